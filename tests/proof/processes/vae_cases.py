"""Small VAEs of Wan's form, what diffusers makes of them, and what ranks that are threads do."""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bernini.parallel.group import Group
from bernini.parallel.simulated import simulate
from bernini.parallel.vae import Part, TemporalVAE, gathered

SIDE = 4
"""Of a latent."""


@dataclass(frozen=True)
class Case:
    """A VAE and a video.

    Args:
        most: latent frames of a rank at a time.
    """

    seed: int
    latents: int
    ranks: int
    most: int = 3
    dtype: torch.dtype = torch.float32

    @cached_property
    def model(self) -> Any:
        from diffusers import AutoencoderKLWan

        draw = random.Random(self.seed)
        temporal = draw.choice([[True, True], [False, True, True], [True, False, True], [False, True], [False], [True]])
        mult = [draw.choice([1, 2]) for _ in range(len(temporal) + 1)]
        channels = draw.choice([2, 4])
        torch.manual_seed(self.seed)
        model = AutoencoderKLWan(
            base_dim=8, z_dim=channels, dim_mult=mult, num_res_blocks=draw.choice([1, 1, 2]), attn_scales=[],
            temperal_downsample=temporal, latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
            scale_factor_temporal=2 ** sum(temporal), scale_factor_spatial=2 ** len(temporal),
        )  # fmt: skip
        if draw.random() < 0.3:
            self._attention(model, draw.choice([1.0, 0.5]), draw)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.1)
        return torch.nn.Module.to(model, self.dtype).eval()

    @staticmethod
    def _attention(model: Any, scale: float, draw: random.Random) -> None:
        """Attention in the encoder at a scale. diffusers hands its blocks a cache that they do not take, and fails;
        here they take it.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample

        blocks, now = list(model.encoder.down_blocks), 1.0
        found = []
        for block in blocks:
            found.append(block)
            if isinstance(block, WanResample):
                now /= 2
            elif now == scale:
                found.append(WanAttentionBlock(block.out_dim))

                def forward(self: Any, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
                    return WanAttentionBlock.forward(self, x)

                found[-1].forward = types.MethodType(forward, found[-1])
        model.encoder.down_blocks = torch.nn.ModuleList(found)

    @property
    def frames(self) -> int:
        """Of the video: diffusers works on four at a time, whatever becomes of them."""
        return 1 + (self.latents - 1) * 2 ** sum(self.model.config.temperal_downsample) // 4 * 4

    @cached_property
    def pixels(self) -> Tensor:
        side = SIDE * 2 ** len(self.model.config.temperal_downsample)
        draw = torch.Generator().manual_seed(self.seed)
        return (torch.rand((1, 3, self.frames, side, side), generator=draw) * 2 - 1).to(self.dtype)

    @cached_property
    def latent(self) -> Tensor:
        shape = (1, self.model.config.z_dim, self.latents, SIDE, SIDE)
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + 1)).to(self.dtype)

    # --- diffusers ----------------------------------------------------------------------------------------------------

    def encoded(self, pixels: Tensor) -> Tensor:
        return self.model._encode(pixels)

    def decoded(self, latent: Tensor) -> Tensor:
        """Not clamped, so that all gradients can be compared."""
        model, parts = self.model, []
        model.clear_cache()
        states = model.post_quant_conv(latent)
        for number in range(latent.shape[2]):
            model._conv_idx = [0]
            first = {"first_chunk": True} if number == 0 else {}
            own = states[:, :, number : number + 1]
            parts.append(model.decoder(own, feat_cache=model._feat_map, feat_idx=model._conv_idx, **first))
        model.clear_cache()
        return torch.cat(parts, 2)

    # --- ours ---------------------------------------------------------------------------------------------------------

    def vae(self, group: Group | None = None, exact: bool = True) -> TemporalVAE:
        return TemporalVAE(self.model, group, exact=exact, most=self.most)

    def encode(self, vae: TemporalVAE, pixels: Tensor) -> list[Part]:
        return list(vae.encode(lambda start, stop: pixels[:, :, start:stop], pixels.shape[2]))

    @torch.no_grad()
    def both(self, exact: bool = True) -> tuple[Tensor, Tensor]:
        """(encoded, decoded) by all ranks together."""

        @torch.no_grad()
        def work(group: Group) -> list[Tensor]:
            vae = self.vae(group, exact)
            every = (self.encode(vae, self.pixels), list(vae.decode(self.latent)))
            return [torch.cat([gathered(group, part) for part in parts], 2) for parts in every]

        found = simulate(self.ranks, work)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), "all ranks get the same"
        return found[0][0], found[0][1]

    def weights(self, job: str) -> list[Tensor]:
        modules = ("encoder", "quant_conv") if job == "encode" else ("decoder", "post_quant_conv")
        return [weight for name in modules for weight in getattr(self.model, name).parameters()]

    def gradients(self, job: str, ranks: bool) -> list[Tensor]:
        """Of the input and the weights, by diffusers or by all ranks together (summed in their order)."""
        given, weights = self.pixels if job == "encode" else self.latent, self.weights(job)
        with torch.no_grad():
            like = self.encoded(given) if job == "encode" else self.decoded(given)
        dout = torch.randn(like.shape, generator=torch.Generator().manual_seed(9)).to(self.dtype)

        def back(out: Tensor, x: Tensor, dout: Tensor) -> list[Tensor]:
            grads = torch.autograd.grad(out, [x, *weights], dout, allow_unused=True)
            pairs = zip(grads, [x, *weights], strict=True)
            return [torch.zeros_like(to) if grad is None else grad for grad, to in pairs]

        def work(group: Group) -> list[Tensor]:
            x = given.clone().requires_grad_()
            vae = self.vae(group)
            (part,) = self.encode(vae, x) if job == "encode" else vae.decode(x)
            return back(part.own, x, dout[:, :, part.cut[group.rank] : part.cut[group.rank + 1]])

        if ranks:
            return [sum(parts[1:], parts[0]) for parts in zip(*simulate(self.ranks, work), strict=True)]
        x = given.clone().requires_grad_()
        return back(self.encoded(x) if job == "encode" else self.decoded(x), x, dout)


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of any two, of the largest value of each."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs)


def random_cases(count: int, seed: int = 0, **options: Any) -> list[Case]:
    """1 to 33 latent frames, 1 to 8 ranks."""
    draw = random.Random(seed)
    return [
        Case(draw.randrange(10_000), draw.choice([*range(1, 10), *range(1, 34)]), draw.randint(1, 8), **{
            "most": draw.randint(1, 4), **options
        })
        for _ in range(count)
    ]  # fmt: skip


@contextmanager
def steady_convolutions() -> Iterator[None]:
    """Convolutions whose results do not depend on how many frames there are: in float64, rounded once.

    torch's own take other ways for other sizes, and then add up in another order.
    """
    taken = F.conv2d, F.conv3d

    def steady(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
            return convolve(x.double(), weight.double(), None if bias is None else bias.double(), *options).to(x.dtype)

        return run

    F.conv2d, F.conv3d = (steady(convolve) for convolve in taken)
    try:
        yield
    finally:
        F.conv2d, F.conv3d = taken
