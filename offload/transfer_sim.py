"""A virtual clock behind the interface of ``transfer.py``: what a schedule would cost, without memory or time.

Streams are ends of queues, in seconds. A copy takes its bytes over the link's rate; compute takes what
:meth:`SimTransfers.work` says. Asking costs nothing, and the host runs ahead as far as it is let.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .log import Log
from .transfer import Buffer, Event, Stream, Transfers


class _Clock:
    __slots__ = ("now", "stalled")

    def __init__(self) -> None:
        self.now = self.stalled = 0.0


class SimTransfers(Transfers):
    """Args:
    rates: bytes per second of streams by their names.
    rate: of the others.
    """

    def __init__(self, rate: float, rates: Mapping[str, float] | None = None, log: Log | None = None) -> None:
        super().__init__(log)
        self.rate, self._rates = rate, dict(rates or {})
        self.host_now = 0.0

    def current(self) -> Stream:
        return self.stream("compute")

    def holds(self, tensor: Any) -> bool:
        return True

    def work(self, stream: Stream, seconds: float) -> None:
        """So long a piece of compute."""
        clock: _Clock = stream.native
        clock.now = max(clock.now, self.host_now) + seconds

    def now(self, stream: Stream) -> float:
        """Seconds until everything asked of the stream so far is done."""
        return stream.native.now

    def stalled(self, stream: Stream) -> float:
        """Seconds that the stream spent waiting for events."""
        return stream.native.stalled

    def mark(self) -> float:
        return self.now(self.current())

    def _make(self, name: str) -> _Clock:
        return _Clock()

    def _allocate(self, nbytes: int) -> None:
        return None

    def _copy(self, stream: Stream, out: Buffer, source: Buffer) -> None:
        self.work(stream, out.nbytes / self._rates.get(stream.name, self.rate))

    def _record(self, stream: Stream) -> float:
        return max(stream.native.now, self.host_now)

    def _wait(self, stream: Stream, event: Event) -> None:
        clock: _Clock = stream.native
        late = event.native - max(clock.now, self.host_now)
        if late > 0:
            clock.stalled += late
            clock.now = event.native

    def _done(self, event: Event) -> bool:
        return event.native <= max(self.host_now, self.now(self.current()))

    def _synchronize(self, event: Event) -> None:
        self.host_now = max(self.host_now, event.native)
