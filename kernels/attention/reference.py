"""Interval attention in plain PyTorch: the definition of right.

Sources: scaled dot-product attention, Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; grouped heads, Ainslie et al. 2023
(arXiv 2305.13245); the backward formulas from the saved log-sum-exp, Dao et al. 2022 (arXiv 2205.14135), app. B.
Shapes: T queries, S keys, H query heads, G key heads (query head h reads key head h // (H / G)), R = H / G, D head dim.
Float64 inputs are computed in float64, everything else in float32. Scores are dense: T * S * H values in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64; every other dtype is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def interval_mask(
    starts_T: Tensor, ends_T: Tensor, starts2_T: Tensor | None, ends2_T: Tensor | None, keys: int
) -> Tensor:
    """``[T, S]``, true where row t may attend key s."""
    key = torch.arange(keys, device=starts_T.device)
    mask_TS = (key >= starts_T[:, None]) & (key < ends_T[:, None])
    if starts2_T is not None and ends2_T is not None:
        mask_TS |= (key >= starts2_T[:, None]) & (key < ends2_T[:, None])
    return mask_TS


def _grouped(x_THD: Tensor, groups: int) -> Tensor:
    """``[T, G, R, D]``."""
    return x_THD.unflatten(1, (groups, x_THD.shape[1] // groups))


def _scores(q_THD: Tensor, k_SGD: Tensor, scale: float) -> Tensor:
    """``[G, R, T, S]`` in the compute dtype."""
    wide = compute_dtype(q_THD)
    q_TGRD = _grouped(q_THD.to(wide), k_SGD.shape[1])
    return scale * torch.einsum("tgrd,sgd->grts", q_TGRD, k_SGD.to(wide))


def interval_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    starts_T: Tensor,
    ends_T: Tensor,
    starts2_T: Tensor | None,
    ends2_T: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``out[t] = sum over the row's keys of softmax(scale * q[t] . k) v`` and ``lse_HT``, the log of the softmax's sum.

    A row without keys gets zeros and a log-sum-exp of -inf.
    """
    scores = _scores(q_THD, k_SGD, scale)
    mask_TS = interval_mask(starts_T, ends_T, starts2_T, ends2_T, len(k_SGD))
    lse_GRT = torch.logsumexp(scores.masked_fill(~mask_TS, -torch.inf), -1)
    weights = _weights(scores, lse_GRT, mask_TS)
    out_THD = torch.einsum("grts,sgd->tgrd", weights, v_SGD.to(weights.dtype)).flatten(1, 2)
    return out_THD.to(q_THD.dtype).contiguous(), lse_GRT.flatten(0, 1).contiguous()


def _weights(scores: Tensor, lse_GRT: Tensor, mask_TS: Tensor) -> Tensor:
    """``exp(scores - lse)`` on the mask, else 0; the rows whose lse is -inf have no keys."""
    finite = torch.where(lse_GRT == -torch.inf, 0.0, lse_GRT)
    return torch.exp((scores - finite[..., None]).masked_fill(~mask_TS, -torch.inf))


def interval_attention_backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    starts_T: Tensor,
    ends_T: Tensor,
    starts2_T: Tensor | None,
    ends2_T: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v. With ``P = exp(scores - lse)`` on the mask and ``delta[t] = dout[t] . out[t]``:

    ``dv[s] = sum over t of P[t, s] dout[t]``, ``dS = P * (dout . v - delta)``,
    ``dq[t] = scale * sum over s of dS k[s]`` and ``dk[s] = scale * sum over t of dS q[t]``; k and v add up the heads of
    their group.
    """
    wide, groups = compute_dtype(q_THD), k_SGD.shape[1]
    q, dout, out = (_grouped(x.to(wide), groups) for x in (q_THD, dout_THD, out_THD))
    k, v = k_SGD.to(wide), v_SGD.to(wide)
    mask_TS = interval_mask(starts_T, ends_T, starts2_T, ends2_T, len(k_SGD))
    weights = _weights(_scores(q_THD, k_SGD, scale), lse_HT.unflatten(0, (groups, lse_HT.shape[0] // groups)), mask_TS)
    delta_GRT = (dout * out).sum(-1).permute(1, 2, 0)
    dscores = weights * (torch.einsum("tgrd,sgd->grts", dout, v) - delta_GRT[..., None])
    dq = scale * torch.einsum("grts,sgd->tgrd", dscores, k).flatten(1, 2)
    dk = scale * torch.einsum("grts,tgrd->sgd", dscores, q)
    dv = torch.einsum("grts,tgrd->sgd", weights, dout)
    return (
        dq.to(q_THD.dtype).contiguous(),
        dk.to(k_SGD.dtype).contiguous(),
        dv.to(v_SGD.dtype).contiguous(),
    )


def attention(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> Tensor:
    """Every query attends to every key. Differentiable by torch itself; without keys the result is zeros."""
    weights = torch.softmax(_scores(q_THD, k_SGD, scale), -1)
    return torch.einsum("grts,sgd->tgrd", weights, v_SGD.to(weights.dtype)).flatten(1, 2).to(q_THD.dtype)
