"""What autograd saved, as bytes: which tensors are left alone, and which bytes of which storage the others are.

Autograd saves views: of one packed tensor three, at offsets, with gaps or with a dimension of stride 0, and the same
tensor for several ops. Bytes are therefore kept once per interval of a storage at a version (:class:`Interval`), and
what autograd holds is a :class:`Handle` to some of them. Strides and the offset within :data:`ALIGN` bytes are the same
after the way to the host and back: kernels may choose by them, and other kernels may round otherwise.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .transfer import Buffer, Event, Stream

ALIGN = 512
"""Bytes: what GPU allocators align to; of a CPU's it is a multiple."""
SPARSE = 4
"""A tensor with gaps takes its whole storage along, if that is at most so many times its own bytes."""


class Layout(NamedTuple):
    """How a tensor lies in bytes that begin ``offset`` elements before it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """From the first byte to the last."""
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return 0 if 0 in self.shape else (last + 1) * self.dtype.itemsize

    def on(self, memory: Tensor, offset: int) -> Tensor:
        """The tensor that begins ``offset`` bytes into ``uint8`` memory."""
        flat = torch.empty(0, dtype=self.dtype, device=memory.device)
        start = memory.storage_offset() + offset
        if start % self.dtype.itemsize:
            raise ValueError(f"offload: a {self.dtype} at byte {start}")
        return flat.set_(memory.untyped_storage(), start // self.dtype.itemsize, self.shape, self.strides)


def plain(tensor: Tensor) -> bool:
    """Whether bytes and strides are all there is to a tensor: no subclass, no lazy conjugate, no other layout."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return not (tensor.is_conj() or tensor.is_neg() or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a leaf that is trained, or a view of one."""
    base = tensor if tensor._base is None else tensor._base
    return isinstance(base, torch.nn.Parameter) or (base.is_leaf and base.requires_grad)


def span(tensor: Tensor) -> tuple[int, int]:
    """First and last byte + 1 in the tensor's storage."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + Layout(tensor.dtype, tuple(tensor.shape), tensor.stride()).nbytes


def own_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor has, an element of a broadcast dimension counted once."""
    count = tensor.element_size()
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= n if stride else min(n, 1)
    return count


def interval(tensor: Tensor) -> tuple[int, int] | None:
    """The bytes of its storage to keep for a tensor, or None if they are much more than its own.

    Dense tensors keep their own, others the whole storage, since those who share it are probably saved as well.
    """
    start, stop = span(tensor)
    own = own_bytes(tensor)
    if own >= stop - start:
        return start // ALIGN * ALIGN, stop
    whole = tensor.untyped_storage().nbytes()
    return (0, whole) if whole <= SPARSE * own else None


@dataclass(eq=False)
class Interval:
    """Bytes ``[start, stop)`` of a storage at a version, wherever they are now.

    On the device (``source``), then in the arena (``host``) as well while a copy is under way, then there alone;
    fetched back (``landing``) as often as a backward asks. Not every interval leaves.

    Args:
        place: in the order of saving, of its graph.
        graph: number of the forward, counted by entering the context.
        identity: of the storage's bytes; for the log.
        cdata: of the storage, which has no other while anybody has a weak reference to it.
        home: stream that wrote it, and that its memory goes back on.
        ready: recorded there when it was saved.
        alias: of the first tensor that was saved of it: keeps the storage, and shares its version.
        origin: the tensor itself, which tells of changes after the alias is gone.
    """

    place: int
    graph: int
    identity: tuple[int, ...]
    cdata: int
    start: int
    stop: int
    version: int
    kind: str
    home: Stream
    ready: Event
    alias: Tensor | None
    origin: weakref.ref[Tensor]
    source: Buffer | None
    host: Buffer | None = None
    copied: Event | None = None
    landing: Buffer | None = None
    landing_home: Stream | None = None
    landed: Event | None = None
    spoiled: bool = False
    """It was written to while it was copied."""
    stays: bool = False
    """It is to stay on the device, whatever the policy."""
    passes: int = 0
    """Times that all who saved it were given it."""
    readers: set[Stream] = field(default_factory=set)
    """Streams that were given it where it is, other than its home."""
    handles: set[int] = field(default_factory=set)
    wanted: set[int] = field(default_factory=set)
    """Handles that were not given their tensor since the interval last came back."""

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def changed(self) -> bool:
        """Whether the tensor was written to since it was saved, as far as anybody can still tell."""
        seen = self.origin() if self.alias is None else self.alias
        return self.spoiled or (seen is not None and seen._version != self.version)


class Handle:
    """What autograd holds instead of a tensor. It tells when autograd lets go of it.

    Args:
        offset: bytes from the beginning of the interval to the tensor's.
        told: called with what is left of the handle.
    """

    __slots__ = ("interval", "layout", "number", "offset", "told")

    def __init__(
        self, number: int, interval: Interval, layout: Layout, offset: int, told: Callable[[int, Interval], None]
    ) -> None:
        self.number, self.interval, self.layout, self.offset, self.told = number, interval, layout, offset, told

    def __del__(self) -> None:
        if getattr(self, "told", None) is not None:
            self.told(self.number, self.interval)


class Kept:
    """A tensor that is left where it is. Torch does not look at versions where there are hooks, so this does."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # an output of the node that saves it must not keep its own graph
        self.tensor = tensor if isinstance(tensor, torch.nn.Parameter) else tensor.detach()
        self.version = tensor._version

    def give(self) -> Tensor:
        if self.tensor._version != self.version:
            raise modified(self.tensor, self.version, self.tensor._version)
        return self.tensor


@dataclass
class Counts:
    """What was done so far."""

    saved: int = 0
    """Tensors that autograd saved and that were not left alone."""
    intervals: int = 0
    """Different bytes of them."""
    offloaded: int = 0
    offloaded_bytes: int = 0
    reloaded: int = 0
    unforeseen: int = 0
    """Reloads that nobody had sent for when they were asked for."""
    refused: int = 0
    """Tensors that stayed because the arena was full."""
    peak_flight: int = 0
    """Most bytes on their way out at once; these are on the device and in the arena."""


def modified(tensor: Tensor | Layout, before: int, now: int | None = None) -> RuntimeError:
    """The error that autograd would raise."""
    later = "" if now is None else f" is at version {now} and"
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: the "
        f"{tensor.dtype} {list(tensor.shape)}{later} was saved at version {before} (activation offload cannot give "
        "back what was overwritten; clone the tensor before it is changed)"
    )
