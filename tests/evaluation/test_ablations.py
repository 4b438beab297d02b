"""Arms differ in what they should and in nothing else; comparisons go on where they stopped and say what was seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sklearn", reason="needs scikit-learn, whose digits are drawn")
pytest.importorskip("tensorboard", reason="needs tensorboard, which training writes to")

from bernini import Bernini, cli
from bernini.checkpoint import WEIGHTS
from bernini.data.encoder import load_encoder
from bernini.data.prepare import prepare
from bernini.data.scene import BACKGROUNDS
from bernini.data.world import Sample, sample
from bernini.data.worlds import WorldData
from bernini.errors import UserError
from bernini.evaluation import ablation_report, ablations
from bernini.evaluation.ablation_report import Claim, Line, figures, markdown, verdict, write
from bernini.evaluation.ablations import Ablations, Options, Outcome, guided, scales, without_planner
from bernini.evaluation.arms import BLOCKS, make_renderer
from bernini.evaluation.leaks import Leak, Watch, leak
from bernini.evaluation.suite import evaluate, request_of
from bernini.kernels import Segment, SegmentLayout
from bernini.renderer.config import RendererConfig
from bernini.renderer.model import Renderer
from bernini.training.trainer import MODEL

from ..training import small

TINY = RendererConfig(num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=24, text_dim=8, freq_dim=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_model(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("features")
    encoder, fingerprints = load_encoder(str(model), parts=["vae", "vit"])
    prepare(WorldData(dict.fromkeys(("t2v", "v2v", "r2v", "rv2v"), 2)), folder, encoder, fingerprints, rows=8)
    return folder


@pytest.fixture(scope="module")
def base(model: Path) -> Bernini:
    return Bernini.from_pretrained(model)


@pytest.fixture
def options(model: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """Three steps of two samples, one sample of one row."""
    monkeypatch.setattr(ablations, "TASKS", {"rope": ("rv2v:object",), "planner": ("v2v:recolor",)})
    few = ("steps=3", "save_every=1", "batch.samples=2", "copies=2", "optimizer.warmup=1")
    return Options(model, "id", features, tmp_path / "out", seeds=1, count=1, steps=1, overrides=few, renderer=TINY)


# --- the arms ---------------------------------------------------------------------------------------------------------


def velocity(renderer: Renderer, first: float = 1.0, second: float = 2.0) -> torch.Tensor:
    """Of a target beside two sources of one shape."""
    draws = torch.Generator().manual_seed(0)
    grid = (2, 2, 2)
    layout = SegmentLayout([Segment("source", grid, first), Segment("source", grid, second), Segment("target", grid)])
    tokens = torch.randn(layout.tokens, TINY.patch_values, generator=draws)
    context = renderer.text_context(torch.randn(3, TINY.text_dim, generator=draws))
    return renderer(tokens, layout, torch.tensor([500.0]), context)


def swapped(renderer: Renderer) -> float:
    """How much it matters which of two sources is the first one."""
    return float((velocity(renderer) - velocity(renderer, 2.0, 1.0)).abs().max().detach())


def test_what_tells_segments_apart() -> None:
    arms = {name: make_renderer(name, TINY, 0) for name in BLOCKS}
    assert swapped(arms["sa3d"]) > 1e-4
    assert swapped(arms["plain"]) == 0 == swapped(arms["embeddings"])
    assert torch.equal(velocity(arms["plain"]), velocity(arms["embeddings"])), "its rows are zero at the beginning"
    assert not torch.allclose(velocity(arms["plain"]), velocity(arms["sa3d"]), atol=1e-4)
    assert torch.equal(velocity(arms["plain"]), velocity(arms["sa3d"], 0.0, 0.0)), "the same model without phases"
    for block in arms["embeddings"].blocks:
        torch.nn.init.normal_(block.segments, generator=torch.Generator().manual_seed(1))
    assert swapped(arms["embeddings"]) > 1e-3


def test_arms_begin_alike() -> None:
    weights = {name: make_renderer(name, TINY, 3).state_dict() for name in BLOCKS}
    extra = weights["embeddings"].keys() - weights["sa3d"].keys()
    assert extra == {f"blocks.{n}.segments" for n in range(2)} and weights["plain"].keys() == weights["sa3d"].keys()
    torch.manual_seed(3)
    for name, value in Renderer(TINY).state_dict().items():
        assert all(torch.equal(value, each[name]) for each in weights.values())
    assert not torch.equal(make_renderer("plain", TINY, 4).proj_out.weight, weights["plain"]["proj_out.weight"])
    with pytest.raises(KeyError):
        make_renderer("none", TINY, 0)


def test_gradients_reach_the_embeddings_that_were_used() -> None:
    renderer = make_renderer("embeddings", TINY, 0)
    velocity(renderer).square().sum().backward()
    for block in renderer.blocks:
        norms = block.segments.grad[0].norm(dim=1)  # type: ignore[union-attr, index]
        assert (norms > 0).tolist() == [True, True, True, False, False, False]
    with pytest.raises(ValueError, match=r"rows for 0 to 5, and none for 1\.5"):
        velocity(renderer, 1.5)


# --- training and sampling --------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stopper(step: int) -> Callable[[str, int, int], None]:
    def stop(name: str, done: int, total: int) -> None:
        if "samples" not in name and done == step:
            raise Stopped

    return stop


def test_the_comparison_of_segments(options: Options) -> None:
    outcomes = list(Ablations(replace(options, only=("rope",))).run())
    assert [(o.arm, o.seed) for o in outcomes] == [("sa3d", 0), ("plain", 0), ("embeddings", 0)]
    assert all(o.trained is not None and o.trained.steps == 3 and len(o.trained.curve) == 3 for o in outcomes)
    assert len({o.trained.curve[1] for o in outcomes if o.trained}) == 3, "they learn different things"
    plain, embedded = (o.trained.curve[0] for o in outcomes[1:] if o.trained)
    assert plain == embedded, "of the same examples and noise, from the same weights"
    written = {arm: load_file(options.output / f"rope/{arm}-0" / MODEL / WEIGHTS) for arm in BLOCKS}
    table = written["embeddings"]["blocks.1.segments"]
    assert table[0, 0].abs().max() > 0, "the target's row has learned"
    frames = [o.results.shown[0].frames for o in outcomes if o.results is not None]
    assert len(frames) == 3 and not np.array_equal(frames[0], frames[1]), "what was trained is what is sampled"
    assert all(len(o.leaks) == 1 for o in outcomes)
    again = list(Ablations(replace(options, only=("rope",)), progress=stopper(-1)).run())
    assert [figures(o) for o in again] == [figures(o) for o in outcomes], "what is there is not made again"


def test_an_arm_that_was_stopped_ends_with_the_same_bits(options: Options) -> None:
    only = replace(options, only=("rope",))
    with pytest.raises(Stopped):
        list(Ablations(only, progress=stopper(2)).run())
    assert not (options.output / "rope/sa3d-0" / MODEL).exists()
    told: list[str] = []
    first = next(Ablations(only, note=told.append).run())
    assert told[0].startswith("sa3d 0: goes on from step 1 of 3") or "step 2 of 3" in told[0]
    whole = next(Ablations(replace(only, output=options.output.with_name("whole"))).run())
    one, other = (
        load_file(o / "rope/sa3d-0" / MODEL / WEIGHTS) for o in (only.output, options.output.with_name("whole"))
    )
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    assert first.trained is not None and whole.trained is not None
    assert first.trained.curve == whole.trained.curve and first.results.rows == whole.results.rows  # type: ignore[union-attr]


def test_an_arm_whose_time_is_up_is_not_measured(options: Options) -> None:
    told: list[str] = []
    short = replace(options, only=("rope",), minutes=1e-9)
    outcomes = list(Ablations(short, note=told.append).run())
    assert len(outcomes) == 3 and all(o.results is None and o.trained and o.trained.steps == 1 for o in outcomes)
    assert "sa3d 0: 1e-09 minutes were up after step 1 of 3, so it is not measured" in told[0]
    assert "- plain, seed 0: stopped after 1 steps" in markdown([ablation_report.line(o, {}) for o in outcomes], "t")
    list(Ablations(short).run())
    assert ablations._so_far(options.output / "rope/sa3d-0").steps == 1, "its time is over for good"


def test_the_comparison_of_planners(options: Options, model: Path) -> None:
    outcomes = list(Ablations(replace(options, only=("planner",))).run())
    assert [(o.arm, o.seed) for o in outcomes] == [("full", 0), ("states", 0), ("none", 0)]
    frames = [o.results.shown[0].frames for o in outcomes if o.results is not None]
    assert len(frames) == 3 and not np.array_equal(frames[1], frames[2])
    start = load_file(model / "bernini/model.safetensors")
    for arm, trains in (("full", True), ("states", True), ("none", False)):
        end = load_file(options.output / f"planner/{arm}-0" / MODEL / "bernini/model.safetensors")
        changed = {name.split(".")[0] for name, value in end.items() if not torch.equal(value, start[name])}
        assert "diff_dec" in changed and (len(changed) > 1) == trains


def test_without_the_interface_nothing_of_the_plan_is_read(base: Bernini) -> None:
    drawn = sample("v2v", 0, "test", edit="recolor")

    def made(model: Bernini, **asked: Any) -> np.ndarray[Any, Any]:
        return ablations.generator(model, steps=2, seed=0, **asked)(drawn)

    asked: dict[str, Any] = {"scales": {"tgt": 0.0}, "decoder_steps": 1}
    blind = [made(base, planning_steps=steps, **asked) for steps in (1, 3)]
    assert np.array_equal(*blind)
    assert not np.array_equal(made(base), blind[0]) and not np.array_equal(made(without_planner(base)), blind[0])


def test_a_planner_is_needed_where_it_is_about_one(options: Options, base: Bernini) -> None:
    job = Ablations(replace(options, only=("planner",)))
    job.__dict__["base"] = without_planner(base)
    with pytest.raises(UserError, match="has no planner, which the comparison 'planner' is about"):
        list(job.run())


def test_what_is_shared_is_not_trained(options: Options) -> None:
    with pytest.raises(UserError, match="ablations share the model's text encoder"):
        list(Ablations(replace(options, overrides=("train_text_encoder=true",), only=("rope",))).run())


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_pairs_of_modes_differ_in_the_projection_alone(base: Bernini) -> None:
    from bernini.renderer.guidance import PLANS

    for pair in ablations.PAIRS:
        without, projected = PLANS[pair.without], PLANS[pair.projected]
        assert without.apg is None and projected.apg is not None
        assert replace(projected, apg=None) == without
    drawn = sample("t2v", 0, "test")
    made = [guided(base, mode, 1, steps=2, seed=0)(drawn) for mode in ("t2v", "t2v_apg")]
    assert not np.array_equal(*made)


def test_scales_of_one_for_all_sources(base: Bernini) -> None:
    for task, images in (("t2v", 0.0), ("v2v", 1.25), ("r2v", 1.5), ("rv2v", 1.5)):
        found = scales(base, request_of(sample(task, 0, "test")), 2)
        assert found == {"txt": 6.0, "tgt": 2.0, "img": 2 * images, "vid": 2.5 if "v2v" in task else 0.0}


# --- leaks ------------------------------------------------------------------------------------------------------------


def referred() -> Sample:
    """With a reference on another background than the video's."""
    for seed in range(50):
        drawn = sample("rv2v", seed, "test")
        assert drawn.scene is not None
        if drawn.sources[1].background != drawn.scene.background:
            return drawn
    raise AssertionError


