"""Prompts -> text states, as the checkpoints were trained: cleaned, prefixed, UMT5, zero-padded to 512.

The zero pads are part of the input: cross-attention sees all 512 positions (after the text projection the pads are
not zero). Source: facts of the released model, section C.1.
"""

from __future__ import annotations

import html
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TEXT_TOKENS = 512


def clean_prompt(text: str) -> str:
    """Mends broken Unicode, resolves HTML entities twice, and collapses white space."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def assemble_context(*parts_LC: Tensor) -> Tensor:
    """``[max(512, sum of L), C]``: the parts one after the other, then zeros up to 512. Nothing is ever cut off.

    A renderer alone has one part, the text's states without pads; with a planner its projected states follow.
    """
    states = torch.cat(parts_LC)
    return F.pad(states, (0, 0, 0, max(0, MAX_TEXT_TOKENS - len(states))))


class TextEncoder:
    """A UMT5 tokenizer and encoder.

    Args:
        tokenizer: from ``transformers``, with a pad token.
        model: ``UMT5EncoderModel``.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model = tokenizer, model

    def __call__(self, prompt: str, *, prefix: str = "") -> Tensor:
        """``[512, text_dim]``: :meth:`states`, and zeros behind them."""
        return assemble_context(self.states(prompt, prefix=prefix))

    @torch.no_grad()
    def states(self, prompt: str, *, prefix: str = "") -> Tensor:
        """``[L, text_dim]``: states of ``prefix`` + cleaned ``prompt`` (no separator).

        Text beyond 512 tokens is cut off.
        """
        encoded = self.tokenizer(
            prefix + clean_prompt(prompt),
            max_length=MAX_TEXT_TOKENS,
            truncation=True,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = encoded.input_ids.to(self.model.device), encoded.attention_mask.to(self.model.device)
        states = self.model(ids, mask).last_hidden_state[0]
        return states[: int(mask.sum())]
