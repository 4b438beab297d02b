"""Stage I: the language model as a planner, with the connector and the decoder of ViT embeddings (paper section 4.1).

The vision tower stays as it is: its embeddings are what is planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ...data.example import Example
from ...data.mixture import Mixture
from ...parallel.fsdp import Groups
from ...parallel.mesh import Mesh, alone
from ...parallel.share import Share
from ...planner.model import Planner
from ...planner.training import Batch, Draws, Outputs, draw, forward, pack
from ..conversations import sample
from ..draws import generator
from ..export import Writer
from ..feed import Feed, dropped
from ..groups import planner_groups
from ..losses import decoder_losses, next_token_losses
from ..models import Models, TrainedPlanner, recompute
from ..recipe import Recipe
from ..stage import Kind, Micro, portion, taken

KINDS: tuple[Kind, ...] = (lambda example: example.answer is not None, lambda example: example.target is not None)


@dataclass(frozen=True)
class Content:
    examples: tuple[Example, ...]
    """Some conditions dropped."""
    batch: Batch
    draws: Draws


class PlannerStage:
    """Losses: ``text`` and ``visual``."""

    def __init__(self, recipe: Recipe, models: Models, mixture: Mixture, mesh: Mesh | None = None) -> None:
        assert models.planner is not None
        self.geometry, self.planner, self._mesh = models.geometry, models.planner.model, mesh or alone()
        self._share = Share(self._mesh.sequence)
        self.planner.visual.requires_grad_(False)
        # The renderer's way out of the planner has no loss here.
        self.planner.connector.proj_gen.requires_grad_(False)
        self.talks = PlannerDraws(recipe, models.planner)
        self.parts: Mapping[str, nn.Module] = {"planner": self.planner}
        if recipe.recompute:
            recompute(self.planner.text.layers)
        self.weights = {"text": recipe.loss.text, "visual": recipe.loss.visual}
        self._feed = Feed(recipe, mixture, self.talks.cost, self.talks.usable)

    def groups(self) -> Groups:
        return planner_groups(self.planner)

    def keep_wide(self, name: str) -> bool:
        return False

    def micro(self, step: int, number: int) -> Micro:
        picked = self._feed.pick(step, number)
        own, real = portion(picked.examples, self._mesh, KINDS, lambda example: self.talks.cost(example)[1])
        content = self.talks.content(own, step)
        keys, counts = tuple(example.key for example in picked.examples), self.talks.counts(picked.examples)
        return Micro(content, counts, content.batch.layout.cu_seqlens[real], keys, picked.skipped, real)

    def losses(self, micro: Micro, step: int) -> Mapping[str, Tensor]:
        content: Content = micro.content
        outputs = forward(self.planner, content.batch, content.draws, contexts=False, share=self._share)
        return planner_losses(self.planner, outputs, taken(micro.real, self._share, content.batch.layout.tokens))

    def samples(self, folder: Path, step: int, model: Path) -> None:
        from ..pictures import write_samples

        write_samples(model, folder, step)

    def export(self, folder: Path, writer: Writer) -> None:
        writer(folder)


def planner_losses(planner: Planner, outputs: Outputs, real: int) -> dict[str, Tensor]:
    """Sums by name, over the first ``real`` samples."""
    found = {}
    if outputs.text is not None:
        found["text"] = next_token_losses(outputs.text)[:real].sum()
    if outputs.flow is not None:
        found["visual"] = decoder_losses(planner.vit_decoder, outputs.flow)[:real].sum()
    return found


class PlannerDraws:
    """The planner's side of examples: conversations, masks and noise."""

    def __init__(self, recipe: Recipe, opened: TrainedPlanner) -> None:
        self._recipe, self._opened = recipe, opened
        self._width = opened.model.config.decoder.channels

    def usable(self, example: Example) -> str | None:
        if any(picture.vit is None or picture.vit_grid is None for picture in example.visuals):
            return "no ViT features"
        return None

    def cost(self, example: Example) -> tuple[int, int]:
        """(0, tokens of the conversation)."""
        return 0, len(sample(self._opened.template, example, end=self._opened.end).conversation.ids)

    def content(self, examples: tuple[Example, ...], step: int) -> Content:
        shown = tuple(dropped(self._recipe, example, step) for example in examples)
        batch = pack([sample(self._opened.template, example, end=self._opened.end) for example in shown])
        seeds = [generator(self._recipe.seed, example.key, step, "mask") for example in shown]
        return Content(shown, batch, draw(batch, self._width, seeds, copies=self._recipe.copies))

    def counts(self, examples: Sequence[Example]) -> dict[str, float]:
        answers, targets = (sum(map(kind, examples)) for kind in KINDS)
        return {name: float(n) for name, n in (("text", answers), ("visual", targets)) if n}
