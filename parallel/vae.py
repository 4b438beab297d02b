"""A Wan VAE over time: piece by piece in one process, or by ranks that have consecutive frames.

The modules are those of diffusers' ``AutoencoderKLWan`` in its Wan 2.1 form, untouched; they are handed in. What
diffusers does chunk by chunk is, over a whole video, this (facts on systems, section 5.1):

* A causal convolution sees each frame and the two before it, zeros before the first.
* Temporal upsampling leaves the video's first frame alone; the others go through a convolution that does not see the
  first and become two each. Temporal downsampling leaves the first alone; each other frame is made of three.
* Everything else works on a frame by itself.

So any cut of the frames gives the same result, as long as the convolutions get the two frames before
(:mod:`.vae_frames` says from whom). Here frames go window by window through all layers; in a window every rank has a
part, cut anew wherever the number of frames changes. What the next window needs is kept by the ranks that have it,
under the names of the convolutions. The memory that is needed does not depend on the video's length. With gradients,
all is one window, and every rank calls the backward of what it has, if that is no frame, too.

Shapes: B batch, C channels, T latent frames, F video frames, H, W and h, w the sides of frames and latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .group import Alone, Group
from .vae_frames import Cut, even, windows
from .vae_layers import Layers, Packed, Plain
from .vae_walk import Walk

MOST = 3
"""Latent frames of a rank at a time; 21 on 8 ranks are one window."""


PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")


@dataclass(frozen=True)
class Part:
    """What a rank has of a window: frames ``[cut[rank], cut[rank + 1])`` of the video or of its latent."""

    cut: Cut
    own: Tensor
    """``[B, C, own frames, H, W]``."""

    @property
    def sizes(self) -> list[int]:
        """Frames of every rank."""
        return [stop - start for start, stop in pairwise(self.cut)]


def can(model: Any) -> bool:
    """Whether this VAE is one of those: the Wan 2.1 form, and neither tiles nor patches."""
    if getattr(model, "use_tiling", False) or not all(hasattr(model, part) for part in PARTS):
        return False
    if not isinstance(getattr(model.encoder, "conv_in", None), torch.nn.Conv3d):
        return False
    residual = any(hasattr(block, "avg_shortcut") for block in model.decoder.up_blocks)
    return not residual and model.config.get("patch_size") is None and sum(rates(model)) <= 2


def rates(model: Any) -> list[bool]:
    """At which of the encoder's downsamplings the number of frames is halved."""
    return [hasattr(layer, "time_conv") for layer in model.encoder.down_blocks if hasattr(layer, "resample")]


class TemporalVAE:
    """Encodes and decodes with the modules of ``model``.

    Args:
        model: an ``AutoencoderKLWan``; see :func:`can`.
        group: ranks that do this together: all call the same methods with the same arguments.
        exact: with torch's own convolutions, in the modules' order of operations: the bits of diffusers' own chunks,
            wherever torch's convolution does not depend on the number of frames. Otherwise, on a CPU in float32 and
            without gradients, a faster form whose results differ by rounding.
        most: latent frames of a rank at a time; by default :data:`MOST`, and one where there is one rank.

    Raises:
        ValueError: another form of VAE, or ``most`` below one.
    """

    def __init__(self, model: Any, group: Group | None = None, *, exact: bool = False, most: int | None = None) -> None:
        self.model, self.group, self.exact = model, group or Alone(), exact
        self.most = (MOST if self.group.size > 1 else 1) if most is None else most
        if not can(model):
            raise ValueError("the VAE is not of the Wan 2.1 form, or works in tiles")
        if self.most < 1:
            raise ValueError(f"most: {most} latent frames of a rank at a time; it has to be at least one")

    def encode(self, pixels: Callable[[int, int], Tensor], frames: int) -> Iterator[Part]:
        """Moments, window by window: ``[B, 2 C, own latent frames, h, w]``, before any sampling.

        Args:
            pixels: gives frames ``[start, stop)`` as ``[B, 3, stop - start, H, W]`` in [-1, 1]; asked for no others
                than those that this rank begins with (none, too: start == stop).
            frames: of the video; of what is over one and a multiple of four nothing is seen, as in diffusers.

        Raises:
            ValueError: no frames, or ``pixels`` gives another number of them than it was asked for.
        """
        if frames < 1:
            raise ValueError(f"encode: {frames} frames; there has to be one")
        model, temporal = self.model, sum(rates(self.model))
        latents = 1 + (frames - 1) // 4 * 4 // 2**temporal

        def begin(first: int, last: int, walk: Walk) -> Tensor:
            start, stop = (0 if t == 0 else (t - 1) * 2**temporal + 1 for t in (first, last))
            walk.cut = even(start, stop, self.group.size)
            walk.rate = 4
            x, wanted = pixels(*walk.own), walk.own[1] - walk.own[0]
            if x.shape[2] != wanted:
                raise ValueError(f"encode: pixels{walk.own} gave {x.shape[2]} frames and not {wanted}")
            return x

        def run(walk: Walk, x: Tensor) -> Tensor:
            return walk.point("quant_conv", model.quant_conv, walk.encoder("encoder", model.encoder, x))

        return self._windows(latents, begin, run, model.encoder, model.quant_conv)

    def decode(self, latent_BCThw: Tensor) -> Iterator[Part]:
        """Pixels, window by window: ``[B, 3, own frames, H, W]``, not clamped.

        Args:
            latent_BCThw: the whole latent, on every rank; not normalised.
        """
        model = self.model

        def begin(first: int, last: int, walk: Walk) -> Tensor:
            walk.cut = even(first, last, self.group.size)
            walk.rate = 1
            return latent_BCThw[:, :, slice(*walk.own)]

        def run(walk: Walk, x: Tensor) -> Tensor:
            return walk.decoder("decoder", model.decoder, walk.point("post_quant_conv", model.post_quant_conv, x))

        return self._windows(latent_BCThw.shape[2], begin, run, model.decoder, model.post_quant_conv)

    def _windows(
        self, latents: int, begin: Callable[[int, int, Walk], Tensor], run: Callable[[Walk, Tensor], Tensor],
        *modules: torch.nn.Module,
    ) -> Iterator[Part]:  # fmt: skip
        grad = torch.is_grad_enabled()
        spans = [(0, latents)] if grad else windows(latents, self.group.size, self.most, self.exact)
        layers: Layers | None = None
        weights = [weight for module in modules for weight in module.parameters()]
        walk = Walk(self.group)
        for number, (first, last) in enumerate(spans):
            # Set in every step: what is outside of a generator may not be changed by it between two of them.
            with torch.set_grad_enabled(grad):
                x = begin(first, last, walk)
                if layers is None:
                    layers = self._layers(x)
                walk.begin(layers, grad and (x.requires_grad or any(w.requires_grad for w in weights)))
                walk.keep = number + 1 < len(spans)
                if walk.grad and not x.requires_grad:
                    x = x.detach().requires_grad_()  # a rank without frames, and weights, takes part in the backward
                own = run(walk, layers.enter(x))
                walk.end()
            yield Part(walk.cut, own)

    def _layers(self, x: Tensor) -> Layers:
        weights = next(self.model.encoder.parameters())
        if self.exact or torch.is_grad_enabled() or not Packed.can(weights.device, weights.dtype):
            return Plain()
        return Packed()


def gathered(group: Group, part: Part) -> Tensor:
    """``[B, C, frames of the window, H, W]`` on every rank; without gradients."""
    if group.size == 1:
        return part.own
    rows = part.own.movedim(2, 0).contiguous()
    return group.gather(rows, part.sizes).movedim(0, 2)
