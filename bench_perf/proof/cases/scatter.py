"""Scatter and gather of 440 000 rows x 5120. Minimum: every element in and out once; and the index once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..case import TOKENS, WIDTH, Broken, Case


def _rows(dtype: torch.dtype, count: int = TOKENS, width: int = WIDTH) -> torch.Tensor:
    return torch.empty(count, width, dtype=dtype, device="cuda")


def _index(count: int = TOKENS, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(count, dtype=dtype, device="cuda")


def _scatter(kernel: Any, dtype: torch.dtype) -> None:
    kernel.scatter_rows(_rows(dtype), [_rows(dtype)], [_index()])


PIECES = (250_000, 180_000, 9_000, 512, 300, 100, 64, 24)
"""Rows of eight sources: videos, images and text of a packed sequence."""


def _eight_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Half of the sources convert: encoders need not compute in the renderer's dtype."""
    return (dtype, torch.float32, dtype, torch.float16) * 2


def _scatter_eight(kernel: Any, dtype: torch.dtype) -> None:
    sources = [_rows(kind, count) for kind, count in zip(_eight_dtypes(dtype), PIECES, strict=True)]
    kernel.scatter_rows(_rows(dtype), sources, [_index(count) for count in PIECES])


def _eight_bytes(dtype: torch.dtype) -> int:
    sizes = [kind.itemsize + dtype.itemsize for kind in _eight_dtypes(dtype)]
    return sum(count * (WIDTH * size + 8) for count, size in zip(PIECES, sizes, strict=True))


HEADS, HEAD = 40 * TOKENS, 128


def _scatter_heads(kernel: Any, dtype: torch.dtype) -> None:
    kernel.scatter_rows(_rows(dtype, HEADS, HEAD), [_rows(dtype, HEADS, HEAD)], [_index(HEADS, torch.int32)])


def _gather(kernel: Any, dtype: torch.dtype) -> None:
    kernel.gather_rows(_rows(dtype), _index())


def _gather_backward(kernel: Any, dtype: torch.dtype) -> None:
    kernel.gather_rows_backward(_rows(dtype), _index(), TOKENS)


def _moved(dtype: torch.dtype) -> int:
    return TOKENS * (2 * WIDTH * dtype.itemsize + 8)


CASES = [
    Case(
        "scatter_rows", "scatter.kernel", _scatter, _moved, launches=1,
        narrow={"scatter_rows_kernel": (1, "the row's target")},
    ),
    Case(
        "scatter_rows of eight sources", "scatter.kernel", _scatter_eight, _eight_bytes, launches=1,
        # fp16 that becomes fp32 is loaded as it is stored, four elements at a time: two sources of ten such loads.
        narrow={"scatter_rows_kernel": (8 + 20, "a target per source; fp16 that becomes fp32")},
    ),
    Case(
        "scatter_rows of narrow rows", "scatter.kernel", _scatter_heads,
        lambda dtype: HEADS * (2 * HEAD * dtype.itemsize + 4), launches=1,
        narrow={"scatter_rows_kernel": (8, "the target of every row of the block")},
    ),
    Case(
        "gather_rows", "scatter.kernel", _gather, _moved, launches=1,
        narrow={"gather_rows_kernel": (1, "the row's origin")},
    ),
    Case(
        "gather_rows backward", "scatter.kernel", _gather_backward, _moved, launches=1,
        narrow={"gather_rows_backward_kernel": (3, "two borders of the row's list, and an entry of it")},
        values={"starts_ptr": np.arange(TOKENS + 1)},  # a permutation: every row once
    ),
]  # fmt: skip


def _broken(name: str, old: str, new: str, caught_by: str, case: str | None = None) -> Broken:
    return Broken(name, "scatter.kernel", old, new, caught_by, case)


