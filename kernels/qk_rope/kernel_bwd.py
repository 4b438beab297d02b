"""``qk_rope`` on GPUs, backward behind a norm. Shapes: T tokens, H heads, D head dim, X heads in a tile of width W.

P programs share the tokens of q and P those of k, each in a fixed stride. With ``g`` = dy turned back by the conjugate
rotation and ``r = 1 / sqrt(mean(x^2) + eps)``, per token and in the same registers:
``dx = r * (g * weight - x * r^2 * mean(g * weight * x))`` and ``dweight = sum over tokens of g * x * r``. The sums stay
in registers to the end; those of the P programs are added in order. x and dy are read once and dx is written once, 6
bytes per bf16 element. RoPE alone needs no x: its backward is the forward kernel with the conjugate rotation, 4 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .kernel import (
    Tile,
    inverse_rms,
    load_tile,
    readable_tables,
    rotate,
    rotation,
    steps,
    store_tile,
    tile,
    turn,
    whole_rows,
)


@triton.jit
def _chosen(q, k):
    """The fields of this program's :class:`Side`: one code for q and k, half the instructions of a branch."""
    fields = ()
    for number in tl.static_range(9):
        fields = fields + (tl.where(tl.program_id(1) == 0, q[number], k[number]),)
    return fields


@triton.jit
def add_pairs(total, x, X: tl.constexpr, W: tl.constexpr):
    """Adds both halves of the pairs of x to a sum ``[X, W / 2]``, which takes half the registers of ``[X, W]``."""
    a, b = tl.split(tl.reshape(x, (X, W // 2, 2)))
    total += a
    total += b
    return total


@triton.jit
def across_heads_kernel(
    q,
    k,
    tables,
    rows_ptr,
    tokens,
    eps,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program: tokens p, p + P, p + 2P, ... of q or of k, and row p of the partial sums, ``[P, H * D]``."""
    D: tl.constexpr = 2 * PAIRS[0] + 2 * PAIRS[1] + 2 * PAIRS[2]
    TILES: tl.constexpr = (max(HEADS[0], HEADS[1]) + X - 1) // X
    FULL: tl.constexpr = HEADS[0] == HEADS[1] and HEADS[0] % X == 0 and D == W
    x_ptr, dy_ptr, weight_ptr, dx_ptr, partial_ptr, x_token, x_head, dy_token, dy_head = _chosen(q, k)
    count = tl.where(tl.program_id(1) == 0, HEADS[0], HEADS[1]).to(tl.int64)  # a constant where they are equal
    inverse = 1.0 / (count * D).to(tl.float32)
    first = tl.arange(0, X)[:, None]
    dims = tl.arange(0, W)[None, :]
    x_lanes = first.to(tl.int64) * x_head * UNIT + dims
    x_step = tl.full((), X * UNIT, tl.int64) * x_head
    dy_lanes = first.to(tl.int64) * dy_head * UNIT + dims
    dy_step = tl.full((), X * UNIT, tl.int64) * dy_head
    lanes = first * D + dims
    program = tl.program_id(0).to(tl.int64)
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + (tl.zeros((X, W), tl.float32),)
    for token in range(program, tokens, tl.num_programs(0)):
        cos, sin = rotation(tables, rows_ptr, token, PAIRS, X, W, True)
        squares = tl.zeros((X, W // 2), tl.float32)
        products = tl.zeros((X, W // 2), tl.float32)
        xs = ()
        gs = ()
        x_from = x_ptr + token * x_token * UNIT
        dy_from = dy_ptr + token * dy_token * UNIT
        for piece in tl.static_range(TILES):
            heads = piece * X + first
            x = load_tile(x_from, x_lanes, heads, dims, count, D, FULL).to(tl.float32)
            dy = load_tile(dy_from, dy_lanes, heads, dims, count, D, FULL).to(tl.float32)
            weight = load_tile(weight_ptr + piece * X * D, lanes, heads, dims, count, D, FULL).to(tl.float32)
            g = turn(dy, cos, sin, X, W)
            squares = add_pairs(squares, x * x, X, W)
            products = add_pairs(products, g * weight * x, X, W)
            xs = xs + (x,)
            gs = gs + (g,)
            x_from += x_step
            dy_from += dy_step
        r = inverse_rms(tl.sum(squares), eps, inverse)
        pull = r * r * (tl.sum(products) * inverse)
        # Without it, the weights of all tiles would be fetched ahead and take registers that are not there.
        tl.debug_barrier()
        grown = ()
        for piece in tl.static_range(TILES):
            heads = piece * X + first
            weight = load_tile(weight_ptr + piece * X * D, lanes, heads, dims, count, D, FULL).to(tl.float32)
            dx = r * (gs[piece] * weight - xs[piece] * pull)
            store_tile(dx_ptr + (token * count + piece * X) * D, lanes, dx, heads, dims, count, D, FULL)
            grown = grown + (sums[piece] + gs[piece] * (xs[piece] * r),)
        sums = grown
    for piece in tl.static_range(TILES):
        heads = piece * X + first
        store_tile(partial_ptr + (program * count + piece * X) * D, lanes, sums[piece], heads, dims, count, D, FULL)


@triton.jit
def per_head_kernel(
    q,
    k,
    tables,
    rows_ptr,
    tokens,
    eps,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program: tokens p, p + P, p + 2P, ... of q or of k, and row p of the partial sums over heads, ``[P, D]``."""
    D: tl.constexpr = 2 * PAIRS[0] + 2 * PAIRS[1] + 2 * PAIRS[2]
    TILES: tl.constexpr = (max(HEADS[0], HEADS[1]) + X - 1) // X
    FULL: tl.constexpr = HEADS[0] == HEADS[1] and HEADS[0] % X == 0 and D == W
    x_ptr, dy_ptr, weight_ptr, dx_ptr, partial_ptr, x_token, x_head, dy_token, dy_head = _chosen(q, k)
    count = tl.where(tl.program_id(1) == 0, HEADS[0], HEADS[1]).to(tl.int64)
    first = tl.arange(0, X)[:, None]
    dims = tl.arange(0, W)[None, :]
    x_lanes = first.to(tl.int64) * x_head * UNIT + dims
    x_step = tl.full((), X * UNIT, tl.int64) * x_head
    dy_lanes = first.to(tl.int64) * dy_head * UNIT + dims
    dy_step = tl.full((), X * UNIT, tl.int64) * dy_head
    lanes = first * D + dims
    program = tl.program_id(0).to(tl.int64)
    weight = load_tile(weight_ptr, first * 0 + dims, first, dims, X, D, D == W).to(tl.float32)
    sums = tl.zeros((X, W), tl.float32)
    for token in range(program, tokens, tl.num_programs(0)):
        cos, sin = rotation(tables, rows_ptr, token, PAIRS, X, W, True)
        xs = ()
        gs = ()
        x_from = x_ptr + token * x_token * UNIT
        dy_from = dy_ptr + token * dy_token * UNIT
        for piece in tl.static_range(TILES):
            heads = piece * X + first
            xs = xs + (load_tile(x_from, x_lanes, heads, dims, count, D, FULL),)
            gs = gs + (load_tile(dy_from, dy_lanes, heads, dims, count, D, FULL),)
            x_from += x_step
            dy_from += dy_step
        for piece in tl.static_range(TILES):
            heads = piece * X + first
            x = xs[piece].to(tl.float32)
            g = turn(gs[piece].to(tl.float32), cos, sin, X, W)
            r = inverse_rms(tl.sum(x * x, 1), eps, 1.0 / D)[:, None]
            normed = x * r
            sums += g * normed
            g *= weight
            dx = r * (g - normed * (tl.sum(g * normed, 1)[:, None] * (1.0 / D)))
            store_tile(dx_ptr + (token * count + piece * X) * D, lanes, dx, heads, dims, count, D, FULL)
    total = tl.sum(sums, 0, keep_dims=True)
    store_tile(partial_ptr + program * D, dims, total, dims * 0, dims, 1, D, D == W)


class Side(NamedTuple):
    """One of q and k, as the kernel sees it. Strides are in UNITs."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    dx: Tensor
    partial: Tensor
    x_token: int
    x_head: int
    dy_token: int
    dy_head: int


def _programs(on: Tensor, cut: Tile) -> tuple[int, int]:
    """(programs for each of q and k, registers of a thread): together as many programs as run at once.

    A thread keeps x, the gradient and the sums of its elements in float32 and about 50 registers more, 128 or more to
    be safe; a multiprocessor has 65536. 40 heads of 128 in bf16: 40 elements, 168 registers, 3 programs of 128 threads.
    """
    threads = 32 * cut.warps
    resident = max(1, 65536 // (threads * max(128, 3 * cut.elements + 48)))
    each = max(1, launch.programs(on) * resident // (2 * launch.PROGRAMS_PER_MULTIPROCESSOR))
    return each, min(255, 65536 // (threads * resident) // 8 * 8)


def _of_one_dtype(q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both dense; the kernel chooses between them, so their dtypes must agree."""
    if q_weight.dtype != k_weight.dtype:
        q_weight, k_weight = q_weight.float(), k_weight.float()
    return q_weight.contiguous(), k_weight.contiguous()


def qk_rope_backward(
    dq_THD: Tensor,
    dk_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    tables: Sequence[Tensor],
    rows_T4: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``bernini::qk_rope_backward``."""
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THD, k_THD))
    if q_weight is None or k_weight is None:
        rotate((dq_THD, dk_THD), (dq, dk), tables, rows_T4, (None, None), norm, eps, conjugate=True)
        return dq, dk, q_THD.new_empty(0), k_THD.new_empty(0)
    cut, tokens = tile(q_THD, k_THD), q_THD.shape[0]
    each, registers = _programs(q_THD, cut)
    each = min(each, tokens)
    inputs = [(whole_rows(x), whole_rows(dy)) for x, dy in ((q_THD, dq_THD), (k_THD, dk_THD))]
    strides = [(*steps(x), *steps(dy)) for x, dy in inputs]
    unit = math.gcd(16, *strides[0], *strides[1])
    weights = _of_one_dtype(q_weight, k_weight)
    partials = [torch.empty((each, *w.shape), dtype=torch.float32, device=w.device) for w in weights]
    sides = [
        Side(*read, weight, dx, partial, *(stride // unit for stride in own))
        for read, weight, dx, partial, own in zip(inputs, weights, (dq, dk), partials, strides, strict=True)
    ]
    launch.launch(
        per_head_kernel if norm == "per_head" else across_heads_kernel, (each, 2), q_THD, *sides,
        readable_tables(tables), rows_T4.contiguous(), tokens, eps, (q_THD.shape[1], k_THD.shape[1]),
        tuple(table.shape[1] for table in tables[:3]), cut.heads, cut.width, unit, num_warps=cut.warps,
        registers=registers,
    )  # fmt: skip
    return dq, dk, partials[0].sum(0).to(q_weight.dtype), partials[1].sum(0).to(k_weight.dtype)
