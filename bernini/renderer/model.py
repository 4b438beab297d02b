"""The renderer: a Wan2.1/2.2 diffusion transformer over one packed sequence of segments (paper fig. 3 C).

Sources and target are tokens of the same sequence; SA-3D RoPE tells them apart, and all tokens of a sample share the
target's timestep. Module names are those of diffusers' ``WanTransformer3DModel``, so its state dicts load unchanged.

Shapes: T tokens, N width, H heads, D head_dim, B samples, L text tokens, C text width, P values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bernini.kernels import SegmentLayout, attention, gather_rows, modulate, qk_rope, rms_norm

from .config import RendererConfig

if TYPE_CHECKING:
    from bernini.parallel.plan import LocalLayout

    Layout = SegmentLayout | LocalLayout

KEEP_IN_FP32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
"""Parts whose weights stay float32 when the rest is loaded in bfloat16 (as the released Bernini-R pipeline does)."""


class Stream(NamedTuple):
    """The residual stream between two modulations: ``residual + gate * branch``, not yet added up.

    The sum is left to the next :func:`bernini.kernels.modulate`, which needs it anyway.
    """

    residual: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None


class QKNorm(NamedTuple):
    """Of q and k, across heads."""

    q: Tensor
    k: Tensor
    eps: float


class QKV(NamedTuple):
    """The projections of a layer's input ``[T, N]`` to its queries, keys and values, ``[T, H, D]`` each."""

    q: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]


class SelfAttend(Protocol):
    """Projection, norm, rotation and attention of a layer's input, ``[T, N]`` -> ``[T, H, D]``. Where a sequence is
    shared by several processes they have another one of these (``bernini.parallel.ulysses.Ulysses``), and what is
    projected leaves while the rest still is; the model does not know."""

    def __call__(
        self, x_TN: Tensor, to: QKV, layout: Layout, norm: QKNorm, rounding: str, backend: str, /
    ) -> Tensor: ...


def attend_here(x_TN: Tensor, to: QKV, layout: Layout, norm: QKNorm, rounding: str, backend: str) -> Tensor:
    """All tokens are here."""
    q_THD, k_THD, v_THD = (project(x_TN) for project in to)
    here = layout.on(q_THD.device)
    q_THD, k_THD = qk_rope(
        q_THD, k_THD, here.tables(q_THD.shape[-1]), here.rows, q_weight=norm.q, k_weight=norm.k, eps=norm.eps,
        rounding=rounding,
    )  # fmt: skip
    borders = layout.cu_seqlens
    return attention(q_THD, k_THD, v_THD, cu_seqlens_q=borders, cu_seqlens_k=borders, backend=backend)


class How(NamedTuple):
    """How a forward is computed: contract of the fused kernels, attention backend, and who attends."""

    rounding: str
    backend: str
    attend: SelfAttend = attend_here


@dataclass(frozen=True)
class TextContext:
    """Keys and values of the text for every block's cross-attention: computed once per prompt, not once per step."""

    keys: list[Tensor]
    """``[L, H, D]`` per block."""
    values: list[Tensor]
    """``[L, H, D]`` per block."""
    cu_seqlens: tuple[int, ...]
    """B+1 borders of the samples' texts."""


