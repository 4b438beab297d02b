"""Attention over a cut sequence, with transfers beside the computing: two ways more, with the bits of the packed one.

    async   v leaves while k is projected, normed and rotated, and k while q is. In backward the gradients of q, k and
            v leave together, and q's are used while those of k and v are on their way.
    chunk   the same, and the band's heads go in chunks: a chunk attends while the queries of the next are on their way
            to it and the results of the one before on their way back; in backward likewise.

Who waits when is left to autograd, which runs the nodes of the latest first. A forward begins the exchanges of v, k and
q (:class:`_Leave`, :class:`_TurnedLeave`) and waits for them (:class:`_Arrive`); so in backward the node that waited
comes first and begins the ways back, and those that began wait, each for its own, q's first. What is on its way has no
tensor yet: an edge of the graph is a *ticket*, a tensor without elements, and the rest is in a :class:`Trip`.

A chunk has whole groups of key heads, so its attention and the sums of its gradients are those of the band.

Shapes: T own tokens, N width of the model, H heads, D their width, as the names of tensors end.

Source: facts on systems, sections 0.4 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bernini.kernels import qk_rope

from .plan import Heads
from .swap import Coming, Swap, banded

if TYPE_CHECKING:
    from bernini.kernels.segments import DeviceLayout
    from bernini.renderer.model import QKV, QKNorm

CHUNKS = 5
"""Chunks at most. All released models have bands of heads that 2, 3 or 5 divide."""


def chunks_of(heads: Heads, most: int = CHUNKS) -> int:
    """Into how many chunks of whole groups of key heads a band goes."""
    whole = heads.kv_band if heads.kv_bands == heads.ulysses else 1
    return max(chunks for chunks in range(1, most + 1) if whole % chunks == 0)


@dataclass
class Trip:
    """One of q, k, v or the result of a layer between ranks, in chunks of its heads.

    Args:
        swap: whose way it is.
        chunks: into how many.
        keys: whether it goes to all that read it, as k and v do.
        there, back: what is on its way in forward, and what in backward, by number of the chunk.
    """

    swap: Swap
    chunks: int
    keys: bool = False
    there: dict[int, Coming] = field(default_factory=dict)
    back: dict[int, Coming] = field(default_factory=dict)

    @property
    def bands(self) -> int:
        return self.swap.heads.kv_bands if self.keys else self.swap.heads.ulysses

    def leave(self, x_UCthD: Tensor, way: dict[int, Coming], order: Sequence[int]) -> None:
        """Begins to send bands of the own tokens to those who attend."""
        for chunk in order:
            x_UthD = x_UCthD[:, chunk]
            way[chunk] = self.swap.start_out(None, x_UthD) if self.keys else self.swap.start_out(x_UthD)

    def give_back(self, x_ThD: Tensor, chunk: int, way: dict[int, Coming]) -> None:
        """Begins to send a chunk of the own band to those whose tokens they are."""
        way[chunk] = self.swap.start_back(None, x_ThD) if self.keys else self.swap.start_back(x_ThD)

    def come_home(self, way: dict[int, Coming]) -> Tensor:
        """Waits for all chunks of the own tokens, ``[t, H, D]``."""
        parts = [way.pop(chunk).wait()[0] for chunk in range(self.chunks)]
        if self.chunks == 1:
            return parts[0]
        return torch.stack([part.unflatten(1, (self.bands, -1)) for part in parts], 2).flatten(1, 3)

    def chunked(self, x_tHD: Tensor) -> Tensor:
        """A view ``[bands, chunks, t, h, D]``."""
        return banded(x_tHD, self.bands * self.chunks).unflatten(0, (self.bands, self.chunks))


class _Leave(torch.autograd.Function):
    """``x_tHD -> ticket``: it is on its way."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, x: Tensor) -> Tensor:
        ctx.trip = trip
        trip.leave(trip.chunked(x), trip.there, range(trip.chunks))
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor]:
        return None, ctx.trip.come_home(ctx.trip.back)


