"""Interval attention on GPUs, forward. Backward is in :mod:`.kernel_bwd`.

Shapes: T query rows, S keys, H query heads, G key heads, D head dim, Dv head dim of the values; tiles of M query rows
and N keys. ``out[t] = softmax(scale * q[t] . k) v`` over the keys of row t's intervals.

One launch plans (:mod:`.kernel_plan`): which key tiles each row tile needs, and in which of them every row sees every
key. One attends: a program per row tile and query head goes through the needed key tiles in order, with the running
maximum and sum of its rows in float32. Tiles that are seen whole run without masks. q is read and out written once, 4
bytes per bf16 element, and k and v once per row tile and head that needs them: consecutive heads and rows run together
and share them in cache. On bf16 and fp16 the weights are rounded to the inputs' dtype for their product with v, on
tensor cores; sums are in float32. float32 is multiplied as float32, never as TF32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from . import kernel_plan
from .kernel_plan import Intervals

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Stands for the maximum of no scores: unlike -inf it can be subtracted from itself."""

LN2 = tl.constexpr(math.log(2))

WIDEST = 256
"""Largest head dim: rows of accumulators are held in registers."""

REGISTERS = 255
"""Per thread: all there are. One or two programs fit on a multiprocessor, with several tiles in flight."""

MOST_TOKENS = 2**30
"""Numbers of rows and keys are int32."""


@triton.jit
def load_rows(ptr, rows, row_stride, D: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr):
    """Rows of ``[.., D]`` as PIECES tiles ``[rows, TILE]``, zeros behind D.

    Where rows may be missing, callers name the last one instead: that needs no mask, and columns have none where D
    needs none, so that accesses have 128 bits.
    """
    xs = ()
    for piece in tl.static_range(PIECES):
        d = piece * TILE + tl.arange(0, TILE)[None, :]
        where = ptr + rows[:, None] * row_stride + d
        x = tl.load(where) if TILE * PIECES == D else tl.load(where, d < D, 0.0)
        xs = xs + (x,)
    return xs


@triton.jit
def store_rows(ptr, rows, row_stride, there, xs, D: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr):
    """The reverse of :func:`load_rows`, rounding to the dtype of ``ptr``; only the rows that are there."""
    for piece in tl.static_range(PIECES):
        d = piece * TILE + tl.arange(0, TILE)[None, :]
        mask = there[:, None] if TILE * PIECES == D else there[:, None] & (d < D)
        tl.store(ptr + rows[:, None] * row_stride + d, xs[piece].to(ptr.dtype.element_ty), mask)


