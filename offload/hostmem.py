"""Host memory from the system: addresses first, memory behind them when it is wanted, page-locked if possible.

Linux only. Calls of the C library by ctypes, since Python's ``mmap`` can neither reserve addresses without memory nor
put memory behind some of them later.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

ALIGN = 4096
"""Bytes of a page; every block begins at a multiple."""
HUGE = 2 << 20
PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0, 0x10, 0x4000  # what the module mmap does not name
MADV_HUGEPAGE, MADV_POPULATE_WRITE = 14, 23
FAILED = ctypes.c_void_p(-1).value


class OutOfMemory(MemoryError):
    """The system has no more; the message says of what."""


def aligned(nbytes: int) -> int:
    """Up to a whole number of pages."""
    return -(-nbytes // ALIGN) * ALIGN


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


class Space:
    """Addresses ``[address, address + length)``, of which a beginning has memory.

    Args:
        length: bytes, a multiple of :data:`ALIGN`.
        file: None for anonymous memory; a folder, or the path of a new file, which loses its name at once.

    The addresses go back to the system when nobody has this object any more.

    Raises:
        ValueError: the file cannot be made, or the process may not have so many addresses.
    """

    def __init__(self, length: int, file: str | Path | None = None) -> None:
        self._fd = -1 if file is None else _new_file(Path(file))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        base = _libc().mmap(None, length + HUGE, PROT_NONE, flags, -1, 0)  # no access: counts towards no limit on data
        if base in (None, FAILED):
            _close(self._fd)
            raise ValueError(f"Arena: the system refused {length} bytes of addresses ({_why()}); is `ulimit -v` set?")
        self.address = -(-base // HUGE) * HUGE
        self._undo: list[Callable[[], None]] = []
        last = weakref.finalize(self, _give_back, base, length + HUGE, self._fd, self._undo, os.getpid())
        last.atexit = False  # the system does it then, and tensors may still be in use

    def grow(self, start: int, more: int, register: Callable[[int, int], Callable[[], None] | None] | None) -> None:
        """Puts memory behind ``[start, start + more)``.

        Raises:
            OutOfMemory: nothing was added.
        """
        where = self.address + start
        try:
            if self._fd < 0:
                self._grow_anonymous(where, more)
            else:
                self._grow_file(where, start, more)
            if register is not None and (undo := register(where, more)) is not None:
                self._undo.append(undo)
        except MemoryError as error:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
            _libc().mmap(where, more, PROT_NONE, flags, -1, 0)
            if self._fd >= 0:
                os.ftruncate(self._fd, start)
            raise OutOfMemory(str(error) or "it cannot be page-locked") from error

    def _grow_anonymous(self, where: int, more: int) -> None:
        if _libc().mprotect(where, more, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OutOfMemory(f"the system refused memory ({_why()})")
        _libc().madvise(where, more, MADV_HUGEPAGE)  # a wish: fewer page faults

    def _grow_file(self, where: int, start: int, more: int) -> None:
        try:
            os.posix_fallocate(self._fd, start, more)  # a full disk is found here, not by a fatal signal in a copy
        except OSError as error:
            raise OutOfMemory(f"the arena's file cannot grow ({error.strerror})") from error
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        if _libc().mmap(where, more, prot, mmap.MAP_SHARED | MAP_FIXED, self._fd, start) != where:
            raise OutOfMemory(f"the arena's file cannot be mapped ({_why()})")


def lock_pages(address: int, nbytes: int) -> Callable[[], None] | None:
    """Page-locks for CUDA; where there is none, touches the pages, so that they are there.

    Raises:
        OutOfMemory: the system refuses.
    """
    import torch

    if (room := available()) is not None and nbytes > room:  # asked first: what touches more than there is gets killed
        raise OutOfMemory(f"this machine has {room} bytes of memory left")
    if not torch.cuda.is_available():
        if _libc().madvise(address, nbytes, MADV_POPULATE_WRITE) and ctypes.get_errno() == errno.ENOMEM:
            raise OutOfMemory("the system refused pages")  # any other error: a system that cannot do it ahead
        return None
    runtime = torch.cuda.cudart()
    if (code := int(runtime.cudaHostRegister(address, nbytes, 0))) != 0:
        raise OutOfMemory(f"cudaHostRegister refused (error {code}); `ulimit -l` and the machine's memory limit it")
    return partial(_unlock, runtime, address)


def _unlock(runtime: object, address: int) -> None:
    runtime.cudaHostUnregister(address)  # type: ignore[attr-defined]


def available() -> int | None:
    """Bytes that this process can still get without pushing somebody out: of the machine and of its control group.
    None where the system does not tell."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable")]
    except OSError:
        pass
    group = Path("/sys/fs/cgroup")
    try:
        top = (group / "memory.max").read_text().strip()
        if top != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
            found.append(int(top) - int((group / "memory.current").read_text()) + cached)
    except (OSError, ValueError):
        pass
    return max(0, min(found)) if found else None


def _new_file(path: Path) -> int:
    """A file for reading and writing that has no name any more: no other process finds it, and it goes with us."""
    try:
        if path.is_dir():
            fd, name = tempfile.mkstemp(prefix="bernini-arena-", dir=path)
        else:
            fd, name = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), str(path)
        os.unlink(name)
    except FileExistsError as error:
        raise ValueError(
            f"Arena: the file {path} is there already and would be overwritten; name a new one, or a folder"
        ) from error
    except OSError as error:
        raise ValueError(
            f"Arena: cannot write the file {path} ({error.strerror}); name a new file in a folder that can be written"
        ) from error
    return fd


def _give_back(base: int, length: int, fd: int, undo: list[Callable[[], None]], owner: int) -> None:
    if os.getpid() == owner:  # a forked child has the addresses but not the locks
        for call in reversed(undo):
            call()
    _libc().munmap(base, length)
    _close(fd)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _why() -> str:
    return os.strerror(ctypes.get_errno())
