"""Weights that flow: a model's blocks come from host memory through a small window on the device, two at a time.

Inference runs the blocks of a transformer one after the other, so of all of them the device needs the one that
computes, and the next, which is on its way meanwhile. Hooks put each block's weights in place when the block (or any
module in it) is called; the model does not know. Casts to the device's dtype happen on the way, with torch's own
rounding: what comes out has the bits that it has with all weights resident.

    stream = WeightStream(model.blocks, [weights_of(block) for block in model.blocks], device="cuda")

Where the weights come from: files mapped read-only (:class:`MappedFile`: pages of the file cache, which the system can
drop and no limit on the process's data counts), or blocks of the page-locked arena (:func:`in_arena`), from which a GPU
copies while it computes. On a CPU the "device" is ordinary memory and the copy runs in a thread.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .courier import Courier, courier

if TYPE_CHECKING:
    from .arena import Arena

ALIGNMENT = 256
"""Bytes: where tensors begin in the window. What CUDA's allocator gives, and a multiple of a CPU's vectors."""
SLOTS = 2
"""Blocks in the window: the one that computes, and the next."""


class Weight(NamedTuple):
    """One parameter of a block."""

    source: Tensor
    """In host memory, in any dtype; only read."""
    dtype: torch.dtype
    """On the device."""
    pieces: tuple[Tensor, ...] = ()
    """The source's bytes in order, where one copy may not move them all (see ``arena.Block.pieces``)."""

    @property
    def size(self) -> int:
        """Bytes in the window."""
        return _aligned(self.source.numel() * self.dtype.itemsize)


