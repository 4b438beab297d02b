"""``qk_rope`` on GPUs, forward. Shapes: T tokens, H heads, D head dim, X heads in a tile, W a tile's width >= D.

A program per token. It multiplies the token's rotation out of four table rows once, for all heads of q and k, and holds
one of q and k at a time in registers, as tiles ``[X, W]``: x is read once and y written once, 4 bytes per bf16 element.
RoPE alone is its own backward with the conjugate rotation, so the same kernel serves there.
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

Pair = tuple[Tensor, Tensor]

WIDEST = 12288
"""Elements of the widest token that fits into registers, backward too, idle lanes included."""


@triton.jit
def load_tile(ptr, at, heads, dims, HEADS: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr):
    """A tile at element offsets ``at``; zeros where it is larger than what there is."""
    # A mask costs nothing where it is known to be full, but it would forbid 128-bit accesses elsewhere.
    return tl.load(ptr + at) if FULL else tl.load(ptr + at, (heads < HEADS) & (dims < D), 0.0)


@triton.jit
def store_tile(ptr, at, y, heads, dims, HEADS: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr):
    tl.store(ptr + at, y.to(ptr.dtype.element_ty), None if FULL else (heads < HEADS) & (dims < D))


@triton.jit
def rotation(tables, rows_ptr, token, PAIRS: tl.constexpr, X: tl.constexpr, W: tl.constexpr, CONJUGATE: tl.constexpr):
    """(cos, sin) of a token, ``[X, W / 2]``: ``[t | h | w] * segment``, slot by slot, the same for all X heads.

    Table rows lie as heads do, (cos, sin) next to each other. Loaded in the shape of a tile of heads, they arrive in
    the threads that need them, through L1 instead of through shared memory and barriers.
    """
    T: tl.constexpr = 2 * PAIRS[0]
    TH: tl.constexpr = 2 * PAIRS[0] + 2 * PAIRS[1]
    D: tl.constexpr = 2 * PAIRS[0] + 2 * PAIRS[1] + 2 * PAIRS[2]
    heads = tl.arange(0, X)[:, None]
    dims = tl.arange(0, W)[None, :]
    t_row = tl.load(rows_ptr + token * 4).to(tl.int64)
    h_row = tl.load(rows_ptr + token * 4 + 1).to(tl.int64)
    w_row = tl.load(rows_ptr + token * 4 + 2).to(tl.int64)
    segment_row = tl.load(rows_ptr + token * 4 + 3).to(tl.int64)
    # A slot belongs to one axis: choosing its address makes one load of what masks would make three.
    h_ptr = tables[1] + (h_row * (TH - T) - T)
    w_ptr = tables[2] + (w_row * (D - TH) - TH)
    axis_ptr = tl.where(dims < T, tables[0] + t_row * T, tl.where(dims < TH, h_ptr, w_ptr)) + dims
    axis_ptr = tl.max_contiguous(tl.multiple_of(axis_ptr, (1, 8)), (1, 2))  # a pair is one access of 8 bytes
    axis = load_tile(axis_ptr, heads * 0, heads, dims, X, D, D == W)
    segment = load_tile(tables[3] + segment_row * D, heads * 0 + dims, heads, dims, X, D, D == W)
    axis_cos, axis_sin = tl.split(tl.reshape(axis, (X, W // 2, 2)))
    segment_cos, segment_sin = tl.split(tl.reshape(segment, (X, W // 2, 2)))
    cos = axis_cos * segment_cos - axis_sin * segment_sin
    sin = axis_cos * segment_sin + axis_sin * segment_cos
    if CONJUGATE:
        sin = -sin
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def turn(x, cos, sin, X: tl.constexpr, W: tl.constexpr):
    """Rotates the adjacent pairs of a tile, which are parted and joined in registers."""
    a, b = tl.split(tl.reshape(x, (X, W // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (X, W))


@triton.jit
def inverse_rms(squares, eps, one_over_count):
    """``1 / sqrt(squares / count + eps)``."""
    return tl.div_rn(1.0, tl.sqrt_rn(squares * one_over_count + eps))


@triton.jit
def _forward(
    side,
    token,
    cos,
    sin,
    eps,
    HEADS: tl.constexpr,
    PER_RANK: tl.constexpr,
    D: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    UNIT: tl.constexpr,
    NORM: tl.constexpr,
    EAGER: tl.constexpr,
):
    """One of q and k; ``side`` is a :class:`Side`."""
    TILES: tl.constexpr = (HEADS + X - 1) // X
    first = tl.arange(0, X)[:, None]
    dims = tl.arange(0, W)[None, :]
    # Offsets within a tile once, and where a tile begins per tile, for all lanes alike: few 64-bit additions.
    x_lanes = first.to(tl.int64) * side.x_head * UNIT + dims
    x_step = tl.full((), X * UNIT, tl.int64) * side.x_head
    x_ptr = side.x + token * side.x_token * UNIT
    squares = tl.zeros((X, W), tl.float32)
    xs = ()
    for piece in tl.static_range(TILES):
        x = load_tile(x_ptr, x_lanes, piece * X + first, dims, HEADS, D, (piece + 1) * X <= HEADS and D == W)
        x = x.to(tl.float32)
        squares += x * x
        xs = xs + (x,)
        x_ptr += x_step
    if NORM == "across_heads":
        r = inverse_rms(tl.sum(squares), eps, 1.0 / max(HEADS * D, 1))
    if NORM == "per_head":
        weight = load_tile(side.weight, first * 0 + dims, first, dims, X, D, D == W).to(tl.float32)
    y_lanes = first.to(tl.int64) * side.y_head * UNIT + dims
    y_step = tl.full((), X * UNIT, tl.int64) * side.y_head
    y_ptr = side.y + token * side.y_token * UNIT
    for piece in tl.static_range(TILES):
        heads = piece * X + first
        y = xs[piece]
        if NORM == "across_heads":
            part_ptr = side.weight + piece * X * D
            weight = load_tile(part_ptr, first * D + dims, heads, dims, HEADS, D, (piece + 1) * X <= HEADS and D == W)
            y = y * r * weight.to(tl.float32)
        if NORM == "per_head":
            y = y * inverse_rms(tl.sum(y * y, 1), eps, 1.0 / D)[:, None] * weight
        if EAGER and NORM != "none":
            y = y.to(side.y.dtype.element_ty).to(tl.float32)
        y = turn(y, cos, sin, X, W)
        if PER_RANK != HEADS:  # a rank's heads may begin in the middle of a tile
            y_lanes = (heads // PER_RANK).to(tl.int64) * side.y_rank + (heads % PER_RANK).to(tl.int64) * side.y_head
            y_lanes = y_lanes * UNIT + dims
        store_tile(y_ptr, y_lanes, y, heads, dims, HEADS, D, (piece + 1) * X <= HEADS and D == W)
        if PER_RANK == HEADS:
            y_ptr += y_step


@triton.jit
def qk_rope_kernel(
    q,
    k,
    tables,
    rows_ptr,
    eps,
    HEADS: tl.constexpr,
    PER_RANK: tl.constexpr,
    PAIRS: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    UNIT: tl.constexpr,
    NORM: tl.constexpr,
    EAGER: tl.constexpr,
    CONJUGATE: tl.constexpr,
):
    """One program: one token. HEADS and PER_RANK are of (q, k); strides count UNITs, so their alignment is known."""
    D: tl.constexpr = 2 * PAIRS[0] + 2 * PAIRS[1] + 2 * PAIRS[2]
    token = tl.program_id(0).to(tl.int64)
    cos, sin = rotation(tables, rows_ptr, token, PAIRS, X, W, CONJUGATE)
    _forward(q, token, cos, sin, eps, HEADS[0], PER_RANK[0], D, X, W, UNIT, NORM, EAGER)
    _forward(k, token, cos, sin, eps, HEADS[1], PER_RANK[1], D, X, W, UNIT, NORM, EAGER)


class Side(NamedTuple):
    """One of q and k, as the kernel sees it. Strides are in UNITs."""

    x: Tensor
    weight: Tensor | None
    y: Tensor
    x_token: int
    x_head: int
    y_rank: int
    y_token: int
    y_head: int


class Tile(NamedTuple):
    """How tokens are cut: X heads in a tile of width W, warps with one access of 16 bytes per thread and tile, and the
    elements of a token that a thread holds then.
    """

    heads: int
    width: int
    warps: int
    elements: int


def tile(q_THD: Tensor, k_THD: Tensor) -> Tile:
    """The tile with the fewest idle lanes, for q and k alike: 8 of 40 heads of 128.

    Raises:
        ValueError: a token does not fit into registers.
    """
    most, head_dim = max(q_THD.shape[1], k_THD.shape[1]), q_THD.shape[2]
    width = 1 << (head_dim - 1).bit_length()
    if most * width > WIDEST:
        raise ValueError(
            f"qk_rope: the Triton kernel takes up to {WIDEST} elements a token (head_dim counted as the next power of "
            f"two, {width}), got q {list(q_THD.shape)} and k {list(k_THD.shape)}"
        )
    # Wider tokens take more threads, not more registers.
    largest = 1024 if most * width <= 6144 else 2048
    sizes = [1 << power for power in range(12) if 256 <= width << power <= largest and most <= 8 << power]

    def lanes(size: int) -> int:
        return sum(-(-x.shape[1] // size) * size for x in (q_THD, k_THD))

    heads = min(sizes or [max(1, largest // width)], key=lambda size: (lanes(size), -size))
    warps = min(max(1, heads * width * q_THD.element_size() // 512), 16)
    return Tile(heads, width, warps, -(-most // heads) * heads * width // (32 * warps))


def whole_rows(x: Tensor) -> Tensor:
    """The same values with a contiguous last axis; a copy only where strides leave no other way."""
    return x if x.stride(-1) == 1 else x.contiguous()


def steps(x: Tensor) -> tuple[int, ...]:
    """Strides of all axes but the last; 0 where they do not matter."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape[:-1], x.stride(), strict=False))