def test_a_leak_in_numbers() -> None:
    drawn = referred()
    assert drawn.target is not None and drawn.scene is not None
    right = leak(drawn, drawn.target)
    assert right.leak is not None and right.leak < 0.05 and right.overshoot == 0
    painted = drawn.target.copy()
    painted[:, :8] = BACKGROUNDS[drawn.sources[1].background]
    wrong = leak(drawn, painted)
    assert wrong.leak is not None and 0.25 <= wrong.leak < 0.29 and wrong.other == pytest.approx(right.other, abs=0.01)
    bright = leak(drawn, np.full_like(drawn.target, 255))
    assert bright.overshoot == 5
    text = sample("t2v", 0, "test")
    assert text.target is not None and leak(text, text.target) == Leak(None, None, 0.0)
    with pytest.raises(ValueError, match="has no picture to be made"):
        leak(sample("understanding", 0, "test"), drawn.target)


def test_every_result_has_its_leak(tmp_path: Path) -> None:
    def truth(drawn: Sample) -> Any:
        return drawn.target

    watch = Watch(truth, tmp_path / "leaks.jsonl")
    rows = evaluate(
        watch, tasks=["rv2v:object", "v2v:add", "v2v:remove"], splits=["test"], count=1, folder=tmp_path
    ).rows
    found = watch.of(rows)
    assert len(found) == 3 and [each.leak is None for each in found[1:]] == [True, True]
    file = tmp_path / "leaks.jsonl"
    whole = file.read_text()
    file.write_text(whole + '\n{"key": ["rv2')  # killed while it wrote
    watch(referred())
    assert watch.of(rows) == found


