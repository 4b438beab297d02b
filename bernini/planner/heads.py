"""What the planner adds to Qwen2.5-VL: the connector's two heads and the decoder of ViT embeddings.

Source: facts of the released model, sections A.4 and E.7. Shapes: T tokens, N hidden size of the language model, C text
width of the renderer, V width of a ViT embedding (equal to N), W width of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bernini.kernels import modulate, rms_norm

TABLES = 1 << 26
"""Numbers that the decoder's sampler holds at once for shift, scale and gate: 128 MB in bfloat16."""


class Norm(nn.Module):
    """RMSNorm in float32, weight included, rounded once."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class Connector(nn.Module):
    """``for_gen``: hidden states -> the renderer's text width. ``for_vit``: hidden states -> conditions of the decoder.

    The last layer of ``for_gen`` starts at zero in training, so that a renderer without a planner is where it begins.
    """

    def __init__(self, hidden: int, gen_dim: int, vit_dim: int) -> None:
        super().__init__()
        self.proj_gen = nn.Sequential(nn.Linear(hidden, gen_dim), nn.GELU(), Norm(gen_dim), nn.Linear(gen_dim, gen_dim))
        self.pred_vit = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden), Norm(hidden), nn.Linear(hidden, vit_dim)
        )

    def for_gen(self, hidden_TN: Tensor) -> Tensor:
        """``[T, N]`` -> ``[T, C]``."""
        return self.proj_gen(hidden_TN)

    def for_vit(self, hidden_TN: Tensor) -> Tensor:
        """``[T, N]`` -> ``[T, V]``."""
        return self.pred_vit(hidden_TN)


@dataclass(frozen=True)
class DecoderConfig:
    """Of the ViT-embedding decoder. ``channels`` is the width of an embedding and of a condition."""

    channels: int
    width: int
    depth: int = 16
    shift: float = 2.0
    frequencies: int = 256


class DecoderBlock(nn.Module):
    """``x + gate * MLP(LN(x) * (1 + scale) + shift)``; shift, scale and gate from the time and the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x_TW: Tensor, table_T3W: Tensor, rows_T: Tensor) -> Tensor:
        """``table_T3W``: what ``adaLN_modulation`` makes of the time and the condition."""
        shift, scale, gate = table_T3W.chunk(3, dim=-1)
        _, normed = modulate(
            x_TW, scale=scale, shift=shift, index_T=rows_T, weight=self.in_ln.weight, bias=self.in_ln.bias
        )
        return torch.addcmul(x_TW, gate, self.mlp(normed))


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_TW: Tensor, table_T2W: Tensor, rows_T: Tensor) -> Tensor:
        shift, scale = table_T2W.chunk(2, dim=-1)
        return self.linear(modulate(x_TW, scale=scale, shift=shift, index_T=rows_T)[1])


class TimeEmbedding(nn.Module):
    def __init__(self, frequencies: int, width: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time_T: Tensor) -> Tensor:
        """Times in 0..1000, one per token or one for all."""
        return self.mlp(sinusoid(time_T, self.frequencies).to(next(self.mlp.parameters()).dtype))


