"""Interval attention compares positions only where it has to: the loop over tiles that are seen whole has no mask.

Every kernel of the family has two loops over tiles, ``range(first, middle)`` for PARTIAL and ``range(middle, last)``
for FULL ones. Shown in TTIR for both kinds of GPU, and in the machine code of sm_90.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from bench_perf.proof import case, stub, ttir
from bench_perf.proof.cases import attention as cases

PARTIAL, FULL = "for at in range(first, middle):", "for at in range(middle, last):"
ABOUT = {one.name: one for one in cases.CASES if one.module != "attention.kernel_plan"}


def launched(about: case.Case, target: str) -> list[stub.Launch]:
    """The launches that attend."""
    with stub.launches(target) as log:
        about.call(about.load(), torch.bfloat16)
    return [one for one in log if one.kernel.startswith("interval_attention")]


def comparisons(op: ttir.Op) -> list[str]:
    """Comparisons, choices and masked accesses in a loop's body, of tensors and of scalars."""
    body = [one for region in op.regions for outer in region for one in _all(outer)]
    found = [one.line for one in body if one.name in ("arith.cmpi", "arith.cmpf", "arith.select")]
    return found + [one.line for one in body if one.name == "tt.load" and len(one.operands) > 1]


def _all(op: ttir.Op) -> list[ttir.Op]:
    return [op, *(inner for region in op.regions for one in region for inner in _all(one))]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ABOUT)
def test_no_position_is_compared_in_full_tiles(name: str, target: str) -> None:
    launches = launched(ABOUT[name], target)
    assert len(launches) == (2 if "backward" in name else 1)
    for launch in launches:
        function = ttir.parse(launch.compiled.asm["ttir"])
        loops = [op for op in function.walk() if op.name == "scf.for"]
        (partial,) = [op for op in loops if function.source(op) == PARTIAL]
        (full,) = [op for op in loops if function.source(op) == FULL]
        assert any(one.name == "tt.dot" for one in _all(full))
        assert not comparisons(full), launch.kernel
        found = comparisons(partial)
        assert any("arith.cmpi" in line and "tensor<" in line for line in found), launch.kernel
        assert any("arith.select" in line and "xi1>" in line for line in found), launch.kernel


# --- machine code ----------------------------------------------------------------------------------------------------


def tensor_core_loops(cubin: Path) -> list[list[str]]:
    """Instructions of the innermost loops with products on tensor cores: from a label to the jump back, in order."""
    lines = subprocess.run(
        [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    labels = {found[1]: number for number, line in enumerate(lines) if (found := re.match(r"(\.L_x_\d+):", line))}
    jumps = [
        (labels[found[1]], number)
        for number, line in enumerate(lines)
        if (found := re.search(r"BRA `\((\.L_x_\d+)\)", line)) and labels[found[1]] < number
    ]
    inner = [a for a in jumps if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in jumps)]
    names = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)")
    bodies = [[found[1] for line in lines[begin:end] if (found := names.search(line))] for begin, end in sorted(inner)]
    return [body for body in bodies if any("HGMMA" in name for name in body)]


def count(body: list[str], *kinds: str) -> int:
    return sum(name.partition(".")[0] in kinds for name in body)


@pytest.mark.parametrize("second", [False, True])
def test_the_machine_code_of_full_tiles_counts_and_nothing_else(second: bool, tmp_path: Path) -> None:
    """sm_90: a thread holds M x N / 256 scores, and a mask costs a comparison and a choice for each of them.

    The loop of FULL tiles has three comparisons: whether this was the last tile, and, of 64 bits in two, whether there
    is one left to fetch. Uniform ones (UISETP), of which a warp has one, go round the buffers of the tiles in flight.
    """
    (launch,) = launched(ABOUT[cases.CASES[2 if second else 1].name], "sm_90")
    file = tmp_path / "kernel.cubin"
    file.write_bytes(launch.compiled.asm["cubin"])
    partial, full = tensor_core_loops(file)
    m, n = cases.TILES["sm_90", torch.bfloat16]
    scores = m * n // (32 * launch.compiled.metadata.num_warps)
    assert count(partial, "ISETP") >= scores and count(partial, "FSEL") >= scores
    assert count(full, "ISETP") <= 3, full
    assert count(full, "FSEL", "SEL", "FSETP", "VIMNMX", "VIADDMNMX", "IMNMX", "LOP3") == 0, full
    assert count(full, "MUFU") >= scores  # it is the loop with the softmax


def test_the_sizes_of_tiles_are_the_ones_that_are_counted() -> None:
    from bernini.kernels.attention import kernel

    for (target, dtype), tile in cases.TILES.items():
        with stub.launches(target):
            q = torch.empty(8, 1, 128, dtype=dtype, device="cuda")
            sizes = kernel.blocks(q, q)
        assert (sizes.m, sizes.n) == tile