class MappedFile:
    """A file as read-only memory, shared with the file cache. The mapping lasts as long as a tensor of it.

    Raises:
        OSError: it cannot be opened or mapped; ValueError: it is empty.
    """

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_SEQUENTIAL)  # blocks are read from front to back

    def tensor(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A view of the file from the byte ``start`` on. It must not be written to: that would end the process.

        Raises:
            ValueError: it does not lie within the file.
        """
        count = math.prod(shape)
        if start < 0 or start + count * dtype.itemsize > len(self._map):
            raise ValueError(f"bytes {start} to {start + count * dtype.itemsize} of a file of {len(self._map)}")
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(tuple(shape))


def window_bytes(blocks: Sequence[Mapping[str, Weight]]) -> int:
    """Bytes of the window that :class:`WeightStream` takes on the device: of the largest block, twice."""
    largest = max((_block_bytes(block) for block in blocks), default=0)
    return min(SLOTS, len(blocks)) * largest


def in_arena(blocks: Sequence[Mapping[str, Weight]], arena: Arena) -> list[dict[str, Weight]]:
    """The same weights, cast and copied into page-locked memory, from where a GPU fetches them by itself.

    A tensor keeps its place in the arena as long as it is referred to.

    Raises:
        ArenaFull: they do not fit; nothing stays taken.
    """
    moved = []
    for block in blocks:
        there: dict[str, Weight] = {}
        for name, (source, dtype, _) in block.items():
            place = arena.take(max(1, source.numel() * dtype.itemsize))
            there[name] = Weight(place.tensor(source.shape, dtype).copy_(source), dtype, tuple(place.pieces()))
        moved.append(there)
    return moved


@dataclass
class Counts:
    """What a stream did so far."""

    loads: int = 0
    """Blocks that were copied in."""
    unforeseen: int = 0
    """Of them, those that nobody had sent for when they were called: the first, and jumps in the order."""
    bytes: int = 0
    """On the device."""


class WeightStream:
    """Keeps the weights of ``blocks`` in host memory and two of the blocks on the device.

    The blocks may be called in any order and any number of times; the next is foreseen as the one that came after this
    one last time, at first as its neighbour. Modules inside of a block may be called by themselves. Between its turns a
    block's parameters have their shape and dtype and no memory; they read as NaN.

    Only for inference: a graph would keep weights that the next block takes the place of.

    Args:
        blocks: modules with floating-point parameters, called by one thread.
        weights: of each block by the names of its parameters, all of them.
        device: of the window.

    Raises:
        ValueError: no blocks, weights that are not those of a block, a module in two blocks, or a buffer without
            memory.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], weights: Sequence[Mapping[str, Weight]], *, device: str | torch.device
    ) -> None:
        self.blocks, self.device = list(blocks), torch.device(device)
        self._weights = [dict(block) for block in weights]
        _check(self.blocks, self._weights)
        size = window_bytes(self._weights) // min(SLOTS, len(self.blocks))
        self._slots = [_Slot(self.device, size) for _ in range(min(SLOTS, len(self.blocks)))]
        self._courier: Courier = courier(self.device)
        self._current: int | None = None
        self._next: dict[int, int] = {}
        self.counts = Counts()
        pairs = zip(self.blocks, self._weights, strict=True)
        self._parameters = [dict(_hollow(block, own, self.device)) for block, own in pairs]
        self._empty = [{name: p.data for name, p in own.items()} for own in self._parameters]
        self._hooks = [
            module.register_forward_pre_hook(partial(_enter, self, number))
            for number, block in enumerate(self.blocks)
            for module in block.modules()
        ]

    @property
    def bytes(self) -> int:
        """Of the window, on the device."""
        return sum(slot.memory.numel() for slot in self._slots)

    def close(self) -> None:
        """Ends copies under way and lets go of the window and the sources; the blocks have no weights any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._courier.close()
        if self._current is not None:
            self._bind(self._current, self._empty[self._current])
        self._current = None
        self._slots.clear()
        self._weights.clear()

    def enter(self, number: int) -> None:
        """Puts a block in place and sends for the next. What is computed after this call sees the block.

        Raises:
            RuntimeError: autograd is recording.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("weights that are streamed cannot be differentiated through: use torch.no_grad()")
        if number == self._current:
            return
        slot = self._slot(number)
        if slot is None:
            self.counts.unforeseen += 1
            slot = self._send(number)
        try:
            self._courier.arrived(slot.pending)
        except Exception:
            slot.holds = None  # what is there is no block; whoever asks again has it copied again
            raise
        if self._current is not None:
            self._bind(self._current, self._empty[self._current])
            self._next[self._current] = number
        self._current = number
        self._bind(number, slot.views(self._weights[number]))
        following = self._next.get(number, (number + 1) % len(self.blocks))
        if self._slot(following) is None:
            self._send(following)

    def _slot(self, number: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == number), None)

    def _send(self, number: int) -> _Slot:
        """Begins to copy a block into the slot that does not compute. What was computed there was called before."""
        slot = next(slot for slot in self._slots if slot.holds is None or slot.holds != self._current)
        views, own = slot.views(self._weights[number]), self._weights[number]
        slot.holds = number
        pairs = [pair for name, weight in own.items() for pair in _pairs(views[name], weight)]
        slot.pending = self._courier.send(pairs)
        self.counts.loads += 1
        self.counts.bytes += _block_bytes(own)
        return slot

    def _bind(self, number: int, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters[number].items():
            parameter.data = values[name]


def _enter(stream: WeightStream, number: int, module: nn.Module, args: Any) -> None:
    stream.enter(number)


# --- the window -------------------------------------------------------------------------------------------------------


class _Slot:
    """Memory of the device for one block."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.pending: Any = None
        """The courier's word for the copy that fills it."""

    def views(self, weights: Mapping[str, Weight]) -> dict[str, Tensor]:
        found, start = {}, 0
        for name, weight in weights.items():
            raw = self.memory[start : start + weight.source.numel() * weight.dtype.itemsize]
            found[name] = raw.view(weight.dtype).view(weight.source.shape)
            start += weight.size
        return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _block_bytes(block: Mapping[str, Weight]) -> int:
    return sum(weight.size for weight in block.values())


def _hollow(
    block: nn.Module, weights: Mapping[str, Weight], device: torch.device
) -> Iterator[tuple[str, nn.Parameter]]:
    """Gives a block parameters of the right shape, dtype and device that take no memory: one NaN each, expanded."""
    for name, (source, dtype, _) in weights.items():
        parent, _, leaf = name.rpartition(".")
        nothing = torch.full((), math.nan, dtype=dtype, device=device).expand(source.shape)
        parameter = nn.Parameter(nothing, requires_grad=False)
        setattr(block.get_submodule(parent), leaf, parameter)
        yield name, parameter


def _check(blocks: Sequence[nn.Module], weights: Sequence[Mapping[str, Weight]]) -> None:
    if not blocks or len(blocks) != len(weights):
        raise ValueError(f"weight streaming: {len(blocks)} blocks and the weights of {len(weights)}")
    modules = [id(module) for block in blocks for module in block.modules()]
    if len(set(modules)) != len(modules):
        raise ValueError("weight streaming: a module is in two of the blocks")
    for number, (block, own) in enumerate(zip(blocks, weights, strict=True)):
        expected = {name: tuple(p.shape) for name, p in block.named_parameters(remove_duplicate=False)}
        given = {name: tuple(weight.source.shape) for name, weight in own.items()}
        if expected != given:
            wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
            raise ValueError(
                f"weight streaming: block {number} and its weights differ in {len(wrong)} names or shapes, first "
                f"{wrong[0]!r}: {expected.get(wrong[0])} in the block, {given.get(wrong[0])} in the weights"
            )
        kinds = [name for name, weight in own.items() if not weight.dtype.is_floating_point]
        hollow = [name for name, buffer in block.named_buffers() if buffer.is_meta]
        if kinds or hollow:
            raise ValueError(f"weight streaming: block {number}: {(kinds or hollow)[0]!r} cannot be streamed")


def _pairs(out: Tensor, weight: Weight) -> Iterator[tuple[Tensor, Tensor]]:
    if len(weight.pieces) < 2:
        yield out, weight.source
        return
    raw, start = out.view(-1).view(torch.uint8), 0
    for piece in weight.pieces:
        if start < len(raw):
            yield raw[start : start + len(piece)], piece[: len(raw) - start]
        start += len(piece)