# --- the report -------------------------------------------------------------------------------------------------------


def lines(better: tuple[float, ...], worse: tuple[float, ...]) -> list[Line]:
    return [
        Line("rope", arm, seed, True, 5, {"leak": value}, steps=9, minutes=0.5)
        for arm, values in (("sa3d", better), ("plain", worse)) for seed, value in enumerate(values)
    ]  # fmt: skip


def test_claims_are_seen_contradicted_or_undecided() -> None:
    claim = Claim("rope", "sa3d", "plain", "leak")
    assert verdict(claim, lines((1.0, 2.0), (3.0, 3.0))) == ("seen", [-2, -1])
    assert verdict(claim, lines((4, 5), (3, 3))) == ("contradicted", [1, 2])
    assert verdict(claim, lines((1, 5), (3, 3))) == ("undecided", [-2, 2])
    assert verdict(claim, lines((1, 2), ())) is None
    assert verdict(replace(claim, figure="PSNR"), lines((1,), (2,))) is None
    assert verdict(replace(claim, figure="followed"), [
        replace(each, figures={"followed": each.figures["leak"]}) for each in lines((1.0, 2.0), (3.0, 3.0))
    ]) == ("contradicted", [-2, -1])  # fmt: skip
    text = markdown(lines((1.0, 2.0), (3.0, 3.0)), "title")
    assert "| leak, % | 1.5 (1.0, 2.0) | 3.0 |" in text and "| sa3d better than plain | leak | -2, -1 | seen |" in text
    assert "| steps | 9 | 9 |" in text and "| minutes of training | 0.5000 | 0.5000 |" in text


