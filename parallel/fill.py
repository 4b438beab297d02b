"""Pieces of sequences into bins of ranks and micro-batches; :mod:`bernini.parallel.balance` decides how they are cut.

A bin is one rank in one micro-batch. Ranks wait for each other in every micro-batch, so only the bins of one must be
equally full, and every micro-batch has a height of its own: long sequences stand beside long ones. All below works on
how far a bin is above the height of its micro-batch, its excess.

Cost: a heap for the first placement, and then exchanges between all pairs of bins at once, in numpy. Nothing depends on
the order or the numbers of equal pieces.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROUNDS = 40
"""Of exchanges, at most."""
WIDTH = 64
"""Pieces of a bin that are looked at for exchanges, the heaviest: light ones change nothing."""


class Pieces(NamedTuple):
    """What is placed: the ranks of each, and for each of those its load and tokens. All ``[pieces]``."""

    sizes: Ints
    loads: Floats
    tokens: Ints


class Bins(NamedTuple):
    """Where it is: of every piece the micro-batch and the first rank ``[pieces]``, and loads ``[micros, ranks]``."""

    micros: Ints
    firsts: Ints
    loads: Floats

    @property
    def seconds(self) -> float:
        """Of all micro-batches, each of which ends with its last rank."""
        return float(self.loads.max(axis=1).sum())

    @property
    def spread(self) -> float:
        """Between the loads of ranks, all micro-batches together."""
        return float(np.ptp(self.loads.sum(axis=0)))


def heights(pieces: Pieces, ranks: int, micros: int) -> Floats:
    """How full the bins of every micro-batch should be: ``[micros]``, falling.

    Pieces are stacked by load, heaviest first, a row of all ranks for each micro-batch: it cannot be lower than the
    first of its row. What is missing to the mean raises the lowest.
    """
    order = np.argsort(-pieces.loads, kind="stable")
    stacked = np.repeat(pieces.loads[order], pieces.sizes[order])
    least = np.zeros(micros)
    rows = stacked[: micros * ranks : ranks]
    least[: len(rows)] = rows
    missing = float(stacked.sum()) / ranks - float(least.sum())
    # Water over a floor that falls to the right: the last `count` are level.
    for count in range(1, micros + 1):
        level = (float(least[micros - count :].sum()) + missing) / count
        if count == micros or level <= least[micros - count - 1]:
            return np.maximum(least, level) if missing > 0 else least
    return least


def fill(pieces: Pieces, ranks: int, micros: int, cap: int, goal: float, *, by_tokens: bool = False) -> Bins | None:
    """Places all pieces, or ``None`` if one does not fit.

    Larger groups first, heaviest first, each into the emptiest bins that have room: so all ranks of a group are equally
    full when one of its pieces comes. After each size come exchanges between its groups.

    Args:
        cap: tokens of a bin.
        goal: a difference of excess between bins that is good enough.
        by_tokens: the longest first, each where the fewest tokens are: less balanced, but more fits.
    """
    excess = np.repeat(-heights(pieces, ranks, micros)[:, None], ranks, axis=1)
    full = excess.copy()
    used = np.zeros((micros, ranks), np.int64)
    places = np.empty(len(pieces.sizes), np.int64)
    for size in sorted(set(pieces.sizes.tolist()), reverse=True):
        which = np.flatnonzero(pieces.sizes == size)
        if by_tokens:
            which = which[np.argsort(-pieces.tokens[which], kind="stable")]
        wide = ranks // size * size
        shape = (micros, ranks // size, size)
        loads = excess[:, :wide].reshape(shape)[..., 0].reshape(-1)
        tokens = used[:, :wide].reshape(shape).max(-1).reshape(-1)
        if not _first(which, pieces, loads, tokens, cap, places, by_tokens):
            return None
        _exchange(which, pieces, loads, tokens, cap, places, goal)
        excess[:, :wide] = np.repeat(loads.reshape(shape[:2]), size, axis=1)
        used[:, :wide] = np.repeat(tokens.reshape(shape[:2]), size, axis=1)
    groups = ranks // pieces.sizes
    return Bins(places // groups, places % groups * pieces.sizes, excess - full)


def _first(
    which: Ints, pieces: Pieces, loads: Floats, tokens: Ints, cap: int, places: Ints, by_tokens: bool
) -> bool:  # fmt: skip
    """Places pieces of one size among ``len(loads)`` groups, whose loads and tokens it brings up to date."""
    counts = pieces.tokens[which]
    least = np.minimum.accumulate(counts[::-1])[::-1].tolist()  # of a piece and all behind it
    load, used = loads.tolist(), tokens.tolist()  # the same once more: lists are read faster
    full, fulls = (used, tokens) if by_tokens else (load, loads)
    heap: list[tuple[float, int]] = list(zip(full, range(len(full)), strict=True))
    heapify(heap)
    for piece, own, count, small in zip(
        which.tolist(), pieces.loads[which].tolist(), counts.tolist(), least, strict=True
    ):
        # What was placed past the top of the heap left old entries; a bin that nothing else fits is done with.
        while heap and (heap[0][0] != full[heap[0][1]] or used[heap[0][1]] + small > cap):
            heappop(heap)
        if not heap:
            return False
        top = at = heap[0][1]
        if used[top] + count > cap:
            at = int(np.where(tokens + count <= cap, fulls, np.inf).argmin())
            if used[at] + count > cap:
                return False
        load[at] += own
        used[at] += count
        loads[at], tokens[at], places[piece] = load[at], used[at], at
        (heapreplace if at == top else heappush)(heap, (full[at], at))
    return True


def _exchange(which: Ints, pieces: Pieces, excess: Floats, used: Ints, cap: int, places: Ints, goal: float) -> None:
    """Full bins give an empty one a piece for a lighter one or for none, many pairs at once, while that helps."""
    count = np.bincount(places[which], minlength=len(excess))
    if len(excess) < 2 or not len(which):
        return
    # A table of what every bin has; -1 is nothing, whose load and tokens are the 0 behind the last.
    order = np.argsort(places[which], kind="stable")  # the heaviest of a bin first, as all are
    column = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    order, column = order[column < WIDTH], column[column < WIDTH]
    has = np.full((len(excess), int(column.max()) + 3), -1)
    has[places[which][order], column] = which[order]
    load, tokens = np.append(pieces.loads, 0.0), np.append(pieces.tokens, 0)
    turned = 0
    for _ in range(ROUNDS):
        ranked = np.argsort(-excess, kind="stable")
        half = len(ranked) // 2
        high, low = ranked[:half], ranked[::-1][:half]
        if turned:
            low = np.roll(low, turned)
        far = excess[high] - excess[low] > goal
        if not far.any():
            break
        high, low = high[far], low[far]
        gap = (excess[high] - excess[low]) / 2
        gives, takes = has[high], has[low]
        moved = load[gives][:, :, None] - load[takes][:, None, :]
        shift = tokens[gives][:, :, None] - tokens[takes][:, None, :]
        fits = (used[low][:, None, None] + shift <= cap) & (used[high][:, None, None] - shift <= cap)
        miss = np.where(fits, np.abs(moved - gap[:, None, None]), np.inf).reshape(len(high), -1)
        best = miss.argmin(axis=1)
        pair = np.arange(len(high))
        better = miss[pair, best] < gap * (1 - 1e-9)
        if not better.any():
            turned += 1
            if turned == min(half, 4):
                break
            continue
        turned = 0
        pair, best, high, low = pair[better], best[better], high[better], low[better]
        row, other = np.divmod(best, has.shape[1])
        given, taken = has[high, row], has[low, other]
        has[high, row], has[low, other] = taken, given
        excess[high] -= moved[pair, row, other]
        excess[low] += moved[pair, row, other]
        used[high] -= shift[pair, row, other]
        used[low] += shift[pair, row, other]
        places[given[given >= 0]] = low[given >= 0]
        places[taken[taken >= 0]] = high[taken >= 0]
