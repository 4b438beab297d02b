"""The planner's part of a request: sources and prompt -> the plan and the contexts that the renderer reads.

    frames -> vision tower -> conversations -> masked generation -> connector

Shapes: N target tokens, V width of a ViT embedding, L tokens of a context, C text width of the renderer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bernini.errors import UserError
from bernini.parallel.share import ALONE, Share

from ..geometry import RELEASED, Geometry
from ..media import Clip
from .decode import Contexts, Draws, Prefix, contexts, generate
from .model import Planner, released_frequencies
from .plan_file import Plan, fingerprint
from .prompt import Conversation, Template, Visual
from .settings import PlanSettings, Variant
from .vision import VisionRules

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Planned:
    """What comes out: the plan, the renderer's contexts, and the sources' own embeddings for comparison."""

    plan: Plan
    contexts: Contexts
    sources: list[tuple[Visual, Tensor]]


class PlannerStage:
    """A planner with its tokenizer and the rules of its vision tower.

    Args:
        backend: attention backend of the steps, a name of ``bernini.kernels.attention``'s table or ``"auto"``.
        geometry: of the checkpoint; says which frames the vision tower sees.
        share: ranks that plan together, each with a planner of its own.
    """

    def __init__(
        self, planner: Planner, tokenizer: Any, rules: VisionRules, *, backend: str = "auto",
        geometry: Geometry = RELEASED, share: Share = ALONE,
    ) -> None:  # fmt: skip
        self.planner, self.rules, self.backend, self.geometry, self.share = planner, rules, backend, geometry, share
        self.template = Template(tokenizer, planner.ticks)

    def target(self, frames: int, height: int, width: int, fps: float) -> Visual:
        """The tokens of a result of this shape: of a video, those of the frames that the vision tower would see.

        Raises:
            UserError: more tokens than the model has places for.
        """
        kind = "image" if frames == 1 else "video"
        seen = 1 if frames == 1 else len(self.geometry.frame_indices(frames, fps, fps, frames, "full_vit"))
        visual = self.rules.visual(kind, seen, height, width)
        most = self.planner.config.mask_tokens
        if visual.tokens > most:
            raise UserError(
                f"a result of {frames} frames of {width}x{height} takes {visual.tokens} tokens to plan, and the model "
                f"has places for {most}; ask for fewer frames"
            )
        return visual

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        sources: Sequence[Clip | Tensor],
        target: Visual,
        *,
        task: str,
        negative_prompt: str,
        settings: PlanSettings,
        draws: Draws,
        plan: Plan | None = None,
        progress: Progress | None = None,
    ) -> Planned:
        """Plans a request, or takes up a plan that was made before.

        Args:
            sources: videos (clips), then images (uint8 ``[H, W, 3]``).
            plan: its embeddings are used as they are; nothing is decoded.

        Raises:
            UserError: too many sources, one that the vision tower cannot see, a plan that is not for this model and
                result, or one that came out with values that are not finite.
        """
        if plan is not None:
            plan.check(target, self.planner)
        frames = [_frames(source, self.geometry) for source in sources]
        visuals = [
            self.rules.visual("video" if isinstance(source, Clip) else "image", *pixels.shape[:3])
            for source, pixels in zip(sources, frames, strict=True)
        ]
        weights: dict[Variant, float] = {"conditional": 1.0} if plan else settings.weights(bool(visuals))
        names: list[Variant] = [*weights]
        names += [name for name in ("unconditional",) if name not in names]  # its prefix is a context
        talks = [
            self.template.variant(name, prompt, visuals, target, task=task, negative_prompt=negative_prompt)
            for name in names
        ]
        with released_frequencies(self.planner) if settings.parity else nullcontext():
            return self._run(dict(zip(names, talks, strict=True)), visuals, frames, target, weights, settings, draws,
                             plan, progress or (lambda stage, done, total: None))  # fmt: skip

    def _run(
        self, talks: dict[Variant, Conversation], visuals: list[Visual], frames: list[Tensor], target: Visual,
        weights: dict[Variant, float], settings: PlanSettings, draws: Draws, plan: Plan | None, report: Progress,
    ) -> Planned:  # fmt: skip
        """What costs time. ``talks`` begins with the branches that have weights, and of these with the conditional."""
        planner = self.planner
        report("seeing", 0, 1)
        seen = self._see(frames)
        report("seeing", 1, 1)
        embeds = [planner.embed(talk, seen) for talk in talks.values()]
        engine = Prefix(
            planner, list(talks.values()), embeds, active=len(weights), backend=self.backend, share=self.share
        )
        if plan is None:
            filled = generate(
                planner, engine, list(weights.values()), settings, draws,
                progress=lambda done, total: report("planning", done, total),
            )  # fmt: skip
            if not bool(torch.isfinite(filled).all()):
                raise UserError("the plan came out with values that are not finite; another dtype may help")
            plan = Plan(filled, target, fingerprint(planner))
        states = engine.step(plan.embeds.to(planner.device, planner.dtype), 1)[0]
        hidden = dict(zip(talks, engine.hidden, strict=True))
        found = contexts(planner, talks["conditional"], hidden["conditional"], hidden["unconditional"], states)
        pieces = [] if seen is None else list(seen.split([visual.tokens for visual in visuals]))
        return Planned(plan, found, list(zip(visuals, pieces, strict=True)))

    def _see(self, frames: Sequence[Tensor]) -> Tensor | None:
        """ViT embeddings of the sources, all in a row."""
        if not frames:
            return None
        patches, grids = zip(*(self.rules.patches(pixels) for pixels in frames), strict=True)
        return self.planner.see(torch.cat(patches).to(self.planner.device), grids)


def _frames(source: Clip | Tensor, geometry: Geometry = RELEASED) -> Tensor:
    """``[F, H, W, 3]``: an image as one frame, of a video the frames that the vision tower sees.

    They are taken from the frames that were read at the request's rate; the release samples the file once more.
    """
    if not isinstance(source, Clip):
        return source[None]
    return geometry.seen(source.frames, source.fps)
