"""Which tiles the attention kernels visit: worked out on the device from the intervals, before attention.

Shapes: T query rows, S keys; row tiles of M query rows, key tiles of N keys. A pair of tiles is FULL if all of its rows
see all of its keys, a GAP if no row sees any, else PARTIAL. Consecutive tiles make a run ``(first, middle, last)``:
``first .. middle - 1`` are PARTIAL, ``middle .. last - 1`` FULL. The runs of a row tile say which key tiles it needs,
no more and no fewer; those of a key tile, by which row tiles it is needed.

A row tile has at most M runs, 2 * M with second intervals, so all runs take 12 (24) bytes per token. A key tile has any
number, but one or two where segments make the intervals: up to :data:`COLUMN_RUNS` are planned, and of a key tile with
more, attention looks at the intervals of each row tile before it computes. Exact in either case.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch

Intervals = tuple[Tensor, ...]
"""``(starts, ends)`` or ``(starts, ends, starts2, ends2)``."""

COLUMN_RUNS = 8
LOOKED_AT = 4
"""Runs of a row tile that are looked at for it; segments make up to three."""

BLOCK = 128
"""Row tiles that the plan of a key tile looks at together."""

GAP = tl.constexpr(0)
PARTIAL = tl.constexpr(1)
FULL = tl.constexpr(2)
FAR = tl.constexpr(2**30)
"""Behind every tile."""


@triton.jit
def _extend(firsts, middles, lasts, count, before, now, begin, end, RUNS: tl.constexpr):
    """Appends the tiles ``begin .. end - 1``, which are all ``now``, to the runs; the ones before them were ``before``.

    Runs for which there is no room are counted only.
    """
    fresh = (now != GAP) & ((before == GAP) | ((before == FULL) & (now == PARTIAL)))
    count += fresh.to(tl.int32)
    here = (tl.arange(0, RUNS) == count - 1) & (now != GAP)
    firsts = tl.where(here & fresh, begin, firsts)
    middles = tl.where(here & fresh, begin, middles)
    middles = tl.where(here & (now == PARTIAL), end, middles)
    lasts = tl.where(here, end, lasts)
    return firsts, middles, lasts, count


@triton.jit
def _tiles_of(starts_ptr, ends_ptr, rows, there, keys, N: tl.constexpr):
    """Key tiles ``[touched, beyond)`` of which a row sees some, ``[inside, behind)`` of which it sees all keys.

    Rows that are not there see all and need none.
    """
    start = tl.maximum(tl.load(starts_ptr + rows, there, 0).to(tl.int32), 0)
    end = tl.minimum(tl.load(ends_ptr + rows, there, 0).to(tl.int32), keys)
    some = start < end
    touched = tl.where(some, start // N, FAR)
    beyond = tl.where(some, (end + N - 1) // N, 0)
    return touched, beyond, (start + N - 1) // N, tl.where(there, end // N, FAR)


@triton.jit
def _next(touched, beyond, inside, behind, at):
    """The first tile after ``at`` at which something changes, of every row."""
    first = tl.minimum(tl.where(touched > at, touched, FAR), tl.where(beyond > at, beyond, FAR))
    return tl.minimum(first, tl.minimum(tl.where(inside > at, inside, FAR), tl.where(behind > at, behind, FAR)))


@triton.jit(do_not_specialize=["tokens", "keys"])
def plan_rows_kernel(
    counts_ptr,
    row_runs_ptr,
    intervals,
    tokens,
    keys,
    M: tl.constexpr,
    N: tl.constexpr,
    RUNS: tl.constexpr,
    SECOND: tl.constexpr,
):
    """One program: the runs of a row tile. Goes from change to change, so gaps and full stretches cost one step."""
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * M + tl.arange(0, M)
    there = rows < tokens
    touched, beyond, inside, behind = _tiles_of(intervals[0], intervals[1], rows, there, keys, N)
    at = tl.min(touched)
    end = tl.max(beyond)
    if SECOND:
        touched2, beyond2, inside2, behind2 = _tiles_of(intervals[2], intervals[3], rows, there, keys, N)
        at = tl.minimum(at, tl.min(touched2))
        end = tl.maximum(end, tl.max(beyond2))
    firsts = tl.zeros((RUNS,), tl.int32)
    middles = tl.zeros((RUNS,), tl.int32)
    lasts = tl.zeros((RUNS,), tl.int32)
    count = tl.to_tensor(0)
    before = tl.to_tensor(0)
    while at < end:
        some = (touched <= at) & (at < beyond)
        every = (inside <= at) & (at < behind)
        change = _next(touched, beyond, inside, behind, at)
        if SECOND:
            some |= (touched2 <= at) & (at < beyond2)
            every |= (inside2 <= at) & (at < behind2)
            change = tl.minimum(change, _next(touched2, beyond2, inside2, behind2, at))
        now = tl.max(some.to(tl.int32)) * (PARTIAL + tl.min(every.to(tl.int32)))
        after = tl.minimum(tl.min(change), end)
        firsts, middles, lasts, count = _extend(firsts, middles, lasts, count, before, now, at, after, RUNS)
        before = now
        at = after
    runs = row_runs_ptr + tile * (3 * RUNS) + tl.arange(0, RUNS)
    tl.store(counts_ptr + tile, count)
    tl.store(runs, firsts)
    tl.store(runs + RUNS, middles)
    tl.store(runs + 2 * RUNS, lasts)


@triton.jit(do_not_specialize=["tokens"])
def plan_columns_kernel(
    column_counts_ptr,
    column_runs_ptr,
    counts_ptr,
    row_runs_ptr,
    tokens,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_RUNS: tl.constexpr,
    LOOKED_AT: tl.constexpr,
    RUNS: tl.constexpr,
):
    """One program: the runs of a key tile, from those of all row tiles; -1 of them if they are too many.

    Of each row tile it looks at the first LOOKED_AT runs; where one has more, no key tile is planned. The last row tile
    is never FULL if it is not whole.
    """
    column = tl.program_id(0)
    tiles = (tokens + M - 1) // M
    firsts = tl.zeros((RUNS,), tl.int32)
    middles = tl.zeros((RUNS,), tl.int32)
    lasts = tl.zeros((RUNS,), tl.int32)
    count = tl.to_tensor(0)
    before = tl.to_tensor(0)
    unclear = tl.to_tensor(0)
    for block in range(0, tiles, BLOCK):
        lane = block + tl.arange(0, BLOCK)
        there = lane < tiles
        number = tl.load(counts_ptr + lane, there, 0)
        more = number > LOOKED_AT
        state = tl.zeros((BLOCK,), tl.int32)
        for run in tl.static_range(LOOKED_AT):
            known = there & (run < number)
            where = row_runs_ptr + lane.to(tl.int64) * (3 * ROW_RUNS) + run
            first = tl.load(where, known, FAR)
            middle = tl.load(where + ROW_RUNS, known, FAR)
            last = tl.load(where + 2 * ROW_RUNS, known, 0)
            state = tl.where((first <= column) & (column < last), 1 + (middle <= column).to(tl.int32), state)
        state = tl.where((state == FULL) & ((lane.to(tl.int64) + 1) * M > tokens), PARTIAL, state)
        at = block
        end = tl.minimum(block + BLOCK, tiles)
        unclear = tl.maximum(unclear, tl.max(more.to(tl.int32)))
        while at < end:
            now = tl.sum(tl.where(lane == at, state, 0))
            after = tl.minimum(tl.min(tl.where((lane > at) & (state != now), lane, FAR)), end)
            firsts, middles, lasts, count = _extend(firsts, middles, lasts, count, before, now, at, after, RUNS)
            before = now
            at = after
    runs = column_runs_ptr + column.to(tl.int64) * (3 * RUNS) + tl.arange(0, RUNS)
    tl.store(column_counts_ptr + column, tl.where((unclear > 0) | (count > RUNS), -1, count))
    tl.store(runs, firsts)
    tl.store(runs + RUNS, middles)
    tl.store(runs + 2 * RUNS, lasts)


def rows(intervals: Intervals, keys: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Runs of key tiles for each row tile: how many, ``[T / M]``, and ``[T / M, 3, most]``; int32, on the device."""
    starts = intervals[0]
    tiles, most = triton.cdiv(len(starts), m), m * len(intervals) // 2
    counts = torch.empty((tiles,), dtype=torch.int32, device=starts.device)
    runs = torch.empty((tiles, 3, most), dtype=torch.int32, device=starts.device)
    launch.launch(
        plan_rows_kernel, (tiles,), starts, counts, runs, intervals, len(starts), keys, m, n, most,
        len(intervals) == 4, num_warps=1,
    )  # fmt: skip
    return counts, runs


def columns(intervals: Intervals, keys: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Runs of row tiles for each key tile: how many, or -1 if not planned, ``[S / N]``, and ``[S / N, 3, 8]``."""
    counts, runs = rows(intervals, keys, m, n)
    tiles = triton.cdiv(keys, n)
    column_counts = torch.empty((tiles,), dtype=torch.int32, device=counts.device)
    column_runs = torch.empty((tiles, 3, COLUMN_RUNS), dtype=torch.int32, device=counts.device)
    launch.launch(
        plan_columns_kernel, (tiles,), counts, column_counts, column_runs, counts, runs, len(intervals[0]), m, BLOCK,
        runs.shape[2], min(LOOKED_AT, runs.shape[2]), COLUMN_RUNS, num_warps=1,
    )  # fmt: skip
    return column_counts, column_runs
