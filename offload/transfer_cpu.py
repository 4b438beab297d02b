"""The CPU's backend of ``transfer.py``: threads as streams, real copies, a bandwidth and random delays if wanted.

The "device" is ordinary memory, and the host is the arena, which may lie in a file. That is of use where host memory is
short, and it lets everything above run without a GPU, in whatever order the delays make.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from .log import Log
from .transfer import Buffer, Event, Stream, Transfers

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 4 << 20
"""Bytes that are copied at a time, so that a slow link is slow throughout."""


class CpuTransfers(Transfers):
    """Threads as streams. Compute streams are names for what the calling threads do, which is always done at once.

    Args:
        bandwidth: bytes per second of each stream; None for as fast as it goes.
        delay: seconds; every copy begins later by a random time of up to this.
        seed: of the delays.
    """

    def __init__(
        self, *, bandwidth: float | None = None, delay: float = 0.0, seed: int = 0, log: Log | None = None
    ) -> None:
        super().__init__(log)
        self.rate = bandwidth or 2e9
        self._bandwidth, self._delay, self._seed = bandwidth, delay, seed
        self._compute = Stream("compute")
        self._places = threading.local()

    def current(self) -> Stream:
        return getattr(self._places, "stream", self._compute)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """As ``torch.cuda.stream``: another compute stream is current here."""
        before = self.current()
        self._places.stream = self._streams.setdefault(name, Stream(name))
        try:
            yield
        finally:
            self._places.stream = before

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def close(self) -> None:
        workers = [stream.native for stream in self._streams.values() if stream.native is not None]
        for worker in workers:
            worker.close()
        self._streams.clear()

    def _make(self, name: str) -> _Worker:
        return _Worker(name, random.Random(f"{self._seed} {name}"), self._delay, self._bandwidth)

    def _allocate(self, nbytes: int) -> Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8)

    def _copy(self, stream: Stream, out: Buffer, source: Buffer) -> None:
        to, of = _bytes(out.memory), _bytes(source.memory)
        if stream.native is None:
            to.copy_(of)
        else:
            stream.native.ask(lambda: stream.native.copy(to, of))

    def _record(self, stream: Stream) -> _Flag:
        flag = _Flag()
        if stream.native is None:
            flag.set()
        else:
            stream.native.ask(flag.set, always=True)
            flag.worker = stream.native
        return flag

    def _wait(self, stream: Stream, event: Event) -> None:
        if stream.native is None:
            event.native.reached()
        else:
            stream.native.ask(event.native.reached)

    def _done(self, event: Event) -> bool:
        return event.native.is_set()

    def _synchronize(self, event: Event) -> None:
        event.native.reached()


def _bytes(memory: Any) -> Tensor:
    """``uint8`` of device memory or of a block."""
    return getattr(memory, "bytes", memory)


class _Flag(threading.Event):
    worker: _Worker | None = None

    def reached(self) -> None:
        """Raises what the thread raised that was to reach it."""
        self.wait()
        if self.worker is not None and self.worker.error is not None:
            raise RuntimeError("transfer: a copy failed") from self.worker.error


class _Worker:
    """A thread that does one thing after the other. After a failure it does nothing more but to say so."""

    def __init__(self, name: str, chance: random.Random, delay: float, bandwidth: float | None) -> None:
        self.error: BaseException | None = None
        self._chance, self._delay, self._bandwidth = chance, delay, bandwidth
        self._jobs: SimpleQueue[tuple[Callable[[], Any], bool] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"transfer-{name}", daemon=True)
        self._thread.start()

    def ask(self, job: Callable[[], Any], always: bool = False) -> None:
        self._jobs.put((job, always))

    def copy(self, out: Tensor, source: Tensor) -> None:
        if self._delay:
            time.sleep(self._chance.random() * self._delay)
        end = time.perf_counter()
        for start in range(0, out.numel(), CHUNK):  # by memmove: torch's would wake threads of its own here
            size = min(CHUNK, out.numel() - start)
            ctypes.memmove(out.data_ptr() + start, source.data_ptr() + start, size)
            if self._bandwidth:
                end += size / self._bandwidth
                time.sleep(max(0.0, end - time.perf_counter()))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, always = item
            if self.error is not None and not always:
                continue
            try:
                job()
            except BaseException as error:
                self.error = error
            del job, item  # they hold memory, and the next may be long in coming
