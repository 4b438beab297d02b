"""Pre-training of a small language model with its vision tower: captions and answers, by next tokens.

The released planner starts from Qwen2.5-VL, which has learned this already; a tiny one has to learn it first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...data.example import Example, Features
from ...data.mixture import Mixture
from ...parallel.fsdp import Groups
from ...parallel.mesh import Mesh, alone
from ...parallel.share import ALONE, Share
from ...parallel.workload import Sizes
from ...planner.model import Planner
from ...planner.training import Batch, NextTokens, draw, forward, pack
from ...planner.training import Sample as PlannerSample
from ..batches import Batches
from ..conversations import conversation
from ..export import Writer
from ..feed import Feed
from ..groups import planner_groups
from ..losses import next_token_losses
from ..models import Models, open_trained_planner
from ..recipe import Recipe
from ..stage import Micro, taken
from ..work import counted

LETTERS = 4
"""Of a token, about."""


@dataclass(frozen=True)
class Content:
    batch: Batch
    patches: Tensor | None
    grids: tuple[tuple[int, int, int], ...]


class UnderstandingStage:
    """Loss: ``text``. Trains language model and vision tower; the rest of the planner stays as it is."""

    def __init__(self, recipe: Recipe, models: Models, mixture: Mixture, mesh: Mesh | None = None) -> None:
        assert models.planner is not None
        self._opened, self.geometry, self._mesh = models.planner, models.geometry, mesh or alone()
        self._share = Share(self._mesh.sequence)
        self.planner, self._template, self._rules = self._opened.model, self._opened.template, self._opened.rules
        for part in (self.planner.connector, self.planner.vit_decoder):
            part.requires_grad_(False)
        self.planner.mask_tokens.requires_grad_(False)
        self.parts: Mapping[str, nn.Module] = {"planner": self.planner}
        self.weights = {"text": 1.0}
        self.batches = Batches(
            recipe, Feed(recipe, mixture, cost=lambda example: (0, 0), usable=_usable), self._mesh,
            kinds=(lambda example: bool(example.sources),), counts=_counts, sizes=self._sizes,
            workload=counted(None, self.planner.text.config, again=False),
        )  # fmt: skip

    def groups(self) -> Groups:
        return planner_groups(self.planner)

    def keep_wide(self, name: str) -> bool:
        return False

    def micro(self, step: int, number: int) -> Micro:
        portion = self.batches.portion(step, number)
        content = self._content([drawn.example for drawn in portion.own])
        counts = _counts([drawn.example for drawn in portion.examples])
        return Micro.of(portion, content, counts, content.batch.layout.cu_seqlens[portion.real])

    def _sizes(self, example: Example) -> Sizes:
        """Words are estimated from letters: they are not cut into tokens before they are needed."""
        tokens = len(example.prompt + (example.answer or "")) / LETTERS
        for source in example.sources:
            assert source.pixels is not None
            grid = self._rules.visual(source.kind, len(self._frames(source)), *source.pixels.shape[1:3]).grid
            tokens += math.prod(grid)
        return Sizes(planner=round(tokens))

    def _frames(self, source: Features) -> Tensor:
        """What of a picture is seen."""
        assert source.pixels is not None
        return self.geometry.seen(source.pixels, self.geometry.fps) if source.kind == "video" else source.pixels

    def _content(self, examples: Sequence[Example]) -> Content:
        samples, patches, grids = [], [], []
        for example in examples:
            seen = []
            for source in example.sources:
                rows, grid = self._rules.patches(self._frames(source))
                merged = (grid[0], grid[1] // self._rules.merge, grid[2] // self._rules.merge)
                patches.append(rows)
                grids.append(grid)
                seen.append(Features(source.kind, vit_grid=merged))
            talk, learned = conversation(self._template, replace(example, sources=tuple(seen)), end=self._opened.end)
            count = sum(t * h * w for t, h, w in (f.vit_grid or (0, 0, 0) for f in seen))
            samples.append(PlannerSample(talk, learned, torch.empty(count, 0) if count else None))
        batch = pack(samples)
        return Content(batch, torch.cat(patches) if patches else None, tuple(grids))

    def losses(self, micro: Micro, step: int) -> Mapping[str, Tensor]:
        share = micro.share or self._share
        answers = _answers(self.planner, micro.content, share)
        real = taken(micro.real, share, micro.content.batch.layout.tokens)
        return {"text": next_token_losses(answers)[:real].sum()}

    def samples(self, folder: Path, step: int, model: Path) -> None:
        """Questions of the first batch, their answers, and what the model answers when it is told the words before."""
        examples = self.batches.feed.pick(0, 0).examples
        with torch.no_grad():
            text = _answers(open_trained_planner(model).model, self._content(examples))
        guessed, right = text.logits.argmax(1), text.labels
        decode = self._template.tokenizer.decode
        lines = [
            f"{key}\t{decode(right[text.samples == n].tolist())}\t{decode(guessed[text.samples == n].tolist())}\n"
            for n, key in enumerate(example.key for example in examples)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{step:08d}.tsv").write_text("example\tanswer\tmodel\n" + "".join(lines), encoding="utf-8")

    def export(self, folder: Path, writer: Writer) -> None:
        writer(folder)


def _answers(planner: Planner, content: Content, share: Share = ALONE) -> NextTokens:
    batch = content.batch
    if content.patches is not None:
        seen = planner.see(content.patches.to(planner.device), content.grids)
        batch = replace(batch, sources=seen)
    text = forward(planner, batch, draw(batch, 0, torch.Generator()), contexts=False, share=share).text
    assert text is not None
    return text


def _counts(examples: Sequence[Example]) -> dict[str, float]:
    return {"text": float(len(examples))}


def _usable(example: Example) -> str | None:
    if example.answer is None:
        return "no answer"
    return "no pixels" if any(source.pixels is None for source in example.sources) else None
