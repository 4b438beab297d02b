"""When tensors will be wanted back: as long after each other as in the step before."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from .budget import Choice, Limits, Saved, plan, scaled

if TYPE_CHECKING:
    from .saved import Interval
    from .transfer import Transfers

SLACK = 0.2
"""A copy is begun earlier than its bytes over the rate need, by this part of that time."""


class Pace:
    """Times of one forward and its backward, from the marks of the step before.

    Marks are points on the compute stream, so that a host which runs ahead does not matter.
    """

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._noted: list[tuple[int, int, Any, Any]] = []  # (place, bytes, when saved, when first used)
        self._began: dict[int, Any] = {}
        self._marks: dict[int, dict[int, tuple[int, Any, Any]]] = {}  # graph -> place -> (bytes, saved, used)
        self.last: list[Saved] = []
        self._order: list[float] = []  # when they were used

    def begin(self, graph: int) -> None:
        """A forward begins. Of the graphs before it the latest that was run backward is what is known from now on."""
        done = [
            number for number, marks in self._marks.items() if any(used is not None for _, _, used in marks.values())
        ]
        if done and (times := self._times(done[-1])):
            self.last = times
            self._order = sorted(one.used for one in times)
        for number in [number for number in self._marks if number <= graph - 4]:
            del self._marks[number], self._began[number]
        self._marks[graph], self._began[graph] = {}, self._transfers.mark()

    def saved(self, known: Interval) -> None:
        if (marks := self._marks.get(known.graph)) is not None:
            marks[known.place] = (known.nbytes, self._transfers.mark(), None)

    def used(self, known: Interval) -> None:
        """For the first time; later ones do not count."""
        marks = self._marks.get(known.graph)
        if marks is not None and known.place in marks and marks[known.place][2] is None:
            nbytes, saved, _ = marks[known.place]
            marks[known.place] = (nbytes, saved, self._transfers.mark())

    def due(self, now: Interval, wanted: Interval, waiting: int) -> bool:
        """Whether a copy back would be late if it were asked for at the next opportunity, not now.

        Args:
            now: interval that the backward has got to.
            waiting: bytes that are on their way back already.
        """
        if len(self._marks.get(now.graph, ())) != len(self.last) or not self.last[now.place].nbytes:
            return True  # nothing is known of such a step: as early as there is room
        ratio = now.nbytes / self.last[now.place].nbytes
        shorter = min(1.0, ratio * ratio)  # attention's time, if the sequence is shorter; if it is longer, any is early
        reached = self.last[now.place].used
        lead = (self.last[wanted.place].used - reached) * shorter
        later = bisect_right(self._order, reached)
        gap = (self._order[later] - reached) * shorter if later < len(self._order) else 0.0
        takes = (waiting + wanted.nbytes) / self._transfers.rate * (1 + SLACK)
        return lead - takes <= gap

    def _times(self, graph: int) -> list[Saved]:
        """Of each place; empty if some is not known."""
        found: list[Saved] = []
        start = self._began[graph]
        marks = self._marks[graph]
        for place in sorted(marks):
            nbytes, saved, used = marks[place]
            if used is None:
                used = saved  # never asked for
            times = self._transfers.seconds(start, saved), self._transfers.seconds(start, used)
            if times[0] is None or times[1] is None or place != len(found):
                return []
            found.append(Saved(str(place), nbytes, times[0], times[1]))
        return found


class Budget:
    """Which intervals leave the device: none as long as all fit, and those that ``budget.py`` chooses otherwise.

    Args:
        device_bytes: of saved tensors that may stay.
        host_bytes: of the arena.
    """

    def __init__(self, device_bytes: int, host_bytes: int, pace: Pace, rate: float) -> None:
        self._limits = Limits(device_bytes, host_bytes, rate, rate)
        self._pace = pace
        self._recorded: list[Saved] = []
        self._choices: dict[int, tuple[Choice, ...]] = {}
        self._step: tuple[Choice, ...] | None = None

    def begin(self) -> None:
        """A forward begins.

        Raises:
            ValueError: the step before shows that the budget cannot be met.
        """
        self._step = None
        if not self._recorded and self._pace.last:
            self._recorded = self._pace.last
            self._for(0)

    def leaves(self, place: int, nbytes: int) -> bool:
        """Whether the interval at that place of the step leaves."""
        if not self._recorded:
            return True
        if place == 0 or self._step is None:
            first = self._recorded[min(place, len(self._recorded) - 1)].nbytes
            self._step = self._for(_eighths(nbytes / max(first, 1)))
        return place >= len(self._step) or self._step[place] == "offload"

    def _for(self, eighths: int) -> tuple[Choice, ...]:
        """Choices for steps that are ``2 ** (eighths / 8)`` times as long as the recorded one."""
        if eighths not in self._choices:
            self._choices[eighths] = plan(scaled(self._recorded, 2 ** (eighths / 8)), self._limits).choices
        return self._choices[eighths]


def _eighths(ratio: float) -> int:
    """The length's bucket, rounded up: of an octave there are eight."""
    return math.ceil(8 * math.log2(ratio) - 1e-9) if ratio > 0 else 0
