"""What :mod:`bernini.renderer.patch` puts into a diffusers Wan block: its forward, and its attentions' processor.

Parameters and layers stay in diffusers' modules. Every Linear, the attention call and the feed-forward are called as
diffusers calls them; what lies between them are our fused ops.

A block takes and returns whole hidden states. :mod:`bernini.renderer.model` leaves a block's last sum to the next
block's first modulation; here that would put something half-added before the hooks that cache, skip or offload blocks,
so the sum is made at the end of the block.

Shapes: B samples, S tokens of a sample, T = B x S, N width, H heads, D head dim, R rows of the modulation, L text.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformer3DModel,
    WanTransformerBlock,
    _get_added_kv_projections,
    _get_qkv_projections,
)
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from bernini.kernels import modulate, qk_rope, rms_norm
from bernini.kernels.qk_rope.tables import axis_dims

TEXT_TOKENS = 512
"""Text length behind the image tokens of image-to-video models; diffusers' processor has the same constant."""

# Context parallelism of diffusers 0.36 also cuts the text; later versions leave cross-attention whole.
CROSS_IS_PARALLEL = "blocks.*" in (getattr(WanTransformer3DModel, "_cp_plan", None) or {})


class FusedBlock:
    """The forward of one ``WanTransformerBlock``, with its three adaLN chains fused."""

    def __init__(self, block: WanTransformerBlock, rounding: str) -> None:
        self.block, self.rounding = block, rounding

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Hidden states ``[B, S, N]``, text ``[B, L, N]``, modulation ``[B, 6, N]`` or, per token, ``[B, S, 6, N]``."""
        block, shape = self.block, hidden_states.shape
        time_R6N = (block.scale_shift_table + _wide(temb)).flatten(0, -3)
        shift1, scale1, gate1, shift3, scale3, gate3 = time_R6N.unbind(1)
        x = hidden_states.flatten(0, 1)
        join = partial(modulate, index_T=_rows(len(time_R6N), x), rounding=self.rounding)

        _, normed = join(x, scale=scale1, shift=shift1, **_affine(block.norm1))
        branch = _branch(block.attn1(normed.view(shape), None, None, rotary_emb), x)
        if isinstance(block.norm2, nn.Identity):  # cross_attn_norm=False: a sum, and no norm behind it
            x = normed = gated_sum(x, branch, gate1, self.rounding)
        else:
            x, normed = join(x, branch, gate=gate1, **_affine(block.norm2))
        branch = _branch(block.attn2(normed.view(shape), encoder_hidden_states, None, None), x)
        x, normed = join(x, branch, scale=scale3, shift=shift3, **_affine(block.norm3))
        branch = _branch(block.ffn(normed.view(shape)), x)
        return gated_sum(x, branch, gate3, self.rounding).view(shape)


class FusedAttnProcessor(WanAttnProcessor):
    """``WanAttnProcessor`` with norm and rotation fused.

    What the model's user chooses (attention backend, context parallelism) is kept in the stock processor, so it is
    still in force after unpatching.
    """

    def __init__(self, stock: WanAttnProcessor, rounding: str) -> None:
        super().__init__()
        self.stock, self.rounding = stock, rounding

    @property
    def _attention_backend(self) -> Any:
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.stock._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.stock, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.stock._parallel_config = config

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``[B, S, N]`` and, for cross-attention, image and text ``[B, image + L, N]`` -> ``[B, S, N]``."""
        image, text = None, encoder_hidden_states
        if attn.add_k_proj is not None and text is not None:
            image, text = text.tensor_split([text.shape[1] - TEXT_TOKENS], dim=1)
        q, k, v = _get_qkv_projections(attn, hidden_states, text)
        if rotary_emb is None:
            q, k = self._norm(attn, q, attn.norm_q), self._norm(attn, k, attn.norm_k)
        else:
            q, k = self._norm_and_rotate(attn, q, k, rotary_emb)

        options = {"dropout_p": 0.0, "is_causal": False, "backend": self._attention_backend}
        if self._parallel_config is not None and (text is None or CROSS_IS_PARALLEL):
            options["parallel_config"] = self._parallel_config
        attend = partial(dispatch_attention_fn, q, **options)
        out = attend(k, _heads(attn, v), attn_mask=attention_mask).flatten(2).type_as(q)
        if image is not None:
            k, v = _get_added_kv_projections(attn, image)
            k = self._norm(attn, k, attn.norm_added_k)
            out = out + attend(k, _heads(attn, v), attn_mask=None).flatten(2).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))

    def _norm(self, attn: WanAttention, x: Tensor, norm: Any) -> Tensor:
        """``[B, S, N]`` -> ``[B, S, H, D]``."""
        return _heads(attn, rms_norm(x, norm.weight, eps=norm.eps, rounding=self.rounding))

    def _norm_and_rotate(
        self, attn: WanAttention, q: Tensor, k: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``[B, S, N]`` -> ``[B, S, H, D]``."""
        tables, rows_T4 = _rotations(rotary_emb)
        q_THD, k_THD = (_heads(attn, x).flatten(0, 1) for x in (q, k))
        if len(rows_T4) != len(q_THD):  # a row for each place, the same in all samples
            rows_T4 = rows_T4.repeat(len(q_THD) // len(rows_T4), 1)
        weights = {"q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight}
        q_THD, k_THD = qk_rope(q_THD, k_THD, tables, rows_T4, **weights, eps=attn.norm_q.eps, rounding=self.rounding)
        return q_THD.unflatten(0, q.shape[:2]), k_THD.unflatten(0, k.shape[:2])


def gated_sum(x_TN: Tensor, branch_TN: Tensor, gate_RN: Tensor, rounding: str) -> Tensor:
    """``x + gate * branch`` with no norm behind it, rounded as :func:`bernini.kernels.modulate` rounds its residual.

    Each row of the gate serves T / R tokens, in order.
    """
    x, branch = (t.unflatten(0, (len(gate_RN), -1)) for t in (x_TN, branch_TN))
    gate = gate_RN.unsqueeze(1)
    # addcmul computes in the widest dtype of the three, the gate's float32, and widens the others as it reads them.
    total = _wide(x) + _wide(branch) * gate if rounding == "eager" else torch.addcmul(x, branch, gate)
    return total.to(x_TN.dtype).view(x_TN.shape)


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _heads(attn: WanAttention, x: Tensor) -> Tensor:
    """``[B, S, N]`` -> ``[B, S, H, D]``, a view whatever the strides."""
    return x.unflatten(2, (attn.heads, -1))


def _affine(norm: Any) -> dict[str, Any]:
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}


def _branch(x: Tensor, residual_TN: Tensor) -> Tensor:
    """``[B, S, N]`` -> ``[T, N]`` in the dtype of the residual (an adapter may have left another)."""
    return x.flatten(0, 1).to(residual_TN.dtype)


def _rows(count: int, x_TN: Tensor) -> Tensor | None:
    """Row of each token when ``count`` rows serve T / count tokens each, in order; a single row needs no index."""
    if count == 1:
        return None
    rows = torch.arange(count, dtype=torch.int32, device=x_TN.device)
    return rows.unsqueeze(1).expand(-1, len(x_TN) // count).flatten()


# What `_rotations` made of the cosines of a running forward: its first block makes it, and it goes when they go.
_MADE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _rotations(rotary_emb: tuple[Tensor, Tensor]) -> tuple[list[Tensor], Tensor]:
    """(cos, sin) of diffusers, each ``[1, S, 1, D]`` with every value twice -> the tables and rows of ``qk_rope``.

    A token's rotation is its row of the segment table; the other three tables hold the identity. So the numbers are
    the model's own: a replaced or rescaled rope is honoured, and so is a rank's share of a long sequence.
    """
    cos, sin = rotary_emb
    if torch.compiler.is_compiling():  # a compiler shares what blocks have in common, and a graph must keep nothing
        return _make_rotations(cos, sin)
    if cos not in _MADE:
        _MADE[cos] = _make_rotations(cos, sin)
    return _MADE[cos]


def _make_rotations(cos: Tensor, sin: Tensor) -> tuple[list[Tensor], Tensor]:
    """Tables ``[1, pairs, 2]`` for t, h and w and ``[S, D/2, 2]`` for the segment; rows ``[S, 4]``."""
    segment = _wide(torch.stack((cos[..., 0::2], sin[..., 1::2]), dim=-1).flatten(0, 2))
    identity = F.pad(torch.ones_like(segment[:1, :, :1]), (0, 1))  # cos 1, sin 0
    axes = identity.split([dim // 2 for dim in axis_dims(cos.shape[-1])], dim=1)
    rows_S4 = F.pad(torch.arange(len(segment), dtype=torch.int32, device=cos.device).unsqueeze(1), (3, 0))
    return [*axes, segment], rows_S4