def test_comparisons_made_apart_are_one_report(tmp_path: Path) -> None:
    write(tmp_path, lines((1.0, 2.0), (3.0, 3.0)), "t")
    apg = Line("apg", "t2v x1", 0, True, 3, {"overshoot": 1.0})
    assert len(write(tmp_path, [apg], "t")) == 5
    assert len(write(tmp_path, [replace(apg, figures={"overshoot": 2.0})], "t")) == 5, "the newer one replaces it"
    text, numbers = (tmp_path / "ablations.md").read_text(), json.loads((tmp_path / "ablations.json").read_text())
    assert text.index("figure 15") < text.index("inference only") and "| overshoot, of 255 | 2.0 |" in text
    assert len(numbers["lines"]) == 5 and numbers["claims"][0]["here"] == "seen"
    (tmp_path / "ablations.json").write_text("[]")
    with pytest.raises(UserError, match="holds no results of ablations"):
        write(tmp_path, [apg], "t")


def test_figures_of_an_outcome() -> None:
    def truth(drawn: Sample) -> Any:
        return drawn.target

    results = evaluate(truth, tasks=["v2v:recolor", "rv2v:digit"], splits=["test"], count=1)
    found = figures(Outcome("rope", "sa3d", 0, results, [Leak(0.5, 0.25, 1.0), Leak(None, None, 3.0)]))
    assert found["followed"] == found["followed v2v"] == found["identity rv2v"] == 100 and "identity v2v" not in found
    assert (found["leak"], found["other"], found["overshoot"]) == (50, 25, 2) and found["PSNR"] > 50


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(
    model: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablations, "PAIRS", ablations.PAIRS[:1])
    monkeypatch.setattr(ablations, "TASKS", {"rope": ("rv2v:object",)})
    words = ["eval", "ablations", "--model", str(model), "--data", str(features), "--output", str(tmp_path / "out"),
             "--count", "1", "--steps", "1", "--seeds", "1"]  # fmt: skip
    assert cli.main([*words, "--only", "apg"]) == 0
    shown = capsys.readouterr().out
    assert "| t2v_apg x2 better than t2v x2 | overshoot |" in shown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ablations.json", "ablations.md", "apg"]
    assert cli.main([*words, "--only", "rope", "steps=1", "batch.samples=1"]) == 0
    shown = capsys.readouterr().out
    assert "figure 15" in shown and "inference only" in shown
    assert cli.main([*words, "--only", "rope", "steps=2"]) == 2
    assert "is of a run with another recipe" in capsys.readouterr().err
    assert cli.main(["eval", "ablations", "--model", str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
