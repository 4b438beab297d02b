"""Branches of guidance on different ranks: where they are placed, and that the result is that of one process."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bernini.cli import main
from bernini.kernels import Segment, SegmentLayout
from bernini.parallel import branches, simulated
from bernini.parallel.branches import GAIN, MACHINES, Costs, Machine, Model, Piece, Placement, Work, in_turn, place
from bernini.parallel.calls import Mismatch
from bernini.parallel.group import Group, Message, Processes
from bernini.parallel.share import Share
from bernini.parallel.trace import simulate
from bernini.renderer import branches as renderer_branches
from bernini.renderer.branches import Branches
from bernini.renderer.config import RendererConfig
from bernini.renderer.guidance import PLANS
from bernini.renderer.model import Renderer
from bernini.renderer.sampler import Experts, Guidance, sample
from bernini.renderer.schedule import make_solver

WORKER = Path(__file__).with_name("branches_worker.py")

# --- where they are placed --------------------------------------------------------------------------------------------

MODEL = Model(layers=3, width=96, hidden=256, heads=12, itemsize=4)


def machine(dice: random.Random) -> Machine:
    """From one that is slow in computing to one that is slow in talking."""
    return Machine(1e9, 10.0 ** dice.uniform(5, 9), 10.0 ** dice.uniform(-6, -2), 10.0 ** dice.uniform(-6, -2))


def costs(dice: random.Random, most: int, ranks: int) -> Costs:
    works = tuple(Work(t := dice.randint(1, 3000), dice.randint(1, 600), 256 * t) for _ in range(dice.randint(1, most)))
    cap = dice.choice([inf, inf, 1000])
    return Costs(works, ranks, MODEL, machine(dice), dice.choice([0, 500, 4000]), cap)


def best_of_all(given: Costs) -> float:
    """Seconds of the best of all placements: any groups of neighbours in any order, nested or not."""
    neighbours = [range(a, b) for a in range(given.ranks) for b in range(a + 1, given.ranks + 1)]

    def below(todo: tuple[int, ...], free: tuple[float, ...], found: float) -> float:
        if not todo:
            return min(found, max(free))
        for branch, ranks in product(todo, neighbours):
            end = max(free[ranks.start : ranks.stop]) + given.seconds(branch, len(ranks))
            if max(end, *free) < found:
                after = tuple(end if rank in ranks else at for rank, at in enumerate(free))
                found = below(tuple(b for b in todo if b != branch), after, found)
        return found

    return below(tuple(range(len(given.works))), (0.0,) * given.ranks, inf) + given.machine.latency


def test_every_branch_has_one_place_that_it_may_have() -> None:
    dice = random.Random(0)
    apart = 0
    for _ in range(1000):
        given = costs(dice, 5, dice.randint(1, 9))
        found = place(given)
        assert sorted(piece.branch for piece in found.pieces) == list(range(len(given.works)))
        assert found == place(given) and found.seconds <= found.together == given.together
        if not found.apart:
            assert all(len(piece.ranks) == given.ranks for piece in found.pieces)
            continue
        apart += 1
        assert found.seconds == given.step(found.pieces) < (1 - GAIN) * given.together
        for branch, ranks in found.pieces:
            assert 0 <= ranks.start < ranks.stop <= given.ranks and given.seconds(branch, len(ranks)) < inf
            assert given.works[branch].tokens >= given.least or len(ranks) == 1
            assert len(ranks) == given.ranks or given.works[branch].tokens / len(ranks) <= given.cap
    assert 300 < apart < 1000


def test_none_is_much_better_than_the_nested_ones() -> None:
    """The search is exact among nestings. All placements of up to four branches on up to four ranks beside it."""
    dice = random.Random(1)
    gaps = []
    for _ in range(150):
        given = costs(dice, 4, dice.randint(2, 4))
        best, found = best_of_all(given), place(given).seconds
        gaps.append(found / min(best, given.together))
    assert min(gaps) > 1 - 1e-9 and max(gaps) < 1 / (1 - GAIN)
    assert sum(gap < 1 + 1e-9 for gap in gaps) > 140


def test_never_behind_placing_in_turn_or_together() -> None:
    dice = random.Random(2)
    for _ in range(300):
        given = costs(dice, 5, dice.randint(2, 8))
        turn = given.step(in_turn(len(given.works), given.ranks))
        assert (1 - GAIN) * place(given).seconds <= min(turn, given.together) * (1 + 1e-9)


def test_many_ranks_are_placed_in_blocks() -> None:
    works = tuple(Work(tokens, 512, tokens * 128) for tokens in (33390, 66780, 69960, 69960, 69960))
    for ranks, fewest in ((16, 1), (24, 2), (64, 4), (17, 17)):
        slow = MACHINES["cuda"]._replace(link=1e9, latency=1e-3)
        found = place(Costs(works, ranks, Model(40, 5120, 13824, 40, 2), slow, 4096))
        assert all(len(part) % fewest == 0 or len(part) == 1 for _, part in found.pieces)
        assert found.apart and found.seconds < found.together


def test_two_branches_without_a_link_to_wait_for() -> None:
    """Worked out by hand."""
    slow = Machine(flops=1e9, link=inf, latency=0.0, layer=0.0)
    works = (Work(1000, 10, 0), Work(1000, 10, 0), Work(2000, 10, 0))
    given = Costs(works, 2, Model(1, 10, 20, 2, 4), slow, least=10_000)
    per_token = 12 * 100 + 4 * 10 * (20 + 10)
    small, large = (1e-9 * (n * per_token + 4 * n * n * 10) for n in (1000, 2000))
    found = place(given)
    assert found.together == pytest.approx(2 * small + large) and found.seconds == pytest.approx(large)
    assert {len(piece.ranks) for piece in found.pieces} == {1} and found.groups == []
    assert found.describe().startswith("branches of guidance: 1 on rank ")


class Counted:
    """A group that adds up what it sends."""

    def __init__(self, group: Group) -> None:
        self.group, self.rank, self.size, self.calls, self.bytes = group, group.rank, group.size, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self._count(sends)
        self.group.exchange(sends, receives)

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        self._count(sends)
        return self.group.start(sends, receives)

    def _count(self, sends: Sequence[Message]) -> None:
        self.calls += 1
        self.bytes += sum(tensor.nbytes for _, tensor in sends)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bytes_are_those_that_ranks_send(ranks: int) -> None:
    """Of a model that runs, with heads that do and do not divide among the ranks."""
    model, layout = expert(0), SegmentLayout([Segment("target", (ranks, 3, 4))])
    texts = {"positive": torch.randn(6, 24), "negative": torch.randn(6, 24)}
    noise = torch.randn(layout.tokens, 64)

    def work(group: Group) -> tuple[int, int]:
        counted: Any = Counted(group)
        parts = Branches(PLANS["t2v"], layout, 0, [], noise, texts, Share(counted, least=0), CONFIG)
        with torch.no_grad():
            parts.velocities(model, 500.0, noise)
        return counted.calls, counted.bytes

    shape = Model(CONFIG.num_layers, CONFIG.width, CONFIG.ffn_dim, CONFIG.num_attention_heads, 4)
    works = (Work(layout.tokens, 6, noise.nbytes),) * 2
    per_byte = Costs(works, ranks, shape, Machine(inf, 1.0, 0.0, 0.0))
    found = simulated.simulate(ranks, work)
    assert {sent for _, sent in found} == {per_byte.step([Piece(b, range(ranks)) for b in (0, 1)])}
    assert {calls for calls, _ in found} == {2 * 2 * CONFIG.num_layers + 1}  # one for the predictions of both


def test_the_table_of_all_modes() -> None:
    """``docs/branches.md`` says what the model says, and names a tie and a loss."""
    file = Path(__file__).parents[2] / "docs" / "branches_table.py"
    spec = importlib.util.spec_from_file_location("branches_table", file)
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    text = table.PAGE.read_text("utf-8")
    assert text.partition(table.MARK)[2] == "".join(table.lines())
    cells = {
        (link, grid, mode, ranks): table.cell(table.works(mode, table.GRIDS[grid]), ranks, table.LINKS[link])
        for link, grid, mode, ranks in product(table.LINKS, table.GRIDS, PLANS, table.RANKS)
    }
    assert all(together >= 1 and turn >= 1 - GAIN for together, turn in cells.values())
    fast = "200 GB/s", "480x848, 81 frames"
    assert cells[*fast, "r2v_apg", 3][0] == 1 > cells[*fast, "r2v_apg", 3][1]  # a loss against branches in turn
    assert cells["200 GB/s", "512x512, image", "v2v", 2] == pytest.approx((2, 1), rel=1e-3)  # a tie with them
    assert sum(together == 1 for together, _ in cells.values()) > 50  # ties with all together


# --- what they compute ------------------------------------------------------------------------------------------------

CONFIG = RendererConfig(num_attention_heads=4, attention_head_dim=8, num_layers=2, ffn_dim=32, text_dim=24)
SOURCES = [Segment("source", (2, 2, 3), 1.0), Segment("source", (1, 2, 2), 2.0)]
TARGET = Segment("target", (3, 2, 3))


@cache
def expert(seed: int) -> Renderer:
    torch.manual_seed(seed)
    return Renderer(CONFIG).eval()


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Of a video and a picture."""
    draws = torch.Generator().manual_seed(5)
    rand = lambda *shape: torch.randn(shape, generator=draws)  # noqa: E731
    texts = {name: rand(length, 24).to(dtype) for name, length in (("positive", 6), ("negative", 4), ("planned", 9))}
    return {
        "layout": SegmentLayout([*SOURCES, TARGET]), "videos": 1, "texts": texts,
        "source_tokens": [rand(s.tokens, 64) for s in SOURCES], "noise_tokens": rand(TARGET.tokens, 64),
    }  # fmt: skip


