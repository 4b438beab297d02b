"""What is computed in the layers of a Wan VAE, apart from which frames: two ways, over the same modules.

``Plain`` does the operations of the modules in their own order with torch's convolutions: the bits of the modules, any
device and type, with gradients. ``Packed`` is for float32 on a CPU without gradients: channels last, so that a frame
is one piece of memory, a norm reads one row and a convolution needs no other layout; weights in the layout that
oneDNN's convolution wants, made once per call of the VAE instead of once per convolution; and of a video's first frame
only the part that is not multiplied by zeros. Its convolutions add up in another order: results differ by rounding.

Shapes: B batch, C channels, T frames, H, W the sides of a frame. No convolution here pads in time: the frames before
are there, or zeros are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bernini.kernels import rms_norm

Shape = tuple[int, int, int, int, int]


class At(NamedTuple):
    """Where in the video some frames are."""

    start: int
    """The first."""
    rate: int
    """Frames here that diffusers works on at once, but for the video's first, which is alone."""


class Layers(Protocol):
    """One way of computing."""

    skips_zeros: bool
    """Whether the video's first frame is convolved by :meth:`first`."""
    channels_last: bool
    """Of the layout."""

    def enter(self, x_BCTHW: Tensor) -> Tensor:
        """Into the layout of this way."""

    def empty(self, shape: Shape, like: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` in that layout."""

    def activated(self, norm: Any, act: Callable[[Tensor], Tensor], x: Tensor, out: Tensor | None = None) -> Tensor:
        """``act(norm(x))``, into ``out`` if there is one."""

    def causal(self, name: str, conv: Any, x: Tensor) -> Tensor:
        """A convolution over all frames that are there: as many fewer come out as the kernel is long, less one."""

    def first(self, name: str, conv: Any, x: Tensor) -> Tensor:
        """A convolution of the video's first frame, with nothing before it."""

    def point(self, name: str, conv: Any, x: Tensor) -> Tensor:
        """A convolution of one value at a time."""

    def attend(self, name: str, block: Any, x: Tensor, at: At) -> Tensor:
        """Self-attention within each frame, and the residual."""

    def resample(self, name: str, layers: Any, x: Tensor, at: At) -> Tensor:
        """Sides twice or half as long."""


def halved(conv: Any) -> list[int]:
    """Padding of the sides; diffusers moves it out of the module's own field."""
    return [0, conv._padding[2], conv._padding[0]] if hasattr(conv, "_padding") else [0, *conv.padding[1:]]


class Plain:
    """torch's operations in the order of the modules."""

    skips_zeros = channels_last = False

    def enter(self, x_BCTHW: Tensor) -> Tensor:
        return x_BCTHW

    def empty(self, shape: Shape, like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def activated(self, norm: Any, act: Callable[[Tensor], Tensor], x: Tensor, out: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.float32 or isinstance(norm.bias, Tensor):
            y = act(norm(x))
        else:
            y = F.normalize(x, dim=1).mul_(norm.scale).mul_(norm.gamma)  # the module adds 0.0, which changes nothing
            y = F.silu(y, inplace=True) if isinstance(act, nn.SiLU) else act(y)
        return y if out is None else out.copy_(y)

    def causal(self, name: str, conv: Any, x: Tensor) -> Tensor:
        return F.conv3d(x, conv.weight, conv.bias, conv.stride, halved(conv))

    def first(self, name: str, conv: Any, x: Tensor) -> Tensor:
        raise NotImplementedError

    def point(self, name: str, conv: Any, x: Tensor) -> Tensor:
        return F.conv3d(x, conv.weight, conv.bias)

    def attend(self, name: str, block: Any, x: Tensor, at: At) -> Tensor:
        return _as_in_diffusers(lambda x: type(block).forward(block, x), x, at)

    def resample(self, name: str, layers: Any, x: Tensor, at: At) -> Tensor:
        def sides(x: Tensor) -> Tensor:
            return layers(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)

        return _as_in_diffusers(sides, x, at)


def _as_in_diffusers(work: Callable[[Tensor], Tensor], x: Tensor, at: At) -> Tensor:
    """Frames alone or not alone as they are in diffusers: on a CPU, torch's 2-D convolution of one image adds up in
    another order than that of several, whose number does not matter. So a frame that must not be alone goes twice.
    """
    if x.device.type != "cpu" or len(x) > 1:
        return work(x)
    alone = x.shape[2] if at.rate == 1 else int(at.start == 0)
    parts = [work(frame) for frame in x[:, :, :alone].split(1, 2)] if alone else []
    others = x[:, :, alone:]
    if others.shape[2] == 1:
        parts.append(work(others.expand(-1, -1, 2, -1, -1))[:, :, :1])
    elif others.shape[2]:
        parts.append(work(others))
    # Frame after frame in memory, as diffusers has them here: the norm that comes next adds up by that.
    return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2) if len(parts) > 1 else parts[0]


def _rows(x_BCTHW: Tensor) -> Tensor:
    """``[B * T * H * W, C]`` of what is channels last."""
    return x_BCTHW.permute(0, 2, 3, 4, 1).flatten(0, 3)


def _boxes(rows: Tensor, like_BCTHW: Tensor) -> Tensor:
    """Back from :func:`_rows`, with any number of channels."""
    batch, _, frames, height, width = like_BCTHW.shape
    return rows.view(batch, frames, height, width, rows.shape[1]).permute(0, 4, 1, 2, 3)


def _frames(x_BCTHW: Tensor) -> Tensor:
    """``[B * T, C, H, W]``, channels last."""
    return x_BCTHW.permute(0, 2, 1, 3, 4).flatten(0, 1)


class Packed:
    """Channels last, weights packed."""

    skips_zeros = channels_last = True

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    @staticmethod
    def can(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether this way exists here; on ``meta``, too, for counting what it would take."""
        return device.type in ("cpu", "meta") and dtype == torch.float32 and torch.backends.mkldnn.is_available()

    def enter(self, x_BCTHW: Tensor) -> Tensor:
        return x_BCTHW.contiguous(memory_format=torch.channels_last_3d)

    def empty(self, shape: Shape, like: Tensor) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)

    def activated(self, norm: Any, act: Callable[[Tensor], Tensor], x: Tensor, out: Tensor | None = None) -> Tensor:
        normed = self._normed(norm, x)
        if isinstance(act, nn.SiLU):
            return F.silu(normed, inplace=True) if out is None else torch.ops.aten.silu.out(normed, out=out)
        return act(normed) if out is None else out.copy_(act(normed))

    @staticmethod
    def _normed(norm: Any, x: Tensor) -> Tensor:
        """``F.normalize`` bounds the norm from below by 1e-12; added to the mean square, it is as small."""
        rows = rms_norm(_rows(x), norm.gamma.detach().flatten(), eps=1e-24 / x.shape[1])
        return _boxes(rows if not isinstance(norm.bias, Tensor) else rows + norm.bias.flatten(), x)

    def causal(self, name: str, conv: Any, x: Tensor) -> Tensor:
        return self._conv(name, conv.weight, conv.bias, x, conv.stride, halved(conv))

    def first(self, name: str, conv: Any, x: Tensor) -> Tensor:
        return self._conv(f"{name} first", conv.weight[:, :, -1:], conv.bias, x, (1, *conv.stride[1:]), halved(conv))

    def point(self, name: str, conv: Any, x: Tensor) -> Tensor:
        return _boxes(F.linear(_rows(x), conv.weight.flatten(1), conv.bias), x)

    def attend(self, name: str, block: Any, x: Tensor, at: At) -> Tensor:
        batch, channels, frames, height, width = x.shape
        qkv = F.linear(_rows(self._normed(block.norm, x)), block.to_qkv.weight.flatten(1), block.to_qkv.bias)
        q, k, v = qkv.view(batch * frames, 1, height * width, 3 * channels).chunk(3, -1)
        seen = F.scaled_dot_product_attention(q, k, v).reshape(-1, channels)
        return _boxes(F.linear(seen, block.proj.weight.flatten(1), block.proj.bias), x).add_(x)

    def resample(self, name: str, layers: Any, x: Tensor, at: At) -> Tensor:
        before, conv = layers
        y = before(_frames(x)).contiguous(memory_format=torch.channels_last)
        y = self._conv(name, conv.weight, conv.bias, y, conv.stride, list(conv.padding))
        return y.unflatten(0, (len(x), -1)).transpose(1, 2)

    def _conv(
        self, name: str, weight: Tensor, bias: Tensor | None, x: Tensor, stride: tuple[int, ...], padding: list[int]
    ) -> Tensor:
        if x.device.type == "meta":
            self._weights.setdefault(name, torch.empty_like(weight))
            convolve: Any = F.conv3d if x.ndim == 5 else F.conv2d
            return convolve(x, weight, bias, stride, padding)
        ones = [1] * len(padding)
        packed = self._weights.get(name)
        if packed is None:
            nn_: Any = torch._C._nn
            pack = nn_.mkldnn_reorder_conv3d_weight if x.ndim == 5 else nn_.mkldnn_reorder_conv2d_weight
            packed = pack(weight.detach().contiguous().to_mkldnn(), padding, list(stride), ones, 1, list(x.shape))
            self._weights[name] = packed
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed, bias, padding, list(stride), ones, 1, "none", [], ""
        )  # fmt: skip
