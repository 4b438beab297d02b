"""Gated residual, LayerNorm and scale/shift (adaLN) in plain PyTorch: the definition of right.

Sources: LayerNorm, arXiv 1607.06450 eq. 3; adaLN with a gate, DiT (arXiv 2212.09748) section 3.2; the order in which
the Wan transformer chains them (arXiv 2503.20314).
Shapes: T tokens, N width, R rows of the tables. Float64 inputs are computed in float64, everything else in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rms_norm.reference import compute_dtype


def _pick(table_RN: Tensor, index_T: Tensor | None) -> Tensor:
    """Each token's row, ``[T, N]``; a table of one row is left to broadcast."""
    if table_RN.shape[0] == 1 or index_T is None:
        return table_RN
    return table_RN.index_select(0, index_T)


def _multiply_add(x: Tensor, factor: Tensor, addend: Tensor, rounding: str) -> Tensor:
    """``x * factor + addend``; ``"eager"`` rounds the product too, ``"fp32"`` may fuse the two."""
    return x * factor + addend if rounding == "eager" else torch.addcmul(addend, x, factor)


def _add_branch(
    residual_TN: Tensor, branch_TN: Tensor, gate_RN: Tensor | None, index_T: Tensor | None, rounding: str
) -> Tensor:
    """``residual + gate * branch`` in the compute dtype, not yet rounded."""
    wide = compute_dtype(residual_TN)
    residual, branch = residual_TN.to(wide), branch_TN.to(wide)
    if gate_RN is None:
        return residual + branch
    return _multiply_add(branch, _pick(gate_RN.to(wide), index_T), residual, rounding)


def _norm(
    h_TN: Tensor,
    scale_RN: Tensor | None,
    shift_RN: Tensor | None,
    index_T: Tensor | None,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
    rounding: str,
) -> Tensor:
    """LayerNorm, affine, scale and shift of an h that is in the compute dtype, where the result stays."""
    wide = h_TN.dtype
    weight, bias = (None if p is None else p.to(wide) for p in (weight_N, bias_N))
    y = F.layer_norm(h_TN, h_TN.shape[-1:], weight, bias, eps)
    factor = None if scale_RN is None else _pick(1 + scale_RN.to(wide), index_T)
    shift = None if shift_RN is None else _pick(shift_RN.to(wide), index_T)
    if factor is not None and shift is not None:
        return _multiply_add(y, factor, shift, rounding)
    if factor is not None:
        return y * factor
    return y if shift is None else y + shift


