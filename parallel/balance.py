"""Which rank computes which sequence, so that all end at the same time.

Sequences differ in load by a factor of a thousand, and in every micro-batch ranks wait for the last. A *window* of them
is placed at once: for each its micro-batch and its rank, or an aligned group of 2, 4, 8, ... ranks that compute it
together. Everything follows from loads, tokens and numbers of ranks: no rank asks another, and all find the same.

How: a sequence is cut only if its load alone is above the mean, if its tokens pass the cap, or if nothing else brings
the window close to the lower bound. What is left whole goes to the emptiest rank, heaviest first, and is then exchanged
in pairs (:mod:`bernini.parallel.fill`).

Source: facts on systems, section 4; groups of several sizes for long sequences are KnapFormer's idea
(arXiv 2508.06001).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .fill import Bins, Floats, Ints, Pieces, fill, heights
from .workload import Sizes as Sizes
from .workload import Workload as Workload

LEAST = 4096
"""Tokens from which on a sequence is cut: below, two exchanges per layer cost more than they save."""
GOOD, EVEN = 0.0025, 0.0075
"""Time above the lower bound, and difference of ranks' loads, as parts of the bound: nothing better is looked for."""
FINER, TRIES = 0.8, 20
"""The largest load of a piece falls so from try to try, and how often."""
MORE, DRAWN = 250, 32_000
"""Tries with limits drawn at random, and items in all of them, at most: a window of 4096 has none."""
CLOSE = 0.05
"""Above the bound, as a part of it: nothing is drawn for windows that are further away."""


@dataclass(frozen=True)
class Item:
    """A sequence.

    Args:
        tokens: what it takes in memory.
        load: seconds of one rank that computes it alone, or any one unit. Not negative.
    """

    tokens: int
    load: float


class Piece(NamedTuple):
    """A number of an item, computed by ranks ``[first, first + size)``; ``size`` is a power of two, and
    ``first % size == 0``."""

    item: int
    first: int
    size: int


@dataclass(frozen=True)
class Placement:
    """
    Args:
        micros: pieces of every micro-batch in the one order in which all ranks take them: larger groups first, then
            longer sequences. So groups never wait for each other in a circle, nor for a rank that is late. A rank may
            have none.
        spans: loads of every micro-batch and rank.
    """

    micros: tuple[tuple[Piece, ...], ...]
    spans: tuple[tuple[float, ...], ...]

    @property
    def loads(self) -> tuple[float, ...]:
        """Of every rank in all micro-batches."""
        return tuple(map(math.fsum, zip(*self.spans, strict=True)))

    @property
    def seconds(self) -> float:
        """Of the window, in the unit of loads: a micro-batch ends with its last rank."""
        return math.fsum(map(max, self.spans))

    def of(self, rank: int, micro: int = 0) -> tuple[Piece, ...]:
        """What a rank computes in a micro-batch, in this order."""
        return tuple(piece for piece in self.micros[micro] if piece.first <= rank < piece.first + piece.size)


def place(
    items: Sequence[Item], ranks: int, *, cap_tokens: int, micros: int = 1, largest: int | None = None,
    least: int = LEAST, overhead: float = 0.0,
) -> Placement:  # fmt: skip
    """Places a window of sequences: every one exactly once. The same loads for any order of the same items.

    Args:
        cap_tokens: of a rank in a micro-batch. An item counts ``ceil(tokens / size)`` for each rank of its group.
        micros: micro-batches.
        largest: ranks of a group, at most; a power of two. Default: as many as there are.
        least: tokens from which on an item is cut for balance.
        overhead: of a group, as a part of the load: each of its ranks takes ``load / size * (1 + overhead)``.

    Raises:
        ValueError: an argument makes no sense, or no way was found in which all fits: with the numbers.
    """
    loads, tokens, top = _checked(items, ranks, cap_tokens, micros, largest, overhead)
    order = np.lexsort((-tokens, -loads))
    window = _Window(loads[order], tokens[order], ranks, micros, cap_tokens, top, least, overhead)
    if tokens.sum() > window.room:
        raise window.refusal
    good, even = (1 + GOOD) * window.bound, EVEN * window.bound
    best: tuple[float, float, Bins, Pieces] | None = None
    for drawn, pieces in window.tries():
        if drawn and (best is None or best[0] > (1 + CLOSE) * window.bound):
            break
        bins = window.fill(pieces)
        if bins is None:
            continue
        cost = max(bins.seconds, good), max(bins.spread, even)
        if best is None or cost < best[:2]:
            best = *cost, bins, pieces
        if cost == (good, even):
            break
    return _placement(order, tokens, *(best[2:] if best else window.tight()))


def lower_bound(
    items: Sequence[Item], ranks: int, *, cap_tokens: int, micros: int = 1, largest: int | None = None,
    overhead: float = 0.0,
) -> float:  # fmt: skip
    """No placement takes less: the larger of the mean load of a rank and of the largest piece of the largest group.

    Items that the cap cuts count with their overhead. The cap does nothing else to the bound: with items cut as finely
    as one likes, all ranks would have the mean load and the mean tokens.
    """
    loads, tokens, top = _checked(items, ranks, cap_tokens, micros, largest, overhead)
    return _Window(loads, tokens, ranks, micros, cap_tokens, top, 0, overhead).bound


