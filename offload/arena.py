"""One arena of host memory: exact sizes, best fit, a hard limit (facts, systems, sections 0.7 and 2.3).

A caching allocator rounds to powers of two or keeps a list for every shape; training on clips of any length fits
neither. Here addresses for the whole limit are reserved at once, which costs nothing, and memory comes behind them slab
by slab. So the arena is one range however often it has grown: a tensor may be larger than a slab, no slab has an unused
end, and blocks that are freed beside each other become one. It grows and never shrinks, so that after warm-up
nothing is allocated, touched for the first time or page-locked again.

Memory is page-locked slab by slab where there is CUDA. A copy that spans two of them is refused by the driver
(``invalid argument``): copy :meth:`Block.pieces`, not :attr:`Block.bytes`, from and to a GPU.
"""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from .holes import Holes
from .hostmem import ALIGN, OutOfMemory, Space, aligned, lock_pages

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SLAB = 256 << 20
"""Bytes by which the arena grows: 1 % of what the hidden states of a 14B model are at 440K tokens on 8 ranks."""

Register = Callable[[int, int], Callable[[], None] | None]
"""Page-locks ``(address, bytes)`` and returns what undoes it; raises MemoryError if the system refuses."""


class ArenaFull(ValueError):
    """No room for a block: the limit, or the machine's memory. Nothing was changed: keep the tensor where it is, or
    recompute it."""


@dataclass(frozen=True)
class Stats:
    """What an arena has and had. Sizes in bytes.

    Args:
        slabs: growths so far; each is one page-locked range.
        registered: behind which there is memory. It is the most that there ever was.
        live: of the blocks in use, as asked for.
        peak_live: the most of it.
        extent: from the start to the end of the last block in use.
        peak_bytes: the most of it.
        largest_free: largest block that can be taken without growing.
        takes: blocks taken so far.
        refused: takes that raised :class:`ArenaFull`.
    """

    slabs: int
    registered: int
    live: int
    peak_live: int
    extent: int
    peak_bytes: int
    largest_free: int
    takes: int
    refused: int


