"""How a plan is made: plain numbers, and which guidance branches they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError

Variant = Literal["conditional", "text only", "unconditional"]

MAX_VISUALS = 64
"""Images and videos of one conversation, the target among them: the checkpoints know as many markers."""


def check_visuals(count: int) -> None:
    """Raises UserError where a conversation has more images and videos, the target among them, than there may be."""
    if count > MAX_VISUALS:
        raise UserError(f"the planner takes {MAX_VISUALS} images and videos in all, the result included; got {count}")


@dataclass(frozen=True)
class PlanSettings:
    """How a plan is made.

    Args:
        steps: refinement steps K.
        decoder_steps: steps of the ViT-embedding decoder's sampler.
        visual_cfg: weight of the sources' condition (``vit_txt_cfg`` in the release, which names it misleadingly); 1
            or less turns guidance off.
        text_cfg: weight of the text (``vit_img_cfg`` there); ``None`` compares with the unconditional branch directly.
        parity: the released loop with its quirks (facts, sections E.6 and K): at least one token a step, from the end
            of the order; a step that would reveal only token 0, or nothing, is skipped, so token 0 may stay masked;
            noise levels of the decoder and rotary frequencies in bfloat16.
    """

    steps: int = 25
    decoder_steps: int = 5
    visual_cfg: float = 1.2
    text_cfg: float | None = 1.0
    parity: bool = False

    def weights(self, has_sources: bool) -> dict[Variant, float]:
        """Weight of each branch in ``u + text_cfg * (t - u) + visual_cfg * (c - t)``; those that cancel are left out.

        Without sources the text-only branch is the conditional one. The conditional branch comes first and is always
        there, whatever its weight: the renderer's context is made of its states.
        """
        if self.visual_cfg <= 1:
            return {"conditional": 1.0}
        if self.text_cfg is None:
            found: dict[Variant, float] = {"conditional": self.visual_cfg, "unconditional": 1 - self.visual_cfg}
        elif has_sources:
            found = {
                "conditional": self.visual_cfg,
                "text only": self.text_cfg - self.visual_cfg,
                "unconditional": 1 - self.text_cfg,
            }
        else:
            found = {"conditional": self.text_cfg, "unconditional": 1 - self.text_cfg}
        return {variant: weight for variant, weight in found.items() if weight or variant == "conditional"}
