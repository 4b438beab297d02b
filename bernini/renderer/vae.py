"""Pixels <-> normalised latents through diffusers' ``AutoencoderKLWan``, in float32.

Latents are the mode of the posterior, never a sample (facts of the released model, section C.4), normalised per
channel with the statistics of the checkpoint's config.

A VAE of the Wan 2.1 form is run by :class:`bernini.parallel.vae.TemporalVAE`: window by window, by all processes that
serve a request together, and on a CPU by faster convolutions whose results differ from diffusers' own by rounding
(1e-5 of the largest value). Others, and those with tiles switched on, are one call of diffusers' on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bernini.parallel.group import Alone, Group
from bernini.parallel.vae import Part, TemporalVAE, can, gathered

from ..geometry import vae_strides


class VideoAutoencoder:
    """Wraps an ``AutoencoderKLWan``; its strides are read from the config.

    Args:
        group: processes that encode and decode together; each gets the whole result.
        most: latent frames of a process at a time; by default what :mod:`bernini.parallel.vae` takes.
        exact: diffusers' own operations on a CPU, too: the same bits.
    """

    def __init__(self, model: Any, group: Group | None = None, *, most: int | None = None, exact: bool = False) -> None:
        self.model, self.group, self._most, self._exact = model, group or Alone(), most, exact
        self.spatial_stride, self.temporal_stride = vae_strides(dict(model.config))
        self.channels = int(model.config.z_dim)

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            like.new_tensor(v).view(-1, 1, 1, 1)
            for v in (self.model.config.latents_mean, self.model.config.latents_std)
        )
        return mean, std

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """``(C, T, H, W)`` of the latent of such a video."""
        t = (frames - 1) // self.temporal_stride + 1
        return self.channels, t, height // self.spatial_stride, width // self.spatial_stride

    @property
    def in_pieces(self) -> bool:
        """Whether it is run window by window."""
        return can(self.model)

    @torch.no_grad()
    def encode(self, pixels_3FHW: Tensor) -> Tensor:
        """``[3, F, H, W]`` in [-1, 1] -> ``[C, T, h, w]`` (:meth:`latent_shape`)."""
        return self.encode_pieces(lambda start, stop: pixels_3FHW[:, start:stop], pixels_3FHW.shape[1])

    @torch.no_grad()
    def encode_pieces(self, pixels: Callable[[int, int], Tensor], frames: int) -> Tensor:
        """The same of ``pixels(start, stop)``, ``[3, stop - start, H, W]`` (of no frames, too), a window at a time."""

        def here(start: int, stop: int) -> Tensor:
            return pixels(start, stop).to(self.model.device, self.model.dtype)[None]

        if self.in_pieces:
            parts = [gathered(self.group, part) for part in self._temporal.encode(here, frames)]
            latent = torch.cat(parts, 2)[0].chunk(2)[0]  # of mean and variance the mean
        else:
            latent = self.model.encode(here(0, frames)).latent_dist.mode()[0]
        mean, std = self.statistics(latent)
        return (latent - mean) / std

    @torch.no_grad()
    def decode(self, latent_CTHW: Tensor) -> Tensor:
        """``[C, T, h, w]`` -> ``[3, F, H, W]`` in [-1, 1]."""
        if self.in_pieces:
            parts = [gathered(self.group, part) for part in self.decode_pieces(latent_CTHW)]
            return torch.cat(parts, 2)[0]
        return self.model.decode(self._raw(latent_CTHW)).sample[0].clamp(-1, 1)

    @torch.no_grad()
    def decode_pieces(self, latent_CTHW: Tensor) -> Iterator[Part]:
        """What this process makes of each window, ``[1, 3, own frames, H, W]`` in [-1, 1]; for :attr:`in_pieces`."""
        for part in self._temporal.decode(self._raw(latent_CTHW)):
            yield Part(part.cut, part.own.clamp(-1, 1))

    @property
    def _temporal(self) -> TemporalVAE:
        return TemporalVAE(self.model, self.group, exact=self._exact, most=self._most)

    def _raw(self, latent_CTHW: Tensor) -> Tensor:
        """As the modules take it, ``[1, C, T, h, w]``."""
        latent = latent_CTHW.to(self.model.device, self.model.dtype)
        mean, std = self.statistics(latent)
        return (latent * std + mean)[None]
