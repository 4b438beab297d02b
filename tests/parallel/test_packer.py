"""The packer: every rank's rows against the concatenation, their gradients, and what no rank may allocate."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench_perf import packer as bench
from bench_perf.packer import Allocations, Latents, Talk
from bernini.kernels import Segment, SegmentLayout
from bernini.kernels.segments import KINDS, Kind
from bernini.parallel.packer import Box, Modality, Packer, boxes, from_boxes
from bernini.parallel.plan import SPPlan
from bernini.renderer.latents import patchify
from bernini.training.flow import mix

WIDTH, VOCABULARY = 5, 7
LEAST = 12  # tokens: more than any other dimension of the cases, so that one as long as the sequence is known by that


@st.composite
def layouts(draw: st.DrawFn) -> SegmentLayout:
    """Samples of some runs of text, sources and targets, in any order."""
    size = st.integers(1, 4)
    segments = []
    for sample in range(draw(st.integers(1, 3))):
        for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4)):
            grid = (draw(st.integers(1, 9)), 1, 1) if kind == "text" else (draw(size), draw(size), draw(size))
            segments.append(Segment(kind, grid, sample=sample))
    return SegmentLayout(segments)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cut(layout: SegmentLayout, ranks: int) -> list[Packer]:
    plan = SPPlan.make(layout, ranks, ranks, ranks)
    return [Packer.of(plan.local(rank)) for rank in range(ranks)]


def segments_of(layout: SegmentLayout, kind: Kind) -> list[Segment]:
    return [layout.segments[number] for number in layout.numbers(kind)]


@dataclass
class Inputs:
    """What a model would pack: embedded text, scaled features of the sources, targets that are partly masked.

    No product of matrices: its bits depend on how many rows it has.

    ``asked`` logs which rows of which segment were made.
    """

    layout: SegmentLayout
    table: Tensor = field(default_factory=lambda: rand(VOCABULARY, WIDTH, seed=1).requires_grad_())
    weight: Tensor = field(default_factory=lambda: rand(WIDTH, seed=2).requires_grad_())
    mask: Tensor = field(default_factory=lambda: rand(WIDTH, seed=3).requires_grad_())
    asked: list[tuple[Kind, int, int, int]] = field(default_factory=list)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.table, self.weight, self.mask

    def make(self, kind: Kind, number: int, start: int, stop: int) -> Tensor:
        """Rows of the kind's segment ``number``; a row's value depends on nothing else."""
        self.asked.append((kind, number, start, stop))
        tokens, seed = segments_of(self.layout, kind)[number].tokens, 10 * number
        if kind == "text":
            return F.embedding(torch.arange(start, stop) * 3 % VOCABULARY, self.table)
        if kind == "source":
            return rand(tokens, WIDTH, seed=seed)[start:stop] * self.weight
        masked = (torch.arange(start, stop) * 7 % 3 == 0)[:, None]
        return torch.where(masked, self.mask, rand(tokens, WIDTH, seed=seed)[start:stop])

    def producers(self, kind: Kind) -> list[Any]:
        return [partial(self.make, kind, number) for number in range(len(self.layout.numbers(kind)))]

    def whole(self, kind: Kind) -> list[Tensor]:
        return [
            self.make(kind, number, 0, segment.tokens) for number, segment in enumerate(segments_of(self.layout, kind))
        ]

    def concatenated(self) -> Tensor:
        """As one would without the packer."""
        pieces = {kind: iter(self.whole(kind)) for kind in KINDS}
        return torch.cat([next(pieces[segment.kind]) for segment in self.layout.segments])

    def modality(self, kind: Kind, form: str) -> Modality:
        """In each form that the packer takes."""
        if form == "producers":
            return self.producers(kind)
        pieces = self.whole(kind)
        if form == "tensors":
            return pieces
        joined = torch.cat([torch.zeros(0, WIDTH, dtype=torch.float64), *pieces])
        return joined if form == "one tensor" else lambda start, stop: joined[start:stop]


FORMS = ("producers", "tensors", "one tensor", "one producer")


def packed(inputs: Inputs, packer: Packer, form: str = "producers", **how: Any) -> Tensor:
    modalities = {kind: inputs.modality(kind, form) for kind in KINDS}
    return packer.pack(modalities, WIDTH, dtype=torch.float64, device="cpu", **how)


# --- the same rows, the same gradients --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(layouts(), st.integers(1, 8), st.sampled_from(FORMS))
def test_the_ranks_rows_are_the_concatenation(layout: SegmentLayout, ranks: int, form: str) -> None:
    inputs = Inputs(layout)
    want = inputs.concatenated()
    parts = [packed(inputs, packer, form) for packer in cut(layout, ranks)]
    assert all(part.is_contiguous() for part in parts)
    assert torch.equal(torch.cat(parts), want)
    assert torch.equal(packed(inputs, Packer(layout), form), want)  # one process


@settings(max_examples=40)
@given(layouts(), st.integers(1, 8), st.sampled_from(FORMS))
def test_gradients_are_those_of_the_concatenation(layout: SegmentLayout, ranks: int, form: str) -> None:
    inputs = Inputs(layout)
    upstream = rand(layout.tokens, WIDTH, seed=9)
    want = torch.autograd.grad(inputs.concatenated(), inputs.leaves, upstream, allow_unused=True)
    total: list[Tensor | None] = [None] * len(want)
    for packer in cut(layout, ranks):
        out = packed(inputs, packer, form)
        if out.requires_grad:
            found = torch.autograd.grad(out, inputs.leaves, upstream[slice(*packer.part)], allow_unused=True)
            total = [a if b is None else b if a is None else a + b for a, b in zip(total, found, strict=True)]
    for got, expected in zip(total, want, strict=True):
        assert (expected is None) == (got is None) or (got is not None and not got.any())
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(layouts(), st.integers(1, 8))
def test_a_rank_makes_its_own_rows_and_no_others(layout: SegmentLayout, ranks: int) -> None:
    made: list[tuple[Kind, int, int]] = []
    for packer in cut(layout, ranks):
        inputs = Inputs(layout)
        packed(inputs, packer)
        here = [(kind, number, row) for kind, number, start, stop in inputs.asked for row in range(start, stop)]
        assert len(here) == packer.tokens
        assert all(start < stop for _, _, start, stop in inputs.asked)  # segments that lie elsewhere are not asked
        made += here
    assert len(made) == len(set(made)) == layout.tokens


@settings(max_examples=40)
@given(layouts(), st.integers(1, 8))
def test_one_kind_alone(layout: SegmentLayout, ranks: int) -> None:
    for kind in KINDS:
        inputs = Inputs(layout)
        parts = []
        for packer in cut(layout, ranks):
            part = packer.take(kind, inputs.producers(kind), WIDTH, dtype=torch.float64, device="cpu")
            start, stop = packer.rows(kind)
            assert len(part) == stop - start == len(packer.places(kind))
            whole = layout.indices(layout.numbers(kind))[start:stop]
            assert (packer.places(kind) + packer.part[0] == whole).all()
            parts.append(part)
        assert torch.equal(torch.cat(parts), torch.cat([parts[0][:0], *inputs.whole(kind)]))


# --- what is allocated ------------------------------------------------------------------------------------------------


def trace(call: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Allocations:
    with Allocations() as seen:
        out = call()
        if out.requires_grad:
            torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
    return seen


class Lean(Inputs):
    """Features that are there; the other rows are made without looking at the whole segment, as models make them."""

    def __init__(self, layout: SegmentLayout) -> None:
        super().__init__(layout)
        self.features = {kind: [rand(s.tokens, WIDTH) for s in segments_of(layout, kind)] for kind in KINDS}
        self.ids = torch.arange(layout.tokens) % VOCABULARY

    def make(self, kind: Kind, number: int, start: int, stop: int) -> Tensor:
        if kind == "text":
            return F.embedding(self.ids[start:stop], self.table)
        rows = self.features[kind][number][start:stop] * self.weight
        return rows if kind == "source" else torch.where(rows > 0, self.mask, rows)


@settings(max_examples=40)
@given(layouts().filter(lambda layout: layout.tokens >= LEAST), st.integers(2, 8))
def test_no_rank_allocates_more_rows_than_it_has(layout: SegmentLayout, ranks: int) -> None:
    for packer in cut(layout, ranks):
        inputs = Lean(layout)
        seen = trace(lambda: packed(inputs, packer), inputs.leaves)  # noqa: B023
        assert seen.shapes
        assert not seen.as_long_as(max(packer.tokens + 1, LEAST))
        with torch.no_grad():
            assert not trace(lambda: packed(inputs, packer), ()).as_long_as(max(packer.tokens + 1, LEAST))  # noqa: B023


def concatenate_first(inputs: Inputs, packer: Packer) -> Tensor:
    return inputs.concatenated()[slice(*packer.part)].clone()


def embed_whole_modalities(inputs: Inputs, packer: Packer) -> Tensor:
    return packed(inputs, packer, "one tensor")


def whole_buffer(inputs: Inputs, packer: Packer) -> Tensor:
    return packed(inputs, Packer(inputs.layout))[slice(*packer.part)].clone()


@pytest.mark.parametrize("broken", [concatenate_first, embed_whole_modalities, whole_buffer])
def test_the_trace_catches_who_makes_it_all(broken: Callable[[Inputs, Packer], Tensor]) -> None:
    layout = SegmentLayout([Segment("text", (3, 1, 1)), Segment("source", (5, 2, 2)), Segment("target", (7, 2, 2))])
    for packer in cut(layout, 4):
        inputs = Lean(layout)
        assert not trace(lambda: packed(inputs, packer), inputs.leaves).as_long_as(packer.tokens + 1)  # noqa: B023
        assert trace(lambda: broken(inputs, packer), inputs.leaves).as_long_as(packer.tokens + 1)  # noqa: B023
    if broken is not embed_whole_modalities:
        assert trace(lambda: broken(inputs, packer), inputs.leaves).as_long_as(layout.tokens)


def test_the_trace_counts_bytes_and_lifetimes() -> None:
    before = torch.zeros(1000)
    with Allocations() as seen:
        a = before + 1  # 4000
        view = a[:10]  # nothing
        view.add_(1)
        b = a.double()  # 8000
        del b
        c = before[:100].clone()  # 400
        del a, c
        assert seen.live == 4000  # the view holds it
        del view
        assert seen.live == 0
        torch.empty(500, device="meta")
    assert seen.peak == 12000 and seen.live == 0
    assert [shape for _, shape in seen.shapes] == [(1000,), (1000,), (100,), (500,)]
    assert [shape for _, shape in seen.as_long_as(1000, [torch.empty(500)])] == [(1000,), (1000,)]
    assert seen.as_long_as(500, [torch.empty(500)]) == seen.as_long_as(1000)


def test_the_papers_size() -> None:
    case = Latents.make(bench.PAPER, 5120, 8, 5, torch.bfloat16, "meta")
    assert case.layout.tokens == 440_430
    *rows, whole = bench.counted("patches", case, {"concatenated": case.concatenated, "one product": case.one_product})
    assert whole.ours == 0 and whole.holds is True
    own = case.packer.tokens * 5120 * 2 / 1e9
    for row, peer in zip(rows, (2.1, 1.1), strict=True):  # full sequences of the peer, besides its own rows
        assert 2 * own < row.ours < 2.03 * own  # the rows and their gradient
        assert row.peer is not None and row.peer > 8 * peer * 0.95 * own
    trace_of_peer = bench.trace(case.concatenated, case.leaves)
    assert trace_of_peer.as_long_as(case.layout.tokens, case.leaves)


# --- the call sites ---------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.tuples(*[st.integers(1, 5)] * 3), st.data())
def test_boxes_are_the_rows_in_order(grid: tuple[int, int, int], data: st.DataObject) -> None:
    tokens = torch.arange(grid[0] * grid[1] * grid[2])
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    found = boxes(grid, start, stop)
    assert len(found) <= 5
    covered = [box.crop(tokens.view(1, *grid)).flatten() for box in found]
    assert torch.equal(torch.cat([tokens[:0], *covered]), tokens[start:stop])
    assert all(len(rows) for rows in covered)


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 1, 3)])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_patches_of_latents(patch_size: tuple[int, int, int], ranks: int) -> None:
    """The renderer's batch: clean sources, a noisy target, and the velocity that is to be answered."""
    grids = [(3, 2, 5), (1, 4, 3), (4, 2, 5)]
    sizes = [(6, *(n * p for n, p in zip(grid, patch_size, strict=True))) for grid in grids]
    *sources, target = (rand(*size, seed=n, dtype=torch.float32) for n, size in enumerate(sizes))
    noise, sigma = rand(*target.shape, seed=9, dtype=torch.float32), 0.37
    segments = [Segment("source", grid) for grid in grids[:-1]]
    layout = SegmentLayout([*segments, Segment("target", grids[-1])])
    want = torch.cat([patchify(x, patch_size) for x in (*sources, mix(target, noise, sigma))])
    velocity = patchify(noise - target, patch_size)

    def clean(latent: Tensor, box: Box) -> Tensor:
        return patchify(box.crop(latent, patch_size), patch_size)

    def noisy(box: Box) -> Tensor:
        clean, random = (box.crop(latent, patch_size) for latent in (target, noise))
        return patchify(mix(clean, random, sigma), patch_size)

    def answer(box: Box) -> Tensor:
        return patchify(box.crop(noise, patch_size) - box.crop(target, patch_size), patch_size)

    tokens, answers = [], []
    for packer in cut(layout, ranks):
        with Allocations() as seen:
            made = [from_boxes(s.grid, partial(clean, x)) for s, x in zip(layout.segments, sources, strict=False)]
            modalities: dict[Kind, Modality] = {"source": made, "target": from_boxes(grids[-1], noisy)}
            where: dict[str, Any] = {"width": want.shape[1], "dtype": torch.float32, "device": "cpu"}
            tokens.append(packer.pack(modalities, **where))
            answers.append(packer.take("target", from_boxes(grids[-1], answer), **where))
        assert not [s for _, s in seen.shapes if torch.Size(s).numel() > packer.tokens * want.shape[1]]
    assert torch.equal(torch.cat(tokens), want)
    assert torch.equal(torch.cat(answers), velocity)


