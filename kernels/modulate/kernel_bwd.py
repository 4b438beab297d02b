"""``modulate`` on GPUs, backward. Shapes: T tokens, N width, R rows of the tables, P programs, K sums.

Besides the two gradients of the data there are up to five of small tables, which are sums over tokens. With dn the
gradient of normed, dh that of residual' (all of it) and u the normalised residual', three sums per row of the tables
serve them all:

    A = sum dn * u       B = sum dn       C = sum dh * branch
    dscale = weight * A + bias * B        dshift = B        dgate = C
    dweight = sum over rows of (1 + scale) * A              dbias = sum over rows of (1 + scale) * B

Tokens are taken in the order of their rows (a stable sort of the index), so each program has few rows in its share and
keeps the sums of one at a time in registers. Nothing is added atomically: the same bits every run.

Residual, branch and both gradients are read once, dresidual and dbranch written once: 12 bytes per bf16 element, 10
without a gate, 6 without a branch. At a width of 5120 the sums, the row's two factors and a token in work fill the
registers of a multiprocessor once, as 8 warps of 255, so the next token cannot wait there: it is on its way into
shared memory meanwhile (``num_stages=2``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .kernel import dense_rows, row_of, strides

WARPS = 8
"""Whose registers, 255 per thread, are all that a multiprocessor has."""

LARGEST_SHARE = 20
"""Elements of a row per thread that leave room for the three sums and all else."""

LARGEST_STAGE = 96 * 1024
"""Bytes of shared memory that the next token may take: what every target has."""


@triton.jit
def add_triples(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def fold(x, LANES: tl.constexpr):
    """Sums what each thread holds of a tile, to one number per thread, so that tiles of all sizes add up."""
    return tl.sum(tl.reshape(x, (LANES, x.shape[0] // LANES)), 1)


@triton.jit
def read(ptr, N: tl.constexpr, PIECES: tl.constexpr):
    """A row as a tuple of tiles, in its own dtype."""
    xs = ()
    for piece in tl.static_range(len(PIECES)):
        at = PIECES[piece][0] + tl.arange(0, PIECES[piece][1])
        xs += (tl.load(ptr + at, None if PIECES[piece][2] else at < N, None if PIECES[piece][2] else 0.0),)
    return xs


@triton.jit
def write(ptr, xs, N: tl.constexpr, PIECES: tl.constexpr):
    for piece in tl.static_range(len(PIECES)):
        at = PIECES[piece][0] + tl.arange(0, PIECES[piece][1])
        tl.store(ptr + at, xs[piece].to(ptr.dtype.element_ty), None if PIECES[piece][2] else at < N)


@triton.jit
def zeros(PIECES: tl.constexpr):
    xs = ()
    for piece in tl.static_range(len(PIECES)):
        xs += (tl.zeros((PIECES[piece][1],), tl.float32),)
    return xs


@triton.jit
def factors(scale_ptr, weight_ptr, N: tl.constexpr, PIECES: tl.constexpr):
    """``(1 + scale) * weight``, by which dn is multiplied on its way to the normalised value; all ones without both."""
    scales = zeros(PIECES) if scale_ptr is None else read(scale_ptr, N, PIECES)
    xs = ()
    for piece in tl.static_range(len(PIECES)):
        xs += (1 + scales[piece].to(tl.float32),)
    if weight_ptr is not None:
        weights = read(weight_ptr, N, PIECES)
        scaled = ()
        for piece in tl.static_range(len(PIECES)):
            scaled += (xs[piece] * weights[piece].to(tl.float32),)
        xs = scaled
    return xs


@triton.jit
def modulate_backward_kernel(
    gradients,
    inputs,
    results,
    partial_ptr,
    tables,
    order,
    gradient_rows,
    input_rows,
    table_rows,
    tokens,
    chunk,
    eps,
    N: tl.constexpr,
    PIECES: tl.constexpr,
    LANES: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: ``chunk`` tokens in the order of their rows, and for each row among them, its part of the sums.

    The part of program p for row r goes to slot p + r of ``[P + R - 1, K, N]``: both only grow along the order, so no
    two parts share one. Slots in between stay unwritten.

    Args:
        gradients: of residual' (``None`` without a branch) and of normed.
        inputs: residual and branch (or ``None``), ``results`` their gradients; dbranch only where there is a gate.
        tables: gate, scale and weight, each one or ``None``.
        order: tokens in the order of their rows, those rows, and where in the order each row begins (R + 1 numbers);
            three ``None`` where all tokens take row 0.
        PIECES: (start, size, whether all lanes are in use) of the tiles that a row is held in.
        LANES: threads.
        SUMS: which of A, B and C are wanted.
        STAGES: 2 loads the next token while one is in work, 1 does not.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * chunk
    last = tl.minimum(first + chunk, tokens)
    first_row = tl.zeros((), tl.int64)
    last_row = tl.zeros((), tl.int64)
    if order[0] is not None:
        first_row = tl.load(order[1] + first).to(tl.int64)
        last_row = tl.load(order[1] + last - 1).to(tl.int64)
    for row in range(first_row, last_row + 1):
        begin = first
        end = last
        if order[0] is not None:
            begin = tl.maximum(first, tl.load(order[2] + row))
            end = tl.minimum(last, tl.load(order[2] + row + 1))
        scale_ptr = None if tables[1] is None else tables[1] + row * table_rows[1]
        fs = factors(scale_ptr, tables[2], N, PIECES)
        gates = () if tables[0] is None else read(tables[0] + row * table_rows[0], N, PIECES)
        a_sums = zeros(PIECES) if SUMS[0] else ()
        b_sums = zeros(PIECES) if SUMS[1] else ()
        c_sums = zeros(PIECES) if SUMS[2] else ()
        for place in tl.range(begin, end, num_stages=STAGES):
            token = place if order[0] is None else tl.load(order[0] + place)
            hs = read(inputs[0] + token * input_rows[0], N, PIECES)
            branches = () if inputs[1] is None else read(inputs[1] + token * input_rows[1], N, PIECES)
            dns = read(gradients[1] + token * gradient_rows[1], N, PIECES)
            dhs = () if gradients[0] is None else read(gradients[0] + token * gradient_rows[0], N, PIECES)
            wide = ()
            total = tl.zeros((LANES,), tl.float32)
            for piece in tl.static_range(len(PIECES)):
                h = hs[piece].to(tl.float32)
                if inputs[1] is not None:
                    branch = branches[piece].to(tl.float32)
                    h += branch if tables[0] is None else branch * gates[piece].to(tl.float32)
                total += fold(h, LANES)
                wide += (h,)
            mean = tl.div_rn(tl.sum(total), N * 1.0)
            cs = ()
            cc = tl.zeros((LANES,), tl.float32)
            g = tl.zeros((LANES,), tl.float32)
            gc = tl.zeros((LANES,), tl.float32)
            for piece in tl.static_range(len(PIECES)):
                c = wide[piece] - mean
                if not PIECES[piece][2]:
                    c = tl.where(PIECES[piece][0] + tl.arange(0, PIECES[piece][1]) < N, c, 0.0)
                dy = dns[piece].to(tl.float32) * fs[piece]
                cc += fold(c * c, LANES)
                g += fold(dy, LANES)
                gc += fold(dy * c, LANES)
                cs += (c,)
            cc_sum, g_sum, gc_sum = tl.reduce((cc, g, gc), 0, add_triples)
            r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(cc_sum, N * 1.0) + eps))
            drift = r * tl.div_rn(g_sum, N * 1.0)
            pull = r * r * r * tl.div_rn(gc_sum, N * 1.0)
            a_next = ()
            b_next = ()
            c_next = ()
            dresiduals = ()
            dbranches = ()
            for piece in tl.static_range(len(PIECES)):
                dn = dns[piece].to(tl.float32)
                dh = r * (dn * fs[piece]) - drift - cs[piece] * pull
                if gradients[0] is not None:
                    dh += dhs[piece].to(tl.float32)
                if SUMS[0]:
                    a_next += (a_sums[piece] + dn * (cs[piece] * r),)
                if SUMS[1]:
                    b_next += (b_sums[piece] + dn,)
                if SUMS[2]:
                    c_next += (c_sums[piece] + dh * branches[piece].to(tl.float32),)
                    dbranches += (dh * gates[piece].to(tl.float32),)
                dresiduals += (dh,)
            write(results[0] + token * N, dresiduals, N, PIECES)
            if results[1] is not None:
                write(results[1] + token * N, dbranches, N, PIECES)
            a_sums = a_next
            b_sums = b_next
            c_sums = c_next
        slot = partial_ptr + (program + row) * ((SUMS[0] + SUMS[1] + SUMS[2]) * N)
        if SUMS[0]:
            write(slot, a_sums, N, PIECES)
        if SUMS[1]:
            write(slot + SUMS[0] * N, b_sums, N, PIECES)
        if SUMS[2]:
            write(slot + (SUMS[0] + SUMS[1]) * N, c_sums, N, PIECES)


@triton.jit
def row_sums_kernel(
    partial_ptr, sums_ptr, starts_ptr, programs, chunk, W: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr
):
    """One program: TILE of the W sums of one row, added up over the programs that had tokens of that row.

    Args:
        starts_ptr: where each row begins in the order of tokens, or ``None`` where all programs had row 0.
    """
    EXACT: tl.constexpr = W % TILE == 0
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * TILE
    at = start + tl.arange(0, TILE)[None, :]
    first = tl.zeros((), tl.int64)
    last = first + programs
    if starts_ptr is not None:
        begin = tl.load(starts_ptr + row)
        end = tl.load(starts_ptr + row + 1)
        first = begin // chunk
        last = tl.where(begin < end, (end + chunk - 1) // chunk, first)
    sums = tl.zeros((SLOTS, TILE), tl.float32)
    for some in range(first, last, SLOTS):
        program = some + tl.arange(0, SLOTS)[:, None]
        mask = program < last if EXACT else (program < last) & (at < W)
        sums += tl.load(partial_ptr + (program + row) * W + at, mask, 0.0)
    at = start + tl.arange(0, TILE)
    tl.store(sums_ptr + row * W + at, tl.sum(sums, 0), None if EXACT else at < W)


def sizes(width: int, dtype: torch.dtype) -> tuple[tuple[tuple[int, int, bool], ...], int]:
    """((start, size, whether all lanes are in use) of the pieces of a row, warps).

    16 bytes per thread as often as they fit, then less: 5120 in bf16 are 2048 + 2048 + 1024 for 8 warps, and in fp32
    five times 1024. Rows of more than 5120 elements need more registers than there are and spill some.
    """
    warps = 1
    while 32 * warps * LARGEST_SHARE < width and warps < 16:
        warps *= 2
    size = 32 * warps * 16 // dtype.itemsize
    smallest = max(32 * warps, size // 4)
    pieces, start = [], 0
    while start < width:
        while size > smallest and size > width - start:
            size //= 2
        pieces.append((start, size, start + size <= width))
        start += size
    return tuple(pieces), warps


def _run(
    dresidual: Tensor | None,
    dnormed: Tensor,
    residual: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of residual, branch, gate, scale, shift, weight and bias; empty where there are none."""
    tokens, width = residual.shape
    launch.check_width("modulate", width)
    dx = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    dbranch = None if gate is None else torch.empty_like(dx)
    rows = next((table.shape[0] for table in (gate, scale, shift) if table is not None), 1)
    index = row_of(index, gate, scale, shift)
    order: tuple[Tensor | None, ...] = (None, None, None)
    if index is not None:
        in_rows, by_row = torch.sort(index, stable=True)
        bounds = torch.arange(rows + 1, dtype=index.dtype, device=index.device)
        order = (by_row, in_rows, torch.searchsorted(in_rows, bounds))
    pieces, warps = sizes(width, residual.dtype)
    chunk = max(1, triton.cdiv(tokens, launch.programs(residual, max(1, WARPS // warps))))
    programs = triton.cdiv(tokens, chunk)
    wanted = (scale is not None or weight is not None, shift is not None or bias is not None, gate is not None)
    partial = torch.empty(max(programs + rows - 1, 0), sum(wanted), width, dtype=torch.float32, device=residual.device)
    gradients = tuple(None if x is None else dense_rows(x) for x in (dresidual, dnormed))
    inputs = tuple(None if x is None else dense_rows(x) for x in (residual, branch))
    tables = tuple(None if x is None else dense_rows(x) for x in (gate, scale))
    stage = sum(x is not None for x in (*gradients, *inputs)) * width * residual.itemsize
    launch.launch(
        modulate_backward_kernel, (programs,), residual, gradients, inputs, (dx, dbranch), partial,
        (*tables, None if weight is None else weight.contiguous()), order, strides(gradients), strides(inputs),
        strides(tables), tokens, chunk, eps, width, pieces, 32 * warps, tuple(map(int, wanted)),
        2 if stage <= LARGEST_STAGE else 1, num_warps=warps, registers=min(255, 2048 // warps),
    )  # fmt: skip
    absent = residual.new_empty(0)
    found = iter(_add_up(partial, rows, order[2], programs, chunk).unbind(1)) if any(wanted) else iter(())
    a, b, c = (next(found) if is_wanted else absent for is_wanted in wanted)
    factor = 1 if scale is None else 1 + scale.float()

    def dscale() -> Tensor:
        sums = a if weight is None else a * weight.float()
        return sums if bias is None else sums + b * bias.float()

    def gradient(of: Tensor | None, sums: Callable[[], Tensor]) -> Tensor:
        # A copy: an op's results may not share memory, as the sums of a row do.
        return absent if of is None else sums().to(of.dtype, copy=True, memory_format=torch.contiguous_format)

    return (
        dx,
        absent if dbranch is None else dbranch,
        gradient(gate, lambda: c),
        gradient(scale, dscale),
        gradient(shift, lambda: b),
        gradient(weight, lambda: (factor * a).sum(0)),
        gradient(bias, lambda: (factor * b).sum(0)),
    )


def _add_up(partial: Tensor, rows: int, starts: Tensor | None, programs: int, chunk: int) -> Tensor:
    """The parts of all programs ``[P + R - 1, K, N]``, added up row by row: ``[R, K, N]``."""
    _, kinds, width = partial.shape
    sums = torch.empty(rows, kinds, width, dtype=torch.float32, device=partial.device)
    launch.launch(
        row_sums_kernel, (rows, triton.cdiv(kinds * width, 128)), partial, partial, sums, starts, programs, chunk,
        kinds * width, 32, 128, num_warps=4,
    )  # fmt: skip
    return sums


def modulate_backward(
    dresidual: Tensor,
    dnormed: Tensor,
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """The op ``bernini::modulate_backward``."""
    return _run(dresidual, dnormed, residual, branch, gate, scale, shift, index, weight, bias, eps)


def modulate_norm_backward(
    dnormed: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """The op ``bernini::modulate_norm_backward``."""
    dx, _, _, *others = _run(None, dnormed, residual, None, None, scale, shift, index, weight, bias, eps)
    return dx, *others