@triton.jit
def products(xs, ys, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """``x . y`` for all pairs of rows of two lists of tiles, ``[ROWS, COLUMNS]``."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for piece in tl.static_range(PIECES):
        total = tl.dot(xs[piece], tl.trans(ys[piece]), total, input_precision="ieee")
    return total


@triton.jit
def add_products(sums, weights, ys, PIECES: tl.constexpr):
    """``sums + weights @ y``; the weights are rounded to y's dtype."""
    grown = ()
    for piece in tl.static_range(PIECES):
        y = ys[piece]
        grown = grown + (tl.dot(weights.to(y.dtype), y, sums[piece], input_precision="ieee"),)
    return grown


@triton.jit
def zeros(ROWS: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr):
    xs = ()
    for _ in tl.static_range(PIECES):
        xs = xs + (tl.zeros((ROWS, TILE), tl.float32),)
    return xs


@triton.jit
def load_intervals(intervals, rows, there, SECOND: tl.constexpr):
    """``(start, end)`` of each row, or four; rows that are not there have empty ones."""
    borders = ()
    for number in tl.static_range(4 if SECOND else 2):
        borders = borders + (tl.load(intervals[number] + rows, there, 0).to(tl.int32),)
    return borders


@triton.jit
def visible(borders, keys, SECOND: tl.constexpr):
    """Whether row and key see each other; the two are given along different axes.

    By how far the key is outside, so that there is one comparison: a mask of each would not fit into AMD's scalars.
    """
    outside = tl.maximum(borders[0] - keys, keys - borders[1] + 1)
    if SECOND:
        outside = tl.minimum(outside, tl.maximum(borders[2] - keys, keys - borders[3] + 1))
    return outside <= 0


@triton.jit
def _attend(top, total, sums, scores, mask, scale, vs, PIECES: tl.constexpr):
    """Adds one key tile to the running maximum, the sum of the weights and the weighted sum of v."""
    if mask is None:
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
    else:
        scores = tl.where(mask, scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    shrunk = ()
    for piece in tl.static_range(PIECES):
        shrunk = shrunk + (sums[piece] * shrink[:, None],)
    return higher, total * shrink + tl.sum(weights, 1), add_products(shrunk, weights, vs, PIECES)


@triton.jit(do_not_specialize=["tokens", "keys", "group"])
def interval_attention_kernel(
    out_ptr,
    lse_ptr,
    inputs,
    strides,
    intervals,
    plan,
    visits_ptr,
    tokens,
    keys,
    group,
    scale,
    BLOCKS: tl.constexpr,
    RUNS: tl.constexpr,
    SECOND: tl.constexpr,
):
    """One program: a row tile (the last ones first, which see most) and a query head.

    ``inputs``: q, k, v; ``strides``: elements from token to token and from head to head of each; ``plan``: counts and
    runs; ``scale`` in units of log 2; ``visits_ptr``: where to count key tiles, or ``None``.
    """
    M: tl.constexpr = BLOCKS[0]
    N: tl.constexpr = BLOCKS[1]
    D: tl.constexpr = BLOCKS[2]
    TILE: tl.constexpr = BLOCKS[3]
    PIECES: tl.constexpr = BLOCKS[4]
    DV: tl.constexpr = BLOCKS[5]
    V_TILE: tl.constexpr = BLOCKS[6]
    V_PIECES: tl.constexpr = BLOCKS[7]
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    key_head = head // group
    k_ptr = inputs[1] + key_head * strides[3]
    v_ptr = inputs[2] + key_head * strides[5]
    lanes = tl.arange(0, N)
    rows = tile * M + tl.arange(0, M)
    there = rows < tokens
    borders = load_intervals(intervals, rows[:, None], there[:, None], SECOND)
    loaded = load_rows(inputs[0] + head * strides[1], tl.minimum(rows, tokens - 1), strides[0], D, TILE, PIECES)
    q = ()
    sign = tl.where(scale < 0, -1.0, 1.0)  # so that the largest product has the largest score
    for piece in tl.static_range(PIECES):
        q = q + ((loaded[piece].to(tl.float32) * sign).to(loaded[piece].dtype),)
    scale = tl.abs(scale)
    top = tl.full((M,), LOWEST, tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = zeros(M, V_TILE, V_PIECES)
    visits = tl.to_tensor(0)
    runs = plan[1] + tile * (3 * RUNS)
    for run in range(tl.load(plan[0] + tile)):
        first = tl.load(runs + run)
        middle = tl.load(runs + RUNS + run)
        last = tl.load(runs + 2 * RUNS + run)
        for at in range(first, middle):
            begin = tl.cast(at, tl.int64) * N
            places = tl.minimum(begin + lanes, keys - 1)
            k = load_rows(k_ptr, places, strides[2], D, TILE, PIECES)
            v = load_rows(v_ptr, places, strides[4], DV, V_TILE, V_PIECES)
            mask = visible(borders, at * N + lanes[None, :], SECOND)
            top, total, sums = _attend(top, total, sums, products(q, k, M, N, PIECES), mask, scale, v, V_PIECES)
            if visits_ptr is not None:
                visits += 1
        for at in range(middle, last):
            begin = tl.cast(at, tl.int64) * N
            k = load_rows(k_ptr + begin * strides[2], lanes.to(tl.int64), strides[2], D, TILE, PIECES)
            v = load_rows(v_ptr + begin * strides[4], lanes.to(tl.int64), strides[4], DV, V_TILE, V_PIECES)
            top, total, sums = _attend(top, total, sums, products(q, k, M, N, PIECES), None, scale, v, V_PIECES)
            if visits_ptr is not None:
                visits += 1
    none = total == 0
    total = tl.where(none, 1.0, total)
    out = ()
    for piece in tl.static_range(V_PIECES):
        out = out + (sums[piece] / total[:, None],)
    out_row = tl.num_programs(1).to(tl.int64) * DV
    store_rows(out_ptr + head * DV, rows, out_row, there, out, DV, V_TILE, V_PIECES)
    lse = tl.where(none, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse_ptr + head * tokens + rows, lse, there)
    if visits_ptr is not None:
        tl.store(visits_ptr + head * tl.num_programs(0) + tile, visits)


@dataclass(frozen=True)
class Blocks:
    """Sizes of a launch.

    Args:
        m, n: query rows and keys of a tile.
        d, dv: head dims as (width, tile, pieces): pieces of a power of two.
        warps: of 32 lanes.
        stages: how many tiles are in flight, where that can be chosen.
    """

    m: int
    n: int
    d: tuple[int, int, int]
    dv: tuple[int, int, int]
    warps: int
    stages: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.m, self.n, *self.d, *self.dv


def pieces(width: int, largest: int) -> tuple[int, int, int]:
    """(width, TILE, PIECES) with the fewest idle columns; at least 16, which is what products on tensor cores take."""
    sizes = [size for size in (16, 32, 64, 128, 256) if size <= largest and (size == largest or width <= 8 * size)]
    return (width, *min(((size, -(-width // size)) for size in sizes), key=lambda pair: (pair[0] * pair[1], -pair[0])))


def blocks(q: Tensor, v: Tensor) -> Blocks:
    """Sizes of the forward kernel, for each kind of GPU.

    They are such that all sums, M x Dv of them, stay in registers, and that tensor cores take them whole: 16 rows per
    warp, or 64 per four warps on sm_90.
    """
    d, dv, kind = q.shape[2], v.shape[2], launch.architecture()
    amd, wide = kind.startswith("gfx"), max(d, dv) > 128
    if q.dtype == torch.float32:  # not on tensor cores: columns in pieces, else each thread would hold whole rows
        largest = 64 if amd else 32
        return Blocks(32 if wide else 64, 32, pieces(d, largest), pieces(dv, largest), 8, 1 if amd else 2)
    largest = 256 if amd else 128 if kind == "sm_90" else 64
    n = 32 if amd or wide else 64
    return Blocks(64 if wide else 128, n, pieces(d, largest), pieces(dv, largest), 8, 1 if amd else 3)


def check(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("v", v)):
        if x.shape[2] > WIDEST:
            raise ValueError(f"{op}: the Triton kernel takes head dims up to {WIDEST}, got {name} {list(x.shape)}")
    for name, x in (("q", q), ("k", k)):
        if x.shape[0] > MOST_TOKENS:
            raise ValueError(f"{op}: the Triton kernel takes up to {MOST_TOKENS} tokens, got {name} {list(x.shape)}")


def dense(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors with a contiguous last axis (a copy only where it is not), and (token, head) strides of each."""
    made = tuple(x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in tensors)
    return made, tuple(stride for x in made for stride in x.stride()[:2])


def pack(*intervals: Tensor | None) -> Intervals:
    """The intervals that are given, dense in memory."""
    return tuple(x.contiguous() for x in intervals if x is not None)


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, starts2: Tensor | None, ends2: Tensor | None,
    scale: float, *, sizes: Blocks | None = None, visits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op ``bernini::interval_attention``.

    Args:
        sizes: other than :func:`blocks`, to prove small cases.
        visits: int32 ``[H, T / M]``, receives how many key tiles each program went through.
    """
    check("interval_attention", q, k, v)
    (tokens, heads, _), (keys, groups, width) = q.shape, v.shape
    out = torch.empty((tokens, heads, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    sizes = sizes or blocks(q, v)
    intervals = pack(starts, ends, starts2, ends2)
    plan = kernel_plan.rows(intervals, keys, sizes.m, sizes.n)
    inputs, strides = dense(q, k, v)
    launch.launch(
        interval_attention_kernel, (triton.cdiv(tokens, sizes.m), heads), q, out, lse, inputs, strides, intervals, plan,
        visits, tokens, keys, heads // groups, scale / math.log(2), sizes.sizes, plan[1].shape[2], len(intervals) == 4,
        num_warps=sizes.warps, num_stages=sizes.stages, registers=REGISTERS,
    )  # fmt: skip
    return out, lse
