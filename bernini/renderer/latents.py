"""Latents <-> tokens. A token is one 1x2x2 patch; its values are ordered (t, h, w in the patch, channel)."""

from __future__ import annotations

from torch import Tensor


def patch_grid(latent_shape: tuple[int, ...], patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
    """(t, h, w) in tokens of a ``[C, T, H, W]`` latent.

    Raises:
        ValueError: the patch size does not divide the latent.
    """
    sizes = tuple(latent_shape[-3:])
    if any(size % patch for size, patch in zip(sizes, patch_size, strict=True)):
        raise ValueError(f"latent of {list(latent_shape)} cannot be cut into patches of {list(patch_size)}")
    t, h, w = (size // patch for size, patch in zip(sizes, patch_size, strict=True))
    return t, h, w


def patchify(latent_CTHW: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """``[C, T, H, W]`` -> ``[tokens, values]``, tokens in the order frame, row, column."""
    channels = latent_CTHW.shape[0]
    t, h, w = patch_grid(tuple(latent_CTHW.shape), patch_size)
    pt, ph, pw = patch_size
    cut = latent_CTHW.reshape(channels, t, pt, h, ph, w, pw)
    return cut.permute(1, 3, 5, 2, 4, 6, 0).reshape(t * h * w, pt * ph * pw * channels)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`patchify` for a ``grid`` of (t, h, w) tokens."""
    t, h, w = grid
    pt, ph, pw = patch_size
    cut = tokens.reshape(t, h, w, pt, ph, pw, -1)
    return cut.permute(6, 0, 3, 1, 4, 2, 5).reshape(-1, t * pt, h * ph, w * pw)
