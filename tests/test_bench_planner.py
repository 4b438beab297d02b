"""The planner's benchmark: both sides compute the same, and its counts of operations are those of torch's counter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench_perf import harness as bench_harness
from bench_perf import planner as bench
from bench_perf import planner_flops as flops
from bernini.planner.decode import contexts
from bernini.planner.heads import DecoderConfig
from bernini.planner.model import Planner, PlannerConfig
from bernini.planner.prompt import Visual
from bernini.planner.settings import PlanSettings

DIMS = flops.Dims(32, 4, 4, 2, 48, gen=24, width=40, depth=3)
VIDEO, IMAGE = Visual("video", (2, 2, 3)), Visual("image", (1, 2, 2))
TEXT = 17
SOURCES = {"t2v": (), "v2v": (VIDEO,), "r2v": (IMAGE,) * 3}
SETTINGS = [PlanSettings(5, 2), PlanSettings(20, 3, 1.4, 1.2), PlanSettings(1, 1, 1.3, None), PlanSettings(4, 2, 1.0)]


@pytest.fixture(scope="module")
def planner() -> Planner:
    torch.manual_seed(0)
    config = PlannerConfig(
        bench.qwen(DIMS.hidden, DIMS.layers, DIMS.heads, DIMS.key_heads, DIMS.intermediate, 1000), DIMS.gen,
        DecoderConfig(DIMS.hidden, DIMS.width, DIMS.depth), 64,
    )  # fmt: skip
    made = Planner(config).eval()
    torch.nn.init.normal_(made.mask_tokens)
    return made


def _interval_pairs(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, *rest: Any, **_: Any) -> int:
    pairs = int((ends - starts).sum())
    if rest[0] is not None:
        pairs += int((rest[1] - rest[0]).sum())
    return 2 * pairs * q.shape[1] * (q.shape[2] + v.shape[2])


_interval_pairs._get_raw = True  # type: ignore[attr-defined]


def _dense_pairs(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (width + v[3])


def _products(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of rotary angles, which version 4 of transformers has as products over a single number: none."""
    batch, rows, inner = a
    return 2 * batch * rows * inner * b[2] if inner > 1 else 0