def random_placement(seed: int, given: Costs, seen: list[Placement] | None = None) -> Placement:
    """Any groups of neighbours in any order. Branches that stay whole are on one rank."""
    dice = random.Random(seed)
    count, ranks = len(given.works), given.ranks
    pieces = []
    for branch in dice.sample(range(count), count):
        size = dice.randint(1, ranks) if given.cuts(branch) else 1
        first = dice.randint(0, ranks - size)
        pieces.append(Piece(branch, range(first, first + size)))
    made = Placement(tuple(pieces), ranks)
    if seen is not None:
        seen.append(made)
    return made


def sampled(mode: str, share: Share, seen: list[Placement] | None = None) -> Tensor:
    guidance = Guidance({"vid": 1.25, "img": 2.0, "txt": 3.0, "tgt": 0.5}, 0.8, momentum=-0.3)
    solver = make_solver("unipc", "release", 3, 5.0)
    return sample(
        Experts(expert(1), expert(2)), plan=PLANS[mode], guidance=guidance, solver=solver, share=share, **inputs(),
        placed=None if seen is None else seen.append,
    )  # fmt: skip


@pytest.mark.parametrize("mode", PLANS)
def test_whole_branches_have_the_bits_of_one_process(mode: str) -> None:
    """Placed by the model; two experts, projection, momentum, a solver with a memory."""
    wanted = sampled(mode, Share())  # also makes the experts, whose random numbers threads would share
    for ranks in (1, 2, 3, 5):
        seen: list[Placement] = []
        for found in simulate(ranks, lambda group: sampled(mode, Share(group, branches=True), seen)):  # noqa: B023
            assert torch.equal(found, wanted)
        assert len(seen) == ranks and {one.pieces for one in seen} == {seen[0].pieces}
        assert seen[0].apart == (ranks > 1)


