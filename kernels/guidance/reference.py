"""Chained guidance with adaptive projection in plain PyTorch: the definition of right.

Sources: classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), eq. 6; adaptive projected guidance (momentum,
norm threshold, projection), Sadat et al. 2024 (arXiv 2410.02416), sec. 4. Which prediction is projected on, over which
axes and with which guard against zero norms follows the released Bernini code, as its outputs show.
Shapes: F latent frames, M values per frame, L links. Float64 inputs are computed in float64, everything else in
float32; norms and inner products are summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FRAME_NORM_FLOOR = 1e-12
"""Per-frame form: the norm of the projection's direction is not taken smaller than this."""
GLOBAL_EPS = 1e-8
"""Global form: added to the squared norm of the projection's direction."""


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is; every other mix of dtypes is computed in float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def output_dtype(prediction: Tensor, latent: Tensor | None, space: str, update: bool) -> torch.dtype:
    """The latent's dtype for a scheduler update and for x0 space, else the predictions'."""
    return latent.dtype if latent is not None and (update or space == "x0") else prediction.dtype


def guide(
    predictions: Sequence[Tensor],
    new: Sequence[int],
    old: Sequence[int],
    scales: Sequence[float],
    apg: str | None,
    space: str,
    latent: Tensor | None,
    sigma: float,
    eta: float,
    thresholds: Sequence[float],
    coefficients: Sequence[float],
    history: Sequence[Tensor],
    rounding: str,
    buffer: Tensor | None = None,
    momentum: float = 0.0,
) -> list[Tensor]:
    """``[v]``, or with ``coefficients`` (J rows of ``2 + len(history)`` numbers, flattened) the J updated tensors.

    ``v = p[0] + sum of scale * A(p[new] - p[old])`` over the links; in x0 space the same with ``x0 = latent - sigma p``
    in the place of p, and ``v = (latent - x0) / sigma`` at the end. ``buffer`` is updated in place.
    """
    shape, wide = predictions[0].shape, compute_dtype(*predictions, latent, *history)
    rows_FM = (shape[0], math.prod(shape[1:]))
    flat = [p.reshape(rows_FM) for p in predictions]
    latent_FM = None if latent is None else latent.reshape(rows_FM)
    links = list(zip(new, old, scales, thresholds or [0.0] * len(scales), strict=True))
    buffers = None if buffer is None else [b.reshape(rows_FM) for b in buffer.unbind(0)]
    if rounding == "eager":
        v, carried = _eager(flat, links, apg, latent_FM if space == "x0" else None, sigma, eta, buffers, momentum)
    else:
        v, carried = _wide(flat, links, apg, latent_FM if space == "x0" else None, sigma, eta, buffers, momentum, wide)
    if buffer is not None and carried:
        with torch.no_grad():
            buffer.copy_(torch.stack(carried).reshape(buffer.shape))
    if not coefficients:
        return [v.to(output_dtype(predictions[0], latent, space, False)).contiguous().reshape(shape)]
    assert latent_FM is not None
    if rounding == "eager":  # the unfused chain hands the solver a velocity that was rounded when it was returned
        v = v.to(output_dtype(predictions[0], latent, space, False))
    terms = [latent_FM, v, *(h.reshape(rows_FM) for h in history)]
    outputs = []
    for start in range(0, len(coefficients), len(terms)):
        row = coefficients[start : start + len(terms)]
        total = torch.zeros(rows_FM, dtype=wide, device=v.device)
        for c, term in zip(row, terms, strict=True):
            total = total + c * term.to(wide)
        outputs.append(total.to(latent_FM.dtype).contiguous().reshape(shape))
    return outputs