class _TurnedLeave(torch.autograd.Function):
    """The same behind norm and rotation, whose kernel writes into what is sent. It takes one of q and k alone."""

    @staticmethod
    def forward(
        ctx: Any, trip: Trip, x: Tensor, rows: Tensor, weight: Tensor, eps: float, rounding: str, *tables: Tensor
    ) -> Tensor:
        ctx.trip, ctx.eps = trip, eps
        ctx.save_for_backward(x, rows, weight, *tables)
        tokens, heads, dim = x.shape
        parts = trip.bands * trip.chunks
        send, none = x.new_empty((parts, tokens, heads // parts, dim)), x[:, :0]
        out = send, none.new_empty(none.shape)
        qk_rope(x, none, tables, rows, q_weight=weight, k_weight=weight[:0], eps=eps, out=out, rounding=rounding)
        trip.leave(send.unflatten(0, (trip.bands, trip.chunks)), trip.there, range(trip.chunks))
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, weight, *tables = ctx.saved_tensors
        dy, none = ctx.trip.come_home(ctx.trip.back), x[:, :0]
        dx, _, dweight, _ = torch.ops.bernini.qk_rope_backward(
            dy, none, x, none, tables, rows, weight, weight[:0], "across_heads", ctx.eps
        )
        return None, dx, None, dweight, None, None, *[None] * len(tables)


class _Arrive(torch.autograd.Function):
    """``tickets -> q_ThD, k_SgD, v_SgD`` of a chunk: they are here."""

    @staticmethod
    def forward(ctx: Any, chunk: int, trips: Sequence[Trip], *tickets: Tensor) -> tuple[Tensor, ...]:
        ctx.chunk, ctx.trips = chunk, trips
        return tuple(trip.there.pop(chunk).wait()[0] for trip in trips)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for trip, grad, needed in zip(ctx.trips, grads, ctx.needs_input_grad[2:], strict=True):
            if needed:
                trip.give_back(grad, ctx.chunk, trip.back)
        return None, None, *(grad.new_empty(0) for grad in grads)


class _GoBack(torch.autograd.Function):
    """``out_ThD -> ticket``: a chunk's results are on their way to whose tokens they are."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, chunk: int, out: Tensor) -> Tensor:
        ctx.trip, ctx.chunk = trip, chunk
        trip.give_back(out, chunk, trip.there)
        return out.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.trip.back.pop(ctx.chunk).wait()[0]


class _Home(torch.autograd.Function):
    """``tickets -> out_tHD``: all results of the own tokens are here."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, *tickets: Tensor) -> Tensor:
        ctx.trip = trip
        out = trip.come_home(trip.there)
        # Who computes a block again stops behind the last tensor that was saved: not before this one is here.
        ctx.save_for_backward(out.new_empty(0))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        trip: Trip = ctx.trip
        # The last chunk's are needed first.
        trip.leave(trip.chunked(dout), trip.back, range(trip.chunks)[::-1])
        return None, *[dout.new_empty(0)] * trip.chunks


def overlapped(
    swap: Swap, chunks: int, x_TN: Tensor, to: QKV, here: DeviceLayout, norm: QKNorm, rounding: str,
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Projection, norm, rotation and attention of the own tokens with the keys of all ranks, ``[t, H, D]``.

    Args:
        swap: the layer's exchanges.
        chunks: of heads, see :func:`chunks_of`; with one, only q, k and v leave one after the other.
        run: ``(q_ThD, k_SgD, v_SgD) -> out_ThD``, attends with a chunk of the band.
    """
    q, out, k, v = Trip(swap, chunks), Trip(swap, chunks), Trip(swap, chunks, keys=True), Trip(swap, chunks, keys=True)

    def turned(trip: Trip, x_tHD: Tensor, weight: Tensor) -> Tensor:
        tables = here.tables(x_tHD.shape[-1])
        return _TurnedLeave.apply(trip, x_tHD, here.rows, weight, norm.eps, rounding, *tables)

    v_ticket = _Leave.apply(v, to.v(x_TN))
    k_ticket = turned(k, to.k(x_TN), norm.k)
    q_ticket = turned(q, to.q(x_TN), norm.q)
    tickets = []
    for chunk in range(chunks):
        q_ThD, k_SgD, v_SgD = _Arrive.apply(chunk, (q, k, v), q_ticket, k_ticket, v_ticket)
        tickets.append(_GoBack.apply(out, chunk, run(q_ThD, k_SgD, v_SgD)))
    return _Home.apply(out, *tickets)
