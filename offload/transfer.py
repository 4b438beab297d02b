"""Streams, copies and events behind one small interface, with the same code above it on every backend.

    cuda    streams of the GPU's own (``transfer_cuda.py``); no ``record_stream`` anywhere
    cpu     threads as streams, real copies of ordinary memory (``transfer_cpu.py``)
    sim     a virtual clock, no memory at all (``transfer_sim.py``)

The compute stream is one of the streams: whichever is current where the caller is. Every piece of memory is a
:class:`Buffer` with a state that is checked, and everything that is done goes to the log (``log.py``), which says on
any backend what a GPU would be free to reorder. ``checker.py`` reads it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from .log import HOST, Log

if TYPE_CHECKING:
    from torch import Tensor

    from .arena import Block


@dataclass(frozen=True, eq=False)
class Stream:
    """A queue: what is asked of it happens in order. ``native`` is the backend's own."""

    name: str
    native: Any = None


@dataclass(frozen=True, eq=False)
class Event:
    """A point in a stream: reached when everything asked of the stream before it is done."""

    number: int
    stream: Stream
    native: Any = None


State = Literal["empty", "filled", "freed"]


class Buffer:
    """Bytes in one of the memories, from when they are there until they are given back.

    empty -> filled by a copy that was asked for -> freed. Device memory that is adopted is filled from the beginning.

    Args:
        memory: ``uint8`` tensor on the device, a block of the arena on the host, None on the virtual clock.
    """

    __slots__ = ("memory", "nbytes", "number", "state")

    def __init__(self, number: int, nbytes: int, memory: Any, state: State) -> None:
        self.number, self.nbytes, self.memory, self.state = number, nbytes, memory, state

    def must_be(self, *states: State) -> None:
        if self.state not in states:
            raise ValueError(f"transfer: buffer {self.number} is {self.state}; this needs it {' or '.join(states)}")


class Transfers:
    """What every backend does: states and log. A backend adds the methods that begin with an underscore.

    Args:
        log: where actions go; by default the latest ten thousand are kept.
    """

    rate: float = 25e9
    """Bytes per second that one direction of the link is taken to carry where nobody measured it."""

    def __init__(self, log: Log | None = None) -> None:
        self.log = Log() if log is None else log
        self._streams: dict[str, Stream] = {}
        self._numbers = count()

    def stream(self, name: str) -> Stream:
        """The stream of that name, made when it is first asked for."""
        if name not in self._streams:
            self._streams[name] = Stream(name, self._make(name))
        return self._streams[name]

    def current(self) -> Stream:
        """The stream that the caller computes on now. Ask every time: it changes."""
        raise NotImplementedError

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in device memory."""
        raise NotImplementedError

    def adopt(self, memory: Tensor | None, span: tuple[int, int], storage: tuple[int, ...]) -> Buffer:
        """Device memory that the current stream has written, or will have by the time it gets to what is asked next.

        Args:
            memory: ``uint8``.
            span, storage: which bytes of which storage; for the log.
        """
        buffer = Buffer(next(self._numbers), span[1] - span[0], memory, "filled")
        self.log.add("adopt", self.current().name, buffer.number, span=span, storage=storage)
        return buffer

    def host(self, block: Block | None, nbytes: int) -> Buffer:
        """A block of the arena."""
        buffer = Buffer(next(self._numbers), nbytes, block, "empty")
        self.log.add("new", HOST, buffer.number)
        return buffer

    def new(self, stream: Stream, nbytes: int) -> Buffer:
        """Device memory for use on ``stream``, which must be current: until the stream gets here it may still be in use
        as something else."""
        buffer = Buffer(next(self._numbers), nbytes, self._allocate(nbytes), "empty")
        self.log.add("new", stream.name, buffer.number)
        return buffer

    def free(self, stream: Stream | None, buffer: Buffer) -> None:
        """Gives memory back: to the allocator in the order of ``stream``, or a host block (None) at once."""
        buffer.must_be("empty", "filled")
        self.log.add("free", HOST if stream is None else stream.name, buffer.number)
        memory, buffer.memory, buffer.state = buffer.memory, None, "freed"
        if stream is None and memory is not None:
            memory.free()

    def copy(self, stream: Stream, out: Buffer, source: Buffer) -> None:
        """Asks for a copy of all bytes. Both must stay until it is done."""
        source.must_be("filled")
        out.must_be("empty", "filled")
        if out.nbytes != source.nbytes:
            raise ValueError(f"transfer: a copy of {source.nbytes} bytes into {out.nbytes}")
        self.log.add("copy", stream.name, out.number, source.number)
        out.state = "filled"
        self._copy(stream, out, source)

    def give(self, buffer: Buffer, saved: int, span: tuple[int, int]) -> None:
        """Says that the current stream will read bytes of a buffer, as those of a saved tensor."""
        buffer.must_be("filled")
        self.log.add("give", self.current().name, buffer.number, saved=saved, span=span)

    def record(self, stream: Stream) -> Event:
        return Event(self.log.add("record", stream.name), stream, self._record(stream))

    def wait(self, stream: Stream, event: Event) -> None:
        """What is asked of ``stream`` from now on happens after the event."""
        if stream is not event.stream:
            self._wait(stream, event)
            self.log.add("wait", stream.name, event=event.number)

    def done(self, event: Event) -> bool:
        """Whether the event was reached. If it was, the host has seen it."""
        reached = self._done(event)
        if reached:
            self.log.add("synchronize", HOST, event=event.number)
        return reached

    def synchronize(self, event: Event) -> None:
        """The host waits for the event."""
        self._synchronize(event)
        self.log.add("synchronize", HOST, event=event.number)

    def mark(self) -> Any:
        """A point in time of the current stream, for :meth:`seconds`."""
        return time.perf_counter()

    def seconds(self, start: Any, stop: Any) -> float | None:
        """Between two marks; None if they were not reached yet."""
        return stop - start

    def close(self) -> None:
        """Ends the streams when they have done what was asked."""

    def _make(self, name: str) -> Any:
        return None

    def _allocate(self, nbytes: int) -> Any:
        raise NotImplementedError

    def _copy(self, stream: Stream, out: Buffer, source: Buffer) -> None:
        raise NotImplementedError

    def _record(self, stream: Stream) -> Any:
        raise NotImplementedError

    def _wait(self, stream: Stream, event: Event) -> None:
        raise NotImplementedError

    def _done(self, event: Event) -> bool:
        raise NotImplementedError

    def _synchronize(self, event: Event) -> None:
        raise NotImplementedError


def make(name: Literal["auto", "cuda", "cpu"] = "auto") -> Transfers:
    """The backend of this machine, or the one that is named."""
    import torch

    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        from .transfer_cuda import CudaTransfers

        return CudaTransfers()
    from .transfer_cpu import CpuTransfers

    return CpuTransfers()
