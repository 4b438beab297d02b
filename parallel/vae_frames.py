"""Which rank has which frames of a video, and what ranks send each other so that causal convolutions go on: integers.

Frames count from the beginning of the video, at the rate of the place in the network where they are. A *cut* is the
``ranks + 1`` borders of the frames that are worked on together (a *window*): rank r has ``[cut[r], cut[r + 1])``, which
may be empty. A causal convolution also reads the frames just before its own: the *halo*.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

Cut = tuple[int, ...]
Tails = tuple[tuple[int, int], ...]
"""Frames before the window that are still read, and who has each."""


class Piece(NamedTuple):
    """Frames ``[start, stop)`` that go to a rank or come from it."""

    rank: int
    start: int
    stop: int


class Halo(NamedTuple):
    """What a rank sends and receives for one convolution, and which frames of its halo it still has itself."""

    sends: tuple[Piece, ...]
    receives: tuple[Piece, ...]
    own: tuple[int, int]


def up(frame: int) -> int:
    """A border after the temporal upsampling: the first frame stays one, each other becomes two."""
    return max(0, 2 * frame - 1)


def down(frame: int) -> int:
    """A border after the temporal downsampling; the inverse of :func:`up` where there is one."""
    return (frame + 1) // 2


def balanced(wished: Sequence[int]) -> Cut:
    """The cut with the smallest largest part that moves the fewest frames from where they are, border by border.

    Args:
        wished: the borders as they are (or, at a beginning, as they would be without rounding).
    """
    first, last, ranks = wished[0], wished[-1], len(wished) - 1
    most = -(-(last - first) // ranks)
    cut = [first]
    for rank in range(1, ranks):
        low = max(cut[-1], last - (ranks - rank) * most)
        cut.append(min(max(wished[rank], low), cut[-1] + most))
    return (*cut, last)


def even(first: int, last: int, ranks: int) -> Cut:
    """Frames in parts that differ by one at most. Those before get more: the video's first frame is less work."""
    return balanced([first - (first - last) * rank // ranks for rank in range(ranks + 1)])


def windows(latents: int, ranks: int, most: int, alone: bool = False) -> list[tuple[int, int]]:
    """Latent frames in groups that ranks work on together, of at most ``most`` per rank, all about as large.

    Args:
        alone: the first frame is a group of its own, as in diffusers; it always is where there is one rank: nothing is
            before it, which saves work.
    """
    first = int(alone or ranks == 1)
    count = -(-(latents - first) // (ranks * most))
    borders = [first + (latents - first) * number // count for number in range(count + 1)] if count else [first]
    return [(0, 1)] * first + list(pairwise(borders))


def owner(cut: Cut, tails: Tails, frame: int) -> int:
    """Who has a frame of the window, or one of those just before it."""
    return bisect_right(cut, frame) - 1 if frame >= cut[0] else dict(tails)[frame]


@lru_cache(4096)
def halo(cut: Cut, tails: Tails, rank: int, width: int, first: int = 0) -> Halo:
    """For a convolution that reads ``width`` frames before each; frames before ``first`` are not there (zeros)."""
    cut = tuple(max(border, first) for border in cut)
    sends, receives, own = [], [], (cut[rank], cut[rank])
    for reader in range(len(cut) - 1):
        if cut[reader] == cut[reader + 1]:
            continue
        frames = range(max(cut[reader] - width, first), cut[reader])
        for who in dict.fromkeys(owner(cut, tails, frame) for frame in frames):
            held = [frame for frame in frames if owner(cut, tails, frame) == who]
            start, stop = held[0], held[-1] + 1
            if who == reader == rank:
                own = (start, stop)
            elif who == rank:
                sends.append(Piece(reader, start, stop))
            elif reader == rank:
                receives.append(Piece(who, start, stop))
    return Halo(tuple(sends), tuple(receives), own)


def kept(cut: Cut, tails: Tails, width: int) -> Tails:
    """The last frames up to the window's end, and who has them: what the next window reads."""
    return tuple(
        (frame, owner(cut, tails, frame))
        for frame in range(cut[-1] - width, cut[-1])
        if frame >= cut[0] or frame in dict(tails)
    )


@lru_cache(4096)
def moved(old: Cut, new: Cut, rank: int) -> Halo:
    """What a rank sends and receives when frames are cut anew; ``own`` are those that stay."""

    def both(one: int, other: int) -> tuple[int, int]:
        return max(old[one], new[other]), min(old[one + 1], new[other + 1])

    others = [other for other in range(len(old) - 1) if other != rank]
    sends = tuple(Piece(other, *both(rank, other)) for other in others if both(rank, other)[0] < both(rank, other)[1])
    receives = tuple(
        Piece(other, *both(other, rank)) for other in others if both(other, rank)[0] < both(other, rank)[1]
    )
    start, stop = both(rank, rank)
    return Halo(sends, receives, (start, max(start, stop)))
