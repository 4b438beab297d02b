"""How a batch is cut for ranks: heads, tokens, what each rank's part of the model reads, and whom it may attend to."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from bernini.kernels import Segment, SegmentLayout
from bernini.parallel.group import Alone
from bernini.parallel.plan import Cut, Heads, LocalLayout, SPPlan, clipped, even_borders
from bernini.parallel.share import Share
from bernini.parallel.ulysses import Ulysses

RANKS = range(1, 9)

# --- heads ------------------------------------------------------------------------------------------------------------


def fits(heads: int, kv_heads: int, bands: int) -> bool:
    """Whether bands of consecutive heads are equal: so many heads, of so many key heads, as many of each."""
    if heads % bands:
        return False
    band, group = heads // bands, heads // kv_heads
    read = [[head // group for head in range(first, first + band)] for first in range(0, heads, band)]
    return len({len(set(keys)) for keys in read}) == 1 == len({keys.count(key) for keys in read for key in keys})


ALL = [(heads, kv) for heads in range(1, 41) for kv in range(1, heads + 1) if heads % kv == 0]


@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_has_as_many_heads_and_reads_its_own_key_heads(ranks: int) -> None:
    for heads, kv_heads in ALL:
        shared = Heads.shared(heads, kv_heads, ranks)
        assert (shared.ranks, shared.ulysses * shared.gather) == (ranks, ranks)
        group = heads // kv_heads
        had, sizes = [], set()
        for rank in range(ranks):
            mine = range(rank % shared.ulysses * shared.band, (rank % shared.ulysses + 1) * shared.band)
            first = shared.kv_band_of(rank) * shared.kv_band
            keys = range(first, first + shared.kv_band)
            assert {head // group for head in mine} == set(keys)  # it gets what it reads, and no more
            # Attention counts both from 0 and divides: the same pairs as in the whole.
            local = [number // (shared.band // shared.kv_band) + first for number in range(shared.band)]
            assert local == [head // group for head in mine]
            had += mine
            sizes.add((len(mine), len(keys)))
        assert sorted(had) == sorted(list(range(heads)) * shared.gather) and len(sizes) == 1
        assert shared.kv_bands * shared.kv_band == kv_heads
        assert shared.kv_bands == len({shared.kv_band_of(rank) for rank in range(ranks)})


@pytest.mark.parametrize("ranks", RANKS)
def test_no_more_bands_would_do(ranks: int) -> None:
    for heads, kv_heads in ALL:
        fitting = [bands for bands in range(1, ranks + 1) if ranks % bands == 0 and fits(heads, kv_heads, bands)]
        assert Heads.shared(heads, kv_heads, ranks).ulysses == max(fitting)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "ulysses", "gather"),
    [
        (28, 4, 2, 2, 1), (28, 4, 4, 4, 1), (28, 4, 8, 4, 2),
        (40, 40, 8, 8, 1), (12, 12, 8, 4, 2), (12, 12, 4, 4, 1),
        (12, 4, 6, 2, 3), (16, 2, 8, 8, 1), (7, 1, 7, 7, 1), (7, 7, 8, 1, 8), (28, 4, 7, 1, 7), (40, 40, 3, 1, 3),
    ],
)  # fmt: skip
def test_known_heads(heads: int, kv_heads: int, ranks: int, ulysses: int, gather: int) -> None:
    assert Heads.shared(heads, kv_heads, ranks) == Heads(heads, kv_heads, ulysses, gather)


def test_rows_of_ranks() -> None:
    heads = Heads.shared(28, 4, 8)
    assert [list(heads.row(rank)) for rank in (0, 3, 4, 7)] == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    assert [heads.kv_band_of(rank) for rank in range(8)] == [0, 1, 2, 3] * 2
    assert [Heads.shared(16, 2, 8).kv_band_of(rank) for rank in range(8)] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(28, 3, 4), (0, 1, 2), (4, 0, 2), (4, 4, 0), (2, 4, 2)])
def test_heads_that_cannot_be(heads: int, kv_heads: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{heads} heads with {kv_heads} key heads on {ranks} ranks cannot be"):
        Heads.shared(heads, kv_heads, ranks)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_an_even_cut_differs_by_one_token() -> None:
    for ranks in RANKS:
        for tokens in range(40):
            sizes = Cut.even(tokens, ranks).sizes
            assert sum(sizes) == tokens and len(sizes) == ranks and max(sizes) - min(sizes) <= 1
    assert Cut.even(3, 8).sizes.count(0) == 5


def test_a_cut_of_some_rows_leaves_each_with_its_rank() -> None:
    draw = random.Random(0)
    for _ in range(200):
        tokens, ranks = draw.randint(1, 40), draw.randint(1, 8)
        whole = Cut.even(tokens, ranks)
        some = np.array(sorted(draw.sample(range(tokens), draw.randint(0, tokens))), np.int64)
        chosen = Cut.chosen(some, whole)
        assert chosen.rows == len(some)
        for rank in range(ranks):
            start, stop = whole.part(rank)
            assert some[slice(*chosen.part(rank))].tolist() == [row for row in some.tolist() if start <= row < stop]
            row = Heads(8, 8, 1, ranks).row(rank)
            assert chosen.of_row(row) == chosen.part(rank)
        assert chosen.of_row(range(ranks)) == (0, len(some))


@pytest.mark.parametrize("borders", [(0,), (1, 2), (0, 3, 2), ()])
def test_borders_that_cannot_be(borders: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must begin with 0 and not decrease"):
        Cut(borders)


def test_a_plan_for_other_ranks_is_refused() -> None:
    layout = SegmentLayout([Segment("target", (2, 2, 2))])
    with pytest.raises(ValueError, match="the plan is for 2 ranks, the group has 1"):
        Ulysses(Alone(), SPPlan.make(layout, 4, 4, 2))
    assert Share(least=0).plan(layout, 4, 4) is None  # one process cuts nothing


# --- what a rank's part of the model reads ----------------------------------------------------------------------------


def layouts() -> list[SegmentLayout]:
    draw, found = random.Random(1), []
    while len(found) < 40:
        segments = []
        for sample in range(draw.randint(1, 3)):
            for number in range(draw.randint(1, 4)):
                kind = draw.choice(("text", "source", "target"))
                grid = (draw.randint(1, 5), *((1, 1) if kind == "text" else (draw.randint(1, 3), draw.randint(1, 3))))
                segments.append(Segment(kind, grid, 0.0 if kind == "target" else number + 1.0, sample))
        layout = SegmentLayout(segments)
        try:
            layout.intervals  # noqa: B018
        except ValueError:  # more than two intervals
            continue
        found.append(layout)
    return [*found, SegmentLayout([Segment("target", (1, 1, 2))])]


LAYOUTS = layouts()


@pytest.mark.parametrize("ranks", RANKS)
def test_a_part_is_a_slice_of_the_whole(ranks: int) -> None:
    for layout in LAYOUTS:
        plan = SPPlan.make(layout, 6, 2, ranks)
        whole, owners = layout.on("cpu"), np.zeros(layout.tokens, int)
        targets = []
        for rank in range(ranks):
            start, stop = plan.cut.part(rank)
            part, owners[start:stop] = plan.local(rank), rank
            here = part.on("cpu")
            assert part.on("cpu") is here
            assert (part.tokens, part.num_samples, part.grid_sizes) == (
                stop - start, layout.num_samples, layout.grid_sizes,
            )  # fmt: skip
            assert torch.equal(here.rows, whole.rows[start:stop])
            assert torch.equal(here.timestep_rows, whole.timestep_rows[start:stop])
            tables = zip(here.tables(8), whole.tables(8), strict=True)
            assert all(torch.equal(one, other) for one, other in tables)
            owned = np.repeat(np.arange(layout.num_samples), np.diff(part.cu_seqlens))
            assert owned.tolist() == layout.timestep_rows[start:stop].tolist()
            targets += (here.target_index + start).tolist()
            assert len(here.target_index) == plan.targets.sizes[rank]
            check_pieces(layout, part)
        assert targets == layout.target_index.tolist()
        assert (np.diff(owners) >= 0).all()


def check_pieces(layout: SegmentLayout, part: LocalLayout) -> None:
    covered = []
    for number, tokens, here in part.pieces:
        start, _ = layout.ranges[number]
        assert tokens.stop > tokens.start
        assert (start + tokens.start, start + tokens.stop) == (part.part[0] + here.start, part.part[0] + here.stop)
        assert tokens.stop <= layout.segments[number].tokens
        covered += range(here.start, here.stop)
    assert covered == list(range(part.tokens))


def test_ranks_without_tokens() -> None:
    layout = SegmentLayout([Segment("source", (1, 1, 1), 1.0), Segment("target", (1, 1, 2))])
    plan = SPPlan.make(layout, 8, 8, 8)
    assert plan.cut.sizes == (0, 0, 1, 0, 0, 1, 0, 1)
    empty = plan.local(0)
    assert (empty.tokens, empty.cu_seqlens, empty.pieces, len(empty.target_index)) == (0, (0, 0), [], 0)
    assert empty.on("cpu").rows.shape == (0, 4)
    assert plan.borders(0) == ((0, 3), (0, 3))  # it has a band of everybody's queries
    apart = SPPlan.make(layout, 7, 7, 8)
    assert apart.reads(0) == (0, 0) and apart.borders(0) == ((0, 0), (0, 0)) and len(apart.intervals(0).starts) == 0


# --- whom a rank's queries may attend to ------------------------------------------------------------------------------


def hybrid(layout: SegmentLayout) -> np.ndarray:
    """The planner's mask by its words: causal text and sources, targets that see what is before and themselves."""
    sees = np.zeros((layout.tokens,) * 2, bool)
    places = [(number, token) for number, (start, stop) in enumerate(layout.ranges) for token in range(start, stop)]
    for query_number, query in places:
        one = layout.segments[query_number]
        for key_number, key in places:
            other = layout.segments[key_number]
            own = query_number == key_number and one.kind == "target"
            before = other.kind != "target" and key <= query
            sees[query, key] = one.sample == other.sample and (own or before)
    return sees


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_masks_of_a_rank_are_rows_of_the_whole(ranks: int) -> None:
    for layout in LAYOUTS:
        plan, mask = SPPlan.make(layout, 6, 2, ranks), hybrid(layout)
        samples = layout.timestep_rows[:, None] == layout.timestep_rows
        for rank in range(ranks):
            start, stop = plan.cut.of_row(plan.heads.row(rank))
            starts, ends, second = plan.intervals(rank)
            found = np.zeros((stop - start, layout.tokens), bool)
            for low, high in [(starts, ends), *([] if second is None else [second])]:
                for row, (a, b) in enumerate(zip(low, high, strict=True)):
                    found[row, a:b] = True
            assert (found == mask[start:stop]).all()
            assert second is None or second[1].any()

            first, last = plan.reads(rank)
            q_borders, k_borders = plan.borders(rank)
            assert (q_borders[-1], k_borders[-1]) == (stop - start, last - first)
            dense = np.zeros((stop - start, layout.tokens), bool)
            for (a, b), (c, d) in zip(pairwise(q_borders), pairwise(k_borders), strict=True):
                dense[a:b, first + c : first + d] = True
            assert (dense == samples[start:stop]).all()
            assert (np.flatnonzero(samples[start:stop].any(0)) == np.arange(first, last)).all()  # no key too many


def test_clipped() -> None:
    assert clipped((0, 4, 9, 12), (3, 10)) == (0, 1, 6, 7)
    assert clipped((0, 4, 9, 12), (5, 5)) == (0, 0, 0, 0)
    assert even_borders(10, 4) == (0, 2, 5, 7, 10)
