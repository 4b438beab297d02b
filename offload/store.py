"""Bytes of saved tensors on their way to the arena and back: what ``activations.py`` decides, this does.

Out: the copy waits for the tensor's stream, and the tensor is let go of when the copy is done. While more bytes than
allowed are on their way, the tensor's own stream waits for the oldest copy, so that memory goes back to the allocator
in the order of the stream that it came from. Back: memory for a tensor is allocated on the stream that wants it; the
copy waits for that stream, since what was there before may still be in use, and the stream waits for the copy.

Streams are asked for every time, never remembered from another call: the current one changes.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .arena import Arena
from .log import HOST
from .pace import Pace
from .saved import Counts, Handle, Interval, Layout, modified, span
from .transfer import Buffer, Event, Stream, Transfers

_in_gc: set[int] = set()
"""Threads whose garbage is being collected: that may be in the middle of anything, with any lock held."""


def _watch(phase: str, info: object) -> None:
    (_in_gc.add if phase == "start" else _in_gc.discard)(threading.get_ident())


gc.callbacks.append(_watch)


class Store:
    """Intervals of storages, wherever they are. Callers hold :attr:`lock`, but for :meth:`forget`.

    Args:
        in_flight: most bytes on their way out at once.
        landing: most intervals fetched ahead at once.
    """

    def __init__(self, arena: Arena, transfers: Transfers, in_flight: int, landing: int) -> None:
        self.arena, self.transfers, self.in_flight, self.landing = arena, transfers, in_flight, landing
        self.counts, self.pace, self.lock = Counts(), Pace(transfers), threading.Lock()
        self.graph = 0
        self._handles = self._flight = 0
        self._storages: dict[int, tuple[StorageWeakRef, list[Interval]]] = {}
        self._lines: dict[int, list[weakref.ref[Interval]]] = {}  # of each graph, in the order of saving
        self._lost: deque[tuple[int, Interval]] = deque()
        self._leaving: deque[Interval] = deque()
        self._ending: deque[tuple[list[Event], Buffer]] = deque()
        self._ahead: dict[int, Interval] = {}  # fetched, and nobody has it yet; the oldest first

    def begin(self) -> None:
        """Another forward begins."""
        self.collect()
        self._lines = {graph: line for graph, line in self._lines.items() if line}
        self.graph += 1
        self.pace.begin(self.graph)

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, tensor: Tensor, keep: tuple[int, int], kind: str) -> Handle:
        """Something to hold instead of a tensor.

        Args:
            keep: bytes of its storage that matter, with the tensor's own among them.
            kind: of the interval, if it is a new one.
        """
        self.counts.saved += 1
        known = self._find(tensor, span(tensor)) or self._begin(tensor, *keep, kind)
        layout = Layout(tensor.dtype, tuple(tensor.shape), tensor.stride())
        self._handles += 1
        handle = Handle(self._handles, known, layout, self.offset(known, tensor), self.forget)
        known.handles.add(handle.number)
        known.wanted.add(handle.number)
        self.transfers.log.add(
            "save", self.current().name, saved=handle.number, span=span(tensor), storage=known.identity
        )
        return handle

    def offset(self, known: Interval, tensor: Tensor) -> int:
        """Bytes from the beginning of the interval to the tensor's."""
        return span(tensor)[0] - known.start

    def current(self) -> Stream:
        return self.transfers.current()

    def of_storage(self, cdata: int) -> list[Interval]:
        return self._storages[cdata][1] if cdata in self._storages else []

    def _find(self, tensor: Tensor, own: tuple[int, int]) -> Interval | None:
        """An interval that has the tensor's bytes as they are now."""
        for known in self.of_storage(tensor.untyped_storage()._cdata):
            if known.version == tensor._version and known.start <= own[0] and own[1] <= known.stop:
                return known
        return None

    def _begin(self, tensor: Tensor, start: int, stop: int, kind: str) -> Interval:
        storage, home = tensor.untyped_storage(), self.current()
        self.counts.intervals += 1
        # While the weak reference is there, no other storage gets the same address.
        weak, others = self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), []))
        identity = (others[0].identity[0] if others else self.counts.intervals, tensor._version)
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, start, (stop - start,), (1,))
        source = self.transfers.adopt(memory, (start, stop), identity)
        line = self._lines.setdefault(self.graph, [])
        made = Interval(
            len(line), self.graph, identity, weak.cdata, start, stop, tensor._version, kind, home,
            self.transfers.record(home), tensor.detach(), weakref.ref(tensor), source,
        )  # fmt: skip
        others.append(made)
        line.append(weakref.ref(made))
        self.pace.saved(made)
        return made

    # --- out --------------------------------------------------------------------------------------------------------

    def depart(self, known: Interval) -> None:
        """Asks for the copy to the arena.

        Raises:
            ArenaFull: the interval stays where it is.
        """
        self._make_room(known.nbytes)
        block = self.arena.take(known.nbytes)
        assert known.source is not None
        known.host = self.transfers.host(block, known.nbytes)
        out = self.transfers.stream("out")
        self.transfers.wait(out, known.ready)
        self.transfers.copy(out, known.host, known.source)
        known.copied = self.transfers.record(out)
        self._leaving.append(known)
        self._flight += known.nbytes
        self.counts.offloaded += 1
        self.counts.offloaded_bytes += known.nbytes
        self.counts.peak_flight = max(self.counts.peak_flight, self._flight)

    def _make_room(self, nbytes: int) -> None:
        """Lets go of what is out; has the compute wait for the oldest while too much is on its way."""
        self._settle()
        while self._leaving and self._flight + nbytes > self.in_flight:
            self.before_release(self._leaving[0])
            self._release(self._leaving.popleft())

    def before_release(self, known: Interval) -> None:
        assert known.copied is not None
        self.transfers.wait(known.home, known.copied)

    def _settle(self) -> None:
        while self._leaving and (copied := self._leaving[0].copied) is not None and self.transfers.done(copied):
            self._release(self._leaving.popleft())

    def _release(self, known: Interval) -> None:
        """It is out: the device's bytes go back."""
        self._flight -= known.nbytes
        if known.alias is not None and known.alias._version != known.version:
            known.spoiled = True  # nobody knows which bytes were copied before they were written
        self._let_go(known)
        if not known.handles:
            self._end_host(known)

    def _let_go(self, known: Interval) -> None:
        known.alias = None
        for reader in known.readers:
            self.transfers.wait(known.home, self.transfers.record(reader))
        known.readers.clear()
        if known.source is not None:
            self.transfers.free(known.home, known.source)
            known.source = None

    # --- back -------------------------------------------------------------------------------------------------------

    def give(self, handle: Handle) -> Tensor:
        """The tensor, as it was saved, for use on the current stream.

        Raises:
            RuntimeError: it was written to.
        """
        known, at = handle.interval, self.current()
        if known.changed():
            raise modified(handle.layout, known.version)
        self.pace.used(known)
        if known.source is not None:  # it has not left
            if at is not known.home:
                self.transfers.wait(at, known.ready)
                known.readers.add(at)
            buffer = known.source
            self._foresee(known, at)
        else:
            if known.landing is not None and known.landing_home is not at:  # its memory is another stream's
                self._drop(known)
            if known.landing is None:
                self.counts.unforeseen += 1
                self._fetch(known, at)
            self._foresee(known, at)
            self.before_use(known, at)
            self._ahead.pop(id(known), None)
            assert known.landing is not None
            buffer = known.landing
        self.transfers.give(buffer, handle.number, (handle.offset, handle.offset + handle.layout.nbytes))
        tensor = handle.layout.on(buffer.memory, handle.offset)
        known.wanted.discard(handle.number)
        if known.source is None and not known.wanted:  # all who saved it have it: from here on it is autograd's
            known.passes += 1
            self._drop(known)
        return tensor

    def before_use(self, known: Interval, at: Stream) -> None:
        assert known.landed is not None
        self.transfers.wait(at, known.landed)

    def _fetch(self, known: Interval, at: Stream) -> None:
        """Asks for the copy back."""
        assert known.host is not None and known.copied is not None
        back = self.transfers.stream("back")
        known.landing, known.landing_home = self.transfers.new(at, known.nbytes), at
        known.wanted = set(known.handles)
        self.before_landing(back, at)
        self.transfers.wait(back, known.copied)
        self.land(known, back)
        self.counts.reloaded += 1

    def before_landing(self, back: Stream, at: Stream) -> None:
        """The memory is free for the copy when the stream that it was allocated on gets here."""
        self.transfers.wait(back, self.transfers.record(at))

    def land(self, known: Interval, back: Stream) -> None:
        assert known.landing is not None and known.host is not None
        self.transfers.copy(back, known.landing, known.host)
        known.landed = self.transfers.record(back)

    def _foresee(self, known: Interval, at: Stream) -> None:
        """Fetches what the backward will ask for next: what was saved before, the latest first."""
        for stale in [one for one in self._ahead.values() if one.graph != known.graph or one.place > known.place]:
            if len(self._ahead) >= self.landing:  # another backward's, or passed by: it makes room
                self._drop(stale)
        line = self._lines.get(known.graph, [])
        waiting = sum(one.nbytes for one in self._ahead.values())
        for place in range(known.place - 1, -1, -1):
            if len(self._ahead) >= self.landing:
                return
            one = line[place]()
            if one is None or not one.handles or one.landing is not None or one.source is not None:
                continue
            if one.passes > known.passes:  # this backward has been there
                continue
            if not self.pace.due(known, one, waiting):
                return
            try:
                self._fetch(one, at)
            except torch.OutOfMemoryError:  # nobody needs it yet
                return
            self._ahead[id(one)] = one
            waiting += one.nbytes

    def _drop(self, known: Interval) -> None:
        """Forgets the bytes on the device; the arena has them still."""
        landing, home, landed = known.landing, known.landing_home, known.landed
        assert landing is not None and home is not None and landed is not None
        self.transfers.wait(home, landed)  # a copy under way must not write into what is another's by then
        self.transfers.free(home, landing)
        self._ahead.pop(id(known), None)
        known.landing = known.landing_home = None
        if not known.handles:
            self._end_host(known)

    # --- the end ----------------------------------------------------------------------------------------------------

    def forget(self, number: int, known: Interval) -> None:
        """Autograd let go of a handle; in any thread, at any point. If this is no time for it, the rest waits for the
        next call of anything here."""
        self._lost.append((number, known))
        if threading.get_ident() not in _in_gc and self.lock.acquire(blocking=False):
            try:
                self.collect()
            finally:
                self.lock.release()

    def collect(self) -> None:
        """Ends what nobody wants any more, as far as copies have got."""
        self._settle()
        while self._lost:
            number, known = self._lost.popleft()
            known.handles.discard(number)
            known.wanted.discard(number)
            self.transfers.log.add("forget", HOST, saved=number)
            if not known.handles:
                self._end(known)
        for _ in range(len(self._ending)):
            events, buffer = self._ending.popleft()
            if all(self.transfers.done(event) for event in events):
                self.transfers.free(None, buffer)
            else:
                self._ending.append((events, buffer))

    def _end(self, known: Interval) -> None:
        others = self.of_storage(known.cdata)
        if known in others:
            others.remove(known)
            if not others:
                del self._storages[known.cdata]
        line = self._lines.get(known.graph)
        if line is not None:
            while line and ((last := line[-1]()) is None or not last.handles):
                line.pop()
            if not line and known.graph != self.graph:
                del self._lines[known.graph]
        if known.copied is None:
            self._let_go(known)
        elif known.landing is not None:
            self._drop(known)
        elif known.source is None:
            self._end_host(known)
        # else it is on its way out, and ends when it is

    def _end_host(self, known: Interval) -> None:
        """The arena's block goes back when the host has seen that no copy needs it."""
        if known.host is not None and known.copied is not None:
            events = [known.copied] if known.landed is None else [known.copied, known.landed]
            self._ending.append((events, known.host))
            known.host = None

    def finish(self) -> None:
        """Waits for the copies under way."""
        for known in list(self._leaving):
            if known.copied is not None:
                self.transfers.synchronize(known.copied)
        for events, _ in list(self._ending):
            for event in events:
                self.transfers.synchronize(event)
        self.collect()
        self.collect()

    @property
    def live(self) -> int:
        """Intervals that some graph may still ask for."""
        return sum(len(known) for _, known in self._storages.values())