def test_sampling_writes_the_target_again_and_again() -> None:
    layout = SegmentLayout([Segment("source", (3, 2, 2)), Segment("target", (4, 2, 2))])
    sources, states = rand(12, WIDTH), [rand(16, WIDTH, seed=n, dtype=torch.float32) for n in range(3)]
    for packer in cut(layout, 3):
        tokens = torch.zeros(packer.tokens, WIDTH)
        assert packer.write(tokens, {"source": [sources]}) is tokens
        for state in states:
            packer.write(tokens, {"target": state})
            want = torch.cat([sources.float(), state])
            assert torch.equal(tokens, want[slice(*packer.part)])


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_planners_embeddings(ranks: int) -> None:
    segments = [Segment("text", (3, 1, 1)), Segment("source", (2, 2, 3)), Segment("text", (9, 1, 1)),
                Segment("target", (2, 2, 2)), Segment("text", (1, 1, 1))]  # fmt: skip
    cases = [Talk.make(segments, 11, WIDTH, ranks, rank, torch.float32, "cpu") for rank in range(ranks)]
    for case in cases:
        assert torch.equal(case.bernini(), case.index_copy())
    whole = torch.cat([case.bernini() for case in cases])
    assert whole.unique(dim=0).shape[0] > 15  # not all alike


