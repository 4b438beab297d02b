"""Videos through the VAE in pieces of one latent frame, with pixels on the device for one piece only.

The VAE is causal in time: diffusers runs it piece by piece already, carrying the last frames of every convolution over
to the next piece, and joins the pixels at the end. Here each piece goes to the host as bytes before the next is made.
The operations are the same ones on the same values, so the result has the same bits. Tiles in space are another matter
(they blend, and change the result): with tiling switched on, or a VAE of an unknown form, it is one call for all.

Shapes: F frames, T latent frames, C channels of the latent, h, w its sides.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..media import Clip, from_model, to_model
from .vae import VideoAutoencoder


def in_pieces(model: Any) -> bool:
    """Whether this VAE can be run so."""
    return (
        not model.use_tiling
        and model.config.get("patch_size") is None
        and "first_chunk" in inspect.signature(model.decoder.forward).parameters
    )


@torch.no_grad()
def encode(vae: VideoAutoencoder, source: Clip | Tensor, device: str | torch.device) -> Tensor:
    """uint8 ``[F, H, W, 3]`` on the host (or an image ``[H, W, 3]``) -> ``[C, T, h, w]`` on the device: the bits of
    ``vae.encode(to_model(source).to(device))``."""
    model = vae.model
    if not in_pieces(model):
        return vae.encode(to_model(source).to(device))
    frames = source.frames if isinstance(source, Clip) else source[None]
    model.clear_cache()
    pieces = []
    for piece in range(1 + (len(frames) - 1) // 4):
        own = frames[:1] if piece == 0 else frames[4 * piece - 3 : 4 * piece + 1]
        pixels = to_model(Clip(own, 1.0)).to(device).to(model.device, model.dtype)[None]
        model._enc_conv_idx = [0]
        pieces.append(model.encoder(pixels, feat_cache=model._enc_feat_map, feat_idx=model._enc_conv_idx))
        del pixels
    model.clear_cache()
    latent = model.quant_conv(torch.cat(pieces, 2))[0].chunk(2)[0]  # of mean and variance the mean
    mean, std = vae.statistics(latent)
    return (latent - mean) / std


@torch.no_grad()
def decode(vae: VideoAutoencoder, latent_CTHW: Tensor) -> Tensor:
    """``[C, T, h, w]`` -> uint8 ``[F, H, W, 3]`` on the host: the bits of ``from_model(vae.decode(latent))``.

    Raises:
        UserError: values that are not finite.
    """
    if not in_pieces(vae.model):
        return from_model(vae.decode(latent_CTHW))
    frames, done = torch.empty(0, dtype=torch.uint8), 0
    for pixels in decoded(vae, latent_CTHW):
        piece = from_model(pixels)
        if not done:
            frames = piece.new_empty((1 + (latent_CTHW.shape[1] - 1) * vae.temporal_stride, *piece.shape[1:]))
        frames[done : done + len(piece)] = piece
        done += len(piece)
    return frames[:done]


@torch.no_grad()
def decoded(vae: VideoAutoencoder, latent_CTHW: Tensor) -> Iterator[Tensor]:
    """Pieces ``[3, f, H, W]`` in [-1, 1], the first of one frame."""
    model = vae.model
    latent = latent_CTHW.to(model.device, model.dtype)
    mean, std = vae.statistics(latent)
    model.clear_cache()
    states = model.post_quant_conv((latent * std + mean)[None])
    for piece in range(states.shape[2]):
        model._conv_idx = [0]
        first = {"first_chunk": True} if piece == 0 else {}
        own = states[:, :, piece : piece + 1]
        yield model.decoder(own, feat_cache=model._feat_map, feat_idx=model._conv_idx, **first)[0].clamp(-1, 1)
    model.clear_cache()