def _wide(
    predictions: Sequence[Tensor],
    links: Sequence[tuple[int, int, float, float]],
    apg: str | None,
    latent: Tensor | None,
    sigma: float,
    eta: float,
    buffers: Sequence[Tensor] | None,
    momentum: float,
    wide: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """The fp32 contract, unrounded. ``latent`` is given in x0 space only.

    A difference of two x0 is ``-sigma`` times that of the velocities, and it is taken from these: cond and uncond are
    close, so subtracting two x0 would lose digits to the latent that both contain.
    """
    p = [x.to(wide) for x in predictions]
    v, carried = p[0].clone(), []
    for number, (new, old, scale, threshold) in enumerate(links):
        delta, onto = p[new] - p[old], p[new]
        if latent is not None:
            delta, onto = -sigma * delta, latent.to(wide) - sigma * p[new]
        if buffers is not None:
            delta = delta + momentum * buffers[number].to(wide)
            carried.append(delta)
        if apg is not None:
            delta = _project(delta, onto, apg, threshold, eta)
        v = v + (scale if latent is None else -scale / sigma) * delta
    return v, carried


def _project(delta: Tensor, onto: Tensor, apg: str, threshold: float, eta: float) -> Tensor:
    """``clip * (delta - (1 - eta) * parallel)``, three sums and then a linear combination per frame (or in all).

    ``clip = min(1, threshold / |delta|)`` for a positive threshold; ``parallel`` is the part of delta along ``onto``.
    """
    axes = (1,) if apg == "frame" else (0, 1)
    delta64, onto64 = delta.double(), onto.double()
    size = onto64.square().sum(axes, keepdim=True)
    size = size.clamp_min(FRAME_NORM_FLOOR**2) if apg == "frame" else size + GLOBAL_EPS
    along = (delta64 * onto64).sum(axes, keepdim=True) / size
    clip = torch.ones_like(along)
    if threshold > 0:
        squared = delta64.square().sum(axes, keepdim=True)
        over = squared > threshold**2
        clip = torch.where(over, threshold * torch.rsqrt(torch.where(over, squared, 1.0)), 1.0)
    return clip.to(delta.dtype) * delta + ((eta - 1.0) * clip * along).to(delta.dtype) * onto


def _eager(
    predictions: Sequence[Tensor],
    links: Sequence[tuple[int, int, float, float]],
    apg: str | None,
    latent: Tensor | None,
    sigma: float,
    eta: float,
    buffers: Sequence[Tensor] | None,
    momentum: float,
) -> tuple[Tensor, list[Tensor]]:
    """The released chain, op by op, in whatever dtype promotion gives.

    With bf16 predictions: sums of velocities and the global projection stay bf16; sigma is rounded to bf16 on the way
    to x0 (and only there), the product too, and from the float32 latent on everything is float32.
    """
    onto: Sequence[Tensor] = predictions
    if latent is not None:
        rounded = torch.tensor(sigma, dtype=predictions[0].dtype).item()
        onto = [latent - rounded * p for p in predictions]
    result, carried = onto[0].clone(), []
    for number, (new, old, scale, threshold) in enumerate(links):
        delta = onto[new] - onto[old]
        if buffers is not None:
            delta = delta + momentum * buffers[number]
            carried.append(delta)
        if apg is not None:
            delta = _project_eager(delta, onto[new], apg, threshold, eta)
        result = result + scale * delta
    return (result if latent is None else (latent - result) / sigma), carried


def _project_eager(delta: Tensor, onto: Tensor, apg: str, threshold: float, eta: float) -> Tensor:
    axes = (1,) if apg == "frame" else (0, 1)
    if threshold > 0:
        norm = torch.linalg.vector_norm(delta, dim=axes, keepdim=True)
        delta = delta * torch.where(norm > threshold, threshold / norm, torch.ones_like(norm))
    if apg == "frame":  # in float64, on the normalised direction
        onto64 = onto.double()
        unit = onto64 / torch.linalg.vector_norm(onto64, dim=axes, keepdim=True).clamp_min(FRAME_NORM_FLOOR)
        parallel64 = (delta.double() * unit).sum(axes, keepdim=True) * unit
        return (delta.double() - parallel64).to(delta.dtype) + eta * parallel64.to(delta.dtype)
    size = (onto * onto).sum(axes, keepdim=True) + GLOBAL_EPS
    parallel = (delta * onto).sum(axes, keepdim=True) / size * onto
    return eta * parallel + (delta - parallel)
