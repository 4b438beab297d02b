"""RMSNorm in plain PyTorch: the definition of right.

Source: Zhang & Sennrich 2019 (arXiv 1910.07467), eq. 4; the Wan transformer applies it to q and k across all heads.
Shapes: T tokens, N width. Float64 inputs are computed in float64, everything else in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64; every other dtype is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x_TN: Tensor, weight_N: Tensor | None, eps: float, rounding: str) -> Tensor:
    """``y = x / sqrt(mean(x^2) + eps) * weight``.

    ``rounding="eager"`` is the chain of ``torch.nn.RMSNorm``, which widens, multiplies by the weight and rounds once:
    the two contracts coincide here.
    """
    wide = compute_dtype(x_TN)
    x = x_TN.to(wide)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight_N is not None:
        y = y * weight_N.to(wide)
    return y.to(x_TN.dtype).contiguous()


def rms_norm_backward(dy_TN: Tensor, x_TN: Tensor, weight_N: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_norm` for x and weight (an empty tensor where there is no weight).

    With ``r = rsqrt(mean(x^2) + eps)`` and ``g = dy * weight``: ``dx = r * (g - x * r^2 * mean(g * x))`` and
    ``dweight = sum over tokens of dy * x * r``.
    """
    wide = compute_dtype(x_TN)
    x, dy = x_TN.to(wide), dy_TN.to(wide)
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    g = dy if weight_N is None else dy * weight_N.to(wide)
    dx = r * (g - x * (r.square() * (g * x).mean(-1, keepdim=True)))
    if weight_N is None:
        return dx.to(x_TN.dtype).contiguous(), x_TN.new_empty(0)
    dweight = (dy * x * r).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x_TN.dtype).contiguous(), dweight.to(weight_N.dtype)
