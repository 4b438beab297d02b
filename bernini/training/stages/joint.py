"""Stage III: planner and renderer together, with all three losses of equation 3 (paper section 4.1).

The renderer reads its text's states and behind them the planner's: of text, sources, and those target embeddings that
were not masked. Autoencoder and vision tower stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...data.example import Example
from ...data.mixture import Mixture
from ...parallel.fsdp import Groups
from ...parallel.mesh import Mesh, alone
from ...parallel.policy import Policy
from ...parallel.share import Share
from ...parallel.workload import Sizes
from ...planner.training import forward
from ...renderer.model import KEEP_IN_FP32
from ..batches import Batches
from ..draws import uniform
from ..export import Writer
from ..feed import Feed
from ..groups import planner_groups, renderer_groups, text_groups
from ..keeping import Keeping
from ..models import Models
from ..recipe import Recipe
from ..stage import Micro, taken
from ..texts import full_prompt, text_states
from ..work import counted
from .planner import KINDS, Content, PlannerDraws, planner_losses
from .renderer import Item, LatentDraws, dit_losses


@dataclass(frozen=True)
class Both:
    """Items are of the examples with a target, in order; ``planned``: whether the renderer reads the plan of each."""

    talk: Content
    items: tuple[Item, ...]
    planned: tuple[bool, ...]


class JointStage:
    """Losses: ``text``, ``visual`` and ``dit``; of a planner that is not trained, ``dit`` alone."""

    def __init__(self, recipe: Recipe, models: Models, mixture: Mixture, mesh: Mesh | None = None) -> None:
        assert models.renderer is not None and models.planner is not None and models.text is not None
        self._recipe, self.geometry, self._mesh = recipe, models.geometry, mesh or alone()
        self._share = Share(self._mesh.sequence, policy=Policy(self._recipe.swap))
        self.renderer, self.planner, self.text = models.renderer.model, models.planner.model, models.text
        self.planner.visual.requires_grad_(False)
        if not recipe.train_planner:
            self.planner.requires_grad_(False)
        self.parts: Mapping[str, nn.Module] = {"planner": self.planner, "renderer": self.renderer}
        if recipe.train_text_encoder:
            self.parts = {**self.parts, "text_encoder": self.text.encoder.model.requires_grad_(True)}
        layers = self.planner.text.layers  # the last one is for answers
        self._keeping = Keeping(recipe, planner=layers[:-1], renderer=self.renderer.blocks, sometimes=layers[-1:])
        self.weights = {"text": recipe.loss.text, "visual": recipe.loss.visual, "dit": recipe.loss.dit}
        if not recipe.train_planner:
            self.weights = {"dit": recipe.loss.dit}
        self.talks, self.latents = PlannerDraws(recipe, models.planner), LatentDraws(recipe, models)
        self.batches = Batches(
            recipe, Feed(recipe, mixture, self._cost, self._usable), self._mesh,
            kinds=KINDS if recipe.train_planner else (), counts=self._counts, sizes=self._sizes,
            workload=counted(
                self.renderer.config, self.planner.text.config, again=recipe.recompute
            ),
        )  # fmt: skip

    def groups(self) -> Groups:
        text = text_groups(self.text.encoder.model, trained=self._recipe.train_text_encoder)
        return planner_groups(self.planner) + renderer_groups(self.renderer) + text

    def keep_wide(self, name: str) -> bool:
        return any(part in KEEP_IN_FP32 for part in name.split("."))

    def _usable(self, example: Example) -> str | None:
        reason = self.talks.usable(example)
        if example.target is None and not self._recipe.train_planner:
            return "no target, and the planner is not trained"
        return reason if reason or example.target is None else self.latents.usable(example)

    def _cost(self, example: Example) -> tuple[int, int]:
        return 0 if example.target is None else self.latents.cost(example)[0], self.talks.cost(example)[1]

    def _sizes(self, example: Example) -> Sizes:
        """The renderer reads its text and about all that the planner read."""
        drawn, talk = self._cost(example)
        return Sizes(drawn, self.text.encoder.tokens + talk if drawn else 0, talk)

    def _counts(self, examples: Sequence[Example]) -> dict[str, float]:
        counts = self.talks.counts(examples)
        counts = counts | ({"dit": counts["visual"]} if "visual" in counts else {})
        return {name: count for name, count in counts.items() if name in self.weights}

    def micro(self, step: int, number: int) -> Micro:
        portion = self.batches.portion(step, number)
        steps = [drawn.step for drawn in portion.own]
        talk = self.talks.content([drawn.example for drawn in portion.own], steps)
        made = [
            (example, step) for example, step in zip(talk.examples, steps, strict=True) if example.target is not None
        ]
        items = tuple(
            Item(example, full_prompt(example.task, example.prompt), self.latents.sample(example, step))
            for example, step in made
        )
        seed, rate = self._recipe.seed, self._recipe.dropout.plan
        planned = tuple(uniform(seed, example.key, step, "plan") >= rate for example, step in made)
        real = talk.examples[: portion.real]
        tokens = talk.batch.layout.cu_seqlens[portion.real] + sum(self._cost(example)[0] for example in real)
        counts = self._counts([drawn.example for drawn in portion.examples])
        return Micro.of(portion, Both(talk, items, planned), counts, tokens)

    def losses(self, micro: Micro, step: int) -> Mapping[str, Tensor]:
        both: Both = micro.content
        share = micro.share or self._share
        trained, found = self._recipe.train_planner, dict[str, Tensor]()
        with self._keeping("planner") if trained else torch.no_grad():
            outputs = forward(self.planner, both.talk.batch, both.talk.draws, share=share)
        if trained:
            real = taken(micro.real, share, both.talk.batch.layout.tokens)
            found |= planner_losses(self.planner, outputs, real)
        if both.items:
            states = text_states(self.text.encoder, [item.text for item in both.items])
            plans = [(p, g) for p, g in zip(outputs.contexts, outputs.given, strict=True) if p is not None]
            contexts = []
            for own, (plan, given), planned in zip(states, plans, both.planned, strict=True):
                read = plan if planned or given is None else plan[given.nonzero().flatten().to(plan.device)]
                contexts.append(self.text.encoder.context(own, read.to(own.dtype)))
            real = sum(example.target is not None for example in both.talk.examples[: micro.real])
            with self._keeping("renderer"):
                found["dit"] = dit_losses(self.renderer, both.items, contexts, real, share)
        return found

    def samples(self, folder: Path, step: int, model: Path) -> None:
        from ..pictures import write_samples

        write_samples(model, folder, step)

    def export(self, folder: Path, writer: Writer) -> None:
        writer(folder)
