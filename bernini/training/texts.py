"""Text states in training: many prompts at once, with gradients where the encoder is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..presets import TASK_PREFIXES
from ..renderer.text import TextEncoder, clean_prompt
from .conversations import system_task


def full_prompt(task: str, prompt: str) -> str:
    """What the text encoder reads: the task's prefix and the cleaned prompt; of a dropped prompt nothing."""
    return TASK_PREFIXES[system_task(task)] + clean_prompt(prompt) if prompt else ""


def text_states(encoder: TextEncoder, prompts: Sequence[str]) -> list[Tensor]:
    """``[L, C]`` of each prompt, without pads; equal to :meth:`TextEncoder.states` one by one.

    Args:
        prompts: from :func:`full_prompt`.
    """
    device = encoder.model.device
    encoded = encoder.tokenizer(
        list(prompts), max_length=encoder.tokens, truncation=True, padding="longest", return_attention_mask=True,
        return_tensors="pt",
    )  # fmt: skip
    ids, mask = encoded.input_ids.to(device), encoded.attention_mask.to(device)
    with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in encoder.model.parameters())):
        states = encoder.model(ids, mask).last_hidden_state
    return [row[:count] for row, count in zip(states, encoded.attention_mask.sum(1).tolist(), strict=True)]
