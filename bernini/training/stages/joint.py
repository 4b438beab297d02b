"""Stage III: planner and renderer together, with all three losses of equation 3 (paper section 4.1).

The renderer reads its text's states and behind them the planner's: of text, sources, and those target embeddings that
were not masked. Autoencoder and vision tower stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ...data.example import Example
from ...data.mixture import Mixture
from ...parallel.fsdp import Groups
from ...parallel.mesh import Mesh, alone
from ...parallel.share import Share
from ...planner.training import forward
from ...renderer.model import KEEP_IN_FP32
from ..draws import uniform
from ..export import Writer
from ..feed import Feed
from ..groups import planner_groups, renderer_groups, text_groups
from ..models import Models, recompute
from ..recipe import Recipe
from ..stage import Micro, portion, taken
from ..texts import full_prompt, text_states
from .planner import KINDS, Content, PlannerDraws, planner_losses
from .renderer import Item, LatentDraws, dit_losses


@dataclass(frozen=True)
class Both:
    """Items are of the examples with a target, in order; ``planned``: whether the renderer reads the plan of each."""

    talk: Content
    items: tuple[Item, ...]
    planned: tuple[bool, ...]


class JointStage:
    """Losses: ``text``, ``visual`` and ``dit``."""

    def __init__(self, recipe: Recipe, models: Models, mixture: Mixture, mesh: Mesh | None = None) -> None:
        assert models.renderer is not None and models.planner is not None and models.text is not None
        self._recipe, self.geometry, self._mesh = recipe, models.geometry, mesh or alone()
        self._share = Share(self._mesh.sequence)
        self.renderer, self.planner, self.text = models.renderer.model, models.planner.model, models.text
        self.planner.visual.requires_grad_(False)
        self.parts: Mapping[str, nn.Module] = {"planner": self.planner, "renderer": self.renderer}
        if recipe.train_text_encoder:
            self.parts = {**self.parts, "text_encoder": self.text.encoder.model.requires_grad_(True)}
        if recipe.recompute:
            recompute(self.planner.text.layers)
            recompute(self.renderer.blocks)
        self.weights = {"text": recipe.loss.text, "visual": recipe.loss.visual, "dit": recipe.loss.dit}
        self.talks, self.latents = PlannerDraws(recipe, models.planner), LatentDraws(recipe, models)
        self._feed = Feed(recipe, mixture, self._cost, self._usable)

    def groups(self) -> Groups:
        text = text_groups(self.text.encoder.model, trained=self._recipe.train_text_encoder)
        return planner_groups(self.planner) + renderer_groups(self.renderer) + text

    def keep_wide(self, name: str) -> bool:
        return any(part in KEEP_IN_FP32 for part in name.split("."))

    def _usable(self, example: Example) -> str | None:
        reason = self.talks.usable(example)
        return reason if reason or example.target is None else self.latents.usable(example)

    def _cost(self, example: Example) -> tuple[int, int]:
        return 0 if example.target is None else self.latents.cost(example)[0], self.talks.cost(example)[1]

    def micro(self, step: int, number: int) -> Micro:
        picked = self._feed.pick(step, number)
        own, real = portion(picked.examples, self._mesh, KINDS, lambda example: sum(self._cost(example)))
        talk = self.talks.content(own, step)
        made = [example for example in talk.examples if example.target is not None]
        items = tuple(
            Item(example, full_prompt(example.task, example.prompt), self.latents.sample(example, step))
            for example in made
        )
        seed, rate = self._recipe.seed, self._recipe.dropout.plan
        planned = tuple(uniform(seed, example.key, step, "plan") >= rate for example in made)
        counts = self.talks.counts(picked.examples)
        counts |= {"dit": counts["visual"]} if "visual" in counts else {}
        tokens = talk.batch.layout.cu_seqlens[real] + sum(self._cost(example)[0] for example in talk.examples[:real])
        keys = tuple(example.key for example in picked.examples)
        return Micro(Both(talk, items, planned), counts, tokens, keys, picked.skipped, real)

    def losses(self, micro: Micro, step: int) -> Mapping[str, Tensor]:
        both: Both = micro.content
        outputs = forward(self.planner, both.talk.batch, both.talk.draws, share=self._share)
        real = taken(micro.real, self._share, both.talk.batch.layout.tokens)
        found = planner_losses(self.planner, outputs, real)
        if both.items:
            states = text_states(self.text.encoder, [item.text for item in both.items])
            plans = [(p, g) for p, g in zip(outputs.contexts, outputs.given, strict=True) if p is not None]
            contexts = []
            for own, (plan, given), planned in zip(states, plans, both.planned, strict=True):
                read = plan if planned or given is None else plan[given.nonzero().flatten().to(plan.device)]
                contexts.append(self.text.encoder.context(own, read.to(own.dtype)))
            real = sum(example.target is not None for example in both.talk.examples[: micro.real])
            found["dit"] = dit_losses(self.renderer, both.items, contexts, real, self._share)
        return found

    def samples(self, folder: Path, step: int, model: Path) -> None:
        from ..pictures import write_samples

        write_samples(model, folder, step)

    def export(self, folder: Path, writer: Writer) -> None:
        writer(folder)
