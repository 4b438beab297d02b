"""RMSNorm on GPUs. Shapes: T tokens, N width, P programs.

Forward: a program per token holds its row in registers, so x is read once and y written once, 4 bytes per bf16 element.
Backward: P programs share the tokens, each in a fixed stride, and keep the weight's gradient in registers; their P
partial sums are added in order. x and dy are read once, dx is written once: 6 bytes. The weight is asked for again with
every token: it stays in the L1 cache, and its registers are free for the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch

FORWARD_PER_THREAD, BACKWARD_PER_THREAD = 56, 40
"""Elements of a row in one thread. Forward holds x; backward x, dy and a sum, and spills beyond 8192 columns."""


@triton.jit
def _weighted(value, weight_ptr, at, N, EXACT: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """``value * weight`` for the columns ``at``; without a weight, the value."""
    if HAS_WEIGHT:
        value *= tl.load(weight_ptr + at, None if EXACT else at < N, None if EXACT else 0.0).to(tl.float32)
    return value


@triton.jit
def _reciprocal_root(squares, eps, N):
    """``1 / sqrt(squares / N + eps)``, every step rounded to nearest."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, N) + eps))


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    x_row,
    eps,
    N: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """One program: one token. Rows of y are N apart, rows of x ``x_row`` elements."""
    # A mask costs nothing where it is known to be full, but it would forbid 128-bit accesses elsewhere.
    EXACT: tl.constexpr = TILE * TILES == N
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    squares = tl.zeros((TILE,), tl.float32)
    xs = ()
    for piece in tl.static_range(TILES):
        at = piece * TILE + columns
        x = tl.load(x_ptr + token * x_row + at, None if EXACT else at < N, None if EXACT else 0.0).to(tl.float32)
        squares += x * x
        xs += (x,)
    r = _reciprocal_root(tl.sum(squares), eps, N)
    for piece in tl.static_range(TILES):
        at = piece * TILE + columns
        y = _weighted(xs[piece] * r, weight_ptr, at, N, EXACT, HAS_WEIGHT)
        tl.store(y_ptr + token * N + at, y.to(y_ptr.dtype.element_ty), None if EXACT else at < N)


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,
    tokens,
    dy_row,
    x_row,
    eps,
    N: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """One program: tokens p, p + P, p + 2P, ... and row p of the partial sums of dweight, ``[P, N]``.

    With ``g = dy * weight``: ``dx = r * (g - x * r^2 * mean(g * x))``, ``dweight = sum of dy * x * r``.
    """
    EXACT: tl.constexpr = TILE * TILES == N
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    sums = ()
    for _ in tl.static_range(TILES):
        sums += (tl.zeros((TILE,), tl.float32),)
    for token in range(program, tokens, tl.num_programs(0)):
        squares = tl.zeros((TILE,), tl.float32)
        products = tl.zeros((TILE,), tl.float32)
        xs = ()
        dys = ()
        for piece in tl.static_range(TILES):
            at = piece * TILE + columns
            x = tl.load(x_ptr + token * x_row + at, None if EXACT else at < N, None if EXACT else 0.0).to(tl.float32)
            dy = tl.load(dy_ptr + token * dy_row + at, None if EXACT else at < N, None if EXACT else 0.0).to(tl.float32)
            xs += (x,)
            dys += (dy,)
        for piece in tl.static_range(TILES):
            g = _weighted(dys[piece], weight_ptr, piece * TILE + columns, N, EXACT, HAS_WEIGHT)
            squares += xs[piece] * xs[piece]
            products += g * xs[piece]
        square, product = tl.split(tl.sum(tl.join(squares, products), 0))  # one reduction for both
        r = _reciprocal_root(square, eps, N)
        pull = r * r * tl.div_rn(product, N)
        grown = ()
        for piece in tl.static_range(TILES):
            at = piece * TILE + columns
            g = _weighted(dys[piece], weight_ptr, at, N, EXACT, HAS_WEIGHT)
            dx = r * (g - xs[piece] * pull)
            tl.store(dx_ptr + token * N + at, dx.to(dx_ptr.dtype.element_ty), None if EXACT else at < N)
            grown += (sums[piece] + dys[piece] * (xs[piece] * r),)
        sums = grown
    if HAS_WEIGHT:
        for piece in tl.static_range(TILES):
            at = piece * TILE + columns
            tl.store(partial_ptr + program * N + at, sums[piece], None if EXACT else at < N)


def _shape(width: int, per_thread: int) -> tuple[int, int, int]:
    """(TILE, TILES, warps): at most ``per_thread`` elements of a row in a thread, and where they fit, 8 of each tile.

    Eight 16-bit elements are one 128-bit access.
    """
    warps = next(count for count in (1, 2, 4, 8, 16) if width <= 32 * count * per_thread or count == 16)
    tile, tiles = launch.tiles(width, 32 * warps * 8)
    return tile, tiles, warps


def _rows(x: Tensor) -> Tensor:
    """``[..., N]`` as ``[T, N]`` with a contiguous last axis; a copy only where strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, rounding: str) -> Tensor:
    """The op ``bernini::rms_norm``; the two roundings coincide."""
    width = x.shape[-1]
    launch.check_width("rms_norm", width)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    rows = _rows(x)
    tile, tiles, warps = _shape(width, FORWARD_PER_THREAD)
    launch.launch(
        rms_norm_kernel, (rows.shape[0],), x, rows, _weight(weight), y, rows.stride(0), eps, width, tile, tiles,
        weight is not None, num_warps=warps, exact=rounding == "eager",
    )  # fmt: skip
    return y


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The op ``bernini::rms_norm_backward``."""
    width = x.shape[-1]
    launch.check_width("rms_norm", width)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not dx.numel():
        return dx, x.new_empty(0) if weight is None else torch.zeros_like(weight)
    rows, dy_rows = _rows(x), _rows(dy)
    tokens = rows.shape[0]
    count = min(launch.programs(x), tokens)
    partials = torch.empty((count if weight is not None else 0, width), dtype=torch.float32, device=x.device)
    tile, tiles, warps = _shape(width, BACKWARD_PER_THREAD)
    launch.launch(
        rms_norm_backward_kernel, (count,), x, dy_rows, rows, _weight(weight), dx, partials, tokens,
        dy_rows.stride(0), rows.stride(0), eps, width, tile, tiles, weight is not None,
        num_warps=warps,
    )  # fmt: skip
    return dx, x.new_empty(0) if weight is None else partials.sum(0).to(weight.dtype)


def _weight(weight: Tensor | None) -> Any:
    return None if weight is None else weight.contiguous()
