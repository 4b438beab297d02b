"""The reader of TTIR and the counting of bytes, on small kernels whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from bench_perf.proof import machine_code, stub, traffic, ttir


@triton.jit
def copy(x_ptr, y_ptr, row, N: tl.constexpr, WIDE: tl.constexpr):
    at = tl.program_id(0)
    if WIDE:
        at = at.to(tl.int64)
    columns = tl.arange(0, N)
    tl.store(y_ptr + at * row + columns, tl.load(x_ptr + at * row + columns))


@triton.jit
def loops(x_ptr, bounds_ptr, y_ptr, tokens, N: tl.constexpr):
    program = tl.program_id(0)
    columns = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for part in range(program, tokens, tl.num_programs(0)):
        for token in range(tl.load(bounds_ptr + part), tl.load(bounds_ptr + part + 1)):
            total += tl.load(x_ptr + tl.cast(token, tl.int64) * N + columns)
    if program == 0:
        tl.store(y_ptr + columns, total)


@triton.jit
def adds(x_ptr, y_ptr, N: tl.constexpr):
    columns = tl.arange(0, N)
    tl.atomic_add(y_ptr + columns, tl.load(x_ptr + columns))


@triton.jit
def wide(x_ptr, y_ptr, N: tl.constexpr):
    columns = tl.arange(0, N)
    tl.store(y_ptr + columns, tl.sqrt(tl.load(x_ptr + columns).to(tl.float64)).to(tl.float32))


@triton.jit
def unknown(x_ptr, y_ptr, N: tl.constexpr):
    columns = tl.arange(0, N)
    if tl.load(x_ptr) > 0:
        tl.store(y_ptr + columns, tl.load(x_ptr + columns))


def launched(kernel: Any, grid: tuple[int, ...], make: Callable[[], tuple[Any, ...]], **options: Any) -> stub.Launch:
    kernel.device_caches.clear()
    with stub.launches("sm_90") as log:
        kernel[grid](*make(), enable_fp_fusion=True, **options)
    kernel.device_caches.clear()
    return log[0]


def floats(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="cuda")


def test_a_copy_moves_every_byte_twice() -> None:
    launch = launched(copy, (100_000,), lambda: (floats(100_000, 1024), floats(100_000, 1024), 1024, 1024, True))
    assert traffic.traffic(launch) == traffic.Traffic(memory=2 * 100_000 * 1024 * 4, cached=0)


def test_small_tensors_count_once_in_memory_and_fully_in_cache() -> None:
    launch = launched(copy, (100,), lambda: (floats(100, 1024), floats(100, 1024), 0, 1024, True))
    assert traffic.traffic(launch).cached == 2 * 100 * 1024 * 4
    assert traffic.traffic(launch).memory == 2 * 100 * 1024 * 4


def test_loops_count_as_often_as_they_run() -> None:
    launch = launched(
        loops,
        (4,),
        lambda: (floats(8_000_000, 64), torch.empty(9, dtype=torch.int32, device="cuda"), floats(64), 8, 64),
    )
    bounds = np.array([0, 10, 10, 30, 35, 40, 41, 50, 1000])
    moved = traffic.traffic(launch, {"bounds_ptr": bounds})
    small = 9 * 4 + 64 * 4
    assert moved.memory == 1000 * 64 * 4 + small


def test_what_cannot_be_known_is_an_error() -> None:
    launch = launched(
        loops,
        (4,),
        lambda: (floats(8_000_000, 64), torch.empty(9, dtype=torch.int32, device="cuda"), floats(64), 8, 64),
    )
    with pytest.raises(ValueError, match="bounds of a loop are not known"):
        traffic.traffic(launch)
    launch = launched(unknown, (4,), lambda: (floats(64), floats(64), 64))
    with pytest.raises(ValueError, match="condition that is not known"):
        traffic.traffic(launch)


def test_the_lint_sees_a_32_bit_product_and_passes_a_64_bit_one() -> None:
    def make(wide: bool) -> Callable[[], tuple[Any, ...]]:
        return lambda: (floats(1000, 64), floats(1000, 64), 64, 64, wide)

    right, wrong = launched(copy, (1000,), make(True)), launched(copy, (1000,), make(False))
    assert ttir.narrow_products(ttir.parse(right.compiled.asm["ttir"])) == []
    (line,) = ttir.narrow_products(ttir.parse(wrong.compiled.asm["ttir"]))
    assert "at * row" in line


def test_float_atomics_and_float64_are_seen() -> None:
    launch = launched(adds, (4,), lambda: (floats(64), floats(64), 64))
    assert "atomic_add" in ttir.float_atomics(ttir.parse(launch.compiled.asm["ttir"]))[0]
    with pytest.raises(ValueError, match="not counted"):
        traffic.traffic(launch)
    launch = launched(wide, (4,), lambda: (floats(64), floats(64), 64))
    assert machine_code.inspect(launch.compiled).fp64 > 0


def test_access_widths_follow_the_elements_per_thread() -> None:
    def make() -> tuple[Any, ...]:
        return floats(1000, 512), floats(1000, 512), 512, 512, True

    four, one = launched(copy, (9,), make, num_warps=4), launched(copy, (9,), make, num_warps=16)
    assert machine_code.inspect(four.compiled).loads == {128: 1}
    assert set(machine_code.inspect(one.compiled).stores) == {32}


def test_the_size_of_an_argument_in_a_tuple() -> None:
    launch = stub.Launch("k", (1, 1, 1), {"pair": (torch.empty(3), torch.empty(5))}, None)  # type: ignore[arg-type]
    assert launch.bytes_of("pair.1") == 20
