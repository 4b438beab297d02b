"""``bernini estimate``: what the tracker counts against what a hand counts, on models small enough for one."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bernini import cli
from bernini.errors import UserError
from bernini.estimate import rates, sample, search
from bernini.estimate.ledger import CATEGORIES, Part
from bernini.estimate.saved import Keeper
from bernini.estimate.step import Need, Settings, layers, shallow, track
from bernini.planner.heads import DecoderConfig
from bernini.planner.model import PlannerConfig
from bernini.renderer.config import RendererConfig
from bernini.training.dimensions import QWEN_7B, Dimensions
from bernini.training.recipe import Part as Data
from bernini.training.recipe import Recipe

WIDTH, HEADS, FFN, LAYERS = 64, 4, 160, 4
RENDERER = RendererConfig(
    num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, num_layers=LAYERS, ffn_dim=FFN, text_dim=32,
    freq_dim=32,
)  # fmt: skip
TEXT = {
    "vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
MLLM = {
    **QWEN_7B, "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {**QWEN_7B["vision_config"], "depth": 1, "hidden_size": 32, "intermediate_size": 48,
                      "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
}  # fmt: skip
SIZES = Dimensions(
    {"only": RENDERER}, TEXT, PlannerConfig(MLLM, gen_dim=32, decoder=DecoderConfig(channels=64, width=32, depth=2))
)
SIZE = (256, 256)
"""A latent frame has 16 x 16 tokens."""
FRAME = 256
DEPTH = 3


def recipe(stage: str = "renderer", **changes: object) -> Recipe:
    made = Recipe(stage=stage, model="none", output="none", steps=1, copies=2, data=(Data("none"),))  # type: ignore[arg-type]
    return replace(made, **changes)  # type: ignore[arg-type]


def work(frames: int) -> sample.Work:
    return sample.of_tokens(SIZES, "v2v", frames * FRAME, SIZE)


@functools.cache
def tracked(settings: Settings, frames: int = 40, depth: int = DEPTH) -> Need:
    return track(recipe(), shallow(SIZES, {"renderer": depth, "planner": 3}), settings, work(frames))


def part(found: Need, *name: str | int) -> Part:
    return next(part for part in found.parts if part.name == name)


SLACK = 20_000
"""Bytes of what is small beside a sequence."""


def grown(found: Need, kind: str) -> int:
    """From one block to the next in forward."""
    two, one = (part(found, "renderer", number, "forward") for number in (2, 1))
    return two.host - one.host if kind == "host" else two.bytes[kind] - one.bytes[kind]


def numbers(depth: int) -> int:
    """Parameters of the renderer: blocks, embedders and the way out."""
    wide, text, values = WIDTH, 32, RENDERER.patch_values
    matrix = wide * wide + wide
    block = 8 * matrix + 4 * wide + 2 * wide + (wide * FFN + FFN) + (FFN * wide + wide) + 6 * wide
    time = (32 * wide + wide) + matrix + (wide * 6 * wide + 6 * wide)
    texts = (text * wide + wide) + matrix
    return depth * block + time + texts + (values * wide + wide) + (wide * values + values) + 2 * wide


# --- what one process holds -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> Need:
    return tracked(Settings(fsdp="none"))


def test_parameters_gradients_moments_and_average(alone: Need) -> None:
    count = numbers(DEPTH)
    assert alone.parameters == count
    assert alone.tokens == (40 * FRAME, 0)
    before, step = part(alone, "before"), part(alone, "optimizer")
    assert before.bytes["average"] == 4 * count
    # Two moments; and a count of steps, which is four bytes for each of the parameters.
    moments = 8 * count
    assert moments <= before.bytes["optimizer"] <= moments + 4 * 200
    assert step.bytes["gradients"] + step.bytes["working"] >= 4 * count
    text = 300 * 32 + 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32 + 8 * 4) + 32
    assert abs(before.bytes["weights"] - 4 * (count + text)) < 64


def test_an_optimizer_step_takes_one_more_copy(alone: Need) -> None:
    # torch's AdamW over a group of parameters at once keeps the roots of its second moments; vectors are a small group.
    extra = part(alone, "optimizer").bytes["optimizer"] - part(alone, "before").bytes["optimizer"]
    assert 0.9 * 4 * numbers(DEPTH) <= extra <= 4 * numbers(DEPTH)


def test_a_recomputed_block_keeps_its_two_inputs(alone: Need) -> None:
    stream = 2 * 40 * FRAME * WIDTH * 4
    assert stream <= grown(alone, "activations") <= stream * 1.01


def test_what_is_not_recomputed_is_all_kept() -> None:
    kept = grown(tracked(Settings(fsdp="none", recompute=False)), "activations")
    # Residuals 3, normed 3, q k v and results 4, projections 2, cross-attention's q, normed q and results 3; the
    # feed-forward's inside before and after its activation.
    least = 40 * FRAME * (15 * WIDTH + 2 * FFN) * 4
    assert least * 0.8 <= kept <= least * 1.3


# --- what is moved ----------------------------------------------------------------------------------------------------


def test_hidden_moves_what_a_recomputed_block_keeps(alone: Need) -> None:
    away = tracked(Settings(fsdp="none", offload="hidden"))
    assert grown(away, "host") == 2 * 40 * FRAME * WIDTH * 4
    assert grown(away, "activations") < grown(alone, "activations") / 50


def test_attention_kept_is_one_more_tensor() -> None:
    away = tracked(Settings(fsdp="none", offload="hidden+attention"))
    # The log-sum-exp of 4 heads is less than the megabyte below which a tensor stays.
    assert grown(away, "host") == 3 * 40 * FRAME * WIDTH * 4


def test_all_moves_what_is_kept_without_recomputing() -> None:
    kept = grown(tracked(Settings(fsdp="none", recompute=False)), "activations")
    away = tracked(Settings(fsdp="none", recompute=False, offload="all"))
    assert kept * 0.95 <= grown(away, "host") <= kept
    assert max(p.total for p in away.parts) < max(
        p.total for p in tracked(Settings(fsdp="none", recompute=False)).parts
    )


def test_what_was_moved_comes_back_a_block_ahead(alone: Need) -> None:
    away = tracked(Settings(fsdp="none", offload="hidden"))
    stream = 2 * 40 * FRAME * WIDTH * 4
    # While block 2 goes backward its inputs and those of block 1 are there; those of 0 are away. At block 1, with block
    # 0 come back, nothing is away any more. Block 0 has one input, as its stream has no branch yet.
    for number, missing in ((2, 0.5), (1, 0)):
        here, there = (part(found, "renderer", number, "backward").total for found in (alone, away))
        assert missing * stream * 0.9 - SLACK <= here - there <= missing * stream * 1.1 + SLACK


def test_states_on_the_host(alone: Need) -> None:
    away = tracked(Settings(fsdp="none", average=False, optimizer=False))
    start, there = part(alone, "before"), part(away, "before")
    assert there.bytes["average"] == 0
    assert there.bytes["optimizer"] == 0
    moved = start.bytes["average"] + start.bytes["optimizer"]
    assert there.host - start.host == pytest.approx(moved, abs=4 * 200)


def test_policies_that_cannot_be() -> None:
    for policy, recompute in (("hidden", False), ("hidden+attention", False), ("all", True)):
        with pytest.raises(ValueError, match="policy"):
            Keeper(policy, recompute)  # type: ignore[arg-type]


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_hold_their_rows(alone: Need) -> None:
    spread = tracked(Settings(world=4, sequence=2))
    for kind in ("average", "optimizer"):
        own, whole = (part(found, "before").bytes[kind] for found in (spread, alone))
        assert whole / 4 <= own <= whole / 4 * 1.1 + 1000  # what is read outside of a group stays whole
    assert grown(spread, "activations") == pytest.approx(grown(alone, "activations") / 2, rel=0.02)
    assert part(spread, "renderer", 2, "forward").bytes["gathered"] > 0
    assert part(alone, "renderer", 2, "forward").bytes["gathered"] == 0


def test_what_is_gathered_grows_from_blocks_to_whole_models() -> None:
    found = {fsdp: tracked(Settings(world=4, sequence=2, fsdp=fsdp)) for fsdp in ("blocks", "keep", "whole")}  # type: ignore[arg-type]
    last = {fsdp: part(one, "renderer", 2, "forward").bytes["gathered"] for fsdp, one in found.items()}
    assert last["blocks"] < last["keep"]
    assert last["blocks"] < last["whole"]


def test_without_the_packer_a_rank_embeds_everything() -> None:
    on, off = (
        part(tracked(Settings(world=8, sequence=8, fsdp="none", packer=packer), 400), "renderer", "embedding").bytes[
            "activations"
        ]
        for packer in (True, False)
    )
    # The patches, their embeddings, and what these are joined to, all as long as the sequence.
    assert 2.5 * 400 * FRAME * WIDTH * 4 <= off - on <= 3.5 * 400 * FRAME * WIDTH * 4


# --- blocks that are alike --------------------------------------------------------------------------------------------


def test_every_further_block_takes_as_much() -> None:
    found = {depth: tracked(Settings(fsdp="none"), 40, depth) for depth in (3, 4, 5)}
    sizes = [found[depth].most.total for depth in (3, 4, 5)]
    stream = 2 * 40 * FRAME * WIDTH * 4
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.01)
    assert sizes[1] - sizes[0] > stream
    assert found[5].parameters == numbers(5)


def test_both_models_of_stage_three() -> None:
    found = track(recipe("joint"), SIZES, Settings(fsdp="none", offload="hidden"), work(24))
    assert found.tokens[0] == 24 * FRAME and found.tokens[1] > 0
    names = [one.name for one in found.parts]
    # The last layer is for answers alone, of which there are none.
    for stack, blocks in (("planner", 3), ("renderer", LAYERS)):
        for way in ("forward", "backward"):
            numbered = [name[1] for name in names if name[0] == stack and name[-1] == way]
            assert sorted(numbered) == list(range(blocks))  # type: ignore[type-var]
            assert numbered == sorted(numbered, reverse=way == "backward")  # type: ignore[type-var]
    assert found.most in found.parts and found.host > 0


def test_a_planner_that_is_only_read_has_no_backward() -> None:
    both, read = (
        track(replace(recipe("joint"), train_planner=way), SIZES, Settings(fsdp="none"), work(24))
        for way in (True, False)
    )
    assert read.parameters == track(recipe("renderer"), SIZES, Settings(fsdp="none"), work(24)).parameters
    assert read.parameters < both.parameters and read.most.total < both.most.total
    assert {name[-1] for name in (part.name for part in read.parts) if name[0] == "planner"} == {"forward"}


def _bytes(count: int) -> dict[str, int]:
    return {**dict.fromkeys(CATEGORIES, 0), "activations": count}


# --- the longest ------------------------------------------------------------------------------------------------------


def test_the_longest_is_that_of_trying_all() -> None:
    rng = random.Random(0)
    for _ in range(200):
        lines = [(rng.randint(0, 500), rng.randint(0, 40), rng.randint(0, 3)) for _ in range(rng.randint(1, 5))]
        limit, least, most = rng.randint(1, 3000), rng.randint(1, 3), rng.randint(3, 90)
        asked: list[int] = []

        def measure(units: int, lines: list[tuple[int, int, int]] = lines, asked: list[int] = asked) -> list[int]:
            asked.append(units)
            return [start + slope * units + bend * (units // 7) for start, slope, bend in lines]

        fitting = [units for units in range(least, most + 1) if max(measure(units)) <= limit]
        asked.clear()
        found = search.longest(measure, limit, first=rng.randint(1, 100), least=least, most=most)
        assert found == (max(fitting) if fitting else None)
        assert len(asked) == len(set(asked))


def test_few_sizes_are_tried_where_bytes_grow_along_a_line() -> None:
    asked: list[int] = []

    def measure(units: int) -> list[int]:
        asked.append(units)
        return [10**6, 5000 + 1300 * units]

    assert search.longest(measure, 1_200_000, first=20, least=2, most=2048) == (1_200_000 - 5000) // 1300
    assert len(asked) <= 5


def test_the_longest_of_a_model_is_that_of_trying_all() -> None:
    shallow_sizes = shallow(SIZES, {"renderer": 2, "planner": 3})

    @functools.cache
    def parts(frames: int) -> list[int]:
        found = track(recipe(), shallow_sizes, Settings(fsdp="none"), work(frames))
        return [one.total for one in found.parts]

    peaks = {frames: max(parts(frames)) for frames in range(2, 6)}
    limit = (peaks[3] + peaks[4]) // 2
    assert max(frames for frames, peak in peaks.items() if peak <= limit) == 3
    assert search.longest(parts, limit, first=3, least=2, most=5) == 3


def made_up(settings: Settings) -> Need:
    """As a step goes: what is kept of blocks, or away."""
    kept = {"none": 3000 if settings.recompute else 9000, "all": 1500, "hidden": 500, "hidden+attention": 800}
    away = {"none": 0, "all": 8500, "hidden": 3000, "hidden+attention": 4500}
    states = {"average": 1000 * settings.average, "optimizer": 2000 * settings.optimizer}
    host = away[settings.offload] * 10**9 + 3000 - sum(states.values())
    start = Part(("before",), {**_bytes(0), **states}, host)
    peak = Part(("renderer", 0, "backward"), {**_bytes(kept[settings.offload]), **states}, host)
    return Need((start, peak), (2**16, 0), 1000)


def test_search_takes_the_fastest_that_fits() -> None:
    given, settings = rates.rates("h100"), Settings(world=4, sequence=4)
    tried, _ = search.search(SIZES, settings, made_up, given, 1 << 60)
    totals = sorted(way.need.most.total for way in tried)
    limit = (totals[2] + totals[3]) // 2
    tried, best = search.search(SIZES, settings, made_up, given, limit)
    assert best is not None
    assert best.counted and best.need.most.total <= limit
    assert not [way for way in tried if way.fits(limit, None) and way.seconds.total < best.seconds.total * 0.99]
    assert search.search(SIZES, settings, made_up, given, 400)[1] is None
    assert search.search(SIZES, settings, made_up, given, limit, host=0)[1] is None


# --- seconds ----------------------------------------------------------------------------------------------------------


def test_seconds_by_hand() -> None:
    tokens = 1024
    need = Need((Part(("before",), host=4096),), (tokens, 0), 1000)
    given = rates.rates("h100", "flops=1e9,link=1e3,memory=1e6")
    taken = rates.seconds(SIZES, Settings(recompute=True, offload="hidden"), need, given)
    linear = 2 * LAYERS * (6 * WIDTH**2 + 2 * WIDTH * FFN) * tokens
    attended = 4 * LAYERS * WIDTH * tokens**2
    assert taken.compute == pytest.approx((4 * linear + 4.5 * attended) / 1e9)
    assert taken.offload == pytest.approx(2 * 4096 / 1e3)
    assert taken.exchange == 0 and taken.gathering == 0
    kept = rates.seconds(SIZES, Settings(recompute=True, offload="hidden+attention"), need, given)
    assert taken.compute - kept.compute == pytest.approx(attended / 1e9)
    assert rates.seconds(SIZES, Settings(recompute=False), need, given).compute < kept.compute


@pytest.mark.parametrize("change", ["flops", "flops=", "flops=-1", "speed=3", "flops=nan", "link=inf"])
def test_wrong_rates(change: str) -> None:
    with pytest.raises(UserError, match="--rates"):
        rates.rates("h100", change)
    with pytest.raises(UserError, match="no device"):
        rates.rates("abacus")


# --- the command ------------------------------------------------------------------------------------------------------

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs the command, which must end with 2 and one sentence."""

    def run(*argv: str) -> str:
        try:
            code = cli.main(["estimate", *argv])
        except SystemExit as error:
            code = error.code  # type: ignore[assignment]
        out, err = capsys.readouterr()
        assert code == 2
        assert not out and err.startswith("bernini estimate:") and len(err.splitlines()) == 1
        return err

    return run


