"""The sampling loop: every branch of the plan, guidance, one step of the solver; repeated.

Everything stays in token space: the state is the target's patches ``[tokens, values]``, frame after frame, so
guidance's per-frame sums are sums over rows of a ``[frames, ...]`` view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bernini.kernels import SegmentLayout, guide, scatter_rows

from .guidance import Plan
from .model import Renderer, TextContext
from .schedule import Schedule


@dataclass(frozen=True)
class Guidance:
    """Numbers of a plan.

    ``scales`` are named ``vid``, ``img``, ``txt``; ``switch_factor`` multiplies all of them from the first step of the
    low-noise expert on; ``eta``, ``thresholds`` (one per link) and ``momentum`` belong to APG.
    """

    scales: Mapping[str, float]
    switch_factor: float = 1.0
    eta: float = 0.5
    thresholds: Sequence[float] = (50.0, 50.0, 50.0)
    momentum: float = 0.0


@dataclass(frozen=True)
class Experts:
    """The transformers of a checkpoint: ``high`` for timesteps >= ``boundary``, ``low`` below. One may be all."""

    high: Renderer
    low: Renderer | None = None
    boundary: float = 875.0

    def at(self, timestep: float) -> Renderer:
        return self.high if self.low is None or timestep >= self.boundary else self.low

    @property
    def both(self) -> list[Renderer]:
        return [self.high] if self.low is None else [self.high, self.low]


@torch.no_grad()
def sample(
    experts: Experts,
    layout: SegmentLayout,
    videos: int,
    source_tokens: Sequence[Tensor],
    noise_tokens: Tensor,
    texts: Mapping[str, Tensor],
    plan: Plan,
    guidance: Guidance,
    schedule: Schedule,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Denoises the target.

    Args:
        layout: one sample: source videos, source images, target.
        videos: how many sources are videos.
        source_tokens: clean patches ``[tokens, values]`` of each source, in layout order.
        noise_tokens: float32 ``[target tokens, values]``, the initial state.
        texts: ``"positive"`` and ``"negative"`` text states ``[L, text_dim]``.
        progress: called with (steps done, steps), first with 0.

    Returns:
        float32 ``[target tokens, values]``: the clean target's patches.
    """
    target = layout.numbers("target")[0]
    frames = layout.segments[target].grid[0]
    latent = noise_tokens.to(torch.float32)
    inputs = [_branch_input(*branch.layout(layout, videos), source_tokens, latent) for branch in plan.branches]
    momentum = (guidance.momentum, latent.new_zeros(len(plan.links), frames, latent.numel() // frames))
    contexts: dict[tuple[int, str], TextContext] = {}
    report = progress or (lambda done, steps: None)
    report(0, schedule.steps)
    for step, timestep in enumerate(schedule.timesteps):
        model = experts.at(timestep)
        low = experts.low is not None and model is experts.low
        predictions = []
        for branch, (branch_layout, tokens) in zip(plan.branches, inputs, strict=True):
            key = (id(model), branch.text)
            if key not in contexts:
                contexts[key] = model.text_context(texts[branch.text])
            scatter_rows(tokens, [latent], [branch_layout.on(latent.device).target_index])
            time = torch.tensor([timestep], device=latent.device)
            predictions.append(model(tokens, branch_layout, time, contexts[key]).view(frames, -1))
        sigma, following = schedule.sigmas[step], schedule.sigmas[step + 1]
        (latent,) = guide(
            predictions,
            plan.scaled(guidance.scales, guidance.switch_factor if low else 1.0),
            apg=plan.apg,
            space="velocity" if plan.apg is None else "x0",
            latent=latent.view(frames, -1),
            sigma=sigma,
            eta=guidance.eta if plan.apg else 1.0,
            thresholds=list(guidance.thresholds[: len(plan.links)]) if plan.apg else None,
            momentum=momentum if plan.apg and guidance.momentum else None,
            update=([[1.0, following - sigma]], []),  # Euler: x + (sigma' - sigma) v
        )
        latent = latent.reshape(noise_tokens.shape)
        report(step + 1, schedule.steps)
    return latent


def _branch_input(
    layout: SegmentLayout, kept: Sequence[int], source_tokens: Sequence[Tensor], latent: Tensor
) -> tuple[SegmentLayout, Tensor]:
    """A branch's layout and its token buffer with the sources in place; only the target's rows change per step."""
    tokens = latent.new_zeros(layout.tokens, latent.shape[-1])
    sources = [source_tokens[number] for number in kept[:-1]]
    if sources:
        here = layout.on(latent.device)
        places = [here.index(number) for number in layout.numbers("source")]
        scatter_rows(tokens, sources, places)
    return layout, tokens