def first_step(mode: str, model: Renderer, group: Group | None) -> list[Tensor]:
    """What the branches say, in float64."""
    given = inputs(torch.float64)
    given["latent"] = given.pop("noise_tokens").double()
    given["source_tokens"] = [tokens.double() for tokens in given["source_tokens"]]
    share = Share() if group is None else Share(group, least=20, branches=True)
    with torch.no_grad():
        return Branches(PLANS[mode], share=share, config=CONFIG, **given).velocities(model, 700.0, given["latent"])


@pytest.mark.parametrize("mode", PLANS)
def test_cut_branches_are_those_of_one_process(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anywhere: some cut for some of the ranks, the target alone (18 tokens) whole, whatever the order."""
    model = copy.deepcopy(expert(3)).double()
    wanted = first_step(mode, model, None)
    seen: list[Placement] = []
    for ranks, seed in product((2, 3, 4, 5), range(2)):
        monkeypatch.setattr(renderer_branches, "place", partial(random_placement, 10 * seed + ranks, seen=seen))
        for found in simulate(ranks, lambda group: first_step(mode, model, group)):
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert any(one.groups for one in seen) == any(branch.sources != "none" for branch in PLANS[mode].branches)


def test_runs_that_end_with_the_same_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole runs in float32 with cut branches: ranks have the same bits, and those of one process but for rounding."""
    wanted = sampled("rv2v", Share())
    for seed in range(3):
        monkeypatch.setattr(renderer_branches, "place", partial(random_placement, seed))
        found = simulate(4, lambda group: sampled("rv2v", Share(group, least=20, branches=True)))
        assert all(torch.equal(one, found[0]) for one in found)
        assert float((found[0] - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def swapped(group: Group, cuts: Any, parts: Any, like: Tensor) -> list[Tensor]:
    """Two branches taken for each other."""
    first, second, *others = branches.spread(group, cuts, parts, like)
    return [second, first, *others]


def stale(group: Group, cuts: Any, parts: Any, like: Tensor) -> list[Tensor]:
    """Without the exchange."""
    return [x.new_zeros(TARGET.tokens, 64) if x is not None else like.new_zeros(TARGET.tokens, 64) for x in parts]


@pytest.mark.parametrize("broken", [swapped, stale])
def test_what_is_spread_wrongly_is_seen(broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = sampled("rv2v", Share())
    monkeypatch.setattr(renderer_branches, "spread", broken)
    found = simulate(3, lambda group: sampled("rv2v", Share(group, branches=True)))
    assert not any(torch.equal(one, wanted) for one in found)


def test_ranks_that_do_not_agree_are_told_so() -> None:
    with pytest.raises(Mismatch, match=r"rank 0 is in call 1, group.tell by branches._placed, while rank 1"):
        simulate(2, lambda group: sampled("v2v", Share(group, branches=group.rank == 0)))
    with pytest.raises(ValueError, match="branches: ranks have different ones"):
        simulate(2, lambda group: first_step(("t2v", "v2v")[group.rank], expert(3), group))


def test_calls_of_some_of_the_ranks_are_compared() -> None:
    """In a group that was made from others, each in its own; and a message that nobody takes is found."""

    def work(group: Group, kinds: str) -> None:
        ranges = [range(2), range(1, 3)]
        made = group.parts(ranges)
        assert all(one is other for one, other in zip(made, group.parts(ranges), strict=True))
        for ranks, part in zip(ranges, made, strict=True):
            assert (part is None) == (group.rank not in ranks)
            if part is not None:
                assert part.tell(group.rank) == list(ranks)
                if kinds[group.rank] == "g":
                    part.gather(torch.zeros(1), [1, 1])

    simulate(3, partial(work, kinds="ggg"))
    simulate(3, partial(work, kinds="..."))
    with pytest.raises(Mismatch, match=r"while rank 2 has ended after 1 call"):
        simulate(3, partial(work, kinds="gg."))

    def lost(group: Group) -> None:
        (part,) = group.parts([range(1, 3)])
        if part is not None and part.rank == 0:
            part.exchange([Message(1, torch.zeros(1))], [])

    with pytest.raises(RuntimeError, match="rank 1 sent a message that rank 2 did not take"):
        simulated.simulate(3, lost)


def test_torch_makes_each_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    made: list[list[int]] = []
    new_group = dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda ranks, **options: made.append(ranks) or new_group(ranks, **options))
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        world = Processes()
        first, second = world.parts([range(2), range(1, 4)]), world.parts([range(1, 4), range(2, 4)])
        assert made == [[0, 1], [1, 2, 3], [2, 3]]
        assert first[0] is None and first[1] is not None and (first[1].rank, first[1].size) == (1, 3)
        assert second[0] is first[1] and second[1] is not None and second[1].rank == 0
        with pytest.raises(ValueError, match="parts: 3 of 4 processes cannot make groups"):
            first[1].parts([range(2)])
    finally:
        dist.destroy_process_group()


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """The folder with what ``generate`` made, and what it said, by run."""
    folder = tmp_path_factory.mktemp("branches")
    done = subprocess.run(
        [sys.executable, "-P", WORKER, folder], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return folder, said


def frames(folder: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in sorted(folder.glob("*.png"))]).int()


def test_processes_make_the_video_of_one(made: tuple[Path, dict[str, list[str]]]) -> None:
    folder, said = made
    wanted = frames(folder / "one")
    for name in ("two", "two off"):  # whole branches
        assert torch.equal(frames(folder / name), wanted)
    # Three that cut some of them; rounding to bytes may tip.
    assert (frames(folder / "three") - wanted).abs().max() <= 1
    placed = {name: [line for line in lines if "branches of guidance" in line] for name, lines in said.items()}
    assert [len(placed[name]) for name in ("two off", "two", "three")] == [0, 1, 1]
    assert " on ranks 0-1" in placed["three"][0] or " on ranks 1-2" in placed["three"][0]


def test_an_option_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--prompt", "a", "--output", "a.mp4", "--branches", "on"])
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(said) == 1
    assert "--branches: invalid choice: 'on' (choose from" in said[0]