class Block:
    """Bytes ``[offset, offset + nbytes)`` of an arena, from :meth:`Arena.take` until :meth:`free`.

    A block that is forgotten goes back by itself when neither it nor a tensor of it is left. One that is freed may be
    somebody else's at once: its tensors must not be used again.
    """

    __slots__ = ("__weakref__", "_arena", "_space", "freed", "nbytes", "offset")

    def __init__(self, arena: Arena, space: Space, offset: int, nbytes: int) -> None:
        self._arena, self._space, self.offset, self.nbytes, self.freed = arena, space, offset, nbytes, False

    @property
    def bytes(self) -> Tensor:
        """``uint8 [nbytes]``; page-locked where the arena is, but see :meth:`pieces`."""
        return self._view(0, self.nbytes)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The first bytes as a contiguous tensor.

        Raises:
            ValueError: it would need more than the block has.
        """
        needs = math.prod(shape) * dtype.itemsize
        if needs > self.nbytes:
            raise ValueError(f"Block: {list(shape)} of {dtype} are {needs} bytes, and the block has {self.nbytes}")
        return self._view(0, needs).view(dtype).view(tuple(shape))

    def pieces(self) -> list[Tensor]:
        """The bytes in order, each piece ``uint8`` and within one page-locked range: what one copy may move."""
        end = self.offset + self.nbytes
        cuts = [border - self.offset for border in self._arena.borders if self.offset < border < end]
        ends = [*cuts, self.nbytes]
        return [self._view(start, stop) for start, stop in zip([0, *cuts], ends, strict=True)]

    def free(self) -> None:
        """Gives the bytes back.

        Raises:
            ValueError: for the second time.
        """
        self._arena._free(self)

    def _view(self, start: int, stop: int) -> Tensor:
        if self.freed:
            raise ValueError("Block: it was freed; its bytes may be another block's")
        import torch

        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        buffer = (ctypes.c_uint8 * (stop - start)).from_address(self._space.address + self.offset + start)
        buffer.owner = self  # type: ignore[attr-defined]  # the tensor keeps the buffer, and this the memory
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def __del__(self) -> None:
        if not getattr(self, "freed", True):
            self._arena._lost.append(self.offset)  # taken back later: the arena may be in the middle of something


class Arena:
    """Host memory that offloaded tensors live in. All methods may be called from any thread.

    Args:
        limit_bytes: it never has more memory than this.
        slab_bytes: it grows by multiples of this.
        file: a new file, or a folder, to keep the bytes in instead of anonymous memory: the system may write them out
            when memory is short. It has no name from the beginning on and is gone with the arena. It is never
            page-locked.
        register: page-locks each growth; by default ``cudaHostRegister`` where there is CUDA. Elsewhere the pages are
            touched, so that the machine's memory is found too small now and not in the middle of a copy.

    Raises:
        ValueError: a limit below one page; a file that is there already or cannot be written.
    """

    def __init__(
        self, limit_bytes: int, *, slab_bytes: int = SLAB, file: str | Path | None = None,
        register: Register | None = None,
    ) -> None:  # fmt: skip
        if limit_bytes < ALIGN or slab_bytes < 1:
            raise ValueError(
                f"Arena: a limit of {limit_bytes} bytes with slabs of {slab_bytes}; it needs at least {ALIGN} bytes"
            )
        self.limit = limit_bytes // ALIGN * ALIGN
        self.slab = aligned(min(slab_bytes, self.limit))
        self._space: Space | None = Space(self.limit, file)
        self._register = register or (None if file else lock_pages)
        self._lock = Lock()
        self._holes, self._used = Holes(), dict[int, int]()  # used: start -> bytes asked for
        self._lost: deque[int] = deque()
        self._ends: list[int] = []  # of the slabs
        self._live = self._peak_live = self._peak_bytes = self._takes = self._refused = 0
        self._stopped = ""  # why it cannot grow, once the system has said no

    def take(self, nbytes: int) -> Block:
        """A block of so many bytes at an address that is a multiple of 4096.

        Raises:
            ArenaFull: no room under the limit, or in this machine's memory. All blocks stay as they are.
        """
        if nbytes < 0:
            raise ValueError(f"Arena: a block of {nbytes} bytes")
        with self._lock:
            space = self._open()
            self._collect()
            size = aligned(max(nbytes, 1))
            start = self._holes.fit(size, self.registered)
            if start is None:
                try:
                    self._grow(space, size - self._holes.tail(self.registered), nbytes)
                except ArenaFull:
                    self._refused += 1
                    raise
                start = self._holes.starts[-1]
            self._holes.take(start, size)
            self._used[start] = nbytes
            self._live, self._takes = self._live + nbytes, self._takes + 1
            self._peak_live = max(self._peak_live, self._live)
            self._peak_bytes = max(self._peak_bytes, start + size)
            return Block(self, space, start, nbytes)

    def warm_up(self, nbytes: int) -> None:
        """Grows to so many bytes now: what the largest step may need. Later steps then never allocate.

        Raises:
            ArenaFull: as :meth:`take`.
        """
        with self._lock:
            self._stopped = ""  # asked for again: the machine may have memory by now
            if (missing := aligned(nbytes) - self.registered) > 0:
                self._grow(self._open(), missing, nbytes)

    def stats(self) -> Stats:
        with self._lock:
            self._collect()
            extent = self.registered - self._holes.tail(self.registered)
            return Stats(
                len(self._ends), self.registered, self._live, self._peak_live, extent, self._peak_bytes,
                self._holes.largest, self._takes, self._refused,
            )  # fmt: skip

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is of this arena."""
        space = self._space
        return space is not None and 0 <= tensor.data_ptr() - space.address < self.limit

    @property
    def registered(self) -> int:
        """Bytes with memory behind them."""
        return self._ends[-1] if self._ends else 0

    @property
    def borders(self) -> list[int]:
        """Ends of the slabs, as offsets: no copy to a GPU may cross one."""
        return list(self._ends)

    def close(self) -> None:
        """No more blocks. Memory goes back to the system when the last block and tensor is gone; until then they can
        be read."""
        with self._lock:
            self._space = None

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Space:
        if self._space is None:
            raise ValueError("Arena: it was closed")
        return self._space

    def _free(self, block: Block) -> None:
        with self._lock:
            if block.freed:
                raise ValueError(f"Block: {block.nbytes} bytes at {block.offset} were freed twice")
            block.freed = True
            self._return(block.offset)

    def _return(self, start: int) -> None:
        nbytes = self._used.pop(start)
        self._live -= nbytes
        self._holes.give(start, aligned(max(nbytes, 1)))

    def _collect(self) -> None:
        while self._lost:
            self._return(self._lost.popleft())

    def _grow(self, space: Space, missing: int, wanted: int) -> None:
        """Adds memory at the end: ``missing`` bytes or, within the limit, a whole number of slabs.

        Args:
            wanted: bytes that the caller asked for; for the message.
        """
        have = self.registered
        room = self.limit - have
        if wanted > self.limit:
            raise ArenaFull(
                f"Arena: {wanted} bytes are more than its whole limit of {self.limit}; raise the limit, or keep the "
                "tensor on the device"
            )
        if missing > room:
            longest = max(self._holes.largest, self._holes.tail(have) + room)
            raise ArenaFull(
                f"Arena: no room for {wanted} bytes: {self._live} of {self.limit} are used, and no more than {longest} "
                "are free in one piece; raise the limit, or keep the tensor on the device"
            )
        if self._stopped:
            raise ArenaFull(self._stopped)
        more = min(room, -(-missing // self.slab) * self.slab)
        try:
            space.grow(have, more, self._register)
        except OutOfMemory as error:
            self._stopped = (
                f"Arena: it has {have} bytes and cannot get {more} more: {error}; set a lower limit, or give the "
                "arena a file"
            )
            raise ArenaFull(self._stopped) from error
        self._ends.append(have + more)
        self._holes.give(have, more)
