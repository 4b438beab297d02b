"""Copies of weights beside the computation, in order: by a thread, or by a stream of the GPU's own.

Simpler than :mod:`bernini.offload.transfer`: sources are mapped files as well as blocks of the arena, they are cast on
the way, and nothing is ever copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(to, from)."""


class Courier(Protocol):
    def send(self, pairs: Pairs) -> Any:
        """Begins copies, behind all that has been computed so far and all that was sent; returns a word for them."""

    def arrived(self, word: Any) -> None:
        """What is computed from here on sees what was sent under this word."""

    def close(self) -> None:
        """Waits for what is under way."""


class ThreadCourier:
    """One thread. A CPU's computation is done when its call returns, so no copy has to wait for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "weights")

    def send(self, pairs: Pairs) -> Future[None]:
        return self._thread.submit(copy, pairs)

    def arrived(self, word: Future[None]) -> None:
        word.result()

    def close(self) -> None:
        self._thread.shutdown()


class CudaCourier:
    """A stream; an event per copy keeps the order. What is copied to must live until :meth:`close`: then the caching
    allocator need not know of the stream. Written to CUDA's documented rules; no GPU has run it here."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, pairs: Pairs) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy(pairs)
            return self._stream.record_event()

    def arrived(self, word: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(word)

    def close(self) -> None:
        self._stream.synchronize()


def courier(device: torch.device) -> Courier:
    return CudaCourier(device) if device.type == "cuda" else ThreadCourier()


def copy(pairs: Pairs) -> None:
    with torch.no_grad():
        for out, source in pairs:
            out.copy_(source, non_blocking=True)
