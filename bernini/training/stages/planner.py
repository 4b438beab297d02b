"""Stage I: the language model as a planner, with the connector and the decoder of ViT embeddings (paper section 4.1).

The vision tower stays as it is: its embeddings are what is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ...data.example import Example
from ...data.mixture import Mixture
from ...planner.model import Planner
from ...planner.training import Batch, Draws, Outputs, draw, forward, pack
from ..conversations import sample
from ..draws import generator
from ..export import write_model
from ..feed import Feed, dropped
from ..losses import decoder_losses, next_token_losses
from ..models import Models, TrainedPlanner, recompute
from ..recipe import Recipe
from ..stage import Micro


@dataclass(frozen=True)
class Content:
    examples: tuple[Example, ...]
    """Some conditions dropped."""
    batch: Batch
    draws: Draws


class PlannerStage:
    """Losses: ``text`` and ``visual``."""

    def __init__(self, recipe: Recipe, models: Models, mixture: Mixture) -> None:
        assert models.planner is not None
        self.models, self.geometry, self.planner = models, models.geometry, models.planner.model
        self.planner.visual.requires_grad_(False)
        # The renderer's way out of the planner has no loss here.
        self.planner.connector.proj_gen.requires_grad_(False)
        self.talks = PlannerDraws(recipe, models.planner)
        self.parts: Mapping[str, nn.Module] = {"planner": self.planner}
        if recipe.recompute:
            recompute(self.planner.text.layers)
        self.weights = {"text": recipe.loss.text, "visual": recipe.loss.visual}
        self._feed = Feed(recipe, mixture, self.talks.cost, self.talks.usable)

    def keep_wide(self, name: str) -> bool:
        return False

    def micro(self, step: int, number: int) -> Micro:
        picked = self._feed.pick(step, number)
        content = self.talks.content(picked.examples, step)
        keys = tuple(example.key for example in picked.examples)
        return Micro(content, self.talks.counts(content), content.batch.layout.tokens, keys, picked.skipped)

    def losses(self, micro: Micro, step: int) -> Mapping[str, Tensor]:
        content: Content = micro.content
        outputs = forward(self.planner, content.batch, content.draws, contexts=False)
        return planner_losses(self.planner, outputs)

    def samples(self, folder: Path, step: int) -> None:
        from ..pictures import write_samples

        write_samples(self, folder, step)

    def export(self, folder: Path) -> None:
        write_model(self.models.start, folder, self.models.places())


def planner_losses(planner: Planner, outputs: Outputs) -> dict[str, Tensor]:
    """Sums by name."""
    found = {}
    if outputs.text is not None:
        found["text"] = next_token_losses(outputs.text).sum()
    if outputs.flow is not None:
        found["visual"] = decoder_losses(planner.vit_decoder, outputs.flow).sum()
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

    def counts(self, content: Content) -> dict[str, float]:
        answers = sum(example.answer is not None for example in content.examples)
        targets = sum(example.target is not None for example in content.examples)
        return {name: float(n) for name, n in (("text", answers), ("visual", targets)) if n}