def counted(call: Any) -> int:
    """By torch. Its table lacks the CPU's attention and ours."""
    mapping = {
        torch.ops.aten.bmm: _products,
        torch.ops.bernini.interval_attention: _interval_pairs,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _dense_pairs,
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


def sizes(sources: tuple[Visual, ...]) -> Any:
    return flops.Sizes(TEXT - 1 + sum(s.tokens for s in sources), TEXT - 1, VIDEO.tokens)


def finish(planner: Planner, request: Any, found: tuple[Tensor, ...]) -> None:
    _, target, conditional, unconditional = found
    contexts(planner, request.talks["conditional"], conditional, unconditional, target)


@pytest.mark.parametrize("task", SOURCES)
@torch.no_grad()
def test_both_sides_compute_the_same(planner: Planner, task: str) -> None:
    request = bench.Request.make(planner, TEXT, SOURCES[task], VIDEO)
    for settings in SETTINGS[:3]:
        got, want = bench.ours(planner, request, settings), bench.released(planner, request, settings)
        bench.same(got, want)
    with pytest.raises(RuntimeError, match="differs"):
        bench.same((got[0] * 1.001, *got[1:]), want)


@pytest.mark.parametrize("task", SOURCES)
def test_requests_have_the_tokens_they_say(planner: Planner, task: str) -> None:
    request, want = bench.Request.make(planner, TEXT, SOURCES[task], VIDEO), sizes(SOURCES[task])
    for name, talk in request.talks.items():
        assert talk.layout.tokens == want.of(name) + want.target + 1
        assert int(talk.layout.target_index[0]) == want.of(name)
        assert sum(s.tokens for s in talk.layout.segments if s.kind == "text") == TEXT


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("task", SOURCES)
def test_our_operations_are_counted_exactly(planner: Planner, task: str, settings: PlanSettings) -> None:
    request = bench.Request.make(planner, TEXT, SOURCES[task], VIDEO)
    got = counted(lambda: finish(planner, request, bench.ours(planner, request, settings)))
    assert got == flops.ours(DIMS, sizes(SOURCES[task]), settings)


@pytest.mark.parametrize("settings", SETTINGS[:2])
@pytest.mark.parametrize("task", SOURCES)
def test_the_released_loop_s_operations_are_counted_exactly(
    planner: Planner, task: str, settings: PlanSettings
) -> None:
    """As the benchmark runs it: with our decoder, without the last layer, skipping steps that reveal nothing."""
    request = bench.Request.make(planner, TEXT, SOURCES[task], VIDEO)
    got = counted(lambda: finish(planner, request, bench.released(planner, request, settings)))
    idle = sum(count == 0 for count in flops.revealed(VIDEO.tokens, settings, parity=False))
    assert bool(idle) == (settings.steps > VIDEO.tokens)

    def sampler(d: Any, tokens: int, branches: int, steps: int) -> int:
        return flops.decoder(d, tokens, branches, steps) if tokens else 0

    want = flops.released(DIMS, sizes(SOURCES[task]), settings, layers=3, sampler=sampler, parity=False)
    here = sizes(SOURCES[task])
    forward = [3 * flops.layer(DIMS, rows, rows * rows) for rows in (here.before + 13, here.bare + 13, here.bare + 13)]
    assert got == want - idle * sum(forward)


def test_what_the_benchmark_spares_the_release_is_counted_exactly(planner: Planner) -> None:
    """The last layer, and a network run for each decoder step."""
    request = bench.Request.make(planner, TEXT, (VIDEO,), VIDEO)
    talk, embeds = request.talks["conditional"], request.embeds["conditional"]
    attend = bench.additive_mask(talk.layout, embeds)
    rows = talk.layout.tokens
    got = counted(lambda: planner._run(embeds, talk.positions, attend, planner.text.layers))
    assert got == DIMS.layers * flops.layer(DIMS, rows, rows * rows)

    x, condition = torch.randn(7, DIMS.hidden), torch.randn(21, DIMS.hidden)

    def steps() -> None:
        for time in (1000.0, 500.0):
            planner.vit_decoder.net(x.repeat(3, 1), torch.tensor([time]), condition)

    assert counted(steps) == flops.released_decoder(DIMS, 7, 3, 2)


def test_every_task_has_a_row() -> None:
    rows = flops.rows()
    assert [row.name.rpartition(" ")[2] for row in rows] == ["t2i", "i2i", "t2v", "v2v", "r2v", "rv2v"]
    for row in rows:
        assert row.unit == "TFLOP" and row.bar is None and row.ratio is not None and row.ratio > 2


@torch.no_grad()
def test_every_promise_is_measured(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows, from calls that are made once and take as long as they say."""
    made: list[tuple[Any, Any]] = []

    def rounds(ours: Any, peer: Any, **_: Any) -> Any:
        made.append((ours, peer))
        return [bench_harness.Timing.of([seconds]) for seconds in (1.0, 3.0)]

    class Quiet(bench_harness.Watch):
        unfit = None

    monkeypatch.setattr(bench, "Watch", Quiet)
    monkeypatch.setattr(bench, "rounds", rounds)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setattr(bench, "TARGET", VIDEO)
    rows = bench.plans(planner)
    assert [(row.name, row.bar, row.ratio) for row in rows] == [
        ("plan v2v, 25 steps", 2.3, 3.0), ("plan t2v, 25 steps", 3.5, 3.0), ("plan r2v, 25 steps", 2.6, 3.0)
    ]  # fmt: skip
    assert [row.holds for row in rows] == [True, False, True]
    bench.same(made[0][0](), made[0][1]())
    with monkeypatch.context() as default:
        default.delenv("MALLOC_MMAP_MAX_")
        assert [row.name for row in bench.plans(planner)] == ["plan v2v, 25 steps"]

    lengths = iter(bench.PREFIXES)

    def steps(ours: Any, peer: Any, **_: Any) -> Any:
        length = next(lengths)
        assert ours().shape == (1, VIDEO.tokens, DIMS.hidden) and len(peer()) == length + VIDEO.tokens
        return [bench_harness.Timing.of([seconds]) for seconds in (0.1 + length * 1e-6, 0.2 + length * 1e-4)]

    monkeypatch.setattr(bench, "rounds", steps)
    monkeypatch.setattr(bench, "HIDDEN", DIMS.hidden)
    row = bench.slope(planner)
    assert math.isclose(row.ours, 1.0) and row.peer is not None and math.isclose(row.peer, 100.0) and row.bar is None


def test_plans_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least three rounds where they are judged, then until the budget is spent; one where they are only told."""
    calls: list[str] = []
    monkeypatch.setattr(bench_harness.time, "perf_counter", lambda: 5.0 * len(calls))
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")

    def run(budget: float) -> str:
        calls.clear()
        timings = bench.rounds(lambda: calls.append("a"), lambda: calls.append("b"), budget=budget)
        assert [timing.median for timing in timings] == [5.0, 5.0]
        return "".join(calls)

    assert run(99) == "abbaabbaab"
    assert run(1) == "abbaab"
    monkeypatch.delenv("MALLOC_MMAP_MAX_")
    assert run(99) == "ab"


def test_the_slope_is_that_of_a_line() -> None:
    assert math.isclose(bench.line((100, 500, 1000, 2000), [3.1, 3.5, 4.0, 5.0]), 1.0)
