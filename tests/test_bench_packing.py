"""The packing benchmark: its workload, its batches, that both sides compute the same, and what its rows say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench_perf import batching, packing, shrunk, workload
from bench_perf import harness as bench_harness
from bench_perf.batching import Dims, Lengths
from bernini.data.mixture import PAPER_TASKS, TABLE_2
from bernini.kernels import Segment, SegmentLayout
from bernini.media_rules import frame_count, frame_indices
from bernini.planner.model import Planner, PlannerConfig
from bernini.planner.vision import VisionRules
from bernini.renderer.model import Renderer

# --- the workload ---------------------------------------------------------------------------------------------------


def test_shares_and_tasks_are_the_papers() -> None:
    assert {name.rstrip("."): share for name, share in TABLE_2["III-1"].items()} == workload.SHARES
    assert {name: PAPER_TASKS[name] for name in workload.SHARES if name != "Und"} == shrunk.TASKS


def test_clips_have_the_tokens_that_both_models_would_see() -> None:
    seen = {segment for record in workload.sample(3000) for segment in record.segments}
    assert {segment.frames for segment in seen} == {1, *range(33, 118, 4)}  # 7.5 seconds end before the 121st frame
    for segment in seen:
        if segment.frames > 1:
            assert frame_count(segment.frames) == segment.frames
            frames = frame_indices(segment.frames, workload.FPS, workload.FPS, segment.frames, "full_vit")
            visual = VisionRules().visual("video", len(frames), segment.height, segment.width)
        else:
            visual = VisionRules().visual("image", 1, segment.height, segment.width)
        assert segment.vit_grid == visual.grid
    # Facts, section E.5: 81 frames of 480 x 848 are 300 tokens of the planner.
    assert workload.Visual("target", 81).vit_tokens == 300


def test_lengths_of_the_mix() -> None:
    """What every figure of the mix rests on, to three digits; a change of these changes all of them."""
    records = workload.sample(4096)
    clips = [record.target.frames / 16 for record in records if record.task == "T2V" and record.target]
    assert mean(clips) == pytest.approx(4.75, abs=0.1)
    assert mean(record.text_tokens for record in records) == pytest.approx(275, abs=5)
    assert mean(record.renderer_tokens for record in records) == pytest.approx(13_800, rel=0.01)
    assert mean(record.planner_tokens for record in records) == pytest.approx(477, rel=0.01)
    long = sum(record.renderer_tokens for record in records if record.renderer_tokens > 10_000)
    assert long / sum(record.renderer_tokens for record in records) == pytest.approx(0.855, abs=0.01)
    for record in records:
        assert record.renderer_tokens == (0 if record.task == "Und" else record.visual_tokens)
        assert record.segments[: len(record.sources)] == record.sources
        assert record.planner_tokens == record.text_tokens + sum(s.vit_tokens for s in record.segments)


# --- batches --------------------------------------------------------------------------------------------------------


def test_packs_are_full_and_in_order() -> None:
    lengths = [batching.full_lengths(record) for record in workload.sample(300)]
    batches = batching.packed(lengths)
    assert [number for batch in batches for number in batch] == list(range(300))
    sums = [[sum(column) for column in zip(*(lengths[n] for n in batch), strict=True)] for batch in batches]
    assert all(renderer <= batching.BUDGET and planner <= batching.BUDGET for renderer, _, planner in sums)
    for (renderer, _, planner), following in zip(sums, batches[1:], strict=False):
        first = lengths[following[0]]
        assert renderer + first.renderer > batching.BUDGET or planner + first.planner > batching.BUDGET


@pytest.mark.parametrize("window", [1, 16, 64])
def test_padded_batches_fit_the_same_budget(window: int) -> None:
    lengths = [batching.full_lengths(record) for record in workload.sample(300)]
    batches = batching.padded(lengths, window)
    assert sorted(number for batch in batches for number in batch) == list(range(300))
    padded = batching.computed(lengths, batches)
    for batch in batches:
        assert sum(padded[number].renderer for number in batch) <= batching.BUDGET
        assert sum(padded[number].planner for number in batch) <= batching.BUDGET
        assert len({padded[number].planner for number in batch}) == 1
        if window > 1:
            assert len({number // window for number in batch}) == 1
    if window == 1:
        assert [number for batch in batches for number in batch] == list(range(300))
    for own, wide in zip(lengths, padded, strict=True):
        assert (
            wide.renderer >= own.renderer and wide.planner >= own.planner and bool(wide.renderer) == bool(own.renderer)
        )


def test_the_prediction() -> None:
    """Of the module's text: how many times more operations padding takes, for the benchmark's samples."""
    lengths = [batching.full_lengths(record) for record in workload.sample(packing.SAMPLES)]
    own = batching.work(lengths).total
    ratios = {
        window: round(batching.work(batching.computed(lengths, batching.padded(lengths, window))).total / own, 2)
        for window in (*packing.WINDOWS, packing.WINDOW)
    }
    assert ratios == {1: 1.88, 16: 1.23, 32: 1.19, 64: 1.14, 256: 1.06}


# --- operations -----------------------------------------------------------------------------------------------------


def _pairs(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Every query with every key; ``[B, H, T, D]`` of torch's attention, ``[T, H, D]`` of ours."""
    if len(q) == 4:
        return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
    return 2 * q[1] * q[0] * k[0] * (q[2] + v[2])