BIG = "renderer-14b-high"


@pytest.mark.parametrize(("argv", "says"), [
    ([], "name a recipe"),
    ([BIG, "--model", "x"], "not both"),
    (["no-such"], "no recipe no-such"),
    ([BIG, "optimizer.speed=3"], "unknown key"),
    ([BIG, "model=nowhere"], "nowhere"),
    ([BIG, "--ranks", "12", "--share", "8"], "no multiple of the 8"),
    ([BIG, "--ranks", "0"], "--ranks"),
    ([BIG, "--tokens", "9", "--frames", "9"], "--tokens and --frames"),
    ([BIG, "--tokens", "900"], "too few"),
    ([BIG, "--task", "juggle"], "no task 'juggle'"),
    ([BIG, "--task", "t2i", "--tokens", "9000"], "no video"),
    ([BIG, "--task", "t2i", "--longest"], "no video"),
    ([BIG, "--size", "481x848"], "multiples of 16"),
    ([BIG, "recompute=false", "--offload", "hidden"], "--recompute on"),
    ([BIG, "--offload", "all", "--recompute", "on"], "leave out --recompute"),
    ([BIG, "--offload", "some"], "invalid choice"),
    ([BIG, "--memory", "lots"], "lots"),
    ([BIG, "--device", "abacus"], "no device 'abacus'"),
    ([BIG, "--longest", "--search"], "give one of the two"),
    ([BIG, "optimizer.name=muon", "--optimizer", "host"], "adamw"),
    (["toy/vae"], "not estimated"),
    (["--model", "nowhere"], "nowhere"),
    (["--model", "ByteDance/Bernini-R-Diffusers", "--offload", "hidden"], "belongs to a recipe"),
    (["--model", "ByteDance/Bernini-R-Diffusers", "--ranks", "4", "--share", "2"], "leave out --share"),
])  # fmt: skip
def test_bad_input(argv: list[str], says: str, fails: Fails) -> None:
    assert says in fails(*argv)


