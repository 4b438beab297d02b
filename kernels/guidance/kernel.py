"""Chained guidance on GPUs. Shapes: F frames, M values per frame, P predictions, L links, C chunks of a frame.

``v = p[0] + sum over links of scale * A(p[new] - p[old])`` and, with an update, J outputs that are linear combinations
of the latent, v and K history tensors. ``A`` clips a difference d and weighs its part along p[new], by three sums over
a frame or all frames: ``|d|^2, <d, onto>, |onto|^2``. So there are two launches: :func:`partial_sums` adds the three up
for every chunk, and :func:`apply` lets every program derive the weights from the sums of its frame and write its chunk.
Where no sum is needed, the second runs alone.

Bytes per element in float32, five predictions and an Euler step: 20 for the sums, 20 again, 4 + 4 for latent and
result; half of the first two in bf16. x0 space reads the latent for the sums too, 4; history and outputs cost 4 each.
Momentum reads and writes the buffer in the first launch and reads it in the second, 12 per link.

The sums are those of the differences themselves, in float32: a thread adds up a few values, the threads of a program
and then the chunks are added as trees, all in an order that follows from the sizes only. Values beyond 1e16 overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from . import reference

TILE = 1024
"""Values of a frame that a program handles at a time."""

WARPS = 4
FEW_CHUNKS, MANY_CHUNKS = 32, 256
"""A frame has at most 32 chunks, or where there are too few frames to fill a GPU, so many that there are 256 in all. In
the global form, where each program adds up the sums of all, there are 256 at most; of more frames, torch adds them."""

FRAME_FLOOR = tl.constexpr(reference.FRAME_NORM_FLOOR**2)
GLOBAL_EPS = tl.constexpr(reference.GLOBAL_EPS)


class Inputs(NamedTuple):
    """What a kernel reads: tensors whose frames are contiguous, and the elements from one frame to the next."""

    predictions: tuple[Tensor, ...]
    latent: Tensor | None
    history: tuple[Tensor, ...]
    prediction_rows: tuple[int, ...]
    latent_row: int
    history_rows: tuple[int, ...]


class Numbers(NamedTuple):
    """The host's numbers of a call. ``shares``: of each link's d in v, so ``-scale / sigma`` in x0 space."""

    shares: tuple[float, ...]
    thresholds: tuple[float, ...]
    coefficients: tuple[float, ...]
    sigma: float
    eta: float
    momentum: float


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _stacked(columns):
    """Columns side by side, filled up with zeros to a power of two, so that one reduction adds them all up."""
    COUNT: tl.constexpr = triton.next_power_of_2(len(columns))
    for _ in tl.static_range(COUNT - len(columns)):
        columns = columns + (tl.zeros_like(columns[0]),)
    for _ in tl.static_range(COUNT):
        if len(columns) > 1:
            joined = ()
            for number in tl.static_range(len(columns) // 2):
                joined = joined + (tl.join(columns[number], columns[number + len(columns) // 2]),)
            columns = joined
    return tl.reshape(columns[0], (columns[0].shape[0], COUNT))


@triton.jit
def _positions(tile, TILE: tl.constexpr, LANES: tl.constexpr):
    """Places of a tile's values in their frame, ``[TILE / LANES, LANES]``: a row is what a thread loads at once."""
    inside = tl.arange(0, TILE // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return tile * TILE + inside


@triton.jit
def _load_all(pointers, rows, frame, at, there):
    """Every tensor's values at the places ``at`` of a frame, in float32. What nobody looks at is not loaded."""
    values = ()
    for number in tl.static_range(len(pointers)):
        value = tl.load(pointers[number] + frame * rows[number] + at, there, 0.0)
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def _difference(ps, latent, sigma, new: tl.constexpr, old: tl.constexpr, IN_X0: tl.constexpr):
    """(d, onto) of a link. A difference of two x0 is taken from the velocities: the latent would cost it digits."""
    onto = ps[new]
    d = onto - ps[old]
    if IN_X0:
        d = -sigma * d
        onto = latent - sigma * onto
    return d, onto


@triton.jit(do_not_specialize=["chunk_tiles"])
def guide_sums_kernel(
    partials_ptr,
    inputs,
    buffer_ptr,
    numbers,
    values,
    chunk_tiles,
    LINKS: tl.constexpr,
    IN_X0: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program: the three sums of every link over ``chunk_tiles`` tiles of a frame of ``values`` values.

    ``partials``: ``[L, 3, F, C]`` for the grid (F, C). With a buffer ``[L, F, M]``, ``d + momentum * buffer`` takes the
    place of d and is written to the buffer.
    """
    frame, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    frames, chunks = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    sums = ()
    for _ in tl.static_range(3 * len(LINKS)):
        sums = sums + (tl.zeros((TILE // LANES,), tl.float32),)
    for tile in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, tl.cdiv(values, TILE))):
        at = _positions(tile, TILE, LANES)
        there = at < values
        ps = _load_all(inputs.predictions, inputs.prediction_rows, frame, at, there)
        latent = None
        if IN_X0:
            latent = tl.load(inputs.latent + frame * inputs.latent_row + at, there, 0.0).to(tl.float32)
        grown = ()
        for link in tl.static_range(len(LINKS)):
            d, onto = _difference(ps, latent, numbers.sigma, LINKS[link][0], LINKS[link][1], IN_X0)
            if buffer_ptr is not None:
                carried_ptr = buffer_ptr + (link * frames + frame) * values + at
                d += numbers.momentum * tl.load(carried_ptr, there, 0.0)
                tl.store(carried_ptr, d, there)
            grown = grown + (sums[3 * link] + tl.sum(d * d, 1),)
            grown = grown + (sums[3 * link + 1] + tl.sum(d * onto, 1),)
            grown = grown + (sums[3 * link + 2] + tl.sum(onto * onto, 1),)
        sums = grown
    totals = tl.sum(_stacked(sums), 0)
    number = tl.arange(0, totals.shape[0])
    where = (number.to(tl.int64) * frames + frame) * chunks + chunk
    tl.store(partials_ptr + where, totals, number < 3 * len(LINKS))


@triton.jit
def _weights(partials_ptr, share, threshold, eta, every, count, FORM: tl.constexpr, AT_ONCE: tl.constexpr):
    """A link's weights of d and of onto in v: ``share * clip`` and ``(eta - 1) * share * clip * <d, onto> / |onto|^2``.

    From ``count`` partial sums of each kind, at most ``AT_ONCE``; the kinds are ``every`` apart.
    """
    at = tl.arange(0, AT_ONCE)
    squares = tl.load(partials_ptr + at, at < count, 0.0)
    along = tl.load(partials_ptr + every + at, at < count, 0.0)
    size = tl.load(partials_ptr + 2 * every + at, at < count, 0.0)
    squares, along, size = tl.reduce((squares, along, size), 0, _add_three)
    norm = tl.sqrt_rn(squares)
    clips = (threshold > 0) & (norm > threshold)
    weight = share * tl.where(clips, tl.div_rn(threshold, tl.where(clips, norm, 1.0)), 1.0)
    size = size + GLOBAL_EPS if FORM == "global" else tl.maximum(size, FRAME_FLOOR)
    return weight, (eta - 1.0) * weight * tl.div_rn(along, size)


@triton.jit(do_not_specialize=["chunk_tiles", "parts"])
def guide_kernel(
    outputs,
    inputs,
    buffer_ptr,
    partials_ptr,
    numbers,
    values,
    chunk_tiles,
    parts,
    LINKS: tl.constexpr,
    IN_X0: tl.constexpr,
    FORM: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program: ``chunk_tiles`` tiles of a frame of each output, for the grid (F, C).

    ``partials``: ``[L, 3, F, parts]`` for the form "frame", ``[L, 3, 1, parts]`` for "global", none where A is the
    identity. Without coefficients the only output is v.
    """
    frame, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    frames = tl.num_programs(0).to(tl.int64)
    weights = ()
    for link in tl.static_range(len(LINKS)):
        share = numbers.shares[link]
        if FORM is None:
            weights = weights + (share, 0.0)
        else:
            every = frames * parts if FORM == "frame" else tl.cast(parts, tl.int64)
            first_ptr = partials_ptr + 3 * link * every + (frame * parts if FORM == "frame" else 0)
            threshold = numbers.thresholds[link]
            weights = weights + _weights(first_ptr, share, threshold, numbers.eta, every, parts, FORM, AT_ONCE)
    for tile in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, tl.cdiv(values, TILE))):
        at = _positions(tile, TILE, LANES)
        there = at < values
        ps = _load_all(inputs.predictions, inputs.prediction_rows, frame, at, there)
        latent = None
        if inputs.latent is not None:
            latent = tl.load(inputs.latent + frame * inputs.latent_row + at, there, 0.0).to(tl.float32)
        v = tl.zeros((TILE // LANES, LANES), tl.float32)
        for link in tl.static_range(len(LINKS)):
            d, onto = _difference(ps, latent, numbers.sigma, LINKS[link][0], LINKS[link][1], IN_X0)
            if buffer_ptr is not None:
                d = tl.load(buffer_ptr + (link * frames + frame) * values + at, there, 0.0)
            v += weights[2 * link] * d
            if FORM is not None:
                v += weights[2 * link + 1] * onto
        v += ps[0]  # last, so that the small terms are not rounded to the precision of the large one
        where = frame * values + at
        if len(numbers.coefficients) == 0:
            tl.store(outputs[0] + where, v.to(outputs[0].dtype.element_ty), there)
        else:
            terms = (latent, v) + _load_all(inputs.history, inputs.history_rows, frame, at, there)
            for number in tl.static_range(len(outputs)):
                total = numbers.coefficients[number * len(terms)] * terms[0]
                for term in tl.static_range(1, len(terms)):
                    total += numbers.coefficients[number * len(terms) + term] * terms[term]
                tl.store(outputs[number] + where, total.to(outputs[number].dtype.element_ty), there)


def _rows(x: Tensor) -> Tensor:
    """``[F, ...]`` as ``[F, M]`` with contiguous frames; a copy only where strides leave no other way."""
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@dataclass(frozen=True)
class Call:
    """What the two launches share."""

    inputs: Inputs
    numbers: Numbers
    links: tuple[tuple[int, int], ...]
    in_x0: bool
    form: str | None
    """The sums that belong together: those of a "frame", or all ("global"). None where A is the identity."""
    buffer: Tensor | None

    @staticmethod
    def of(
        predictions: Sequence[Tensor],
        new: Sequence[int],
        old: Sequence[int],
        scales: Sequence[float],
        apg: str | None,
        space: str,
        latent: Tensor | None,
        sigma: float,
        eta: float,
        thresholds: Sequence[float],
        coefficients: Sequence[float],
        history: Sequence[Tensor],
        rounding: str,
        *,
        buffer: Tensor | None = None,
        momentum: float = 0.0,
    ) -> Call:
        """From the arguments of the ops."""
        in_x0 = space == "x0"
        ps = tuple(_rows(p) for p in predictions)
        z = _rows(latent) if latent is not None and (in_x0 or coefficients) else None
        hs = tuple(_rows(h) for h in history)
        inputs = Inputs(
            ps, z, hs, tuple(p.stride(0) for p in ps), 0 if z is None else z.stride(0), tuple(h.stride(0) for h in hs)
        )
        # Of integers, Triton would make another binary for every 1 and every multiple of 16.
        limits = tuple(map(float, thresholds)) or (0.0,) * len(scales)
        shares = tuple(-scale / sigma if in_x0 else float(scale) for scale in scales)
        # eta = 1 keeps the parallel part as it is, so without a threshold there is nothing to sum.
        changes = eta != 1 or buffer is not None or any(limit > 0 for limit in limits)
        return Call(
            inputs, Numbers(shares, limits, tuple(map(float, coefficients)), float(sigma), float(eta), float(momentum)),
            tuple(zip(new, old, strict=True)), in_x0, apg if changes and shares else None, buffer,
        )  # fmt: skip

    @property
    def frames(self) -> int:
        return self.inputs.predictions[0].shape[0]

    @property
    def values(self) -> int:
        return self.inputs.predictions[0].shape[1]

    def chunks(self) -> tuple[int, int]:
        """(chunks of a frame, tiles of a chunk)."""
        tiles, shared = triton.cdiv(self.values, TILE), max(1, MANY_CHUNKS // max(1, self.frames))
        size = triton.cdiv(tiles, shared if self.form == "global" else max(FEW_CHUNKS, shared))
        return triton.cdiv(tiles, max(1, size)), size

    def shape(self) -> tuple[int, int]:
        """(TILE, LANES): so many values that a thread's loads have 128 bits, those of the narrowest tensor too."""
        predictions, latent, history, *_ = self.inputs
        every = (*predictions, *history, predictions[0] if latent is None else latent)
        return TILE, 16 // min(x.element_size() for x in every)


def partial_sums(call: Call) -> Tensor:
    """The first launch: ``|d|^2, <d, onto>, |onto|^2`` of every link and chunk, float32 ``[L, 3, F, C]``.

    In the global form ``[L, 3, 1, F C]``. Brings the momentum buffer up to date.
    """
    on, (chunks, size) = call.inputs.predictions[0], call.chunks()
    partials = torch.empty((len(call.links), 3, call.frames, chunks), dtype=torch.float32, device=on.device)
    launch.launch(
        guide_sums_kernel, (call.frames, chunks), on, partials, call.inputs, call.buffer, call.numbers, call.values,
        size, call.links, call.in_x0, *call.shape(), num_warps=WARPS,
    )  # fmt: skip
    return partials if call.form == "frame" else partials.flatten(2).unsqueeze(2)


def apply(call: Call, partials: Tensor | None, outputs: Sequence[Tensor]) -> None:
    """The second launch: the outputs, from any number of partial sums per frame (or in all)."""
    chunks, size = call.chunks()
    parts = 0 if partials is None else partials.shape[3]
    launch.launch(
        guide_kernel, (call.frames, chunks), outputs[0], tuple(outputs), call.inputs, call.buffer, partials,
        call.numbers, call.values, size, parts, call.links, call.in_x0, call.form,
        FEW_CHUNKS if parts <= FEW_CHUNKS else MANY_CHUNKS, *call.shape(), num_warps=WARPS,
    )  # fmt: skip


def run(call: Call, outputs: Sequence[Tensor], reduce: Callable[[Tensor], None] | None = None) -> None:
    """Both launches, or the one that is needed.

    Args:
        reduce: under sequence parallelism, where each rank holds a part of every frame: changes the sums in place into
            those of all ranks. float32, ``[L, 3, F, 1]`` (in the global form ``[L, 3, 1, 1]``), 12 numbers a frame for
            four links; contiguous. It is called only where there are sums, on all ranks alike.
    """
    partials = None if call.form is None else partial_sums(call)
    if partials is not None and (reduce is not None or partials.shape[3] > MANY_CHUNKS):
        partials = partials.sum(3, keepdim=True)
    if partials is not None and reduce is not None:
        reduce(partials)
    apply(call, partials, outputs)


def guide(predictions: Sequence[Tensor], *args: Any, reduce: Callable[[Tensor], None] | None = None) -> list[Tensor]:
    """The op ``bernini::guide``; the arguments are those of the reference, without momentum. See :func:`run`."""
    _, _, _, _, space, latent, _, _, _, coefficients, history, _ = args
    first, dtype = predictions[0], reference.output_dtype(predictions[0], latent, space, bool(coefficients))
    count = len(coefficients) // (2 + len(history)) or 1
    outputs = [torch.empty(first.shape, dtype=dtype, device=first.device) for _ in range(count)]
    run(Call.of(predictions, *args), outputs, reduce)
    return outputs


def guide_momentum(
    buffer: Tensor, outputs: Sequence[Tensor], momentum: float, *args: Any,
    reduce: Callable[[Tensor], None] | None = None,
) -> None:  # fmt: skip
    """The op ``bernini::guide_momentum``: the same into ``outputs``, with a buffer that is updated in place."""
    run(Call.of(*args, buffer=buffer, momentum=momentum), outputs, reduce)
    torch.autograd.graph.increment_version((buffer, *outputs))
