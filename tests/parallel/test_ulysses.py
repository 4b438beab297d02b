"""Attention by ranks that share a sequence against one process: values, bits, and what it sends, copies, waits for.

Ranks are threads, and once real processes over gloo: ``python -m tests.parallel.test_ulysses FOLDER`` is those.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench_perf.moves import Counted, Moves, shapes_backend
from bernini.kernels import Segment, SegmentLayout
from bernini.parallel import plan as plans
from bernini.parallel import ulysses
from bernini.parallel.group import Alone, Group
from bernini.parallel.plan import Heads, SPPlan
from bernini.parallel.share import Share
from bernini.parallel.simulated import simulate
from bernini.parallel.ulysses import Swap, Ulysses
from bernini.planner.model import under_mask
from bernini.renderer.model import QKV, QKNorm, attend_here
from tests.parallel import forked

CASES = {1: 50, 2: 600, 3: 500, 4: 400, 5: 150, 6: 150, 7: 75, 8: 75}
"""How many for each number of ranks: 2 000 in all."""

# --- cases ------------------------------------------------------------------------------------------------------------


def random_layout(draw: random.Random, kinds: Sequence[str], sizes: int) -> SegmentLayout:
    """Samples of some sources (and text), and most often a target, in any order that the mask allows."""
    while True:
        segments: list[Segment] = []
        for sample in range(draw.randint(1, 3)):
            for number in range(draw.randint(1, 4)):
                kind: Any = draw.choice(kinds)
                grid = (draw.randint(1, 4), 1, 1) if kind == "text" else tuple(draw.randint(1, sizes) for _ in range(3))
                segments.append(Segment(kind, grid, 0.0 if kind == "target" else number + 1.0, sample))
        layout = SegmentLayout(segments)
        try:
            layout.intervals  # noqa: B018
        except ValueError:
            continue
        return layout


def given(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    """Projections that are done."""
    return QKV(lambda _: q, lambda _: k, lambda _: v)


@dataclass(frozen=True)
class Case:
    """One attention, its inputs and the gradient that comes back to its result.

    Args:
        planner: under the hybrid mask; else as the renderer attends, norm and rotation before it.
        at: the rows that have queries; all by default. The planner's only.
    """

    planner: bool
    layout: SegmentLayout
    heads: int
    kv_heads: int
    dim: int
    at: Tensor | None = None
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @classmethod
    def random(cls, seed: int) -> Case:
        draw = random.Random(seed)
        if seed % 2:
            heads = draw.randint(1, 8)
            return cls(False, random_layout(draw, ("source", "target"), 2), heads, heads, 8, seed=seed)
        layout, groups = random_layout(draw, ("text", "source", "target"), 2), draw.randint(1, 4)
        at = None
        if draw.random() < 0.4:
            some = draw.sample(range(layout.tokens), draw.randint(1, layout.tokens))
            at = torch.tensor(sorted(some))
        return cls(True, layout, groups * draw.randint(1, 4), groups, 4, at, seed=seed)

    @property
    def queries(self) -> int:
        return self.layout.tokens if self.at is None else len(self.at)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of all tokens."""
        source = torch.Generator().manual_seed(self.seed)
        shapes = [(self.queries, self.heads), *[(self.layout.tokens, self.kv_heads)] * 2, (self.queries, self.heads)]
        made = (torch.randn(*shape, self.dim, generator=source, dtype=torch.float64) for shape in shapes)
        return tuple(x.to(self.dtype) for x in made)

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Of the norms."""
        source = torch.Generator().manual_seed(self.seed + 1)
        made = (torch.rand(n * self.dim, generator=source, dtype=torch.float64) for n in (self.heads, self.kv_heads))
        q, k = (x.to(self.dtype) for x in made)
        return q, k

    def run(self, group: Group, rank: int | None = None) -> list[Tensor]:
        """(result, dq, dk, dv, dq_weight, dk_weight) of a rank's part; of the whole without one."""
        q, k, v, dout = self.parts(group.size if rank is not None else 1, rank or 0)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        share = Share(group, least=0)
        if self.planner:
            layer = under_mask(self.layout, self.at, *(() if rank is None else (share,)))
            out = layer(0, *leaves, 0.3)
        else:
            leaves += [x.clone().requires_grad_() for x in self.weights]
            norm = QKNorm(leaves[3], leaves[4], 1e-6)
            if rank is None:
                out = attend_here(leaves[0], given(*leaves[:3]), self.layout, norm, "fp32", "auto")
            else:
                plan = SPPlan.make(self.layout, self.heads, self.kv_heads, group.size)
                out = Ulysses(group, plan)(leaves[0], given(*leaves[:3]), plan.local(rank), norm, "fp32", "auto")
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    def parts(self, ranks: int, rank: int) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of a rank's tokens."""
        start, stop = self.layout.tokens * rank // ranks, self.layout.tokens * (rank + 1) // ranks
        q, k, v, dout = self.tensors
        own = slice(start, stop) if self.at is None else (self.at >= start) & (self.at < stop)
        return q[own], k[start:stop], v[start:stop], dout[own]

    @cached_property
    def alone(self) -> list[Tensor]:
        return self.run(Alone())

    def joined(self, found: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What all ranks have: rows one after the other, and sums of the weights' gradients."""
        made = [
            torch.cat(rows) if n < 4 else torch.stack(rows).sum(0) for n, rows in enumerate(zip(*found, strict=True))
        ]
        return [x.to(self.dtype) for x in made]

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Which keys each query sees, from the words of the paper and not from the layout's intervals."""
        sees = np.zeros((self.layout.tokens,) * 2, bool)
        for (a, b), one in zip(self.layout.ranges, self.layout.segments, strict=True):
            for (c, d), other in zip(self.layout.ranges, self.layout.segments, strict=True):
                block = sees[a:b, c:d]
                if one.sample != other.sample:
                    continue
                if not self.planner or (one is other and one.kind == "target"):
                    block[:] = True
                elif other.kind != "target":
                    block[:] = np.tril(np.ones(block.shape, bool)) if one is other else c < a
        return sees if self.at is None else sees[self.at.numpy()]


@lru_cache
def cases(ranks: int) -> list[Case]:
    return [Case.random(1000 * ranks + number) for number in range(CASES[ranks])]


def errors(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest error, by the largest value of each tensor."""
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b.numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1.0)) for a, b in pairs)


def worst(ranks: int, some: Sequence[Case]) -> float:
    parts = simulate(ranks, lambda group: [case.run(group, group.rank) for case in some])
    return max(errors(case.joined(each), case.alone) for case, each in zip(some, zip(*parts, strict=True), strict=True))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Ranks are threads already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the same as one process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", CASES)
def test_results_and_gradients_are_those_of_one_process(ranks: int) -> None:
    assert worst(ranks, cases(ranks)) < 1e-12


def test_the_cases_have_what_is_hard() -> None:
    every = [(ranks, case) for ranks in CASES for case in cases(ranks)]
    assert len(every) == 2000
    shared = [(ranks, case, Heads.shared(case.heads, case.kv_heads, ranks)) for ranks, case in every]
    assert sum(case.layout.tokens < ranks for ranks, case in every) > 20
    assert sum(case.at is not None and len(case.at) < ranks for ranks, case in every) > 50
    assert sum(heads.gather > 1 and heads.ulysses > 1 for *_, heads in shared) > 100
    assert sum(heads.kv_bands < heads.ulysses for *_, heads in shared) > 100  # several ranks read a key head
    assert sum(case.layout.intervals.second is not None for _, case in every if case.planner) > 100
    assert sum(case.layout.num_samples > 1 for _, case in every) > 1000
    assert 900 < sum(case.planner for _, case in every) < 1100


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def broken(change: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    BROKEN[change.__name__] = change
    return change


@broken
def key_gradients_are_those_of_the_first_reader(patch: pytest.MonkeyPatch) -> None:
    def summed(self: Swap, parts: list[Tensor]) -> Tensor:
        readers = [self.heads.kv_band_of(rank) if len(part) else None for rank, part in enumerate(parts)]
        return right(
            self,
            [part * (readers.index(reader) == n) for n, (reader, part) in enumerate(zip(readers, parts, strict=True))],
        )

    right = Swap._summed
    patch.setattr(Swap, "_summed", summed)


@broken
def results_come_back_in_another_order(patch: pytest.MonkeyPatch) -> None:
    right = Swap.back

    def back(self: Swap, q_ThD: Tensor, *kv: Tensor) -> tuple[Tensor, ...]:
        q, *rest = right(self, q_ThD, *kv)
        return q.unflatten(1, (self.heads.ulysses, -1)).flip(1).flatten(1, 2), *rest

    patch.setattr(Swap, "back", back)


@broken
def key_bands_go_to_other_ranks(patch: pytest.MonkeyPatch) -> None:
    right = Heads.kv_band_of
    patch.setattr(Heads, "kv_band_of", lambda self, rank: self.kv_bands - 1 - right(self, rank))


@broken
def borders_are_one_off(patch: pytest.MonkeyPatch) -> None:
    def borders(self: SPPlan, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        q, k = right(self, rank)
        return q, (*(min(border + 1, k[-1]) if n > 0 else border for n, border in enumerate(k[:-1])), k[-1])

    right = SPPlan.borders
    patch.setattr(SPPlan, "borders", borders)


@broken
def rotated_as_the_first_rank(patch: pytest.MonkeyPatch) -> None:
    rows = property(lambda self: self.whole.rows[: self.tokens])
    patch.setattr(plans.LocalLayout, "rows", rows)


@broken
def masked_in_another_order(patch: pytest.MonkeyPatch) -> None:
    right = ulysses.attend
    patch.setattr(
        "bernini.parallel.share.attend",
        lambda swap, q, k, v, run: right(swap, q, k, v, lambda q, k, v, rows: run(q.flip(0), k, v, rows).flip(0)),
    )


@broken
def own_part_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = Swap.out

    def out(self: Swap, q: Tensor, *kv: Tensor) -> tuple[Tensor, ...]:
        found = right(self, q, *kv)
        for x in found[1:]:
            start, stop = self.kv.part(self.group.rank)
            x[start:stop] = 0
        return found

    patch.setattr(Swap, "out", out)


@broken
def weights_see_a_part_of_the_gradient(patch: pytest.MonkeyPatch) -> None:
    right = torch.ops.bernini.qk_rope_backward
    patch.setattr(torch.ops.bernini, "qk_rope_backward", lambda dq, dk, *rest: right(dq, torch.zeros_like(dk), *rest))


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    some = cases(4)[:30]
    for case in some:
        assert case.alone  # before anything is broken
    BROKEN[name](monkeypatch)
    assert worst(4, some) > 1e-3


# --- bits -------------------------------------------------------------------------------------------------------------


def larger(dtype: torch.dtype) -> list[Case]:
    """Both models; several ranks read a key head, and rows of ranks a part of the queries."""
    grids = Segment("source", (2, 3, 5), 1.0), Segment("target", (3, 4, 5)), Segment("target", (2, 3, 3), 0.0, 1)
    talk = Segment("text", (7, 1, 1)), Segment("source", (2, 3, 5), 1.0), Segment("target", (3, 4, 5)), *[
        Segment("text", (9, 1, 1), 0.0, sample) for sample in (0, 1)
    ]  # fmt: skip
    return [
        Case(False, SegmentLayout(grids), 8, 8, 16, dtype=dtype, seed=1),
        Case(False, SegmentLayout(grids), 6, 6, 16, dtype=dtype, seed=2),
        Case(True, SegmentLayout(talk), 8, 2, 16, dtype=dtype, seed=3),
        Case(True, SegmentLayout(talk), 14, 2, 16, torch.arange(3, 100, 5), dtype=dtype, seed=4),
    ]


def bits(group: Group, *dtypes: torch.dtype) -> list[list[Tensor]]:
    return [case.run(group, group.rank) for dtype in dtypes for case in larger(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_run_has_the_same_bits(dtype: torch.dtype) -> None:
    def late(group: Group) -> list[list[list[Tensor]]]:
        found = []
        for run in range(20):
            time.sleep((group.rank * 7 + run * 3) % 4 / 2000)  # another rank is the last one every time
            found.append(bits(group, dtype))
        return found

    for runs in simulate(4, late):
        for run in runs[1:]:
            for case, first in zip(run, runs[0], strict=True):
                assert all(torch.equal(*pair) for pair in zip(case, first, strict=True))


def test_bfloat16_is_one_rounding_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a key's gradient are rounded before they are sent, and so is their sum."""
    right = Swap._summed
    roundings: dict[int, list[Tensor]] = {}

    def summed(self: Swap, parts: list[Tensor]) -> Tensor:
        one = right(self, [part.abs() for part in parts]).double() * 2**-8
        roundings.setdefault(self.group.rank, []).append(one)
        return right(self, parts)

    monkeypatch.setattr(Swap, "_summed", summed)
    for case in larger(torch.bfloat16):
        roundings.clear()
        found = case.joined(simulate(4, lambda group, case=case: case.run(group, group.rank)))  # type: ignore[misc]
        distances = [(a.double() - b.double()).abs() for a, b in zip(found, case.alone, strict=True)]
        assert (distances[0] <= 2**-7 * case.alone[0].double().abs()).all()  # neighbours
        for distance, wanted in zip(distances, case.alone, strict=True):
            assert distance.norm() <= 2**-8 * wanted.double().norm()
        if case.planner:  # the renderer's attention rounds inside, and the norm is behind its keys
            for n, distance in enumerate(distances[2:4]):
                one = torch.cat([sizes[n] for _, sizes in sorted(roundings.items())])
                assert (distance <= 3 * one).all()  # of the parts, the sum, and in one process


# --- what is sent, copied and waited for ------------------------------------------------------------------------------


@dataclass
class Watched:
    """What a rank did in one layer, forward and backward."""

    group: Counted
    forward: Moves
    backward: Moves


def watched(case: Case, group: Group, backend: str) -> Watched:
    counted, forward, backward = Counted(group), Moves(), Moves()
    q, k, v, dout = case.parts(group.size, group.rank)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    if case.planner:
        attend: Callable[[], Tensor] = partial(under_mask(case.layout, case.at, Share(counted, 0)), 0, *leaves, 0.3)
    else:
        plan = SPPlan.make(case.layout, case.heads, case.kv_heads, group.size)
        norm = QKNorm(*(x.clone().requires_grad_() for x in case.weights), 1e-6)
        own = plan.local(group.rank)
        attend = partial(Ulysses(counted, plan), leaves[0], given(*leaves), own, norm, "fp32", backend)
    attend()  # tables and masks are made once for all layers
    counted.exchanges.clear()
    with forward:
        out = attend()
    with backward:
        torch.autograd.grad(out, leaves, dout)
    return Watched(counted, forward, backward)


@dataclass(frozen=True)
class Needs:
    """What a rank must have from others, one (token, head) after the other, given its heads and its row."""

    case: Case
    ranks: int
    rank: int

    @cached_property
    def heads(self) -> Heads:
        return Heads.shared(self.case.heads, self.case.kv_heads, self.ranks)

    def rows(self, rank: int) -> tuple[set[int], set[int]]:
        """(keys, queries) that a rank has itself."""
        borders = [self.case.layout.tokens * n // self.ranks for n in (rank, rank + 1)]
        at = range(self.case.layout.tokens) if self.case.at is None else self.case.at.tolist()
        return set(range(*borders)), {n for n, token in enumerate(at) if borders[0] <= token < borders[1]}

    def attends(self, rank: int) -> tuple[set[int], set[int], set[int], set[int]]:
        """(queries, their heads, keys, their heads) of the attention that a rank computes."""
        u = self.heads.ulysses
        queries = set().union(*(self.rows(other)[1] for other in range(self.ranks) if other // u == rank // u))
        heads = {head for head in range(self.case.heads) if head // (self.case.heads // u) == rank % u}
        seen = np.flatnonzero(self.case.mask[sorted(queries)].any(0)).tolist()
        keys = set(range(seen[0], seen[-1] + 1)) if seen else set()  # those between are sent, too
        return queries, heads, keys, {head // (self.case.heads // self.case.kv_heads) for head in heads}

    def exchanges(self) -> list[int]:
        """Elements that it receives in each of the four."""
        own_keys, own_queries = self.rows(self.rank)
        queries, heads, keys, kv_heads = self.attends(self.rank)
        q = len(queries - own_queries) * len(heads)
        result = len(own_queries) * (self.case.heads - len(heads))
        kv = 2 * len(keys - own_keys) * len(kv_heads)
        others = (self.attends(rank) for rank in range(self.ranks) if rank != self.rank)
        kv_grads = sum(2 * len(keys & own_keys) * len(kv_heads) for _, _, keys, kv_heads in others)
        return [self.case.dim * n for n in (q + kv, result, q, result + kv_grads)]

    def staged(self) -> tuple[int, int]:
        """Elements copied forward and backward if none is twice on its way to any place."""
        own_keys, own_queries = map(len, self.rows(self.rank))
        heads, case = self.heads, self.case
        kept = heads.kv_band if heads.kv_bands < self.ranks else 0  # stays here, and goes to others as well
        values = case.kv_heads + kept
        if case.planner:
            out = own_queries * case.heads + 2 * own_keys * values
        else:  # the kernel writes where it is sent from, so all that is copied is what stays
            out = own_queries * heads.band + own_keys * (heads.kv_band + values)
        result, key_grads = own_queries * case.heads, 2 * own_keys * case.kv_heads
        tokens = case.layout.tokens
        if any(len(self.attends(rank)[2]) < tokens for rank in range(self.ranks)) or heads.kv_bands < self.ranks:
            key_grads = 0  # they are added up, not copied
        return case.dim * (out + result), case.dim * (2 * result + key_grads)


def layers() -> list[Case]:
    one = Segment("source", (2, 3, 4), 1.0), Segment("target", (3, 3, 4))
    two = *one, Segment("source", (2, 3, 5), 1.0, 1), Segment("target", (2, 3, 4), 0.0, 1)
    talk = Segment("text", (9, 1, 1)), Segment("source", (2, 3, 5), 1.0), Segment("target", (3, 4, 5))
    return [
        *(Case(False, SegmentLayout(one), heads, heads, 8) for heads in (8, 6)),
        *(Case(False, SegmentLayout(two), heads, heads, 8) for heads in (8, 6)),
        *(Case(True, SegmentLayout(talk), heads, kv_heads, 4) for heads, kv_heads in ((8, 8), (8, 2), (14, 2))),
        Case(True, SegmentLayout(talk), 8, 4, 4, torch.arange(40, 60)),
        Case(True, SegmentLayout(talk), 8, 4, 4, torch.tensor([3, 90])),
    ]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_copies_and_waits(ranks: int) -> None:
    """One exchange each way, forward and backward; what a rank needs and no more; one copy at most; no waiting."""
    with shapes_backend() as backend:
        # One sequence is attended to without a copy, so there the real one can be watched.
        by = [backend if case.layout.num_samples > 1 else "sdpa" for case in layers()]
        found = simulate(ranks, lambda group: [watched(case, group, b) for case, b in zip(layers(), by, strict=True)])
    for rank, seen in enumerate(found):
        for case, one in zip(layers(), seen, strict=True):
            needs = Needs(case, ranks, rank)
            assert [exchange.received // 8 for exchange in one.group.exchanges] == needs.exchanges()
            assert one.group.others == one.forward.syncs == one.backward.syncs == []
            staged = needs.staged()
            assert one.forward.copied <= staged[0], (case, rank, one.forward.copies)
            assert one.backward.copied <= staged[1], (case, rank, one.backward.copies)


# --- processes --------------------------------------------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def all_bits(group: Group) -> list[list[Tensor]]:
    return bits(group, *DTYPES)


def test_processes_have_the_bits_of_threads(tmp_path: Path) -> None:
    by_process = forked.found("tests.parallel.test_ulysses", tmp_path, 4)
    for found, wanted in zip(by_process, simulate(4, all_bits), strict=True):
        for case, expected in zip(found, wanted, strict=True):
            assert all(torch.equal(*pair) for pair in zip(case, expected, strict=True))


if __name__ == "__main__":
    forked.run(Path(sys.argv[1]), 4, all_bits)
