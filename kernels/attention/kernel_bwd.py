"""Interval attention on GPUs, backward; shapes and tiles as in :mod:`.kernel`.

With ``P = exp(scale * q . k - lse)`` on the visible pairs, ``delta[t] = dout[t] . out[t]`` and
``dS = P * (dout . v - delta)``: ``dq = scale * dS k``, ``dk = scale * dS' q``, ``dv = P' dout``, where k and v add up
the heads of their group.

Two launches compute: one goes along the keys for dq, and one along the rows for dk and dv, which takes delta and lse
from the one before. Three plan for them (:mod:`.kernel_plan`). Every program owns what it writes and adds in a fixed
order, heads of a group one after the other: no atomics, the same bits every run. q, out, dout are read and dq, dk, dv
written once, 12 bytes per bf16 element; besides, k and v once per row tile and head that needs them, and q and dout
once per key tile that does.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from . import kernel_plan
from .kernel import (
    LN2,
    REGISTERS,
    Blocks,
    add_products,
    check,
    dense,
    load_intervals,
    load_rows,
    pack,
    pieces,
    products,
    store_rows,
    visible,
    zeros,
)


@triton.jit
def _scaled(xs, factor, PIECES: tl.constexpr):
    ys = ()
    for piece in tl.static_range(PIECES):
        ys = ys + (xs[piece] * factor,)
    return ys


@triton.jit
def _row_step(dq, q, k, v, dout, lse, delta, mask, scale, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr,
              V_PIECES: tl.constexpr):  # fmt: skip
    """Adds a key tile to dq (without its scale); scores are ``[M, N]``."""
    weights = tl.exp2(products(q, k, M, N, PIECES) * scale - lse[:, None])
    if mask is not None:
        weights = tl.where(mask, weights, 0.0)
    dscores = weights * (products(dout, v, M, N, V_PIECES) - delta[:, None])
    return add_products(dq, dscores, k, PIECES)


@triton.jit(do_not_specialize=["tokens", "keys", "group"])
def interval_attention_dq_kernel(
    dq_ptr,
    stats_ptr,
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
    """One program: a row tile and a query head. ``inputs``: q, k, v, dout, out; the rest as in the forward kernel.

    ``stats``: ``[H, 2, T]``, delta and the log-sum-exp in units of log 2 (+inf for rows without keys), for dk and dv.
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
    k_ptr = inputs[1] + head // group * strides[3]
    v_ptr = inputs[2] + head // group * strides[5]
    lanes = tl.arange(0, N)
    rows = tile * M + tl.arange(0, M)
    there = rows < tokens
    near = tl.minimum(rows, tokens - 1)
    dout = load_rows(inputs[3] + head * strides[7], near, strides[6], DV, V_TILE, V_PIECES)
    out = load_rows(inputs[4] + head * strides[9], near, strides[8], DV, V_TILE, V_PIECES)
    delta = tl.zeros((M,), tl.float32)
    for piece in tl.static_range(V_PIECES):
        delta += tl.sum(dout[piece].to(tl.float32) * out[piece].to(tl.float32), 1)
    lse = tl.load(lse_ptr + head * tokens + rows, there, float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse / LN2)
    stats = stats_ptr + head * 2 * tokens + rows
    tl.store(stats, delta, there)
    tl.store(stats + tokens, lse, there)
    q = load_rows(inputs[0] + head * strides[1], near, strides[0], D, TILE, PIECES)
    borders = load_intervals(intervals, rows[:, None], there[:, None], SECOND)
    dq = zeros(M, TILE, PIECES)
    visits = tl.to_tensor(0)
    runs = plan[1] + tile * (3 * RUNS)
    for run in range(tl.load(plan[0] + tile)):
        first = tl.load(runs + run)
        middle = tl.load(runs + RUNS + run)
        last = tl.load(runs + 2 * RUNS + run)
        for at in range(first, middle):
            places = tl.minimum(tl.cast(at, tl.int64) * N + lanes, keys - 1)
            k = load_rows(k_ptr, places, strides[2], D, TILE, PIECES)
            v = load_rows(v_ptr, places, strides[4], DV, V_TILE, V_PIECES)
            mask = visible(borders, at * N + lanes[None, :], SECOND)
            dq = _row_step(dq, q, k, v, dout, lse, delta, mask, scale, M, N, PIECES, V_PIECES)
            if visits_ptr is not None:
                visits += 1
        for at in range(middle, last):
            begin = tl.cast(at, tl.int64) * N
            k = load_rows(k_ptr + begin * strides[2], lanes.to(tl.int64), strides[2], D, TILE, PIECES)
            v = load_rows(v_ptr + begin * strides[4], lanes.to(tl.int64), strides[4], DV, V_TILE, V_PIECES)
            dq = _row_step(dq, q, k, v, dout, lse, delta, None, scale, M, N, PIECES, V_PIECES)
            if visits_ptr is not None:
                visits += 1
    dq_row = tl.num_programs(1).to(tl.int64) * D
    dq = _scaled(dq, scale * LN2, PIECES)
    store_rows(dq_ptr + head * D, rows, dq_row, there, dq, D, TILE, PIECES)
    if visits_ptr is not None:
        tl.store(visits_ptr + head * tl.num_programs(0) + tile, visits)