def _counted(call: Any) -> int:
    mapping = {
        torch.ops.bernini.interval_attention: _pairs,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _pairs,
        torch.ops.aten.bmm: lambda a, b, *_, **__: 0,  # rotary angles
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


def test_a_layer_s_operations_are_counted_exactly() -> None:
    """A model with one layer more, by torch's counter."""
    one = Lengths(12, 7, 9)
    small, dims = shrunk.RENDERER, shrunk.DIMS

    def renderer(layers: int) -> int:
        model = Renderer(replace(small, num_layers=layers))
        layout = SegmentLayout([Segment("target", (3, 2, 2))])
        tokens, context = torch.zeros(12, small.patch_values), torch.zeros(7, small.text_dim)
        return _counted(lambda: model(tokens, layout, torch.zeros(1), model.text_context(context)))

    def planner(layers: int) -> int:
        mllm = shrunk.qwen(shrunk.HIDDEN, layers, shrunk.HEADS, shrunk.KEY_HEADS, shrunk.INTERMEDIATE, 100)
        model = Planner(PlannerConfig(mllm, 8, shrunk.DECODER, 1), understanding=False)
        layout = SegmentLayout([Segment("text", (9, 1, 1))])
        return _counted(lambda: model(torch.zeros(9, shrunk.HIDDEN), torch.arange(9).expand(3, -1), layout))

    def forward(lengths: Lengths, dims: Dims) -> float:
        found = batching.work([lengths], dims)
        return found.linear / 3 + found.attention / 3.5

    layer = replace(dims, layers=1, planner_layers=1)
    assert renderer(3) - renderer(2) == pytest.approx(forward(one._replace(planner=0), layer), rel=1e-12)
    assert planner(4) - planner(3) == pytest.approx(forward(Lengths(0, 0, 9), layer), rel=1e-12)
    shares = [work.attention / work.total for work in _mix_work()]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)


def _mix_work() -> Iterator[batching.Work]:
    """Of the mix at full size, and shrunk: attention has the same share."""
    records = workload.sample(60)
    yield batching.work([batching.full_lengths(record) for record in records])
    yield batching.work([item.lengths for item in shrunk.items(records)], shrunk.DIMS)


# --- the two sides --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> shrunk.Models:
    return shrunk.Models.make()