@dataclass(frozen=True)
class _Window:
    """Items, heaviest first, and the limits."""

    loads: Floats
    tokens: Ints
    ranks: int
    micros: int
    cap: int
    top: int
    least: int
    overhead: float

    @property
    def room(self) -> int:
        return self.ranks * self.micros * self.cap

    @property
    def refusal(self) -> ValueError:
        return ValueError(
            f"{len(self.tokens)} items of {int(self.tokens.sum())} tokens, the longest of {int(self.tokens.max())}, do "
            f"not fit {self.ranks} ranks x {self.micros} micro-batches x {self.cap} tokens (= {self.room}), in groups "
            f"of at most {self.top}"
        )

    @cached_property
    def forced(self) -> Ints:
        """Ranks that every item needs for its tokens."""
        return _powers(np.ceil(self.tokens / self.cap))

    def pieces(self, sizes: Ints) -> Pieces:
        loads = self.loads / sizes * np.where(sizes > 1, 1 + self.overhead, 1.0)
        return Pieces(sizes, loads, -(-self.tokens // sizes))

    @cached_property
    def bound(self) -> float:
        forced = self.pieces(self.forced)
        mean = math.fsum((forced.loads * forced.sizes).tolist()) / self.ranks
        smallest = np.minimum(forced.loads, self.pieces(np.full_like(self.forced, self.top)).loads)
        return max(mean, float(smallest.max(initial=0.0)))

    def tries(self) -> Iterator[tuple[bool, Pieces]]:
        """Ways to cut, one finer than the other, the coarsest first that may come close to the bound.

        With few items none of these may be good: then every item gets a limit of its own, drawn with the same seed
        always; ``True`` tells these.
        """
        # With all cut as finely as can be, the mean is so much higher: a piece may be as heavy.
        start, draw = (self.bound or 1.0) * (1 + self.overhead) * (1 + 1e-9), np.random.default_rng(0)
        seen = set()
        for turn in range(max(TRIES, min(MORE, DRAWN // max(len(self.loads), 1)))):
            limit: Floats | float = start * FINER**turn
            if turn >= TRIES:
                limit = start * draw.uniform(0.1, 1.0) * draw.uniform(0.25, 1.0, len(self.loads))
            wanted = np.where(self.tokens >= self.least, np.ceil(self.loads / limit), 1)
            sizes = np.maximum(np.minimum(_powers(wanted), self.top), self.forced)
            if (name := sizes.tobytes()) in seen:
                continue
            pieces = self.pieces(sizes)
            if turn >= TRIES - 1 or heights(pieces, self.ranks, self.micros).sum() <= (1 + GOOD) * start:
                seen.add(name)
                yield turn >= TRIES, pieces

    def fill(self, pieces: Pieces) -> Bins | None:
        """By load, or by tokens where that does not fit."""
        goal = GOOD * self.bound / self.micros
        bins = fill(pieces, self.ranks, self.micros, self.cap, goal)
        return bins or fill(pieces, self.ranks, self.micros, self.cap, goal, by_tokens=True)

    def tight(self) -> tuple[Bins, Pieces]:
        """Where no balanced way fits: the longest pieces are cut until one does."""
        sizes = self.forced
        while True:
            pieces = self.pieces(sizes)
            if (bins := self.fill(pieces)) is not None:
                return bins, pieces
            coarse = np.where(sizes < self.top, pieces.tokens, 0)
            if coarse.max(initial=0) <= 1:
                break
            sizes = np.where(coarse * 2 > coarse.max(), sizes * 2, sizes)
        raise self.refusal


def _checked(
    items: Sequence[Item], ranks: int, cap: int, micros: int, largest: int | None, overhead: float
) -> tuple[Floats, Ints, int]:
    if min(ranks, cap, micros) < 1 or overhead < 0:
        raise ValueError(f"{ranks} ranks, {micros} micro-batches, a cap of {cap} tokens, an overhead of {overhead}")
    if largest is not None and (largest < 1 or largest & (largest - 1)):
        raise ValueError(f"groups of at most {largest} ranks: it has to be a power of two")
    loads = np.array([item.load for item in items], np.float64)
    tokens = np.array([item.tokens for item in items], np.int64)
    bad = np.flatnonzero((tokens < 0) | ~(np.isfinite(loads) & (loads >= 0)))
    if len(bad):
        raise ValueError(f"item {bad[0]} has {items[bad[0]].tokens} tokens and a load of {items[bad[0]].load}")
    top = 1 << (min(largest or ranks, ranks).bit_length() - 1)
    if len(tokens) and -(-int(tokens.max()) // top) > cap:
        at = int(tokens.argmax())
        raise ValueError(f"item {at} has {int(tokens[at])} tokens, and {top} ranks take {top} x {cap}")
    return loads, tokens, top


def _powers(least: Floats) -> Ints:
    """The powers of two that are not less."""
    return (1 << np.ceil(np.log2(np.maximum(least, 1))).astype(np.int64)).astype(np.int64)


def _placement(order: Ints, tokens: Ints, bins: Bins, pieces: Pieces) -> Placement:
    micros: list[list[Piece]] = [[] for _ in bins.loads]
    ranked = np.lexsort((bins.firsts, -tokens[order], -pieces.sizes))
    columns = (bins.micros[ranked], order[ranked], bins.firsts[ranked], pieces.sizes[ranked])
    for micro, *piece in zip(*(column.tolist() for column in columns), strict=True):
        micros[micro].append(Piece(*piece))
    return Placement(tuple(map(tuple, micros)), tuple(map(tuple, bins.loads.tolist())))
