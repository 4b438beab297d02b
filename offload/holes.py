"""Free ranges of an address line, and which of them the next block gets."""

from __future__ import annotations

from bisect import bisect_left, insort


class Holes:
    """Free ranges of an address line, no two of them touching: by start, and by size for the best fit."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.sizes: dict[int, int] = {}
        self._ranked: list[tuple[int, int]] = []  # (size, start)
        self._next = 0  # where the last block taken ends

    def fit(self, size: int, end: int) -> int | None:
        """Start of the one to use, None if none has room.

        The one behind the last block taken: what a step takes then lies together and is one hole when the step is over,
        which with two graphs in flight halves what is wasted. Else the smallest, the first of equals. One that
        ends at ``end`` comes last, whatever its size: the less lies there, the less the arena grows.
        """
        if self.sizes.get(self._next, 0) >= size and self._next + self.sizes[self._next] != end:
            return self._next
        at = bisect_left(self._ranked, (size, 0))
        if at + 1 < len(self._ranked) and sum(self._ranked[at]) == end:
            at += 1
        return self._ranked[at][1] if at < len(self._ranked) else None

    def take(self, start: int, size: int) -> None:
        """Uses the beginning of one."""
        left = self._drop(start) - size
        self._next = start + size
        if left:
            self._put(start + size, left)

    def give(self, start: int, size: int) -> None:
        """Frees a range, joining what it touches."""
        at = bisect_left(self.starts, start)
        if at < len(self.starts) and self.starts[at] == start + size:
            size += self._drop(self.starts[at])
        if at and (before := self.starts[at - 1]) + self.sizes[before] == start:
            start, size = before, size + self._drop(before)
        self._put(start, size)

    def tail(self, end: int) -> int:
        """Bytes of the one that ends there, or 0."""
        if self.starts and self.starts[-1] + self.sizes[self.starts[-1]] == end:
            return self.sizes[self.starts[-1]]
        return 0

    @property
    def largest(self) -> int:
        return self._ranked[-1][0] if self._ranked else 0

    def _put(self, start: int, size: int) -> None:
        insort(self.starts, start)
        insort(self._ranked, (size, start))
        self.sizes[start] = size

    def _drop(self, start: int) -> int:
        size = self.sizes.pop(start)
        del self.starts[bisect_left(self.starts, start)]
        del self._ranked[bisect_left(self._ranked, (size, start))]
        return size
