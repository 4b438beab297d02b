"""Stage I: the language model as a planner, with the connector and the decoder of ViT embeddings (paper section 4.1).

The vision tower stays as it is: its embeddings are what is planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from ...data.example import Example
from ...data.mixture import Mixture
from ...parallel.fsdp import Groups
from ...parallel.mesh import Mesh, alone
from ...parallel.share import Share
from ...parallel.workload import Sizes
from ...planner.model import Planner
from ...planner.training import Batch, Draws, Outputs, draw, forward, pack
from ..batches import Batches, Kind
from ..conversations import sample
from ..draws import generator
from ..export import Writer
from ..feed import Feed, dropped
from ..groups import planner_groups
from ..keeping import Keeping
from ..losses import decoder_losses, next_token_losses
from ..models import Models, TrainedPlanner
from ..recipe import Recipe
from ..stage import Micro, taken
from ..work import counted

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
        layers = self.planner.text.layers  # the last one is for answers
        self._keeping = Keeping(recipe, planner=layers[:-1], sometimes=layers[-1:])
        self.weights = {"text": recipe.loss.text, "visual": recipe.loss.visual}
        self.batches = Batches(
            recipe, Feed(recipe, mixture, self.talks.cost, self.talks.usable), self._mesh,
            kinds=KINDS, counts=self.talks.counts, sizes=lambda example: Sizes(planner=self.talks.cost(example)[1]),
            workload=counted(None, self.planner.text.config, again=recipe.recompute),
        )  # fmt: skip

    def groups(self) -> Groups:
        return planner_groups(self.planner)

    def keep_wide(self, name: str) -> bool:
        return False

    def micro(self, step: int, number: int) -> Micro:
        portion = self.batches.portion(step, number)
        content = self.talks.content([drawn.example for drawn in portion.own], [drawn.step for drawn in portion.own])
        counts = self.talks.counts([drawn.example for drawn in portion.examples])
        return Micro.of(portion, content, counts, content.batch.layout.cu_seqlens[portion.real])

    def losses(self, micro: Micro, step: int) -> Mapping[str, Tensor]:
        content: Content = micro.content
        share = micro.share or self._share
        with self._keeping("planner"):
            outputs = forward(self.planner, content.batch, content.draws, contexts=False, share=share)
        return planner_losses(self.planner, outputs, taken(micro.real, share, content.batch.layout.tokens))

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

    def content(self, examples: Sequence[Example], steps: int | Sequence[int]) -> Content:
        """Draws everything for examples at a step, or each at its own."""
        if isinstance(steps, int):
            steps = [steps] * len(examples)
        shown = tuple(dropped(self._recipe, example, step) for example, step in zip(examples, steps, strict=True))
        samples = [sample(self._opened.template, example, end=self._opened.end) for example in shown]
        if self._recipe.mask_ratio:
            alpha, beta = self._recipe.mask_ratio
            samples = [one if one.targets is None else replace(one, mask_ratio=(alpha, beta)) for one in samples]
        batch = pack(samples)
        seeds = [
            generator(self._recipe.seed, example.key, step, "mask") for example, step in zip(shown, steps, strict=True)
        ]
        return Content(shown, batch, draw(batch, self._width, seeds, copies=self._recipe.copies))

    def counts(self, examples: Sequence[Example]) -> dict[str, float]:
        answers, targets = (sum(map(kind, examples)) for kind in KINDS)
        return {name: float(n) for name, n in (("text", answers), ("visual", targets)) if n}
