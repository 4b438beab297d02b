"""Which tiles the Triton kernels visit, worked out on the host: to estimate a batch's work, to prove the kernels' plan.

Shapes: T query rows, S keys; row tiles of M query rows, key tiles of N keys. See :mod:`.kernel_plan` for what runs are.
Takes one byte per pair of tiles; needs neither torch nor Triton.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
GAP, PARTIAL, FULL = 0, 1, 2


def states(starts: Ints, ends: Ints, second: tuple[Ints, Ints] | None, keys: int, m: int, n: int) -> NDArray[np.uint8]:
    """``[T / M, S / N]``: what each row tile needs of each key tile.

    Each row counts up where its key tiles begin and down where they end; sums along the keys then tell by how many rows
    a tile is touched, and by how many it is seen whole.
    """
    tokens = len(starts)
    row_tiles, key_tiles = -(-tokens // m), -(-keys // n)
    pairs = [(starts, ends), *([] if second is None else [second])]
    result = np.zeros((row_tiles, key_tiles), np.uint8)
    for tile in range(row_tiles):
        part = slice(tile * m, (tile + 1) * m)
        some, whole = np.zeros(key_tiles + 2, np.int64), np.zeros(key_tiles + 2, np.int64)
        for begins, stops in pairs:
            low, high = begins[part].astype(np.int64), stops[part].astype(np.int64)
            low, high = low[low < high], high[low < high]
            np.add.at(some, low // n, 1)
            np.add.at(some, -(-high // n), -1)
            inside, behind = -(-low // n), high // n
            np.add.at(whole, inside[inside < behind], 1)
            np.add.at(whole, behind[inside < behind], -1)
        needed = np.cumsum(some)[:key_tiles] > 0
        result[tile] = needed * (1 + (np.cumsum(whole)[:key_tiles] == len(starts[part])))
    return result


def tiles_visited(
    starts: Ints, ends: Ints, second: tuple[Ints, Ints] | None, keys: int, m: int, n: int
) -> NDArray[np.int64]:
    """``[T / M]``: how many key tiles the forward kernel reads and multiplies for each row tile."""
    return np.count_nonzero(states(starts, ends, second, keys, m, n), axis=1)


def row_plan(state: NDArray[np.uint8], most: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """What ``plan_rows_kernel`` writes: counts ``[T / M]`` and runs ``[T / M, 3, most]``, zero where there is none."""
    counts, runs = np.zeros(len(state), np.int32), np.zeros((len(state), 3, most), np.int32)
    for tile, line in enumerate(state):
        found = _runs(line)
        counts[tile] = len(found)
        runs[tile, :, : len(found)] = np.array(found, np.int32).reshape(-1, 3).T
    return counts, runs


def column_plan(
    state: NDArray[np.uint8], tokens: int, m: int, most: int = 8, looked_at: int = 4
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """What ``plan_columns_kernel`` writes: ``[S / N]``, how many runs or -1, and ``[S / N, 3, most]``."""
    counts, runs = np.zeros(state.shape[1], np.int32), np.zeros((state.shape[1], 3, most), np.int32)
    if any(len(_runs(line)) > looked_at for line in state):
        return counts - 1, runs
    state = state.copy()
    if tokens % m:  # the last row tile is not whole
        state[-1] = np.minimum(state[-1], PARTIAL)
    for column, line in enumerate(state.T):
        found = _runs(line)
        counts[column] = len(found) if len(found) <= most else -1
        runs[column, :, : len(found)] = np.array(found[:most], np.int32).reshape(-1, 3).T
    return counts, runs


def _runs(line: NDArray[np.uint8]) -> list[tuple[int, int, int]]:
    """``(first, middle, last)``: PARTIAL tiles from first, FULL ones from middle, up to last."""
    borders = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)] if len(line) else []
    found: list[tuple[int, int, int]] = []
    for begin, end in pairwise(borders):
        if line[begin] == PARTIAL:
            found.append((begin, end, end))
        elif line[begin] == FULL and found and found[-1][2] == begin:
            found[-1] = (found[-1][0], begin, end)
        elif line[begin] == FULL:
            found.append((begin, begin, end))
    return found