def readable_tables(tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tables dense and with each pair aligned; at most a copy of a few KB."""
    dense = (table.contiguous() for table in tables)
    return tuple(table if table.storage_offset() % 2 == 0 else table.clone() for table in dense)


def rotate(
    sources: Pair,
    outs: Pair,
    tables: Sequence[Tensor],
    rows_T4: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    norm: str,
    eps: float,
    *,
    eager: bool = False,
    conjugate: bool = False,
) -> None:
    """Launches the kernel for (q, k) and where they go."""
    q, k = sources
    cut = tile(q, k)
    sources = whole_rows(q), whole_rows(k)
    strides = [(*steps(x), *(steps(y) if y.dim() == 4 else (0, *steps(y)))) for x, y in zip(sources, outs, strict=True)]
    unit = math.gcd(16, *strides[0], *strides[1])
    sides = [
        Side(x, None if weight is None else weight.contiguous(), y, *(stride // unit for stride in own))
        for x, weight, y, own in zip(sources, weights, outs, strides, strict=True)
    ]
    pairs = tuple(table.shape[1] for table in tables[:3])
    launch.launch(
        qk_rope_kernel, (q.shape[0],), q, *sides, readable_tables(tables), rows_T4.contiguous(), eps,
        (q.shape[1], k.shape[1]), (max(1, outs[0].shape[-2]), max(1, outs[1].shape[-2])), pairs, cut.heads, cut.width,
        unit, "none" if weights[0] is None else norm, eager, conjugate, num_warps=cut.warps,
        registers=cut.elements + 56, exact=eager,
    )  # fmt: skip


def qk_rope_out(
    q_THD: Tensor,
    k_THD: Tensor,
    tables: Sequence[Tensor],
    rows_T4: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    """The op ``bernini::qk_rope_out``."""
    outs = (q_out, k_out)
    rotate((q_THD, k_THD), outs, tables, rows_T4, (q_weight, k_weight), norm, eps, eager=rounding == "eager")
    torch.autograd.graph.increment_version(outs)


def qk_rope(
    q_THD: Tensor,
    k_THD: Tensor,
    tables: Sequence[Tensor],
    rows_T4: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
) -> Pair:
    """The op ``bernini::qk_rope``."""
    q, k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THD, k_THD))
    eager = rounding == "eager"
    rotate((q_THD, k_THD), (q, k), tables, rows_T4, (q_weight, k_weight), norm, eps, eager=eager)
    return q, k
