"""RMSNorm of q and k followed by SA-3D RoPE, in plain PyTorch: the definition of right.

Sources: RMSNorm, arXiv 1910.07467 eq. 4; RoPE over adjacent pairs, arXiv 2104.09864; the segment factor, Bernini
(arXiv 2605.22344); norm before rotation and across all heads, Wan 2.1 (arXiv 2503.20314).
Shapes: T tokens, H heads, D head dim, P pairs = D/2, N = H * D. Float64 inputs are computed in float64, everything
else in float32.

Rotation is one complex multiplication per pair. On a CPU that is the fastest of the plain forms (the others either
read and write every second number or copy the tensor with its pairs swapped). It gives ``x1 * cos - x2 * sin`` and
``x1 * sin + x2 * cos``, each of two products that torch rounds before it adds them, but for a few at the end of a
tensor, where compilers may fuse a product with the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rms_norm import reference as rms
from ..rms_norm.reference import compute_dtype

NORMS = ("across_heads", "per_head")


def rope_factors(tables: Sequence[Tensor], rows_T4: Tensor) -> Tensor:
    """The rotation of each token, ``[T, D/2, 2]`` (cos, sin), in the tables' dtype.

    ``R = [t part | h part | w part] * segment``, a complex product in each of the D/2 slots.
    """
    t, h, w, segment = (table.index_select(0, rows) for table, rows in zip(tables, rows_T4.unbind(1), strict=True))
    axes = torch.cat((t, h, w), dim=1)
    return torch.view_as_real(torch.view_as_complex(axes) * torch.view_as_complex(segment))


def _rotations(tables: Sequence[Tensor], rows_T4: Tensor, wide: torch.dtype) -> Tensor:
    """:func:`rope_factors` as complex ``[T, 1, P]``, computed in ``wide``, ready to multiply all heads.

    A float32 product would round by a token's place among the others: vector lanes contract, the last ones do not.
    """
    tables = [table.to(wide) for table in tables]
    return torch.view_as_complex(rope_factors(tables, rows_T4).to(wide)).unsqueeze(1)


def _rotate_(x_THD: Tensor, factor_T1P: Tensor) -> Tensor:
    """Rotates adjacent pairs in place; x must be contiguous and the caller's own."""
    torch.view_as_complex(x_THD.unflatten(-1, (-1, 2))).mul_(factor_T1P)
    return x_THD


def _wide_copy(x: Tensor, wide: torch.dtype) -> Tensor:
    """A contiguous copy, never a view: safe to change, and its pairs are aligned whatever x's strides and offset."""
    return x.to(wide, memory_format=torch.contiguous_format, copy=True)


def _tokens_by_width(x_THD: Tensor, norm: str) -> Tensor:
    """Groups the values that share one mean square on the last axis."""
    return x_THD.flatten(1) if norm == "across_heads" else x_THD


def _normed(x_THD: Tensor, weight: Tensor | None, norm: str, eps: float, rounding: str) -> Tensor:
    """RMSNorm in the compute dtype, unrounded for ``"fp32"``. A fresh contiguous tensor."""
    wide = compute_dtype(x_THD)
    if weight is None:
        return _wide_copy(x_THD, wide)
    grouped = _tokens_by_width(x_THD.contiguous(), norm).to(wide)
    y = rms.rms_norm(grouped, weight, eps, rounding).view(x_THD.shape)
    return y.to(x_THD.dtype).to(wide) if rounding == "eager" else y


def qk_rope(
    q_THD: Tensor,
    k_THD: Tensor,
    tables: Sequence[Tensor],
    rows_T4: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    """``y = R * (x / sqrt(mean(x^2) + eps) * weight)`` for q and k, pairs (2k, 2k+1) as complex numbers.

    ``rounding="fp32"`` rounds once, at the end. ``rounding="eager"`` also rounds after the norm, as
    ``torch.nn.RMSNorm`` does; the rotation that follows promotes to the tables' float32 and rounds at its store.
    """
    factor = _rotations(tables, rows_T4, compute_dtype(q_THD))
    q, k = (
        _rotate_(_normed(x, weight, norm, eps, rounding), factor).to(x.dtype)
        for x, weight in ((q_THD, q_weight), (k_THD, k_weight))
    )
    return q, k


def qk_rope_out(
    q_THD: Tensor,
    k_THD: Tensor,
    tables: Sequence[Tensor],
    rows_T4: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    """:func:`qk_rope` into ``[T, H, D]`` or, destination-major, ``[ranks, T, H/ranks, D]``."""
    results = qk_rope(q_THD, k_THD, tables, rows_T4, q_weight, k_weight, norm, eps, rounding)
    for out, result in zip((q_out, k_out), results, strict=True):
        if out.dim() == 4:
            result = result.unflatten(1, (out.shape[0], out.shape[2])).movedim(1, 0)
        out.copy_(result)


def _grad(
    dy_THD: Tensor, x_THD: Tensor, weight: Tensor | None, conjugate_T1P: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """One of q and k: gradients for x and its weight (an empty tensor where there is none)."""
    g = _rotate_(_wide_copy(dy_THD, compute_dtype(x_THD)), conjugate_T1P)
    if weight is None or not weight.numel():  # no heads at all: one of q and k is there alone
        return g.to(x_THD.dtype), (x_THD if weight is None else weight).new_empty(0)
    grouped = _tokens_by_width(x_THD.contiguous(), norm)
    dx, dweight = rms.rms_norm_backward(_tokens_by_width(g, norm), grouped, weight, eps)
    return dx.view(x_THD.shape), dweight


def qk_rope_backward(
    dq_THD: Tensor,
    dk_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    tables: Sequence[Tensor],
    rows_T4: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k and the two weights (empty tensors where there are none).

    A rotation is orthogonal: the gradient before it is ``conj(R) * dy``; the backward of RMSNorm follows.
    """
    conjugate = _rotations(tables, rows_T4, compute_dtype(q_THD)).conj_physical()
    dq, dq_weight = _grad(dq_THD, q_THD, q_weight, conjugate, norm, eps)
    dk, dk_weight = _grad(dk_THD, k_THD, k_weight, conjugate, norm, eps)
    return dq, dk, dq_weight, dk_weight