class SelfAttention(nn.Module):
    """Full bidirectional attention of a sample's tokens, sources and target alike, under SA-3D RoPE."""

    def __init__(self, config: RendererConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.eps = config.num_attention_heads, config.eps
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = Scale(width), Scale(width)

    def forward(self, x_TN: Tensor, layout: Layout, how: How) -> Tensor:
        to = QKV(*(partial(self._heads, project) for project in (self.to_q, self.to_k, self.to_v)))
        norm = QKNorm(self.norm_q.weight, self.norm_k.weight, self.eps)
        out_THD = how.attend(x_TN, to, layout, norm, how.rounding, how.backend)
        return self.to_out[0](out_THD.flatten(1))

    def _heads(self, project: nn.Module, x_TN: Tensor) -> Tensor:
        return project(x_TN).unflatten(1, (self.heads, -1))


class CrossAttention(nn.Module):
    """Attention of every token to its sample's text. Zero pads of the text are attended to, as in training."""

    def __init__(self, config: RendererConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.eps = config.num_attention_heads, config.eps
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = Scale(width), Scale(width)

    def keys_and_values(self, text_LN: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
        k_LN = rms_norm(self.to_k(text_LN), self.norm_k.weight, eps=self.eps, rounding=rounding)
        return k_LN.unflatten(1, (self.heads, -1)), self.to_v(text_LN).unflatten(1, (self.heads, -1))

    def forward(
        self, x_TN: Tensor, k_LHD: Tensor, v_LHD: Tensor, layout: Layout, cu_seqlens: tuple[int, ...], how: How
    ) -> Tensor:
        q_TN = rms_norm(self.to_q(x_TN), self.norm_q.weight, eps=self.eps, rounding=how.rounding)
        q_THD = q_TN.unflatten(1, (self.heads, -1))
        out_THD = attention(
            q_THD, k_LHD, v_LHD, cu_seqlens_q=layout.cu_seqlens, cu_seqlens_k=cu_seqlens, backend=how.backend
        )
        return self.to_out[0](out_THD.flatten(1))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # The odd nesting gives the checkpoint's names: net.0.proj and net.2.
        self.net = nn.ModuleDict(
            {"0": nn.ModuleDict({"proj": nn.Linear(width, hidden)}), "2": nn.Linear(hidden, width)}
        )

    def forward(self, x_TN: Tensor) -> Tensor:
        return self.net["2"](F.gelu(self.net["0"]["proj"](x_TN), approximate="tanh"))  # type: ignore[index]


class Scale(nn.Module):
    """The weight of a norm; the norm itself is computed by the kernel that uses it."""

    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; each branch joins the residual in the next fused modulation."""

    def __init__(self, config: RendererConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = Scale(config.width, bias=True)
        self.ffn = FeedForward(config.width, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, config.width) / config.width**0.5)

    def forward(
        self, stream: Stream, time_B6N: Tensor, k_LHD: Tensor, v_LHD: Tensor, layout: Layout,
        cu_seqlens: tuple[int, ...], how: How,
    ) -> Stream:  # fmt: skip
        shift1, scale1, gate1, shift3, scale3, gate3 = (self.scale_shift_table + time_B6N).unbind(1)
        rows = timestep_rows(layout, stream.residual)
        join = partial(modulate, index_T=rows, eps=self.eps, rounding=how.rounding)
        x, normed = join(stream.residual, stream.branch, gate=stream.gate, scale=scale1, shift=shift1)
        branch = self.attn1(normed, layout, how)
        x, normed = join(x, branch, gate=gate1, weight=self.norm2.weight, bias=self.norm2.bias)
        branch = self.attn2(normed, k_LHD, v_LHD, layout, cu_seqlens, how)
        x, normed = join(x, branch, scale=scale3, shift=shift3)
        return Stream(x, self.ffn(normed), gate3)


class TwoLayers(nn.Module):
    """Linear, activation, linear, under the checkpoint's names."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, width), nn.Linear(width, width)


class ConditionEmbedder(nn.Module):
    """Timestep -> modulation, text states -> model width."""

    def __init__(self, config: RendererConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLayers(config.freq_dim, config.width)
        self.time_proj = nn.Linear(config.width, 6 * config.width)
        self.text_embedder = TwoLayers(config.text_dim, config.width)

    def time(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """``[B]`` in 0..1000, fractions allowed -> embedding ``[B, N]`` and its six modulations ``[B, 6, N]``.

        The modulations come back in float32 (float64 in a float64 model): they are added to float32 tables.
        """
        layers = self.time_embedder
        phases = sinusoid(timestep_B, self.freq_dim).to(layers.linear_1.weight.dtype)
        embedding = layers.linear_2(F.silu(layers.linear_1(phases))).to(self.time_proj.weight.dtype)
        modulation = self.time_proj(F.silu(embedding)).unflatten(1, (6, -1))
        return embedding, modulation.to(torch.promote_types(modulation.dtype, torch.float32))

    def text(self, text_LC: Tensor) -> Tensor:
        layers = self.text_embedder
        return layers.linear_2(F.gelu(layers.linear_1(text_LC), approximate="tanh"))


class Renderer(nn.Module):
    """The whole transformer: ``velocity = renderer(tokens, layout, timestep, context)``.

    Args:
        config: dimensions.
        rounding: contract of the fused kernels, ``"fp32"`` or ``"eager"`` (see ``bernini/kernels/README.md``).
        backend: attention backend, ``"auto"`` or a name of ``bernini.kernels.attention``'s table.
    """

    def __init__(self, config: RendererConfig, *, rounding: str = "fp32", backend: str = "auto") -> None:
        super().__init__()
        self.config, self.rounding, self.backend = config, rounding, backend
        self.patch_embedding = nn.Conv3d(config.in_channels, config.width, config.patch_size, config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(config.width, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.width) / config.width**0.5)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: that of the parts which are not kept in float32."""
        return self.proj_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.proj_out.weight.device

    def text_context(self, text_LC: Tensor, cu_seqlens: tuple[int, ...] | None = None) -> TextContext:
        """Text states ``[L, C]`` (all samples in a row, borders in ``cu_seqlens``) -> keys and values per block."""
        borders = (0, text_LC.shape[0]) if cu_seqlens is None else cu_seqlens
        text_LN = self.condition_embedder.text(text_LC.to(self.dtype))
        pairs = [block.attn2.keys_and_values(text_LN, self.rounding) for block in cast("Iterable[Block]", self.blocks)]
        return TextContext([k for k, _ in pairs], [v for _, v in pairs], borders)

    def forward(
        self,
        tokens_TP: Tensor,
        layout: Layout,
        timestep_B: Tensor,
        context: TextContext,
        *,
        targets_only: bool = True,
        attend: SelfAttend = attend_here,
    ) -> Tensor:
        """Velocity of every target token (of every token with ``targets_only=False``), ``[T', P]``.

        Args:
            tokens_TP: latent patches in layout order (see :func:`bernini.renderer.latents.patchify`).
            layout: the segments of the packed sequence, or this process's part of it.
            timestep_B: one per sample, in 0..1000.
            context: from :meth:`text_context`.
            attend: who attends; see :class:`SelfAttend`.

        Raises:
            ValueError: sizes that do not fit the layout or the model.
        """
        self._check(tokens_TP, layout, timestep_B, context)
        embedding, time_B6N = self.condition_embedder.time(timestep_B)
        stream, how = Stream(self._embed_patches(tokens_TP)), How(self.rounding, self.backend, attend)
        for block, k_LHD, v_LHD in zip(self.blocks, context.keys, context.values, strict=True):
            stream = block(stream, time_B6N, k_LHD, v_LHD, layout, context.cu_seqlens, how)
        rows = timestep_rows(layout, tokens_TP)
        if targets_only and len(layout.target_index) < layout.tokens:
            index = layout.on(tokens_TP.device).target_index
            branch = None if stream.branch is None else gather_rows(stream.branch, index)
            stream = Stream(gather_rows(stream.residual, index), branch, stream.gate)
            rows = None if rows is None else rows[index]
        shift, scale = (self.scale_shift_table + embedding.to(time_B6N.dtype).unsqueeze(1)).unbind(1)
        _, normed = modulate(
            stream.residual, stream.branch, gate=stream.gate, scale=scale, shift=shift, index_T=rows,
            eps=self.config.eps, rounding=self.rounding,
        )  # fmt: skip
        return self.proj_out(normed)

    def _embed_patches(self, tokens_TP: Tensor) -> Tensor:
        """The patch convolution as a matrix product; its weight is ordered channel first, tokens channel last."""
        weight = self.patch_embedding.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(tokens_TP.to(self.dtype), weight, self.patch_embedding.bias)

    def _check(self, tokens_TP: Tensor, layout: Layout, timestep_B: Tensor, context: TextContext) -> None:
        values = self.config.patch_values
        if tuple(tokens_TP.shape) != (layout.tokens, values):
            raise ValueError(f"renderer: tokens must be [{layout.tokens}, {values}], got {list(tokens_TP.shape)}")
        if tuple(timestep_B.shape) != (layout.num_samples,):
            raise ValueError(f"renderer: timestep must be [{layout.num_samples}], got {list(timestep_B.shape)}")
        if len(context.cu_seqlens) != layout.num_samples + 1:
            raise ValueError(f"renderer: {len(context.cu_seqlens) - 1} texts for {layout.num_samples} samples")
        longest = max(layout.grid_sizes)
        if longest > self.config.rope_max_seq_len:
            raise ValueError(
                f"renderer: a segment is {longest} tokens long; the limit is {self.config.rope_max_seq_len}"
            )


def timestep_rows(layout: Layout, like: Tensor) -> Tensor | None:
    """Row of each token in the per-sample tables; ``None`` for one sample, where a single row serves all tokens."""
    return None if layout.num_samples == 1 else layout.on(like.device).timestep_rows


def sinusoid(timestep_B: Tensor, dim: int, period: float = 10000.0) -> Tensor:
    """``[B]`` -> ``[B, dim]``: cosines first, then sines, of ``t * period^(-k / (dim/2))`` (Ho et al. 2020)."""
    half = dim // 2
    # Float64 models get float64 phases; everything else float32, as released.
    wide = torch.float64 if timestep_B.dtype == torch.float64 else torch.float32
    ladder = torch.exp(-math.log(period) * torch.arange(half, dtype=wide, device=timestep_B.device) / half)
    angles = timestep_B.to(wide)[:, None] * ladder
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