# --- parameters that every rank must touch ----------------------------------------------------------------------------


def test_a_modality_that_is_elsewhere_can_be_touched() -> None:
    layout = SegmentLayout([Segment("text", (4, 1, 1)), Segment("target", (4, 2, 2))])
    first, last = cut(layout, 2)
    for packer, touched in ((last, True), (last, False), (first, True)):
        inputs = Inputs(layout)
        out = packed(inputs, packer, touch=("text", "source") if touched else ())
        out.sum().backward()
        if packer is first:
            assert inputs.table.grad is not None and inputs.table.grad.any()
        elif touched:
            assert ("text", 0, 0, 0) in inputs.asked
            assert inputs.table.grad is not None and not inputs.table.grad.any()
        else:
            assert inputs.table.grad is None and all(kind != "text" for kind, *_ in inputs.asked)
    assert torch.equal(packed(Inputs(layout), last, touch=KINDS), packed(Inputs(layout), last))
    # Patches of no rows, too: one call for an empty box.
    none = from_boxes((1, 2, 2), lambda box: patchify(box.crop(torch.ones(3, 1, 4, 4), (1, 2, 2)), (1, 2, 2)))(0, 0)
    assert none.shape == (0, 12)


def test_a_rank_without_rows() -> None:
    layout = SegmentLayout([Segment("text", (2, 1, 1)), Segment("target", (1, 1, 1))])
    inputs = Inputs(layout)
    sizes = [packed(inputs, packer).shape for packer in cut(layout, 8)]
    assert sorted(sizes) == [(0, WIDTH)] * 5 + [(1, WIDTH)] * 3


