"""Examples as the planner reads them in training: conversations with what is to be learned in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.example import Example, Features
from ..planner.prompt import Conversation, Template, Visual
from ..planner.training import MASK_RATIOS, Sample
from ..presets import SYSTEM_PROMPTS


def system_task(task: str) -> str:
    """Whose system prompt, prefix and mask ratio a task has: those of animating a picture are a reference's."""
    return "r2v" if task == "i2v" else task


def visual(features: Features) -> Visual:
    """Its tokens.

    Raises:
        ValueError: nobody has seen it with the vision tower yet.
    """
    if features.vit_grid is None:
        raise ValueError("conversation: a picture has no ViT embeddings; prepare the data with the part 'vit'")
    return Visual(features.kind, features.vit_grid)


def conversation(template: Template, example: Example, *, end: int | None) -> tuple[Conversation, Tensor]:
    """An example as the planner reads it, and bool ``[T]``: the tokens whose prediction has a loss.

    Args:
        end: the token that an answer ends with, if any.
    """
    task = system_task(example.task)
    system = SYSTEM_PROMPTS.get(task, SYSTEM_PROMPTS["default"])
    sources = [visual(source) for source in example.sources]
    if example.answer is None:
        target = None if example.target is None else visual(example.target)
        talk = template(example.prompt, sources, target, system=system)
        return talk, torch.zeros(len(talk.ids), dtype=torch.bool)
    return template.answered(example.prompt, sources, example.answer, system=system, end=end)


def sample(template: Template, example: Example, *, end: int | None) -> Sample:
    """For :func:`bernini.planner.training.pack`; embeddings are those that were stored."""
    talk, learned = conversation(template, example, end=end)
    targets = None if example.target is None else _vit(example.target)
    ratio = None if targets is None else MASK_RATIOS.get(system_task(example.task), MASK_RATIOS["v2v"])
    return Sample(talk, learned, _joined([_vit(source) for source in example.sources]), targets, ratio)


def _vit(features: Features) -> Tensor:
    if features.vit is None:
        raise ValueError("conversation: a picture has no ViT embeddings; prepare the data with the part 'vit'")
    return features.vit


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(parts)) if parts else None
