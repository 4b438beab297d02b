"""``modulate`` on GPUs, forward. Shapes: T tokens, N width, R rows of the tables.

    residual' = residual + gate[row] * branch
    normed = (LayerNorm(residual') * weight + bias) * (1 + scale[row]) + shift[row]

A program per token holds its row in registers, so residual and branch are read once and both results written once: 8
bytes per bf16 element, 4 without a branch. The variance is taken of centred values, which are at hand, rather than as
a difference of two sums. The token's rows of the tables come out of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch


@triton.jit
def modulate_kernel(
    residual_ptr,
    branch_ptr,
    h_ptr,
    normed_ptr,
    tables,
    affine,
    index_ptr,
    residual_row,
    branch_row,
    table_rows,
    eps,
    N: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    EAGER: tl.constexpr,
):
    """One program: one token. ``tables`` are gate, scale and shift, ``affine`` weight and bias, each one or ``None``.

    Args:
        residual_ptr, branch_ptr: ``[T, N]``, rows ``residual_row`` and ``branch_row`` elements apart. branch, and with
            it h, the new residual, may be ``None``.
        h_ptr, normed_ptr: results ``[T, N]``, contiguous.
        index_ptr: the token's row in the tables, or ``None`` for row 0.
        table_rows: elements between the rows of each table.
    """
    # A mask costs nothing where it is known to be full, but it would forbid 128-bit accesses elsewhere.
    EXACT: tl.constexpr = TILE * TILES == N
    token = tl.program_id(0).to(tl.int64)
    row = tl.zeros((), tl.int64) if index_ptr is None else tl.load(index_ptr + token).to(tl.int64)
    columns = tl.arange(0, TILE)
    sums = tl.zeros((TILE,), tl.float32)
    residuals = ()
    branches = ()
    # All loads, then all stores: the compiler cannot know that they are of different memory and would wait in between.
    for piece in tl.static_range(TILES):
        at = piece * TILE + columns
        mask = None if EXACT else at < N
        other = None if EXACT else 0.0
        residuals += (tl.load(residual_ptr + token * residual_row + at, mask, other),)
        if branch_ptr is not None:
            branches += (tl.load(branch_ptr + token * branch_row + at, mask, other),)
    hs = ()
    for piece in tl.static_range(TILES):
        at = piece * TILE + columns
        mask = None if EXACT else at < N
        other = None if EXACT else 0.0
        h = residuals[piece].to(tl.float32)
        if branch_ptr is not None:
            branch = branches[piece].to(tl.float32)
            if tables[0] is not None:
                branch *= tl.load(tables[0] + row * table_rows[0] + at, mask, other).to(tl.float32)
            h += branch
            if EAGER:
                h = h.to(h_ptr.dtype.element_ty).to(tl.float32)
        sums += h
        hs += (h,)
    if branch_ptr is not None:
        for piece in tl.static_range(TILES):
            at = piece * TILE + columns
            tl.store(h_ptr + token * N + at, hs[piece].to(h_ptr.dtype.element_ty), None if EXACT else at < N)
    mean = tl.div_rn(tl.sum(sums), N * 1.0)
    squares = tl.zeros((TILE,), tl.float32)
    cs = ()
    for piece in tl.static_range(TILES):
        c = hs[piece] - mean
        if not EXACT:
            c = tl.where(piece * TILE + columns < N, c, 0.0)
        squares += c * c
        cs += (c,)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares), N * 1.0) + eps))
    ys = ()
    for piece in tl.static_range(TILES):
        at = piece * TILE + columns
        mask = None if EXACT else at < N
        other = None if EXACT else 0.0
        y = cs[piece] * r
        if affine[0] is not None:
            y *= tl.load(affine[0] + at, mask, other).to(tl.float32)
        if affine[1] is not None:
            y += tl.load(affine[1] + at, mask, other).to(tl.float32)
        if tables[1] is not None:
            y *= 1 + tl.load(tables[1] + row * table_rows[1] + at, mask, other).to(tl.float32)
        if tables[2] is not None:
            y += tl.load(tables[2] + row * table_rows[2] + at, mask, other).to(tl.float32)
        ys += (y.to(normed_ptr.dtype.element_ty),)
    for piece in tl.static_range(TILES):
        at = piece * TILE + columns
        tl.store(normed_ptr + token * N + at, ys[piece], None if EXACT else at < N)


def sizes(width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(TILE, TILES, warps) of a row, so that a thread holds 16 bytes of each tile: one 128-bit access."""
    tile, tiles = launch.tiles(width, max(launch.LARGEST_TILE, triton.next_power_of_2(triton.cdiv(width, 7))))
    return tile, tiles, min(max(tile * dtype.itemsize // (16 * 32), 1), 16)


def dense_rows(x: Tensor) -> Tensor:
    """``[T, N]`` with a contiguous last axis and rows anywhere; a copy only where the last axis is not contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def row_of(index: Tensor | None, *tables: Tensor | None) -> Tensor | None:
    """The index, unless all tokens take row 0 anyway."""
    several = any(table is not None and table.shape[0] != 1 for table in tables)
    return index.contiguous() if index is not None and several else None


def _run(
    residual: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rounding: str,
) -> tuple[Tensor | None, Tensor]:
    tokens, width = residual.shape
    launch.check_width("modulate", width)
    normed = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    h = None if branch is None else torch.empty_like(normed)
    rows = dense_rows(residual)
    branch_rows = None if branch is None else dense_rows(branch)
    tables = tuple(None if table is None else dense_rows(table) for table in (gate, scale, shift))
    affine = tuple(None if part is None else part.contiguous() for part in (weight, bias))
    tile, tiles, warps = sizes(width, residual.dtype)
    launch.launch(
        modulate_kernel, (tokens,), residual, rows, branch_rows, h, normed, tables, affine, row_of(index, *tables),
        rows.stride(0), 0 if branch_rows is None else branch_rows.stride(0), strides(tables), eps, width, tile, tiles,
        rounding == "eager", num_warps=warps, exact=rounding == "eager", registers=128,
    )  # fmt: skip
    return h, normed


def strides(tables: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """Elements between rows; 0 where there is no table."""
    return tuple(0 if table is None else table.stride(0) for table in tables)


def modulate(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    """The op ``bernini::modulate``."""
    h, normed = _run(residual, branch, gate, scale, shift, index, weight, bias, eps, rounding)
    assert h is not None
    return h, normed


def modulate_norm(
    residual: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rounding: str,
) -> Tensor:
    """The op ``bernini::modulate_norm``."""
    return _run(residual, None, None, scale, shift, index, weight, bias, eps, rounding)[1]
