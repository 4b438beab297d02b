"""A request as the planner reads it, token for token what the checkpoints were trained on.

    <|im_start|>system\\n{system}<|im_start|>user\\n{videos}{images}{prompt}<|im_start|>assistant\\n{target}

Nothing closes a turn and nothing separates turns. A visual is ``<|vision_start|>``, one pad per merged patch,
``<|vision_end|>``. Source: facts of the released model, sections E.2 to E.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bernini.errors import UserError
from bernini.kernels import Segment, SegmentLayout

from ..presets import SYSTEM_PROMPTS
from .settings import Variant, check_visuals


@dataclass(frozen=True)
class Visual:
    """An image or a video in merged patches, ``grid`` = (t, h, w): one token each."""

    kind: Literal["image", "video"]
    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class Marks(NamedTuple):
    """Ids of the special tokens."""

    turn: int
    vision_start: int
    vision_end: int
    image: int
    video: int

    @classmethod
    def of(cls, tokenizer: Any) -> Marks:
        """Looks them up.

        Raises:
            UserError: the tokenizer has no such token.
        """
        names = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
        unknown = [
            name
            for name, number in zip(names, ids, strict=True)
            if number in (None, getattr(tokenizer, "unk_token_id", None))
        ]
        if unknown:
            raise UserError(f"the planner's tokenizer has no token {unknown[0]}; it must be that of Qwen2.5-VL")
        return cls(*ids)


@dataclass(frozen=True)
class Conversation:
    """One conversation, encoded. T tokens.

    Args:
        ids: int64 ``[T]``; visuals hold pad ids, whose embeddings are replaced.
        layout: text runs, sources and target in order; its ``intervals`` are the hybrid mask.
        visuals: of the source and target segments, in order.
        ticks: by how much a temporal step of a video advances the first position.
    """

    ids: Tensor
    layout: SegmentLayout
    visuals: tuple[Visual, ...]
    ticks: int = 2

    @cached_property
    def positions(self) -> Tensor:
        """int64 ``[3, T]``: Qwen2.5-VL's (t, h, w) positions (facts, section E.4), from 0 in every sample.

        Text counts on all three axes. A visual starts where the text stopped; what follows it starts one above the
        largest position that it used.
        """
        pieces, at, sample = [], 0, 0
        visuals = iter(self.visuals)
        for segment in self.layout.segments:
            if segment.sample != sample:
                at, sample = 0, segment.sample
            if segment.kind == "text":
                piece = torch.arange(segment.tokens).expand(3, -1)
            else:
                visual = next(visuals)
                axes = [torch.arange(size) for size in visual.grid]
                axes[0] = axes[0] * (self.ticks if visual.kind == "video" else 0)
                piece = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
            pieces.append(piece + at)
            at += int(piece.max()) + 1
        return torch.cat(pieces, dim=1)


class Template:
    """The conversation template with a tokenizer.

    Args:
        tokenizer: of Qwen2.5-VL (``transformers``), or anything with its ``encode`` and ``convert_tokens_to_ids``.
        ticks: ``tokens_per_second`` of the vision tower; the released code gives every temporal step one second.
    """

    def __init__(self, tokenizer: Any, ticks: int = 2) -> None:
        self.tokenizer, self.marks, self.ticks = tokenizer, Marks.of(tokenizer), ticks

    def __call__(self, prompt: str, sources: Sequence[Visual], target: Visual | None, *, system: str) -> Conversation:
        """Encodes one request.

        Args:
            prompt: the user's text; without text and sources the user's turn is left out.
            sources: videos, then images.
            target: what is to be planned; ``None`` for understanding.
            system: the system prompt; without it its turn is left out.

        Raises:
            UserError: more visuals than the checkpoints know.
        """
        check_visuals(len(sources) + (target is not None))
        writer = _Writer(self)
        if system.strip():
            writer.turn("system", system.strip())
        # Only the outer ends of a turn are stripped: behind a visual, white space before the prompt stays.
        text = prompt.rstrip() if sources else prompt.strip()
        if sources or text:
            writer.turn("user", text, sources, kind="source")
        if target is not None:
            writer.turn("assistant", "", [target], kind="target")
        return Conversation(torch.tensor(writer.ids), SegmentLayout(writer.segments), tuple(writer.visuals), self.ticks)

    def answered(
        self, prompt: str, sources: Sequence[Visual], answer: str, *, system: str, end: int | None = None
    ) -> tuple[Conversation, Tensor]:
        """A conversation that ends with an answer in words, and bool ``[T]``: which tokens are the answer.

        Args:
            end: token that the answer ends with, if any; it belongs to it.
        """
        asked = self(prompt, sources, None, system=system)
        writer = _Writer(self)
        writer.ids, writer.segments, writer.visuals = asked.ids.tolist(), list(asked.layout.segments), [*asked.visuals]
        writer.turn("assistant", "")
        said = [*self.encode(answer.strip()), *([] if end is None else [end])]
        writer.say(said)
        talk = Conversation(torch.tensor(writer.ids), SegmentLayout(writer.segments), tuple(writer.visuals), self.ticks)
        learned = torch.zeros(len(talk.ids), dtype=torch.bool)
        learned[len(talk.ids) - len(said) :] = True
        return talk, learned

    def variant(
        self, variant: Variant, prompt: str, sources: Sequence[Visual], target: Visual, *, task: str,
        negative_prompt: str = "",
    ) -> Conversation:  # fmt: skip
        """One of the three forms of a request that guidance compares.

        ``"conditional"`` is all of it, ``"text only"`` leaves out the sources, ``"unconditional"`` also puts the
        negative prompt in place of the prompt, or nothing if that has fewer than two characters.
        """
        system = SYSTEM_PROMPTS.get(task, SYSTEM_PROMPTS["default"])
        if variant == "conditional":
            return self(prompt, sources, target, system=system)
        if variant == "text only":
            return self(prompt, (), target, system=system)
        return self(negative_prompt if len(negative_prompt) > 1 else "", (), target, system=system)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


class _Writer:
    """Collects ids and segments; neighbouring text runs become one segment."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self.ids: list[int] = []
        self.segments: list[Segment] = []
        self.visuals: list[Visual] = []

    def turn(
        self, role: str, text: str, visuals: Sequence[Visual] = (), kind: Literal["source", "target"] = "source"
    ) -> None:
        marks, encode = self._template.marks, self._template.encode
        # Header and content are tokenised apart, so that no merge crosses the border.
        self.say([marks.turn, *encode(f"{role}\n")])
        for visual in visuals:
            self.say([marks.vision_start])
            self.ids += [marks.image if visual.kind == "image" else marks.video] * visual.tokens
            self.segments.append(Segment(kind, visual.grid))
            self.visuals.append(visual)
            self.say([marks.vision_end])
        self.say(encode(text))

    def say(self, ids: Sequence[int]) -> None:
        """Text."""
        if not ids:
            return
        self.ids += ids
        joined = len(ids)
        if self.segments and self.segments[-1].kind == "text":
            joined += self.segments.pop().tokens
        self.segments.append(Segment("text", (joined, 1, 1)))
