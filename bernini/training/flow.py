"""Flow matching of the renderer: from clean latents to one loss per sample, many samples in one packed sequence.

    target latent, noise, sigma -> noisy target --+
    clean source latents -------------------------+-> packed tokens -> renderer -> velocity <-> noise - clean

Sources stay clean and share the target's timestep; only target tokens have a loss. It is a mean over the values of a
token, then over the target tokens of a sample: a long video weighs as much as an image. The mean over samples is left
to the caller, who may have spread them over several packs.

Source: facts of the released model, section F. Shapes: C channels, T H W of a latent, B samples, P values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout, segment_phases
from bernini.parallel.packer import Box, Packer, Producer, from_boxes
from bernini.parallel.plan import SPPlan, clipped
from bernini.parallel.share import ALONE, Share
from bernini.parallel.ulysses import Ulysses
from bernini.renderer.latents import patch_grid, patchify
from bernini.renderer.model import Renderer

LOGVAR_LIMITS = (-30.0, 20.0)
"""What diffusers clamps the posterior's log variance to."""


def sample_latent(
    mean_CTHW: Tensor,
    logvar_CTHW: Tensor,
    generator: torch.Generator,
    latents_mean: Sequence[float],
    latents_std: Sequence[float],
) -> Tensor:
    """A normalised latent ``[C, T, H, W]`` from a stored posterior: training samples it, sampling takes its mode.

    Args:
        generator: on the CPU.
        latents_mean, latents_std: per channel, from the autoencoder's config.
    """
    noise = torch.randn(mean_CTHW.shape, generator=generator, dtype=mean_CTHW.dtype).to(mean_CTHW.device)
    latent = mean_CTHW + (0.5 * logvar_CTHW.clamp(*LOGVAR_LIMITS)).exp() * noise
    mean, std = (latent.new_tensor(values).view(-1, 1, 1, 1) for values in (latents_mean, latents_std))
    return (latent - mean) / std


