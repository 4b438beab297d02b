"""The frames of one rank on their way through the layers of a Wan VAE; see :mod:`bernini.parallel.vae`.

Shapes: ``[B, C, own frames, H, W]`` everywhere; a rank may have no frames. Resampling doubles or halves H, W and, where
it has a ``time_conv``, the frames, and :attr:`Walk.cut` with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .group import Group
from .vae_exchange import Flight, Recut, landed, started
from .vae_frames import Cut, Tails, balanced, down, halo, kept, moved, up
from .vae_layers import At, Layers

KERNEL = 3
"""Frames that a convolution over time reads for one."""

Make = Callable[[Tensor, Tensor | None], Tensor]
"""From frames that come out of a layer to those that a convolution reads; into a place if there is one."""


def as_it_is(x: Tensor, out: Tensor | None) -> Tensor:
    return x if out is None else out.copy_(x)


class Walk:
    """One rank's way, window by window.

    Before a window, ``cut`` is set to that of its first frames, ``rate`` to how many of them diffusers takes at once,
    and :meth:`begin` is called; in the end ``cut`` is that of the last, and :meth:`end` is called. ``keep`` says
    whether another window follows.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.cut: Cut = ()
        self.rate = 1
        self.keep = self.grad = False
        self._state: dict[str, tuple[int, Tensor]] = {}
        self._tails: dict[str, Tails] = {}
        self._sent: list[Flight] = []

    def begin(self, layers: Layers, grad: bool) -> None:
        self.layers, self.grad = layers, grad

    @property
    def own(self) -> tuple[int, int]:
        """The rank's frames."""
        return self.cut[self.group.rank], self.cut[self.group.rank + 1]

    @property
    def _at(self) -> At:
        return At(self.own[0], self.rate)

    # --- the network --------------------------------------------------------------------------------------------------

    def encoder(self, name: str, module: Any, x: Tensor) -> Tensor:
        x = self.causal(f"{name}.conv_in", module.conv_in, x)
        for number, layer in enumerate(module.down_blocks):
            at = f"{name}.down_blocks.{number}"
            if hasattr(layer, "resample"):
                x = self.downsample(at, layer, x)
            elif hasattr(layer, "to_qkv"):
                x = self.attend(at, layer, x)
            else:
                x = self.residual(at, layer, x)
        return self.head(name, module, self.middle(f"{name}.mid_block", module.mid_block, x))

    def decoder(self, name: str, module: Any, x: Tensor) -> Tensor:
        x = self.middle(f"{name}.mid_block", module.mid_block, self.causal(f"{name}.conv_in", module.conv_in, x))
        for number, block in enumerate(module.up_blocks):
            at = f"{name}.up_blocks.{number}"
            for place, layer in enumerate(block.resnets):
                x = self.residual(f"{at}.resnets.{place}", layer, x)
            for place, layer in enumerate(block.upsamplers or ()):
                x = self.upsample(f"{at}.upsamplers.{place}", layer, x)
        return self.head(name, module, x)

    def middle(self, name: str, module: Any, x: Tensor) -> Tensor:
        x = self.residual(f"{name}.resnets.0", module.resnets[0], x)
        for number, (block, layer) in enumerate(zip(module.attentions, module.resnets[1:], strict=True)):
            if block is not None:
                x = self.attend(f"{name}.attentions.{number}", block, x)
            x = self.residual(f"{name}.resnets.{number + 1}", layer, x)
        return x

    def head(self, name: str, module: Any, x: Tensor) -> Tensor:
        make = self._activated(module.norm_out, module.nonlinearity)
        return self.causal(f"{name}.conv_out", module.conv_out, x, make)

    def residual(self, name: str, module: Any, x: Tensor) -> Tensor:
        beside = self.point(f"{name}.conv_shortcut", module.conv_shortcut, x)
        y = self.causal(f"{name}.conv1", module.conv1, x, self._activated(module.norm1, module.nonlinearity))
        del x
        y = self.causal(
            f"{name}.conv2", module.conv2, y, self._activated(module.norm2, module.nonlinearity, module.dropout)
        )
        return y + beside if self.grad else y.add_(beside)

    def attend(self, name: str, module: Any, x: Tensor) -> Tensor:
        return self.layers.attend(name, module, x, self._at) if x.shape[2] else x

    def point(self, name: str, conv: Any, x: Tensor) -> Tensor:
        if isinstance(conv, torch.nn.Identity):
            return x
        return self.layers.point(name, conv, x) if x.shape[2] else _none(x, conv.out_channels)

    # --- changes of the rate ------------------------------------------------------------------------------------------

    def upsample(self, name: str, module: Any, x: Tensor) -> Tensor:
        if hasattr(module, "time_conv"):
            alone = x[:, :, : max(0, min(self.own[1], 1) - self.own[0])]
            y = self.causal(f"{name}.time_conv", module.time_conv, x[:, :, alone.shape[2] :], first=1)
            y = y.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            x = torch.cat([alone, y], 2) if alone.shape[2] else y
            self.cut, self.rate = tuple(map(up, self.cut)), 2 * self.rate
            x = self._recut(balanced(self.cut), x)
        if x.shape[2]:
            return self.layers.resample(name, module.resample, x, self._at)
        return _none(x, module.resample[1].out_channels, 2)

    def downsample(self, name: str, module: Any, x: Tensor) -> Tensor:
        x = self.layers.resample(name, module.resample, x, self._at) if x.shape[2] else _none(x, x.shape[1], 0.5)
        if not hasattr(module, "time_conv"):
            return x
        after = balanced(tuple(map(down, self.cut)))
        x = self._recut(tuple(map(up, after)), x)
        x = self.causal(f"{name}.time_conv", module.time_conv, x, halved=True)
        self.cut, self.rate = after, self.rate // 2
        return x

    def _recut(self, new: Cut, x: Tensor) -> Tensor:
        if new != self.cut and self.group.size > 1:
            old, rank = self.cut, self.group.rank
            there, back = moved(old, new, rank), moved(new, old, rank)
            x = Recut(self.group, there, back, old[rank], new[rank], self.layers.channels_last)(x)
        self.cut = new
        return x

    # --- convolutions over time ---------------------------------------------------------------------------------------

    def causal(
        self, name: str, conv: Any, x: Tensor, make: Make = as_it_is, *, first: int = 0, halved: bool = False
    ) -> Tensor:
        """A convolution over the rank's frames, those just before them, and zeros before frame ``first``.

        What others read is made and sent first; frames that need none of the halo are convolved while it comes.

        Args:
            x: the own frames, those before ``first`` left out.
            halved: every other frame, and the video's first as it is.
        """
        width, stride = (1, 2) if halved else (2, 1)
        cut = tuple(max(border, first) for border in self.cut)
        start = cut[self.group.rank]
        tails = self._tails.get(name, ())
        plan = halo(cut, tails, self.group.rank, width, first)
        flight = Flight(self.group, plan, start, self.layers.channels_last)
        own, whole, coming = self._begin(name, flight, x, make, width)
        zeros = width - (start - max(start - width, first))
        outside = (
            [own[:, :, :1].new_zeros(()).expand(*x.shape[:2], zeros, *x.shape[3:])] if zeros and x.shape[2] else []
        )

        def wait() -> list[Tensor]:
            came = landed(flight, coming) if self.grad else self._landed(flight, coming)
            parts = [(piece.start, part) for piece, part in zip(plan.receives, came, strict=True)]
            if plan.own[0] < plan.own[1]:
                parts.append((plan.own[0], self._held(name, *plan.own)))
            return [*outside, *(part for _, part in sorted(parts, key=lambda one: one[0]))]

        def joined(head: list[Tensor], last: int) -> Tensor:
            """The frames before and the own ones up to a place."""
            if whole is None:
                return torch.cat([*head, own[:, :, :last]], 2)
            done = 0
            for part in head:
                whole[:, :, done : done + part.shape[2]] = part
                done += part.shape[2]
            return whole[:, :, : width + last]

        count = x.shape[2]
        boundary = -(-width // stride)  # results that need the halo
        if not count:
            wait()
            y = _none(own if self.grad else x, conv.out_channels)
        elif start == first and (halved or self.layers.skips_zeros):
            head = wait()
            y = own[:, :, :1] if halved else self.layers.first(name, conv, own[:, :, :1])
            if count > 1:
                others = own if halved else joined(head, count)[:, :, 1:]
                y = torch.cat([y, self.layers.causal(name, conv, others)], 2)
        elif coming and count // stride > boundary:
            inside = self.layers.causal(name, conv, own[:, :, boundary * stride - width :])
            few = joined(wait(), (boundary - 1) * stride + KERNEL - width)
            y = torch.cat([self.layers.causal(name, conv, few), inside], 2)
        else:
            y = self.layers.causal(name, conv, joined(wait(), count))
        if self.keep:
            self._remember(name, cut, kept(cut, tails, width), own)
        return y

    def _landed(self, flight: Flight, coming: list[Tensor]) -> list[Tensor]:
        """Who only sends need not wait until it was received."""
        if coming:
            flight.wait()
        else:
            self._sent.append(flight)
        return coming

    def end(self) -> None:
        """Of a window: what was sent has been received."""
        for flight in self._sent:
            flight.wait()
        self._sent.clear()

    def _begin(
        self, name: str, flight: Flight, x: Tensor, make: Make, width: int
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """What the convolution reads of the own frames, the same with room for those before, and what is coming."""
        if self.grad:
            own, coming = started(flight, make(x, None))
            return own, None, coming
        batch, channels, count, height, width_ = x.shape
        whole = self.layers.empty((batch, channels, width + count, height, width_), x)
        own, first = whole[:, :, width:], flight.first
        tail = min((max(piece.start - first, 0) for piece in flight.plan.sends), default=count)
        tail = min(tail, count)
        if tail < count:
            make(x[:, :, tail:], own[:, :, tail:])
        sent = [self._held(name, piece.start, piece.stop, own, first) for piece in flight.plan.sends]
        coming = flight.start(sent, x)
        if tail:
            make(x[:, :, :tail], own[:, :, :tail])
        return own, whole, coming

    def _held(self, name: str, start: int, stop: int, own: Tensor | None = None, first: int = 0) -> Tensor:
        """Frames that this rank has: kept of the window before, or of its own that begin with ``first``."""
        parts = []
        if name in self._state:
            before, kept_ = self._state[name]
            end = before + kept_.shape[2]
            if start < end:
                parts.append(kept_[:, :, start - before : min(stop, end) - before])
                start = min(stop, end)
        if start < stop:
            assert own is not None
            parts.append(own[:, :, start - first : stop - first])
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def _remember(self, name: str, cut: Cut, tails: Tails, own: Tensor) -> None:
        """What the next window needs of what this rank has."""
        mine = [frame for frame, who in tails if who == self.group.rank]
        found = self._held(name, mine[0], mine[-1] + 1, own, cut[self.group.rank]) if mine else None
        self._tails[name] = tails
        self._state.pop(name, None)
        if found is not None:
            self._state[name] = mine[0], found.clone()

    def _activated(self, norm: Any, act: Any, dropout: Any = None) -> Make:
        def make(x: Tensor, out: Tensor | None) -> Tensor:
            if dropout is not None and dropout.training and dropout.p:
                y = dropout(self.layers.activated(norm, act, x))
                return y if out is None else out.copy_(y)
            return self.layers.activated(norm, act, x, out)

        return make


def _none(x: Tensor, channels: int, scale: float = 1) -> Tensor:
    """No frames, as many as went in, in another shape; it keeps its place in the graph."""
    batch, _, _, height, width = x.shape
    return x.reshape(batch, channels, 0, int(height * scale), int(width * scale))