def _trained(models: shrunk.Models, side: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found = packing.train(models, side.contents)
    both = (models.planner, models.renderer)
    return found, {name: p.grad for m in both for name, p in m.named_parameters() if p.grad is not None}


def test_both_sides_compute_the_same(models: shrunk.Models) -> None:
    """Losses of every sample and all gradients, of all tasks, with and without pads."""
    records = [next(r for r in workload.sample(400, seed=1) if r.task == task) for task in workload.SHARES]
    spoken = [r for r in workload.sample(60) if r.task == "Und" and not (r.sources and r.sources[0].frames > 1)][:2]
    records += [*spoken, next(r for r in workload.sample(9) if r.task == "I2I")]
    samples, full = shrunk.items(records), [batching.full_lengths(record) for record in records]
    want, gradients = _trained(models, packing.Arranged.of(samples, full, None))
    assert {name: int((values > 0).sum()) for name, values in want.items()} == {"text": 3, "visual": 7, "dit": 7}
    for window in (1, 16):
        got, theirs = _trained(models, packing.Arranged.of(samples, full, window))
        packing.same(got, want)
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert float((theirs[name] - gradient).norm()) <= 1e-4 * float(gradient.norm().clamp_min(1e-3)), name
    with pytest.raises(RuntimeError, match=r"loss 'dit' of sample \d+ differs"):
        packing.same({**want, "dit": want["dit"] * 1.0001}, want)
    with pytest.raises(RuntimeError, match="losses"):
        packing.same({}, want)


def test_sides_have_the_lengths_that_are_counted(models: shrunk.Models) -> None:
    records = workload.sample(20)
    samples = shrunk.items(records)
    for window in (None, 16):
        side = packing.Arranged.of(samples, [batching.full_lengths(record) for record in records], window)
        for content in side.contents:
            numbers = [item.seed for item in content.items]
            assert content.batch.layout.tokens == sum(samples[n].lengths.planner for n in numbers)
            if window is not None and content.talks is not None:
                assert {side.small[n].planner for n in numbers} == {content.talks.rows.longest}
            if content.latents is not None:
                made = [n for n in numbers if samples[n].lengths.renderer]
                assert {side.small[n].renderer for n in made} == {content.latents.rows.longest}
                assert content.latents.layout.tokens == sum(side.small[n].renderer for n in made)


# --- the rows -------------------------------------------------------------------------------------------------------


def test_every_promise_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole benchmark on a few samples; the judged pair takes as long as it says."""

    class Quiet(bench_harness.Watch):
        unfit = None

    calls: list[Sequence[Any]] = []

    def rounds(*sides: Any, most: int) -> Any:
        calls.append([side.args[1] for side in sides])
        return [bench_harness.Timing.of([seconds]) for seconds in (1.0, 1.2)]

    monkeypatch.setattr(packing, "Watch", Quiet)
    monkeypatch.setattr(packing, "rounds", rounds)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    rows = packing.run(samples=8)
    assert [(row.name.partition(" packed against ")[::2], row.bar) for row in rows] == [
        (("training,", "sorted in windows of 32"), 2.0),
        (("counted at 14B,", "sorted in windows of 32"), None),
        (("counted at 14B,", "unsorted"), None),
        (("training,", "unsorted"), None),
    ]
    assert rows[0].ratio == pytest.approx(1.2) and rows[0].holds is False
    assert rows[0].unit == "us / useful token" and "of the time" in rows[0].note and "expected" in rows[0].note
    assert all(row.unit in bench_harness.COUNTED and row.ratio and row.ratio >= 1 for row in rows[1:3])
    monkeypatch.delenv("MALLOC_MMAP_MAX_")
    assert [row.name for row in packing.run(samples=8)] == [rows[0].name]
    packed, padded = calls[0]
    assert all(content.talks is None for content in packed) and all(content.talks is not None for content in padded)


def test_passes_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(packing.time, "perf_counter", lambda: 5.0 * len(calls))

    def run(most: int, seconds: float) -> str:
        calls.clear()
        monkeypatch.setattr(packing, "SECONDS", seconds)
        timings = packing.rounds(lambda: calls.append("a"), lambda: calls.append("b"), most=most)
        assert [timing.median for timing in timings] == [5.0, 5.0]
        return "".join(calls)

    assert run(4, 99) == "abbaabba"
    assert run(7, 1) == "abbaab"
    assert run(1, 99) == "ab"