def sinusoid(time_T: Tensor, dim: int, period: float = 10000.0) -> Tensor:
    """``[T, dim]``: cosines, then sines, of ``t * period^(-k / (dim / 2))``, in float32."""
    half = dim // 2
    ladder = torch.exp(-math.log(period) * torch.arange(half, dtype=torch.float32, device=time_T.device) / half)
    angles = time_T.reshape(-1, 1).float() * ladder
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DecoderNet(nn.Module):
    """Velocity of noisy ViT embeddings, token by token: no token sees another."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.width
        self.time_embed = TimeEmbedding(config.frequencies, width)
        self.cond_embed = nn.Linear(config.channels, width)
        self.input_proj = nn.Linear(config.channels, width)
        self.res_blocks = nn.ModuleList(DecoderBlock(width) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.channels)

    def forward(self, x_TV: Tensor, time: Tensor, condition_TV: Tensor) -> Tensor:
        """
        Args:
            x_TV: noisy embeddings.
            time: ``sigma * 1000``, one for all tokens or ``[T]``.
            condition_TV: from :meth:`Connector.for_vit`.
        """
        return self.velocity(self.input_proj(x_TV), self.tables(self.time_embed(time) + self.cond_embed(condition_TV)))

    def tables(self, y: Tensor) -> list[Tensor]:
        """Shift, scale (and gate) of every layer from time and condition ``[..., W]``, which the tokens' values do not
        enter."""
        active = F.silu(y)
        return [layer.adaLN_modulation[1](active) for layer in (*self.res_blocks, self.final_layer)]

    def velocity(self, x_TW: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """``[T, V]`` from the projected values and a table per layer."""
        rows_T = torch.arange(len(x_TW), device=x_TW.device)
        for block, table in zip(self.res_blocks, tables, strict=False):
            x_TW = block(x_TW, table, rows_T)
        return self.final_layer(x_TW, tables[-1], rows_T)


class VitDecoder(nn.Module):
    """The flow-matching sampler around :class:`DecoderNet`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.net = DecoderNet(config)

    def forward(self, noisy_KTV: Tensor, times_KT: Tensor, condition_TV: Tensor) -> Tensor:
        """Velocities ``[K, T, V]`` of K noisy copies of each token, which share its condition: for training."""
        copies = noisy_KTV.shape[0]
        time_KTW = self.net.time_embed(times_KT.flatten()).unflatten(0, (copies, -1))
        tables = self.net.tables((time_KTW + self.net.cond_embed(condition_TV)).flatten(0, 1))
        projected = self.net.input_proj(noisy_KTV.to(condition_TV.dtype)).flatten(0, 1)
        return self.net.velocity(projected, tables).unflatten(0, (copies, -1))

    @torch.no_grad()
    def sample(
        self, noise_TV: Tensor, conditions: list[tuple[float, Tensor]], steps: int, *, parity: bool = False
    ) -> Tensor:
        """Clean embeddings from noise, in ``steps`` Euler steps.

        Args:
            noise_TV: float32 normal noise, the same for all branches.
            conditions: (weight, ``[T, V]``) of every guidance branch; the velocity is their weighted sum.
            parity: noise levels in bfloat16, as the released sampler has them.
        """
        x_TV = noise_TV.to(self.net.input_proj.weight.dtype)
        weights = [weight for weight, _ in conditions]
        stacked_BTV = torch.stack([condition for _, condition in conditions])
        sigmas, times = decoder_levels(steps, self.config.shift, parity=parity)
        time_SW = self.net.time_embed(torch.tensor(times, device=x_TV.device))
        # Tokens do not see each other: as many at a time as the tables of all steps and branches may have room for.
        room = TABLES // (len(times) * len(weights) * (3 * len(self.net.res_blocks) + 2) * time_SW.shape[1])
        pieces = zip(x_TV.split(max(1, room)), stacked_BTV.split(max(1, room), dim=1), strict=True)
        return torch.cat([self._sample(x, c, weights, time_SW, sigmas) for x, c in pieces])

    def _sample(
        self, x_TV: Tensor, conditions_BTV: Tensor, weights: list[float], time_SW: Tensor, sigmas: list[float]
    ) -> Tensor:
        """A part of the tokens. Most of the weights make the tables: they are read once, and not at every step."""
        tables = self.net.tables(time_SW[:, None] + self.net.cond_embed(conditions_BTV).flatten(0, 1))
        for number in range(len(time_SW)):
            projected = self.net.input_proj(x_TV).repeat(len(weights), 1)
            velocity = self.net.velocity(projected, [table[number] for table in tables])
            guided = sum(w * v for w, v in zip(weights, velocity.chunk(len(weights)), strict=True))
            x_TV = x_TV + (sigmas[number + 1] - sigmas[number]) * guided
        return x_TV


def decoder_levels(steps: int, shift: float, *, parity: bool) -> tuple[list[float], list[float]]:
    """(``steps + 1`` sigmas ending in 0, ``steps`` times): ``shift s / (1 + (shift - 1) s)`` over even steps from 1 to
    ``0.003 / 1.002``, that last one left out."""
    dtype = torch.bfloat16 if parity else torch.float64
    levels = torch.linspace(1.0, 0.003 / 1.002, steps + 1, dtype=dtype)[:-1]
    levels = shift * levels / (1 + (shift - 1) * levels)
    return [*levels.tolist(), 0.0], (levels * 1000).tolist()


def zero_init(connector: Connector) -> None:
    """Makes the planner silent to begin with: its projected states are zero."""
    for parameter in connector.proj_gen[3].parameters():
        nn.init.zeros_(parameter)
