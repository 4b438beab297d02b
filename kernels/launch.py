"""What the Triton kernels share: how they are found, sized and launched. Imports Triton only when one is launched.

Sizes are chosen here by arithmetic, never by timing: the same call always runs the same binary, whatever the number of
tokens.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from .dispatch import Implementation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs kernels on CPU tensors, slowly: for proofs."""

LARGEST_TILE = 1024
"""Elements of a row that a program handles at a time; four warps then hold 8 of them per thread."""

WIDEST = 32768
"""Elements of the widest row."""

PROGRAMS_PER_MULTIPROCESSOR = 2
"""Of the kernels that keep sums over many tokens: enough loads in flight, few partial sums."""


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be used here, to follow "the triton implementation", or ``None``."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed; it comes with the CUDA and ROCm builds of torch"
    return None


def triton_implementation(package: str, function: str, module: str = "kernel") -> Implementation:
    """The ``triton`` row of an op's table: ``function`` of the family's ``kernel.py``, imported at the first call."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{package}.{module}"), function)(*args)

    devices = ("cuda", "cpu") if INTERPRETED else ("cuda",)
    return Implementation("triton", run, devices=devices, dtypes=DTYPES, missing=missing)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    on: Tensor,
    *args: Any,
    exact: bool = False,
    registers: int | None = None,
    **options: Any,
) -> None:
    """Runs ``kernel[grid](*args)`` on the device of ``on``; an empty grid is no launch.

    Args:
        exact: keeps products and sums apart (no fused multiply-add), for ``rounding="eager"``. Set explicitly in
            either case: Triton's own default changes with its version.
        registers: most per thread, where the compiler takes a limit (NVIDIA's). Left alone it now and then spills a
            few values to fit one program more, of which there are plenty.
        options: ``num_warps``, in warps of 32 lanes, and whatever else Triton takes.
    """
    if 0 in grid:
        return
    run = kernel[grid]
    if INTERPRETED:
        run(*args, **options)
        return
    options["enable_fp_fusion"] = not exact
    target = _driver().get_current_target()
    # Widths are chosen for warps of 32 lanes; where they have 64, half as many hold the same elements per thread.
    options["num_warps"] = max(1, options["num_warps"] * 32 // target.warp_size)
    if registers is not None and target.backend == "cuda":
        options["maxnreg"] = registers
    if on.device.index == _driver().get_current_device():
        run(*args, **options)
    else:
        with torch.cuda.device(on.device):
            run(*args, **options)


def tiles(width: int, largest: int = LARGEST_TILE) -> tuple[int, int]:
    """(TILE, TILES): a row of ``width`` as TILES pieces of TILE elements, a power of two, with the fewest idle lanes.

    5120 = 5 x 1024 and 1536 = 3 x 512 have none, and so no masked access; 760 takes 3 x 256. Up to 8 pieces if tiles of
    ``largest`` suffice.
    """
    pieces = max(8, -(-width // largest))
    sizes = [1 << power for power in range(largest.bit_length()) if -(-width // (1 << power)) <= pieces]
    return min(((tile, -(-width // tile)) for tile in sizes), key=lambda pair: (pair[0] * pair[1], -pair[0]))


def warps(width: int) -> int:
    """Warps for a row of ``width`` elements: at most 64 elements per thread, and at least 8 where there are as many."""
    return 16 if width > 16384 else 8 if width > 6144 else 4 if width > 1024 else 2 if width > 512 else 1


def check_width(op: str, width: int) -> None:
    """A row is held in registers; this is how many fit."""
    if width > WIDEST:
        raise ValueError(f"{op}: the Triton kernel takes rows of up to {WIDEST} elements, got {width}")


def programs(on: Tensor, each: int = PROGRAMS_PER_MULTIPROCESSOR) -> int:
    """How many programs share the tokens in kernels that keep sums; the same for every call on a device."""
    if INTERPRETED:
        return 4
    return each * _multiprocessors(on.device.index)


def architecture() -> str:
    """What is compiled for: ``"sm_90"``, ``"gfx942"``, ...; empty in the interpreter."""
    if INTERPRETED:
        return ""
    target = _driver().get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


def _multiprocessors(device: int) -> int:
    return _driver().utils.get_device_properties(device)["multiprocessor_count"]
