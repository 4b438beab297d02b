"""Stage II: the renderer, and with a switch its text encoder, by flow matching (paper section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...data.example import Example, Features
from ...data.mixture import Mixture
from ...parallel.fsdp import Groups
from ...parallel.mesh import Mesh, alone
from ...parallel.policy import Policy
from ...parallel.share import ALONE, Share
from ...parallel.workload import Sizes
from ...renderer.latents import patch_grid
from ...renderer.model import KEEP_IN_FP32, Renderer
from ..batches import Batches
from ..draws import generator
from ..export import Writer
from ..feed import Feed, dropped
from ..flow import RendererSample, pack_renderer, renderer_losses, sample_latent
from ..groups import renderer_groups, text_groups
from ..keeping import Keeping
from ..models import Models
from ..noise import expert_range, timesteps_for
from ..recipe import Recipe
from ..stage import Micro, taken
from ..texts import full_prompt, text_states
from ..work import counted


@dataclass(frozen=True)
class Item:
    """An example with everything random drawn; its context comes from the models."""

    example: Example
    text: str
    sample: RendererSample


class RendererStage:
    """Loss: ``dit``."""

    def __init__(self, recipe: Recipe, models: Models, mixture: Mixture, mesh: Mesh | None = None) -> None:
        assert models.renderer is not None and models.text is not None
        self._recipe, self.geometry, self._mesh = recipe, models.geometry, mesh or alone()
        self._share = Share(self._mesh.sequence, policy=Policy(self._recipe.swap))
        self.renderer, self.text = models.renderer.model, models.text
        self.latents = LatentDraws(recipe, models)
        self.parts: Mapping[str, nn.Module] = {"renderer": self.renderer}
        if recipe.train_text_encoder:
            self.parts = {**self.parts, "text_encoder": self.text.encoder.model.requires_grad_(True)}
        self._keeping = Keeping(recipe, renderer=self.renderer.blocks)
        self.weights = {"dit": recipe.loss.dit}
        self.batches = Batches(
            recipe, Feed(recipe, mixture, self.latents.cost, self.latents.usable), self._mesh,
            kinds=(), counts=_counts, sizes=self._sizes,
            workload=counted(self.renderer.config, None, again=recipe.recompute),
        )  # fmt: skip

    def _sizes(self, example: Example) -> Sizes:
        return Sizes(renderer=self.latents.cost(example)[0], context=self.text.encoder.tokens)

    def groups(self) -> Groups:
        text = text_groups(self.text.encoder.model, trained=self._recipe.train_text_encoder)
        return renderer_groups(self.renderer) + text

    def keep_wide(self, name: str) -> bool:
        return any(part in KEEP_IN_FP32 for part in name.split("."))

    def micro(self, step: int, number: int) -> Micro:
        portion = self.batches.portion(step, number)
        items = [self.latents.item(drawn.example, drawn.step) for drawn in portion.own]
        tokens = sum(self.latents.cost(drawn.example)[0] for drawn in portion.own[: portion.real])
        return Micro.of(portion, items, _counts([drawn.example for drawn in portion.examples]), tokens)

    def losses(self, micro: Micro, step: int) -> Mapping[str, Tensor]:
        items: Sequence[Item] = micro.content
        states = text_states(self.text.encoder, [item.text for item in items])
        contexts = [self.text.encoder.context(rows) for rows in states]
        with self._keeping("renderer"):
            return {"dit": dit_losses(self.renderer, items, contexts, micro.real, micro.share or self._share)}

    def samples(self, folder: Path, step: int, model: Path) -> None:
        from ..pictures import write_samples

        write_samples(model, folder, step)

    def export(self, folder: Path, writer: Writer) -> None:
        writer(folder)


def dit_losses(
    renderer: Renderer, items: Sequence[Item], contexts: Sequence[Tensor], real: int, share: Share = ALONE
) -> Tensor:
    """The sum over the first ``real`` items, each under its context, or this rank's part of it."""
    samples = [replace(item.sample, context=context) for item, context in zip(items, contexts, strict=True)]
    batch = pack_renderer(samples, renderer.config.patch_size, share).to(renderer.device)
    return renderer_losses(renderer, batch, share)[: taken(real, share, batch.layout.tokens)].sum()


def _counts(examples: Sequence[Example]) -> dict[str, float]:
    return {"dit": float(len(examples))}


class LatentDraws:
    """The renderer's side of an example: latents drawn from their posteriors, noise and its level."""

    def __init__(self, recipe: Recipe, models: Models) -> None:
        assert models.renderer is not None
        self._recipe, self._patch = recipe, models.renderer.model.config.patch_size
        self._mean, self._std = models.latents_mean, models.latents_std
        expert = "both" if recipe.expert == "only" else recipe.expert
        low, high = expert_range(expert, models.renderer.boundary / 1000)
        self._range = (max(low, recipe.noise.low), min(high, recipe.noise.high))

    def usable(self, example: Example) -> str | None:
        if example.target is None:
            return "no target"
        if any(picture.vae_mean is None or picture.vae_logvar is None for picture in example.visuals):
            return "no VAE features"
        return None

    def cost(self, example: Example) -> tuple[int, int]:
        """(tokens of sources and target, 0)."""
        return sum(self._tokens(picture) for picture in example.visuals), 0

    def _tokens(self, picture: Features) -> int:
        assert picture.vae_mean is not None
        t, h, w = patch_grid(tuple(picture.vae_mean.shape), self._patch)
        return t * h * w

    def item(self, example: Example, step: int) -> Item:
        """Draws everything for an example at a step."""
        example = dropped(self._recipe, example, step)
        return Item(example, full_prompt(example.task, example.prompt), self.sample(example, step))

    def sample(self, example: Example, step: int) -> RendererSample:
        seed, key = self._recipe.seed, example.key
        sources = tuple(self._latent(source, step, key, str(n)) for n, source in enumerate(example.sources))
        assert example.target is not None
        target = self._latent(example.target, step, key, "target")
        levels = timesteps_for(example.task, table=self._recipe.noise.table, low=self._range[0], high=self._range[1])
        sigma, timestep = levels.draw(generator(seed, key, step, "timestep"))
        noise = torch.randn(target.shape, generator=generator(seed, key, step, "noise"), dtype=target.dtype)
        nothing = target.new_empty((1, 0))
        return RendererSample(sources, target, nothing, float(sigma), float(timestep), noise)

    def _latent(self, picture: Features, step: int, key: str, which: str) -> Tensor:
        assert picture.vae_mean is not None and picture.vae_logvar is not None
        draws = generator(self._recipe.seed, key, step, "posterior", which)
        return sample_latent(picture.vae_mean.float(), picture.vae_logvar.float(), draws, self._mean, self._std)
