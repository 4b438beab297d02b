"""Interval attention visits the key tiles that the mask needs, no more and no fewer, on the planner's own layouts.

Shapes: T tokens, tiles of M rows and N keys. The mask is written down pair by pair from the paper's rule (fig. 3 D),
without the intervals that the kernels read. That the kernels go through as many tiles as named here is counted where
they run: ``tests/proof/interpreted/test_attention.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bench_perf.proof.cases.attention import TILES, planner_layouts
from bernini.kernels import SegmentLayout
from bernini.kernels.attention import visits

LAYOUTS = planner_layouts()


def hybrid_mask(layout: SegmentLayout) -> NDArray[np.bool_]:
    """``[T, T]``: text and sources see the text and sources up to themselves, targets those before and all of their
    own; nobody sees another sample."""
    segments = layout.segments
    sizes = [segment.tokens for segment in segments]
    number = np.repeat(np.arange(len(segments)), sizes)
    sample = np.repeat([segment.sample for segment in segments], sizes)
    target = np.repeat([segment.kind == "target" for segment in segments], sizes)
    row, key = np.ogrid[: layout.tokens, : layout.tokens]
    own = target[:, None] & (number[:, None] == number)
    return (sample[:, None] == sample) & (own | (~target & (key <= row)))


def needed(mask: NDArray[np.bool_], m: int, n: int) -> NDArray[np.uint8]:
    """``[T / M, T / N]``: 0 where nothing of a tile is seen, 2 where all of its rows see all of its keys, else 1."""
    rows, keys = -(-mask.shape[0] // m), -(-mask.shape[1] // n)
    state = np.empty((rows, keys), np.uint8)
    for i in range(rows):
        for j in range(keys):
            tile = mask[i * m : (i + 1) * m, j * n : (j + 1) * n]
            state[i, j] = 2 if tile.all() and tile.shape[1] == n else int(tile.any())
    return state


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_intervals_are_the_mask(name: str) -> None:
    layout = LAYOUTS[name]
    starts, ends, second = layout.intervals
    assert second is not None
    key = np.arange(layout.tokens)
    seen = (key >= starts[:, None]) & (key < ends[:, None])
    seen |= (key >= second[0][:, None]) & (key < second[1][:, None])
    assert np.array_equal(seen, hybrid_mask(layout))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("m", "n"), sorted(set(TILES.values())))
def test_as_many_tiles_as_the_mask_needs(name: str, m: int, n: int) -> None:
    layout = LAYOUTS[name]
    intervals = layout.intervals
    state = needed(hybrid_mask(layout), m, n)
    visited = visits.tiles_visited(*intervals, layout.tokens, m, n)
    assert np.array_equal(visited, (state > 0).sum(1))
    assert np.array_equal(visits.states(*intervals, layout.tokens, m, n), state)
    assert visited.sum() < 0.7 * state.size  # what dense attention goes through
    assert (state == visits.FULL).any() and (state == visits.PARTIAL).any()


def test_a_mask_with_one_more_key_needs_one_more_tile() -> None:
    """So that the comparison can fail."""
    layout, (m, n) = LAYOUTS["packed"], (128, 64)
    starts, ends, second = layout.intervals
    mask = hybrid_mask(layout)
    assert not mask[0, -1]
    mask[0, -1] = True
    assert (needed(mask, m, n) > 0).sum() == visits.tiles_visited(starts, ends, second, layout.tokens, m, n).sum() + 1
