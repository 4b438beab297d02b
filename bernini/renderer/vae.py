"""Pixels <-> normalised latents through diffusers' ``AutoencoderKLWan``, in float32.

Latents are the mode of the posterior, never a sample (facts of the released model, section C.4), normalised per
channel with the statistics of the checkpoint's config.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..geometry import vae_strides


class VideoAutoencoder:
    """Wraps an ``AutoencoderKLWan``; its strides are read from the config."""

    def __init__(self, model: Any) -> None:
        self.model = model
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

    @torch.no_grad()
    def encode(self, pixels_3FHW: Tensor) -> Tensor:
        """``[3, F, H, W]`` in [-1, 1] -> ``[C, T, h, w]`` (:meth:`latent_shape`)."""
        pixels = pixels_3FHW.to(self.model.device, self.model.dtype)
        latent = self.model.encode(pixels[None]).latent_dist.mode()[0]
        mean, std = self.statistics(latent)
        return (latent - mean) / std

    @torch.no_grad()
    def decode(self, latent_CTHW: Tensor) -> Tensor:
        """``[C, T, h, w]`` -> ``[3, F, H, W]`` in [-1, 1]."""
        latent = latent_CTHW.to(self.model.device, self.model.dtype)
        mean, std = self.statistics(latent)
        return self.model.decode((latent * std + mean)[None]).sample[0].clamp(-1, 1)