def modulate(
    residual_TN: Tensor,
    branch_TN: Tensor,
    gate_RN: Tensor | None,
    scale_RN: Tensor | None,
    shift_RN: Tensor | None,
    index_T: Tensor | None,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    """``residual' = residual + gate * branch`` and ``LayerNorm(residual') * (1 + scale) + shift``.

    ``rounding="fp32"``: residual' is rounded for the output only; the norm takes the unrounded value and is rounded
    once, at the end. ``rounding="eager"``: ``gate * branch`` and the sum are two float32 ops, residual' is rounded to
    the input dtype, the norm takes that rounded value, each of its ops rounds to float32 (no fused multiply-add), and
    one rounding to the input dtype ends the chain.
    """
    h = _add_branch(residual_TN, branch_TN, gate_RN, index_T, rounding)
    residual = h.to(residual_TN.dtype).contiguous()
    if rounding == "eager":
        h = residual.to(h.dtype)
    normed = _norm(h, scale_RN, shift_RN, index_T, weight_N, bias_N, eps, rounding)
    return residual, normed.to(residual_TN.dtype).contiguous()


def modulate_norm(
    residual_TN: Tensor,
    scale_RN: Tensor | None,
    shift_RN: Tensor | None,
    index_T: Tensor | None,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
    rounding: str,
) -> Tensor:
    """The second half of :func:`modulate`, where nothing is added to the residual."""
    h = residual_TN.to(compute_dtype(residual_TN))
    normed = _norm(h, scale_RN, shift_RN, index_T, weight_N, bias_N, eps, rounding)
    return normed.to(residual_TN.dtype).contiguous()


def _row_sum(values_TN: Tensor, table_RN: Tensor | None, index_T: Tensor | None, like: Tensor) -> Tensor:
    """Sums the tokens of each row in the compute dtype; an empty tensor where there is no table."""
    if table_RN is None:
        return like.new_empty(0)
    if table_RN.shape[0] == 1 or index_T is None:
        return values_TN.sum(0, keepdim=True).to(table_RN.dtype)
    zeros = values_TN.new_zeros(table_RN.shape)
    return zeros.index_add_(0, index_T, values_TN).to(table_RN.dtype)


def _norm_backward(
    dn_TN: Tensor,
    h_TN: Tensor,
    scale_RN: Tensor | None,
    shift_RN: Tensor | None,
    index_T: Tensor | None,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of :func:`_norm`: (dh in the compute dtype, dscale, dshift, dweight, dbias).

    With ``r = rsqrt(var(h) + eps)``, ``u = (h - mean(h)) * r``, ``y = u * weight + bias``, ``dy = dn * (1 + scale)``
    and ``g = dy * weight``: ``dh = r * (g - mean(g) - u * mean(g * u))``. Over the tokens of each row
    ``dshift = sum dn`` and ``dscale = sum dn * y``; over all tokens ``dweight = sum dy * u`` and ``dbias = sum dy``.
    """
    wide = h_TN.dtype
    centred = h_TN - h_TN.mean(-1, keepdim=True)
    r = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    u = centred * r

    dscale = like.new_empty(0)
    dy = dn_TN
    if scale_RN is not None:
        y = u if weight_N is None else u * weight_N.to(wide)
        y = y if bias_N is None else y + bias_N.to(wide)
        dscale = _row_sum(dn_TN * y, scale_RN, index_T, like)
        dy = dn_TN * _pick(1 + scale_RN.to(wide), index_T)
    dshift = _row_sum(dn_TN, shift_RN, index_T, like)
    dbias = like.new_empty(0) if bias_N is None else dy.sum(0).to(bias_N.dtype)
    dweight = like.new_empty(0) if weight_N is None else (dy * u).sum(0).to(weight_N.dtype)

    g = dy if weight_N is None else dy * weight_N.to(wide)
    dh = r * (g - g.mean(-1, keepdim=True) - u * (g * u).mean(-1, keepdim=True))
    return dh, dscale, dshift, dweight, dbias


def modulate_backward(
    dresidual_TN: Tensor,
    dnormed_TN: Tensor,
    residual_TN: Tensor,
    branch_TN: Tensor,
    gate_RN: Tensor | None,
    scale_RN: Tensor | None,
    shift_RN: Tensor | None,
    index_T: Tensor | None,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for residual, branch, gate, scale, shift, weight and bias (empty tensors where there are none).

    With dh of the norm plus the gradient of residual' itself: ``dresidual = dh``, ``dbranch = dh * gate`` and
    ``dgate = sum over the tokens of a row of dh * branch``. Without a gate dbranch equals dresidual and is left empty.
    """
    wide, dtype = compute_dtype(residual_TN), residual_TN.dtype
    h = _add_branch(residual_TN, branch_TN, gate_RN, index_T, "fp32")
    dh, dscale, dshift, dweight, dbias = _norm_backward(
        dnormed_TN.to(wide), h, scale_RN, shift_RN, index_T, weight_N, bias_N, eps, residual_TN
    )
    dh = dh + dresidual_TN.to(wide)
    dbranch, dgate = residual_TN.new_empty(0), residual_TN.new_empty(0)
    if gate_RN is not None:
        dbranch = (dh * _pick(gate_RN.to(wide), index_T)).to(dtype).contiguous()
        dgate = _row_sum(dh * branch_TN, gate_RN, index_T, residual_TN)
    return dh.to(dtype).contiguous(), dbranch, dgate, dscale, dshift, dweight, dbias


def modulate_norm_backward(
    dnormed_TN: Tensor,
    residual_TN: Tensor,
    scale_RN: Tensor | None,
    shift_RN: Tensor | None,
    index_T: Tensor | None,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for residual, scale, shift, weight and bias (empty tensors where there are none)."""
    wide = compute_dtype(residual_TN)
    dh, dscale, dshift, dweight, dbias = _norm_backward(
        dnormed_TN.to(wide), residual_TN.to(wide), scale_RN, shift_RN, index_T, weight_N, bias_N, eps, residual_TN
    )
    return dh.to(residual_TN.dtype).contiguous(), dscale, dshift, dweight, dbias
