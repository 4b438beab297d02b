"""What a call costs before any arithmetic: each op on tensors so small that only the way to the kernel counts.

``pytest tests/kernels/test_overhead_bench.py`` prints the table. Under xdist pytest-benchmark runs everything once
and measures nothing. The limits are twenty times and more what the calls take: they catch a search, a compilation or a
file read in every call, and no slow machine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bernini.kernels import gather_rows, modulate, qk_rope, rms_norm, rope_tables, scatter_rows

CALL = 5e-3  # seconds
IMPORT = 5.0


def calls() -> dict[str, Callable[[], Any]]:
    x, y, row = torch.randn(2, 16), torch.randn(2, 16), torch.randn(1, 16)
    q, k = torch.randn(2, 2, 2, 8)
    rows, index = torch.zeros(2, 4, dtype=torch.int32), torch.tensor([1, 0])
    weight = torch.ones(16)
    rotate = partial(qk_rope, q, k, rope_tables(8, (1, 1, 1), [0]), rows, q_weight=weight, k_weight=weight)
    return {
        "rms_norm": partial(rms_norm, x, weight),
        "qk_rope": rotate,
        "modulate": partial(modulate, x, y, gate=row, scale=row, shift=row),
        "scatter_rows": partial(scatter_rows, torch.empty(2, 16), [x], [index]),
        "gather_rows": partial(gather_rows, x, index),
        "torch's own rms_norm": partial(torch.nn.functional.rms_norm, x, (16,), weight),
    }


@pytest.fixture(autouse=True)
def _one_thread():
    """A second thread would have to be woken for every call of the plain PyTorch paths."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_limit(benchmark: Any, limit: float) -> None:
    if benchmark.enabled:
        assert benchmark.stats.stats.min < limit


@pytest.mark.benchmark(group="a call")
@pytest.mark.parametrize("name", list(calls()))
def test_a_call(benchmark: Any, name: str) -> None:
    with torch.no_grad():
        benchmark.pedantic(calls()[name], rounds=10, iterations=50, warmup_rounds=1)
    check_limit(benchmark, CALL)


@pytest.mark.benchmark(group="an import")
@pytest.mark.parametrize("module", ["bernini", "bernini.kernels"])
def test_an_import(benchmark: Any, module: str) -> None:
    command = [sys.executable, "-P", "-c", f"import {module}"]
    benchmark.pedantic(partial(subprocess.run, command, check=True), rounds=3, iterations=1)
    check_limit(benchmark, IMPORT)
