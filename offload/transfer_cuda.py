"""The GPU's backend of ``transfer.py``. It has not been run on a GPU; everything above it is tested on the others.

No ``record_stream``: memory goes back to the caching allocator on the stream that it was allocated for, and only when
that stream waits for every copy from or into it, so the allocator need not know of the other streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .log import Log
from .transfer import Buffer, Event, Stream, Transfers

if TYPE_CHECKING:
    from torch import Tensor


class CudaTransfers(Transfers):
    """Streams of one GPU.

    Args:
        device: by default the current one.
    """

    def __init__(self, device: str | torch.device | None = None, log: Log | None = None) -> None:
        super().__init__(log)
        chosen = torch.device("cuda" if device is None else device)
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        self.device = torch.device("cuda", index)
        self._compute: dict[int, Stream] = {}

    def current(self) -> Stream:
        native = torch.cuda.current_stream(self.device)
        return self._compute.setdefault(native.cuda_stream, Stream(f"compute-{native.cuda_stream:x}", native))

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Any, stop: Any) -> float | None:
        if not (start.query() and stop.query()):
            return None
        return start.elapsed_time(stop) / 1e3

    def close(self) -> None:
        for stream in self._streams.values():
            stream.native.synchronize()

    def _make(self, name: str) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def _allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _copy(self, stream: Stream, out: Buffer, source: Buffer) -> None:
        with torch.cuda.stream(stream.native):
            for to, of in _pairs(out.memory, source.memory):
                to.copy_(of, non_blocking=True)

    def _record(self, stream: Stream) -> Any:
        return stream.native.record_event()

    def _wait(self, stream: Stream, event: Event) -> None:
        stream.native.wait_event(event.native)

    def _done(self, event: Event) -> bool:
        return event.native.query()

    def _synchronize(self, event: Event) -> None:
        event.native.synchronize()


def _pairs(out: Any, source: Any) -> list[tuple[Tensor, Tensor]]:
    """Pieces that one copy may move: a block's page-locked ranges, and the device's bytes beside them."""
    if isinstance(out, torch.Tensor):
        pieces = source.pieces()
        return list(zip(out.split([piece.numel() for piece in pieces]), pieces, strict=True))
    return [(piece, whole) for whole, piece in _pairs(source, out)]