# --- what is refused --------------------------------------------------------------------------------------------------

LAYOUT = SegmentLayout([Segment("text", (3, 1, 1)), Segment("source", (1, 2, 2)), Segment("source", (1, 1, 2))])


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ({"text": rand(3, 2)}, "source has 6 rows here and no modality"),
        ({"text": rand(4, 2), "source": rand(6, 2)}, "all text segments has 3 rows and was given [4, 2]"),
        ({"text": rand(3, 2), "source": [rand(6, 2)]}, "1 pieces for the 2 source segments"),
        ({"text": rand(3, 2), "source": [rand(4, 2), None]}, "segment 2 (source) has rows 0 to 2 here"),
        ({"text": rand(3, 2), "source": [rand(4, 2), rand(3, 2)]}, "segment 2 (source) has 2 rows and was given"),
        ({"text": lambda a, b: rand(2, 2), "source": rand(6, 2)}, "asked for rows 0 to 3 and returned [2, 2]"),
        ({"text": rand(3, 2), "source": rand(6, 2), "sound": rand(1, 2)}, "no kind 'sound'"),
        ({"text": rand(3, 3), "source": rand(6, 2)}, "[3, 3]"),
    ],
)
def test_what_does_not_fit_is_refused(modalities: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Packer(LAYOUT).pack(modalities, 2, dtype=torch.float64, device="cpu")


def test_what_lies_elsewhere_need_not_be_there() -> None:
    packer = Packer(LAYOUT, (0, 5))
    source = rand(4, 2)
    out = packer.pack({"text": rand(3, 2), "source": [source, None]}, 2, dtype=torch.float64, device="cpu")
    assert torch.equal(out, torch.cat([rand(3, 2), source[:2]]))
    with pytest.raises(ValueError, match="the buffer has 9 rows, and 5 are here"):
        packer.write(torch.zeros(9, 2), {})
    with pytest.raises(ValueError, match="requires grad"):
        packer.write(torch.zeros(5, 2, requires_grad=True), {"text": rand(3, 2)})


def test_the_benchmark_is_listed() -> None:
    from bench_perf import BENCHMARKS

    assert BENCHMARKS["packer"] == bench.__name__
