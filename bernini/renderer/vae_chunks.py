"""Videos through the VAE in pieces, with pixels on the device for one piece only.

The VAE is causal in time, so it is run window by window (:mod:`bernini.parallel.vae`), and each window's pixels go to
the host as bytes before the next is made. Several processes have a part of each window; they exchange bytes, not
floats. The result has the same bits as in one call. Tiles in space are another matter (they blend, and change the
result): with tiling switched on, or a VAE of an unknown form, it is one call for all.

Shapes: F frames, T latent frames, C channels of the latent, h, w its sides.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..media import Clip, from_model, to_model
from .vae import VideoAutoencoder


@torch.no_grad()
def encode(vae: VideoAutoencoder, source: Clip | Tensor, device: str | torch.device) -> Tensor:
    """uint8 ``[F, H, W, 3]`` on the host (or an image ``[H, W, 3]``) -> ``[C, T, h, w]`` on the device: the bits of
    ``vae.encode(to_model(source).to(device))``."""
    frames = source.frames if isinstance(source, Clip) else source[None]

    def pixels(start: int, stop: int) -> Tensor:
        if start == stop:
            return torch.empty((3, 0, *frames.shape[1:3]), device=device)
        return to_model(Clip(frames[start:stop], 1.0)).to(device)

    return vae.encode_pieces(pixels, len(frames))


@torch.no_grad()
def decode(vae: VideoAutoencoder, latent_CTHW: Tensor) -> Tensor:
    """``[C, T, h, w]`` -> uint8 ``[F, H, W, 3]`` on the host: the bits of ``from_model(vae.decode(latent))``.

    Raises:
        UserError: values that are not finite.
    """
    if not vae.in_pieces:
        return from_model(vae.decode(latent_CTHW))
    frames, done = torch.empty(0, dtype=torch.uint8), 0
    for piece in decoded(vae, latent_CTHW):
        if not done:
            frames = piece.new_empty((1 + (latent_CTHW.shape[1] - 1) * vae.temporal_stride, *piece.shape[1:]))
        frames[done : done + len(piece)] = piece
        done += len(piece)
    return frames[:done]


@torch.no_grad()
def decoded(vae: VideoAutoencoder, latent_CTHW: Tensor) -> Iterator[Tensor]:
    """uint8 ``[f, H, W, 3]`` on the host, window by window as they are made, on every process."""
    for part in vae.decode_pieces(latent_CTHW):
        own = part.own[0]
        rows = from_model(own) if own.shape[1] else torch.empty((0, *own.shape[2:], 3), dtype=torch.uint8)
        if own.device.type != "cpu" and vae.group.size > 1:
            yield vae.group.gather(rows.to(own.device), part.sizes).cpu()
        else:
            yield vae.group.gather(rows, part.sizes)
