"""Frames on their way between ranks, with gradients that go back the same way.

The halo of a convolution is started, something else is computed, and then it is waited for. In the backward the
halo's gradient is on its way to the rank that it came from as soon as it is known, while the interior's is computed;
that rank adds it to what it has. A rank without frames takes part in every exchange.

Shapes: ``[B, C, frames, H, W]``; on their way with channels last where the layers keep them so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .group import Group, Message
from .vae_frames import Halo, Piece


def to_send(x_BCTHW: Tensor, channels_last: bool) -> Tensor:
    """One piece of memory; no copy where channels are last and the batch is one."""
    return x_BCTHW.movedim(1, -1).contiguous() if channels_last else x_BCTHW.contiguous()


def to_receive(like_BCTHW: Tensor, frames: int, channels_last: bool) -> Tensor:
    batch, channels, _, height, width = like_BCTHW.shape
    if channels_last:
        return like_BCTHW.new_empty((batch, frames, height, width, channels))
    return like_BCTHW.new_empty((batch, channels, frames, height, width))


class Flight:
    """One exchange of frames.

    Args:
        plan: its pieces.
        first: the video's frame that is the first of the rank's own.
    """

    def __init__(self, group: Group, plan: Halo, first: int, channels_last: bool) -> None:
        self.group, self.plan, self.first, self.channels_last = group, plan, first, channels_last
        self._pending: Any = None
        self._back: Any = None

    def start(self, sent: Sequence[Tensor], like_BCTHW: Tensor) -> list[Tensor]:
        """Begins; what it returns is there after :meth:`wait`.

        Args:
            sent: ``[B, C, t, H, W]`` of each piece that is sent.
            like_BCTHW: tells all but the number of frames of what comes.
        """
        self._pending, found = self._go(self.plan.sends, sent, self.plan.receives, like_BCTHW)
        return found

    def wait(self) -> None:
        self._pending.wait()

    def start_back(self, grads: Sequence[Tensor], like_BCTHW: Tensor) -> None:
        """The gradients of what came go back."""
        if self._back is None:
            self._back = self._go(self.plan.receives, grads, self.plan.sends, like_BCTHW)

    def add_back(self, grad_BCTHW: Tensor) -> Tensor:
        """Those of the rank's own frames, with what the others found for them."""
        pending, found = self._back
        pending.wait()
        self._back = None
        if found:
            grad_BCTHW = grad_BCTHW.clone()
        for (_, start, stop), part in zip(self.plan.sends, found, strict=True):
            grad_BCTHW[:, :, start - self.first : stop - self.first] += part
        return grad_BCTHW

    def _go(
        self, sends: Sequence[Piece], sent: Sequence[Tensor], receives: Sequence[Piece], like: Tensor
    ) -> tuple[Any, list[Tensor]]:
        out = [to_send(x, self.channels_last) for x in sent]
        if not receives:  # it may be waited for much later: nothing large is kept for that
            out = [x.clone() if x._base is not None else x for x in out]
        places = [to_receive(like, stop - start, self.channels_last) for _, start, stop in receives]
        pending = self.group.start(
            [Message(piece.rank, x) for piece, x in zip(sends, out, strict=True)],
            [Message(piece.rank, x) for piece, x in zip(receives, places, strict=True)],
        )
        return pending, [x.movedim(-1, 1) if self.channels_last else x for x in places]


class _Start(torch.autograd.Function):
    """The rank's own frames as they are, and the halo that is on its way."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, own: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        first = flight.first
        sent = [own[:, :, start - first : stop - first] for _, start, stop in flight.plan.sends]
        return own.view_as(own), *flight.start(sent, own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *halo: Tensor) -> tuple[None, Tensor]:
        ctx.flight.start_back(halo, grad)  # where :class:`_Land` had nothing to do
        return None, ctx.flight.add_back(grad)


class _Land(torch.autograd.Function):
    """Waits for the halo; in the backward the first to know its gradient."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, *halo: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        flight.wait()
        return tuple(x.view_as(x) for x in halo)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.flight.start_back(grads, grads[0])
        return None, *grads


def started(flight: Flight, own: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Differentiable :meth:`Flight.start` of parts of the own frames."""
    own, *halo = _Start.apply(flight, own)
    return own, halo


def landed(flight: Flight, halo: Sequence[Tensor]) -> list[Tensor]:
    """Differentiable :meth:`Flight.wait`."""
    if halo:
        return list(_Land.apply(flight, *halo))
    flight.wait()
    return []


class _Recut(torch.autograd.Function):
    """Frames to the ranks that have them from here on."""

    @staticmethod
    def forward(ctx: Any, way: Recut, x: Tensor) -> Tensor:
        ctx.way = way
        return way.go(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.way.reverse().go(grad)


@dataclass(frozen=True)
class Recut:
    """Frames of one cut to another.

    Args:
        there, back: :func:`bernini.parallel.vae_frames.moved` from the old cut to the new, and from the new to the old.
        old, new: the rank's first frame in each.
    """

    group: Group
    there: Halo
    back: Halo
    old: int
    new: int
    channels_last: bool

    def __call__(self, x_BCTHW: Tensor) -> Tensor:
        """Differentiable."""
        return _Recut.apply(self, x_BCTHW)

    def reverse(self) -> Recut:
        return Recut(self.group, self.back, self.there, self.new, self.old, self.channels_last)

    def go(self, x: Tensor) -> Tensor:
        flight = Flight(self.group, self.there, self.old, self.channels_last)
        found = flight.start([x[:, :, start - self.old : stop - self.old] for _, start, stop in self.there.sends], x)
        start, stop = self.there.own
        own = x[:, :, start - self.old : stop - self.old] if start < stop else x[:, :, :0]
        flight.wait()
        parts = [(piece.start, part) for piece, part in zip(self.there.receives, found, strict=True)]
        ordered = sorted([*parts, *([(start, own)] if start < stop else [])], key=lambda one: one[0])
        whole = torch.cat([part for _, part in ordered] or [own], 2)
        return whole.contiguous(memory_format=torch.channels_last_3d) if self.channels_last else whole.contiguous()
