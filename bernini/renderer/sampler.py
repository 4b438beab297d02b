"""The sampling loop: every branch of the plan, then guidance and the solver's step in one operation; repeated.

Everything stays in token space: the state is the target's patches ``[tokens, values]``, frame after frame, so
guidance's per-frame sums are sums over rows of a ``[frames, ...]`` view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from bernini.kernels import SegmentLayout, guide
from bernini.parallel.branches import Placement
from bernini.parallel.share import ALONE, Share

from .branches import Branches
from .config import RendererConfig
from .guidance import Plan, Projection
from .model import Renderer
from .schedule import Solver

Which = Literal["high", "low"]


@dataclass(frozen=True)
class Guidance:
    """Numbers of a plan.

    ``scales`` are named ``vid``, ``img``, ``txt``, ``tgt``; ``switch_factor`` multiplies all of them from the first
    step of the low-noise expert on; ``eta``, ``thresholds`` (one per link) and ``momentum`` belong to APG.
    """

    scales: Mapping[str, float]
    switch_factor: float = 1.0
    eta: float = 0.5
    thresholds: Sequence[float] = (50.0, 50.0, 50.0)
    momentum: float = 0.0

    def eta_of(self, apg: Projection | None) -> float:
        if apg is None:
            return 1.0
        return self.eta if apg.eta is None else apg.eta

    def thresholds_of(self, apg: Projection | None, links: int) -> list[float] | None:
        """One per link; ``None`` without projection."""
        if apg is None:
            return None
        return list(self.thresholds[:links]) if apg.threshold is None else [apg.threshold] * links


class ExpertPair(Protocol):
    """The transformers of a checkpoint, wherever they are kept."""

    config: RendererConfig
    boundary: float
    """Timesteps from here up belong to ``high``, those below to ``low``."""
    has_low: bool
    """False where one expert serves all timesteps; it is called ``high`` then."""

    def get(self, which: Which) -> Renderer: ...


class Experts:
    """Both experts resident, or the only one."""

    def __init__(self, high: Renderer, low: Renderer | None = None, boundary: float = 875.0) -> None:
        self.high, self.low, self.boundary = high, low, boundary
        self.config, self.has_low = high.config, low is not None

    def get(self, which: Which) -> Renderer:
        return self.low if which == "low" and self.low is not None else self.high


class OneAtATime:
    """Loads an expert when its steps begin and lets go of the other: half the memory, and a load per switch."""

    def __init__(
        self, load: Callable[[Which], Renderer], config: RendererConfig, *, has_low: bool, boundary: float
    ) -> None:
        self.config, self.has_low, self.boundary = config, has_low, boundary
        self._load, self._held = load, dict[Which, Renderer]()

    def get(self, which: Which) -> Renderer:
        if which not in self._held:
            self._held.clear()  # first, so that the two never meet in memory
            self._held[which] = self._load(which)
        return self._held[which]


def expert_at(experts: ExpertPair, timestep: float) -> Which:
    return "low" if experts.has_low and timestep < experts.boundary else "high"


@torch.no_grad()
def sample(
    experts: ExpertPair,
    layout: SegmentLayout,
    videos: int,
    source_tokens: Sequence[Tensor],
    noise_tokens: Tensor,
    texts: Mapping[str, Tensor],
    plan: Plan,
    guidance: Guidance,
    solver: Solver,
    *,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
    rounding: str = "fp32",
    share: Share = ALONE,
    placed: Callable[[Placement], None] | None = None,
) -> Tensor:
    """Denoises the target.

    Ranks that work together compute their part of every branch, or some branches each; the velocities of the target are
    small, so each rank gets all of them and does the same step.

    Args:
        layout: one sample: source videos, source images, target.
        videos: how many sources are videos.
        source_tokens: clean patches ``[tokens, values]`` of each source, in layout order.
        noise_tokens: float32 ``[target tokens, values]``, the initial state.
        texts: text states ``[L, text_dim]`` by the plan's names.
        solver: a fresh one.
        progress: called with (steps done, steps), first with 0.
        watch: called after each step with (step, guided velocity, state), both ``[target tokens, values]``.
        rounding: contract of guidance's arithmetic.
        share: the ranks that call this together, with equal arguments.
        placed: called once with which ranks compute which branches, numbered as they differ.

    Returns:
        float32 ``[target tokens, values]``: the clean target's patches.
    """
    plan = plan.evaluated(guidance.scales)
    frames = layout.segments[layout.numbers("target")[0]].grid[0]
    latent = noise_tokens.to(torch.float32)
    branches = Branches(plan, layout, videos, source_tokens, latent, texts, share, experts.config)
    if placed is not None:
        placed(branches.placement)
    buffer = latent.new_zeros(len(plan.links), frames, latent.numel() // frames)
    levels, report = solver.schedule, progress or (lambda done, steps: None)
    model: Renderer | None = None
    held: Which | None = None
    report(0, levels.steps)
    for step, timestep in enumerate(levels.timesteps):
        which = expert_at(experts, timestep)
        if which != held:
            branches.forget()  # keys and values of the other expert's layers
            model = None  # let go of it before the next is loaded: two may not fit
            model, held = experts.get(which), which
        assert model is not None
        results = branches.velocities(model, timestep, latent)
        # In x0 space, at sigma 0, nothing is left to guide.
        apg = plan.apg if plan.apg and (levels.sigmas[step] > 0 or plan.apg.space != "x0") else None
        in_x0 = apg is not None and apg.space == "x0"
        rows, history = solver.update(step)
        if watch is not None:  # the velocity is written only where somebody looks at it
            rows = [*rows, [0.0, 1.0, *[0.0] * len(history)]]
        state, *kept = guide(
            [velocity.view(frames, -1) for velocity in results],
            plan.scaled(guidance.scales, guidance.switch_factor if which == "low" else 1.0),
            apg=apg.form if apg else None,
            space="x0" if in_x0 else "velocity",
            latent=latent.view(frames, -1),
            sigma=levels.sigmas[step] if in_x0 else None,
            eta=guidance.eta_of(apg),
            thresholds=guidance.thresholds_of(apg, len(plan.links)),
            momentum=(guidance.momentum, buffer) if apg and apg.eta is None and guidance.momentum else None,
            update=(rows, history),
            rounding=rounding,
        )
        latent = state.view(latent.shape)
        if watch is not None:
            watch(step, kept.pop().view(latent.shape), latent)
        solver.remember(kept)
        report(step + 1, levels.steps)
    return latent
