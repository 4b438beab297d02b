"""Row scatter and gather on GPUs. Shapes: T rows of the buffer, n rows of a piece, N width.

``out[index[i]] = source[i]`` and ``y[i] = x[index[i]]``: every element is read once and written once, 4 bytes per bf16
element, and 4 or 8 bytes of index per row. A few programs per multiprocessor share all rows; a scatter of up to
:data:`MOST_SOURCES` sources is one launch, in which block b of all their rows is program b modulo their number.

``dx[t] = sum of dy[i] over index[i] = t``: rows are sorted by their target, and the program of row t adds its own in
order. dy is read once and dx written once, 4 bytes per bf16 element, with no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch

MOST_SOURCES = 8
"""Sources of one launch; more take several launches."""

WARPS = 4
BLOCK = 4096
"""Elements that a program copies at a time, about: narrow rows go several at once."""

LARGEST_CHUNK = 8 * launch.LARGEST_TILE
"""Elements of a row that a program holds at a time; of wider rows, chunks are copied as if they were rows."""

PROGRAMS = 4
"""Of a multiprocessor. Each has a row of 10 KB in flight: 40 KB hide the memory's latency, also where a row is only
asked for when its number has come."""


@triton.jit
def _copy_block(to_ptr, to_rows, to_column, from_ptr, from_rows, from_column, rows, chunk, N, PIECES: tl.constexpr,
                TILE: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Copies one chunk of ROWS rows. ``to_rows``, ``from_rows``: where each begins; ``rows``: which of them there are.

    All is loaded before anything is stored: the compiler must take the two for the same memory, and would otherwise
    wait for every piece before it asks for the next. A mask of whole rows leaves 128-bit accesses possible, one of
    columns does not.
    """
    lanes = tl.arange(0, TILE)[None, :]
    if from_ptr.dtype.element_ty.primitive_bitwidth < to_ptr.dtype.element_ty.primitive_bitwidth:
        # As many elements per thread as the store takes; else they change threads between, through shared memory.
        lanes = tl.max_contiguous(lanes, [1, 128 // to_ptr.dtype.element_ty.primitive_bitwidth])
    held = ()
    for piece in tl.static_range(PIECES):
        column = chunk * (PIECES * TILE) + piece * TILE + lanes.to(tl.int64)
        inside = None if EXACT and ROWS == 1 else rows if EXACT else rows & (column < N)
        where = from_ptr + (from_rows + column * from_column)
        value = tl.load(where, inside)
        if value.dtype != to_ptr.dtype.element_ty:
            value = value.to(tl.float32).to(to_ptr.dtype.element_ty)
        held += (value,)
    for piece in tl.static_range(PIECES):
        column = chunk * (PIECES * TILE) + piece * TILE + lanes.to(tl.int64)
        inside = None if EXACT and ROWS == 1 else rows if EXACT else rows & (column < N)
        where = to_ptr + (to_rows + column * to_column)
        tl.store(where, held[piece], inside)


@triton.jit
def scatter_rows_kernel(
    out_ptr,
    sources,
    indices,
    odd_lengths,
    source_rows,
    source_columns,
    out_row,
    out_column,
    N: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """``out[indices[k][i]] = sources[k][i]`` for COUNT sources; tuples have an entry per source.

    ``*_row`` and ``*_column``: elements from one row, and one column, to the next. ``odd_lengths[k]``: twice the rows
    of source k, plus one. Of a tuple's integers, Triton makes another binary for every 1 and every multiple of 16;
    among odd numbers above 1 it sees no difference.
    """
    CHUNKS: tl.constexpr = (N + PIECES * TILE - 1) // (PIECES * TILE)
    EXACT: tl.constexpr = CHUNKS * PIECES * TILE == N
    programs = tl.num_programs(0)
    turn = tl.program_id(0)  # which of the source's blocks is this program's first; the last source's end moves it on
    for k in tl.static_range(COUNT):
        length = odd_lengths[k] // 2
        blocks = (length + ROWS - 1) // ROWS * CHUNKS
        for block in range(turn, blocks, programs):
            row = tl.cast(block // CHUNKS, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
            there = row < length
            target = tl.load(indices[k] + row, there, 0).to(tl.int64)
            chunk = tl.cast(block % CHUNKS, tl.int64)
            _copy_block(out_ptr, target * out_row, out_column, sources[k], row * source_rows[k], source_columns[k],
                        there, chunk, N, PIECES, TILE, ROWS, EXACT)  # fmt: skip
        turn = (turn + programs - blocks % programs) % programs


@triton.jit(do_not_specialize=["length"])
def gather_rows_kernel(
    y_ptr,
    x_ptr,
    index_ptr,
    length,
    x_row,
    x_column,
    N: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``y[i] = x[index[i]]`` for ``length`` rows; rows of y are N apart."""
    CHUNKS: tl.constexpr = (N + PIECES * TILE - 1) // (PIECES * TILE)
    EXACT: tl.constexpr = CHUNKS * PIECES * TILE == N
    blocks = (length + ROWS - 1) // ROWS * CHUNKS
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = tl.cast(block // CHUNKS, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        there = row < length
        origin = tl.load(index_ptr + row, there, 0).to(tl.int64)
        chunk = tl.cast(block % CHUNKS, tl.int64)
        _copy_block(y_ptr, row * N, 1, x_ptr, origin * x_row, x_column, there, chunk, N, PIECES, TILE, ROWS, EXACT)


@triton.jit
def gather_rows_backward_kernel(
    dx_ptr,
    dy_ptr,
    order_ptr,
    starts_ptr,
    dy_row,
    N: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """``dx[t] = sum of dy[order[j]], starts[t] <= j < starts[t + 1]``: one program per row and chunk, sums in fp32.

    ``order``: the rows of dy sorted by their target, earlier ones first. A row that is never named becomes zero; one
    that is named k times costs k steps one after the other.
    """
    CHUNKS: tl.constexpr = (N + PIECES * TILE - 1) // (PIECES * TILE)
    EXACT: tl.constexpr = CHUNKS * PIECES * TILE == N
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * (PIECES * TILE)
    lanes = tl.arange(0, TILE)
    sums = ()
    for _ in tl.static_range(PIECES):
        sums += (tl.zeros((TILE,), tl.float32),)
    for at in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        origin = tl.load(order_ptr + at).to(tl.int64)
        grown = ()
        for piece in tl.static_range(PIECES):
            column = first + piece * TILE + lanes
            dy = tl.load(dy_ptr + origin * dy_row + column, None if EXACT else column < N, None if EXACT else 0.0)
            grown += (sums[piece] + dy.to(tl.float32),)
        sums = grown
    for piece in tl.static_range(PIECES):
        column = first + piece * TILE + lanes
        dx = sums[piece].to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row * N + column, dx, None if EXACT else column < N)


def _shape(width: int) -> tuple[int, int, int, int]:
    """(TILE, PIECES, ROWS, chunks of a row): blocks of about BLOCK elements, and 8 elements for every thread's load."""
    tile, pieces = launch.tiles(min(width, LARGEST_CHUNK))
    rows = max(1, 32 * 8 * WARPS // tile, 1 << (BLOCK // (tile * pieces)).bit_length() >> 1)
    return tile, pieces, rows, triton.cdiv(width, tile * pieces)


def _programs(on: Tensor, blocks: int) -> int:
    return min(launch.programs(on, PROGRAMS), blocks)


def scatter_rows(out: Tensor, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """The op ``bernini::scatter_rows``: any strides, no copies but of sources in dtypes other than fp32, fp16, bf16."""
    width = out.shape[1]
    tile, pieces, rows, chunks = _shape(width)
    todo = [(source, index) for source, index in zip(sources, indices, strict=True) if source.numel()]
    for start in range(0, len(todo), MOST_SOURCES):
        now = todo[start : start + MOST_SOURCES]
        some = tuple(source if source.dtype in launch.DTYPES else source.to(out.dtype) for source, _ in now)
        lengths = tuple(len(source) for source in some)
        blocks = sum(triton.cdiv(length, rows) * chunks for length in lengths)
        launch.launch(
            scatter_rows_kernel, (_programs(out, blocks),), out, out, some,
            tuple(index.contiguous() for _, index in now), tuple(2 * length + 1 for length in lengths),
            tuple(source.stride(0) for source in some), tuple(source.stride(1) for source in some),
            out.stride(0), out.stride(1), width, tile, pieces, rows, len(now), num_warps=WARPS,
        )  # fmt: skip


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """The op ``bernini::gather_rows``: any strides."""
    length, width = len(index), x.shape[1]
    y = torch.empty((length, width), dtype=x.dtype, device=x.device)
    if y.numel():
        tile, pieces, rows, chunks = _shape(width)
        launch.launch(
            gather_rows_kernel, (_programs(x, triton.cdiv(length, rows) * chunks),), x, y, x, index.contiguous(),
            length, x.stride(0), x.stride(1), width, tile, pieces, rows, num_warps=WARPS,
        )  # fmt: skip
    return y


def gather_rows_backward(dy: Tensor, index: Tensor, rows: int) -> Tensor:
    """The op ``bernini::gather_rows_backward``. Sorting touches the index only and does not wait for the device."""
    width = dy.shape[1]
    dx = torch.empty((rows, width), dtype=dy.dtype, device=dy.device)
    if dx.numel():
        dy = dy if dy.stride(1) == 1 or width == 1 else dy.contiguous()
        targets, order = torch.sort(index, stable=True)
        starts = torch.searchsorted(targets, torch.arange(rows + 1, dtype=index.dtype, device=index.device))
        tile, pieces, _, chunks = _shape(width)
        launch.launch(
            gather_rows_backward_kernel, (rows, chunks), dx, dx, dy, order, starts, dy.stride(0), width, tile, pieces,
            num_warps=min(WARPS, launch.warps(width)),
        )  # fmt: skip
    return dx
