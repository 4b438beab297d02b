"""A driver without a GPU: real launches of real wrappers, compiled for any target, run on nothing.

``with launches(target) as log:`` makes Triton compile for ``target`` and hands every launch to a list instead of to a
device. Tensors inside are fake cuda tensors, so 440 000 x 5120 costs no memory, and everything a launch depends on is
the real thing: grid, strides, specialisation, constexprs, the compiled binary.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.compiler.compiler import max_shared_mem
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Shared memory a program may use, and multiprocessors of the largest part of each kind.
PROPERTIES = {"sm_80": (166912, 108), "sm_90": (232448, 132), "sm_100": (232448, 148), "gfx942": (65536, 304)}


# Triton finds compiled code by what a kernel's source says and not by where it lies, and the code names lines of files.
# In the cache that all checkouts share by default it may name the files of another one, perhaps no longer there.
CACHE = Path(__file__).resolve().parents[2] / "build" / "triton"


@dataclass(frozen=True)
class Launch:
    """One launch: which kernel, over which grid, with which arguments (by name), compiled to what."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    compiled: CompiledKernel

    def argument(self, name: str) -> Any:
        """An argument by its name in the IR, where ``sources.2`` is an element of a tuple."""
        head, *places = name.split(".")
        value = self.arguments[head]
        for place in places:
            value = value[int(place)] if place.isdigit() else getattr(value, place)  # of a tuple, of a NamedTuple
        return value

    def bytes_of(self, argument: str) -> int:
        """Size of a tensor argument."""
        tensor = self.argument(argument)
        assert isinstance(tensor, Tensor), f"{self.kernel}: {argument} is no tensor"
        return tensor.numel() * tensor.element_size()


class _Utils:
    def __init__(self, name: str) -> None:
        self._shared, self._multiprocessors = PROPERTIES[name]

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared, "multiprocessor_count": self._multiprocessors}


class _Driver:
    """What Triton asks of a driver; a launch only writes itself down."""

    def __init__(self, name: str, log: list[Launch]) -> None:
        self._target, self.utils, self._log = TARGETS[name], _Utils(name), log

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def run(x: int, y: int, z: int, stream: int, function: Any, packed: Any, extra: Any, enter: Any, leave: Any,
                *arguments: Any) -> None:  # fmt: skip
            fn: JITFunction = source.fn
            named = dict(zip(fn.arg_names, arguments, strict=True))
            self._log.append(Launch(fn.__name__, (x, y, z), named, self._kernels[id(function)]))

        return run

    _kernels: dict[int, CompiledKernel]

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launches(target: str) -> Iterator[list[Launch]]:
    """Inside, Triton compiles for ``target`` (a name of :data:`TARGETS`) and launches are appended to the list."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("code is generated where TRITON_INTERPRET is not set")
    log: list[Launch] = []
    driver = _Driver(target, log)
    compiled: dict[int, CompiledKernel] = {}
    driver._kernels = compiled
    original = CompiledKernel._init_handles

    def remember(kernel: CompiledKernel) -> None:
        original(kernel)
        compiled[id(kernel.function)] = kernel
        kernel.module = None  # nothing was loaded, so there is nothing to unload when it goes

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    CompiledKernel._init_handles = remember
    _forget_binaries()
    try:
        with FakeTensorMode(), warnings.catch_warnings(), triton.knobs.cache.scope():
            triton.knobs.cache.dir = str(CACHE)
            # Triton asks a fake tensor for its address to see how it is aligned; the answer 0 is fine.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield log
    finally:
        CompiledKernel._init_handles = original
        triton.runtime.driver._active = before
        _forget_binaries()


def _forget_binaries() -> None:
    """Kernels remember what they compiled per device number; another target is the same number here."""
    max_shared_mem.cache_clear()
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("bernini.kernels"):
            for value in list(vars(module).values()):
                if isinstance(value, JITFunction):
                    value.device_caches.clear()
