"""Prompts -> text states, as the checkpoints were trained: cleaned, prefixed, UMT5, zero-padded to 512 tokens (or as
many as the checkpoint says).

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

from ..geometry import TEXT_TOKENS as MAX_TEXT_TOKENS


def clean_prompt(text: str) -> str:
    """Mends broken Unicode, resolves HTML entities twice, and collapses white space."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def assemble_context(*parts_LC: Tensor, tokens: int = MAX_TEXT_TOKENS) -> Tensor:
    """``[max(tokens, sum of L), C]``: the parts one after the other, then zeros up to ``tokens``. Nothing is cut off.

    A renderer alone has one part, the text's states without pads; with a planner its projected states follow.
    """
    states = torch.cat(parts_LC)
    return F.pad(states, (0, 0, 0, max(0, tokens - len(states))))


class TextEncoder:
    """A UMT5 tokenizer and encoder.

    Args:
        tokenizer: from ``transformers``, with a pad token.
        model: ``UMT5EncoderModel``.
        tokens: of a context at least, and of a text at most.
    """

    def __init__(self, tokenizer: Any, model: Any, tokens: int = MAX_TEXT_TOKENS) -> None:
        self.tokenizer, self.model, self.tokens = tokenizer, model, tokens

    def __call__(self, prompt: str, *, prefix: str = "") -> Tensor:
        """``[tokens, text_dim]``: :meth:`states`, and zeros behind them."""
        return self.context(self.states(prompt, prefix=prefix))

    def context(self, *parts_LC: Tensor) -> Tensor:
        """:func:`assemble_context` at this checkpoint's length."""
        return assemble_context(*parts_LC, tokens=self.tokens)

    @torch.no_grad()
    def states(self, prompt: str, *, prefix: str = "") -> Tensor:
        """``[L, text_dim]``: states of ``prefix`` + cleaned ``prompt`` (no separator).

        Text beyond ``tokens`` is cut off.
        """
        encoded = self.tokenizer(
            prefix + clean_prompt(prompt),
            max_length=self.tokens,
            truncation=True,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = encoded.input_ids.to(self.model.device), encoded.attention_mask.to(self.model.device)
        states = self.model(ids, mask).last_hidden_state[0]
        return states[: int(mask.sum())]