@triton.jit
def _overlap(borders, begin, N: tl.constexpr, SECOND: tl.constexpr):
    """1 for the rows that see one of the keys ``begin .. begin + N - 1``."""
    begin = begin.to(tl.int32)
    some = tl.minimum(borders[1], begin + N) > tl.maximum(borders[0], begin)
    if SECOND:
        some |= tl.minimum(borders[3], begin + N) > tl.maximum(borders[2], begin)
    return some.to(tl.int32)


@triton.jit
def _key_step(dk, dv, k, v, q, dout, lse, delta, mask, scale, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr,
              V_PIECES: tl.constexpr):  # fmt: skip
    """Adds a row tile to dk (without its scale) and dv; scores are ``[N, M]``, so that no product needs a transpose."""
    weights = tl.exp2(products(k, q, N, M, PIECES) * scale - lse[None, :])
    if mask is not None:
        weights = tl.where(mask, weights, 0.0)
    dv = add_products(dv, weights, dout, V_PIECES)
    dscores = weights * (products(v, dout, N, M, V_PIECES) - delta[None, :])
    return add_products(dk, dscores, q, PIECES), dv


@triton.jit(do_not_specialize=["tokens", "keys", "group"])
def interval_attention_dkdv_kernel(
    dk_ptr,
    dv_ptr,
    stats_ptr,
    inputs,
    strides,
    intervals,
    column_plan,
    visits_ptr,
    tokens,
    keys,
    group,
    scale,
    BLOCKS: tl.constexpr,
    RUNS: tl.constexpr,
    SECOND: tl.constexpr,
):
    """One program: a key tile and a key head; goes through the heads of the group and the row tiles that need it."""
    M: tl.constexpr = BLOCKS[0]
    N: tl.constexpr = BLOCKS[1]
    D: tl.constexpr = BLOCKS[2]
    TILE: tl.constexpr = BLOCKS[3]
    PIECES: tl.constexpr = BLOCKS[4]
    DV: tl.constexpr = BLOCKS[5]
    V_TILE: tl.constexpr = BLOCKS[6]
    V_PIECES: tl.constexpr = BLOCKS[7]
    tile = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, M)
    places = tile * N + tl.arange(0, N)
    near = tl.minimum(places, keys - 1)
    k = load_rows(inputs[1] + key_head * strides[3], near, strides[2], D, TILE, PIECES)
    v = load_rows(inputs[2] + key_head * strides[5], near, strides[4], DV, V_TILE, V_PIECES)
    key = places.to(tl.int32)[:, None]
    dk = zeros(N, TILE, PIECES)
    dv = zeros(N, V_TILE, V_PIECES)
    visits = tl.to_tensor(0)
    count = tl.load(column_plan[0] + tile)
    unplanned = count < 0
    runs = column_plan[1] + tile * (3 * RUNS)
    for member in range(group):
        head = key_head * group + member
        q_ptr = inputs[0] + head * strides[1]
        dout_ptr = inputs[3] + head * strides[7]
        stats = stats_ptr + head * 2 * tokens
        for run in range(tl.where(unplanned, (tokens + M - 1) // M, count)):
            if unplanned:
                rows = tl.cast(run, tl.int64) * M + lanes
                borders = load_intervals(intervals, rows, rows < tokens, SECOND)
                first = run
                middle = run + tl.max(_overlap(borders, tile * N, N, SECOND))
                last = middle
            else:
                first = tl.load(runs + run)
                middle = tl.load(runs + RUNS + run)
                last = tl.load(runs + 2 * RUNS + run)
            for at in range(first, middle):
                rows = tl.cast(at, tl.int64) * M + lanes
                row = tl.minimum(rows, tokens - 1)
                q = load_rows(q_ptr, row, strides[0], D, TILE, PIECES)
                dout = load_rows(dout_ptr, row, strides[6], DV, V_TILE, V_PIECES)
                delta = tl.load(stats + row)
                lse = tl.load(stats + tokens + row)
                borders = load_intervals(intervals, rows[None, :], rows[None, :] < tokens, SECOND)
                mask = visible(borders, key, SECOND)
                dk, dv = _key_step(dk, dv, k, v, q, dout, lse, delta, mask, scale, M, N, PIECES, V_PIECES)
                if visits_ptr is not None:
                    visits += 1
            for at in range(middle, last):
                begin = tl.cast(at, tl.int64) * M
                q = load_rows(q_ptr + begin * strides[0], lanes.to(tl.int64), strides[0], D, TILE, PIECES)
                dout = load_rows(dout_ptr + begin * strides[6], lanes.to(tl.int64), strides[6], DV, V_TILE, V_PIECES)
                delta = tl.load(stats + begin + lanes)
                lse = tl.load(stats + tokens + begin + lanes)
                dk, dv = _key_step(dk, dv, k, v, q, dout, lse, delta, None, scale, M, N, PIECES, V_PIECES)
                if visits_ptr is not None:
                    visits += 1
    there = places < keys
    groups = tl.num_programs(1).to(tl.int64)
    dk = _scaled(dk, scale * LN2, PIECES)
    store_rows(dk_ptr + key_head * D, places, groups * D, there, dk, D, TILE, PIECES)
    store_rows(dv_ptr + key_head * DV, places, groups * DV, there, dv, DV, V_TILE, V_PIECES)
    if visits_ptr is not None:
        tl.store(visits_ptr + key_head * tl.num_programs(0) + tile, visits)


def blocks(q: Tensor, v: Tensor, second: bool) -> tuple[Blocks, Blocks]:
    """Sizes of the kernels of dq, and of dk and dv; see :func:`.kernel.blocks`."""
    d, dv, kind = q.shape[2], v.shape[2], launch.architecture()
    amd, wide = kind.startswith("gfx"), max(d, dv) > 128
    if q.dtype == torch.float32:
        largest, stages = (64, 1) if amd else (32, 2)
        by_row = Blocks(32, 16 if amd else 32, pieces(d, largest), pieces(dv, largest), 8, stages)
        return by_row, Blocks(16, 32, pieces(d, 64), pieces(dv, 64), 8, stages)
    largest = 256 if amd else 128 if kind == "sm_90" else 64
    size = pieces(d, largest), pieces(dv, largest)
    if amd:
        return Blocks(64, 32, *size, 8, 1), Blocks(16, 32 if wide else 64, *size, 8, 1)
    if kind == "sm_90" and not wide:
        return Blocks(128, 64, *size, 8, 2), Blocks(16 if second else 32, 128, *size, 8, 3)
    return Blocks(64, 32, *size, 4, 2), Blocks(64, 32, *size, 8, 2)


def interval_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, ends: Tensor,
    starts2: Tensor | None, ends2: Tensor | None, scale: float, *, sizes: tuple[Blocks, Blocks] | None = None,
    visits: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op ``bernini::interval_attention_backward``.

    Args:
        sizes: other than :func:`blocks`, to prove small cases.
        visits: int32 ``[H, T / M]`` and ``[G, S / N]``, receive how many tiles the programs of dq, and of dk and dv,
            went through.
    """
    check("interval_attention_backward", q, k, v)
    (tokens, heads, _), (keys, groups, _) = q.shape, k.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    stats = torch.empty((heads, 2, tokens), dtype=torch.float32, device=q.device)
    intervals = pack(starts, ends, starts2, ends2)
    inputs, strides = dense(q, k, v, dout, out)
    by_row, by_key = sizes or blocks(q, v, len(intervals) == 4)
    visits_rows, visits_keys = visits or (None, None)
    common = (tokens, keys, heads // groups, scale / math.log(2))
    plan = kernel_plan.rows(intervals, keys, by_row.m, by_row.n)
    launch.launch(
        interval_attention_dq_kernel, (triton.cdiv(tokens, by_row.m), heads), q, dq, stats, lse.contiguous(), inputs,
        strides, intervals, plan, visits_rows, *common, by_row.sizes, plan[1].shape[2], len(intervals) == 4,
        num_warps=by_row.warps, num_stages=by_row.stages, registers=REGISTERS,
    )  # fmt: skip
    column_plan = kernel_plan.columns(intervals, keys, by_key.m, by_key.n)
    launch.launch(
        interval_attention_dkdv_kernel, (triton.cdiv(keys, by_key.n), groups), q, dk, dv, stats, inputs, strides,
        intervals, column_plan, visits_keys, *common, by_key.sizes, kernel_plan.COLUMN_RUNS, len(intervals) == 4,
        num_warps=by_key.warps, num_stages=by_key.stages, registers=REGISTERS,
    )  # fmt: skip
    return dq, dk, dv