_SCATTER_ROW = "            row = tl.cast(block // CHUNKS, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]"
_GATHER_ROW = "\n        row = tl.cast(block // CHUNKS, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]"
_TILE = "tile, pieces = launch.tiles(min(width, LARGEST_CHUNK))"
_ROWS = "rows = max(1, "
_STORE_MASK = "rows & (column < N)\n        where = to_ptr"

BROKEN = [
    # scatter
    _broken("scatter: wrong stride", "row * source_rows[k]", "row * N", "semantics"),
    _broken("scatter: wrong stride of the buffer", "target * out_row", "target * N", "semantics"),
    _broken("scatter: int32 offset", _SCATTER_ROW, _SCATTER_ROW.replace("tl.int64", "tl.int32"), "lint",
            "scatter_rows"),
    _broken("scatter: int32 target", "target = tl.load(indices[k] + row, there, 0).to(tl.int64)",
            "target = tl.load(indices[k] + row, there, 0)", "lint", "scatter_rows of narrow rows"),
    _broken("scatter: missing mask of rows", "            there = row < length", "            there = row < length + 1",
            "semantics"),
    _broken("scatter: missing mask of columns", _STORE_MASK, "rows\n        where = to_ptr", "semantics"),
    _broken("scatter: spilling block", _ROWS, "rows = max(16, ", "spills", "scatter_rows"),
    _broken("scatter: idle lanes", _TILE, "tile, pieces = triton.next_power_of_2(width), 1", "traffic", "scatter_rows"),
    _broken("scatter: columns may be apart", "@triton.jit\ndef scatter_rows_kernel",
            '@triton.jit(do_not_specialize=["out_column"])\ndef scatter_rows_kernel', "widths", "scatter_rows"),
    _broken("scatter: a launch per source", "MOST_SOURCES = 8", "MOST_SOURCES = 1", "launches",
            "scatter_rows of eight sources"),
    _broken("scatter: the next source's first block is skipped", "blocks % programs) % programs",
            "blocks % programs) % programs + 1", "semantics"),
    # gather
    _broken("gather: wrong stride", "origin * x_row", "origin * N", "semantics"),
    _broken("gather: int32 offset", _GATHER_ROW, _GATHER_ROW.replace("tl.int64", "tl.int32"), "lint", "gather_rows"),
    _broken("gather: missing mask of rows", "\n        there = row < length", "\n        there = row < length + 1",
            "semantics"),
    _broken("gather: missing mask of columns", _STORE_MASK, "rows\n        where = to_ptr", "semantics"),
    _broken("gather: spilling block", _ROWS, "rows = max(16, ", "spills", "gather_rows"),
    _broken("gather: scatters", "_copy_block(y_ptr, row * N, 1, x_ptr, origin * x_row",
            "_copy_block(y_ptr, origin * N, 1, x_ptr, row * x_row", "semantics"),
    # gather backward
    _broken("gather backward: wrong stride", "origin * dy_row", "origin * N", "semantics"),
    _broken("gather backward: int32 offset", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", "lint",
            "gather_rows backward"),
    _broken("gather backward: missing mask", "column, dx, None if EXACT else column < N)", "column, dx)", "semantics"),
    _broken("gather backward: too large a tile for its registers", "num_warps=min(WARPS, launch.warps(width))",
            "num_warps=min(WARPS, launch.warps(width)), registers=32", "spills", "gather_rows backward"),
    _broken("gather backward: order forgotten", "origin = tl.load(order_ptr + at).to(tl.int64)", "origin = at",
            "semantics"),
    _broken("gather backward: sums from the last to the first", "targets, order = torch.sort(index, stable=True)",
            "targets, order = torch.sort(index.flip(0), stable=True)\n        order = len(index) - 1 - order",
            "semantics"),
    _broken("gather backward: narrow sums", "(sums[piece] + dy.to(tl.float32),)",
            "((sums[piece] + dy.to(tl.float32)).to(dy.dtype).to(tl.float32),)", "semantics"),
]  # fmt: skip