def mix(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """``(1 - sigma) clean + sigma noise``, in ``clean``'s dtype.

    ``1 - sigma`` is taken in sigma's own dtype: with a bfloat16 sigma it is rounded as in the release.
    """
    kept = 1 - sigma
    if isinstance(kept, Tensor):
        kept = kept.to(clean)
    if isinstance(sigma, Tensor):
        sigma = sigma.to(clean)
    return kept * clean + sigma * noise


@dataclass(frozen=True)
class RendererSample:
    """One task for the renderer.

    Args:
        sources: clean normalised latents ``[C, T, H, W]``, videos before images.
        target: ``[C, T, H, W]``.
        context: ``[L, text_dim]``, at least one row; pads are part of it.
        sigma, timestep: see :meth:`bernini.training.noise.Timesteps.draw`; a tensor has one value.
        noise: like ``target``.
        phases: segment ids of the sources; ``None`` numbers them as sampling does (1..n, squeezed beyond five, where
            the released training would count on).
    """

    sources: tuple[Tensor, ...]
    target: Tensor
    context: Tensor
    sigma: float | Tensor
    timestep: float | Tensor
    noise: Tensor
    phases: tuple[float, ...] | None = None


@dataclass(frozen=True)
class RendererBatch:
    """Samples in a row. Where ranks share it, tokens and velocity are of this rank's rows.

    Args:
        tokens: ``[tokens, P]`` in layout order, the targets noisy.
        layout: of each sample the sources, then the target; always the whole.
        timestep: ``[B]``.
        context: ``[L, text_dim]``, one sample's behind the other's.
        context_borders: B+1.
        velocity: ``[target tokens, P]``, what the renderer is to answer.
    """

    tokens: Tensor
    layout: SegmentLayout
    timestep: Tensor
    context: Tensor
    context_borders: tuple[int, ...]
    velocity: Tensor

    @property
    def target_tokens(self) -> tuple[int, ...]:
        """Of each sample."""
        counts = [0] * self.layout.num_samples
        for segment in self.layout.segments:
            counts[segment.sample] += segment.tokens if segment.kind == "target" else 0
        return tuple(counts)

    def to(self, device: torch.device | str) -> RendererBatch:
        return replace(
            self,
            **{name: getattr(self, name).to(device) for name in ("tokens", "timestep", "context", "velocity")},
        )


def pack_renderer(
    samples: Sequence[RendererSample], patch_size: tuple[int, int, int], share: Share = ALONE
) -> RendererBatch:
    """Mixes the targets with their noise and puts the samples in a row.

    Args:
        share: ranks that have the same samples. Where they cut the row, each makes the patches of its own part.

    Raises:
        ValueError: no samples, or one whose parts do not fit each other or the patch size.
    """
    if not samples:
        raise ValueError("pack_renderer: needs at least one sample")
    segments: list[Segment] = []
    sources, noisy, answers = list[Producer](), list[Producer](), list[Producer]()
    borders = [0]

    def patches(of: Callable[[Box], Tensor], grid: tuple[int, int, int]) -> Producer:
        return from_boxes(grid, lambda box: patchify(of(box), patch_size))

    for number, sample in enumerate(samples):
        _check(number, sample)
        phases = segment_phases(len(sample.sources)) if sample.phases is None else sample.phases
        for source, phase in zip(sample.sources, phases, strict=True):
            grid = patch_grid(tuple(source.shape), patch_size)
            segments.append(Segment("source", grid, phase, number))
            sources.append(patches(partial(_cropped, patch_size, source), grid))
        grid = patch_grid(tuple(sample.target.shape), patch_size)
        segments.append(Segment("target", grid, sample=number))
        noisy.append(patches(partial(_noisy, patch_size, sample), grid))
        answers.append(patches(partial(_answer, patch_size, sample), grid))
        borders.append(borders[-1] + len(sample.context))
    layout, target = SegmentLayout(segments), samples[0].target
    packer = Packer(layout, share.rows(layout.tokens))
    values, dtype, device = target.shape[0] * math.prod(patch_size), target.dtype, target.device
    tokens = packer.pack({"source": sources, "target": noisy}, values, dtype=dtype, device=device)
    velocity = packer.take("target", answers, values, dtype=dtype, device=device)
    wide = torch.promote_types(target.dtype, torch.float32)
    times = torch.tensor([float(sample.timestep) for sample in samples], dtype=wide, device=target.device)
    context = torch.cat([sample.context for sample in samples])
    return RendererBatch(tokens, layout, times, context, tuple(borders), velocity)


def _cropped(patch_size: tuple[int, int, int], latent: Tensor, box: Box) -> Tensor:
    return box.crop(latent, patch_size)


def _noisy(patch_size: tuple[int, int, int], sample: RendererSample, box: Box) -> Tensor:
    return mix(box.crop(sample.target, patch_size), box.crop(sample.noise, patch_size), sample.sigma)


def _answer(patch_size: tuple[int, int, int], sample: RendererSample, box: Box) -> Tensor:
    return box.crop(sample.noise, patch_size) - box.crop(sample.target, patch_size)


def _check(number: int, sample: RendererSample) -> None:
    where, channels = f"pack_renderer: sample {number}", sample.target.shape[0]
    if any(latent.dim() != 4 or latent.shape[0] != channels for latent in (*sample.sources, sample.target)):
        shapes = ", ".join(str(list(latent.shape)) for latent in (*sample.sources, sample.target))
        raise ValueError(f"{where}: latents must be [C, T, H, W] with as many channels, got {shapes}")
    if sample.noise.shape != sample.target.shape:
        raise ValueError(f"{where}: noise is {list(sample.noise.shape)}, the target {list(sample.target.shape)}")
    if sample.phases is not None and len(sample.phases) != len(sample.sources):
        raise ValueError(f"{where}: {len(sample.phases)} phases for {len(sample.sources)} sources")
    if sample.context.dim() != 2 or not len(sample.context):
        raise ValueError(f"{where}: context must be [L, text_dim] with L > 0, got {list(sample.context.shape)}")
    if not 0 <= float(sample.sigma) <= 1 or not 0 <= float(sample.timestep) <= 1000:
        raise ValueError(
            f"{where}: sigma must be in [0, 1] and timestep in [0, 1000], got {float(sample.sigma):g} and "
            f"{float(sample.timestep):g}"
        )


def renderer_losses(renderer: Renderer, batch: RendererBatch, share: Share = ALONE) -> Tensor:
    """``[B]``, float32 (float64 in a float64 model): the mean squared error of each sample's velocity.

    Gradients go to the renderer, and to the contexts where they ask for them.

    Args:
        share: what the batch was packed with. Where ranks cut it, each computes its rows and its part of the means.
    """
    text = renderer.text_context(batch.context, batch.context_borders)
    borders = (0, *accumulate(batch.target_tokens))
    if share.cuts(batch.layout.tokens):
        rank, heads = share.group.rank, renderer.config.num_attention_heads
        sp = SPPlan.make(batch.layout, heads, heads, share.group.size)
        local, here = sp.local(rank), sp.targets.part(rank)
        velocity = renderer(batch.tokens, local, batch.timestep, text, attend=Ulysses(share.group, sp, share.policy))
    else:
        here, velocity = (0, borders[-1]), renderer(batch.tokens, batch.layout, batch.timestep, text)
    wide = torch.promote_types(velocity.dtype, torch.float32)
    error = (velocity.to(wide) - batch.velocity.to(wide)).square().mean(1)
    parts = error.split(np.diff(clipped(borders, here)).tolist())
    return torch.stack([part.sum() / count for part, count in zip(parts, batch.target_tokens, strict=True)])