def test_it_prints_a_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bernini.training.dimensions.dimensions", lambda model: SIZES)
    argv = ["estimate", BIG, "expert=only", "--ranks", "8", "--share", "8", "--size", "256x256", "--tokens", "9000"]
    assert cli.main([*argv, "--offload", "hidden", "--fsdp", "none"]) == 0
    out = capsys.readouterr().out
    assert "8,960 tokens (renderer)" in out and "8 ranks, 8 share the sequence" in out
    for words in ("at most", "of renderer block", "phases", "rates of h100", "not counted"):
        assert words in out
    monkeypatch.setattr("bernini.estimate.report.track", lambda recipe, sizes, settings, work: made_up(settings))
    assert cli.main([*argv, "--search"]) == 0
    out = capsys.readouterr().out
    assert "choose      --ranks 8 --share 8 --fsdp blocks --recompute off --offload none" in out
    assert len([line for line in out.splitlines() if line.startswith("FSDP by blocks")]) == 15


def test_it_prints_what_generating_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
    monkeypatch.setattr("bernini.training.dimensions.dimensions", lambda model: replace(SIZES, planner=None))
    monkeypatch.setattr("bernini.estimate.generate.vae_config", lambda folder: small)
    argv = ["estimate", "--model", "any", "--size", "256x256", "--frames", "17"]
    taken = {}
    for ranks in ("1", "4"):
        assert cli.main([*argv, "--ranks", ranks]) == 0
        out = capsys.readouterr().out
        assert "2,560 tokens at most" in out
        taken[ranks] = float(next(line for line in out.splitlines() if line.startswith("sampling")).split()[1])
        expert = next(line for line in out.splitlines() if line.startswith("expert high"))
        assert float(expert.split()[2]) == pytest.approx(2 * numbers(LAYERS) / 1e9, abs=0.005)
    assert taken["4"] <= taken["1"]


def test_layers_and_shallow() -> None:
    assert layers(SIZES) == {"renderer": LAYERS, "planner": 4}
    assert layers(shallow(SIZES, {"renderer": 2, "planner": 3})) == {"renderer": 2, "planner": 3}
