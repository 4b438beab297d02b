"""Loads ``libbernini_native.so``, once, after torch, on torch's own OpenMP runtime.

The library has no OpenMP runtime of its own: its ``GOMP_*`` symbols are left open and meet the one that torch loaded,
made visible here. A second runtime in the process would start a second set of threads that fights the first for the
cores. A process without the library still works, on the reference path; :func:`missing` tells why it is not there.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ABI = 3
"""Raised together with BERNINI_NATIVE_ABI in common.h whenever the arguments of any exported function change."""

LIBRARY = Path(__file__).with_name("libbernini_native.so")

_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$")


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process. More than one is a fault: they compete for the cores."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return []
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines())
    return sorted({path for path in paths if _OPENMP.search(path)})


def _torch_openmp() -> str | None:
    """The runtime that torch computes with: of several, the one that lies in torch's own folders."""
    import torch

    site = Path(torch.__file__).resolve().parent.parent
    homes = (f"{site}/torch/", f"{site}/torch.libs/")
    runtimes = openmp_runtimes()
    return next((path for path in runtimes if path.startswith(homes)), runtimes[0] if runtimes else None)


def _absent() -> str:
    """Why there is no library file, and what to do about it."""
    if not (LIBRARY.parents[2] / "CMakeLists.txt").exists():
        return "is not part of this installation; install bernini again where a C++ compiler is found"
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "is not built: no C++ compiler was found; install one and run `make native`"
    return "is not built; run `make native`"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why it cannot be used."""
    if not LIBRARY.exists():
        return None, _absent()
    runtime = _torch_openmp()
    if runtime is not None:
        # Loaded already: this only lets the next library see its symbols.
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    try:
        library = ctypes.CDLL(str(LIBRARY))
        abi = library.bernini_native_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"cannot be loaded: {error}"
    if abi != ABI:
        return None, f"has interface {abi} where {ABI} is expected; run `make native` or install bernini again"
    return library, None


def missing() -> str | None:
    """Why the native library cannot be used, to follow "the native implementation", or ``None`` if it can."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it is missing; the message says why.
    """
    handle, why = _load()
    if handle is None:
        raise RuntimeError(f"the native library {why}")
    return handle


@functools.cache
def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """The exported function ``name`` with its ctypes signature, so that calls are checked and pointers stay 64-bit."""
    call = getattr(library(), name)
    call.restype, call.argtypes = result, arguments
    return call
