"""Training of the video autoencoder: reconstruction, with a light pull of its posteriors towards unit variance."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint import component_folder
from ...data.encoder import load_vae
from ...data.example import Example, Features
from ...data.mixture import Mixture
from ...media import from_model, to_model
from ...parallel.fsdp import Groups
from ...parallel.mesh import Mesh, alone
from ...parallel.workload import Sizes
from ...weights import read_json, write_json
from ..batches import Batches, Drawn
from ..draws import generator
from ..export import Writer
from ..feed import Feed
from ..models import QUALITY, Models
from ..recipe import Recipe
from ..stage import Micro
from ..work import counted

FLOPS = 1e5
"""Of each value of a picture, about; but one term is to be fitted, so it does not matter."""
MEASURED = 256
"""Videos that are looked at in the end."""


class VaeStage:
    """Losses: ``pixels`` and ``squares``, mean absolute and squared error of values in [-1, 1]; ``kl``, per value."""

    def __init__(self, recipe: Recipe, models: Models, mixture: Mixture, mesh: Mesh | None = None) -> None:
        self._recipe, self._mesh, self.model = recipe, mesh or alone(), models.vae
        self.parts: Mapping[str, nn.Module] = {"vae": self.model}
        self.weights = {"pixels": recipe.loss.pixels, "squares": recipe.loss.squares, "kl": recipe.loss.kl}
        self.batches = Batches(
            recipe, Feed(recipe, mixture, _frames, usable=_usable), self._mesh,
            kinds=(_moves,), counts=self._counts, sizes=_sizes, splits=False, distinct=True,
            workload=counted(None, None, again=False, latent=FLOPS),
        )  # fmt: skip

    def keep_wide(self, name: str) -> bool:
        return False

    def micro(self, step: int, number: int) -> Micro:
        portion = self.batches.portion(step, number)
        pixels = [(drawn, _target(drawn.example.target)) for drawn in portion.own]
        frames = sum(len(x[0]) for _, x in pixels[: portion.real])
        return Micro.of(portion, pixels, self._counts([drawn.example for drawn in portion.examples]), frames)

    def _counts(self, examples: Sequence[Example]) -> dict[str, float]:
        return dict.fromkeys(self.weights, float(len(examples)))

    def _pixels(self, step: int) -> dict[str, Tensor]:
        """Of all examples of a step's first micro-batch."""
        return {example.key: _target(example.target) for example in self.batches.feed.pick(step, 0).examples}

    def losses(self, micro: Micro, step: int) -> Mapping[str, Tensor]:
        content: Sequence[tuple[Drawn, Tensor]] = micro.content
        sums: dict[str, list[Tensor]] = defaultdict(list)
        shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
        # Frames are not cut: of ranks with the same sequences the first one takes the losses.
        real = 0 if self._mesh.sequence.rank else micro.real
        for number, (_, pixels) in enumerate(content):
            shapes[tuple(pixels.shape)].append(number)
        for numbers in shapes.values():
            count = sum(number < real for number in numbers)  # they come before dummies
            clean = torch.stack([content[number][1] for number in numbers]).to(self.model.device, self.model.dtype)
            posterior = self.model.encode(clean).latent_dist
            noise = torch.stack(
                [torch.randn(posterior.mean.shape[1:], generator=self._draws(content[number][0])) for number in numbers]
            )
            latent = posterior.mean + posterior.std * noise.to(posterior.mean)
            error = (self.model.decode(latent).sample - clean).flatten(1)[:count]
            sums["pixels"].append(error.abs().mean(1).sum())
            sums["squares"].append(error.square().mean(1).sum())
            sums["kl"].append(posterior.kl()[:count].sum() / posterior.mean[0].numel())
        return {name: torch.stack(parts).sum() for name, parts in sums.items()}

    def _draws(self, drawn: Drawn) -> torch.Generator:
        return generator(self._recipe.seed, drawn.example.key, drawn.step, "posterior")

    def samples(self, folder: Path, step: int, model: Path) -> None:
        """A few videos above their reconstructions."""
        from ...contact_sheet import contact_sheet

        rows, vae = [], load_vae(model).model
        for key, pixels in list(self._pixels(0).items())[:4]:
            clean = pixels[None].to(vae.device, vae.dtype)
            rebuilt = vae.decode(vae.encode(clean).latent_dist.mode()).sample[0]
            mse = float((rebuilt.clamp(-1, 1) - clean[0]).square().mean() / 4)
            rows += [(key, from_model(pixels)), (f"rebuilt, {-10 * math.log10(mse):.1f} dB", from_model(rebuilt))]
        folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, folder / f"{step:08d}.png", f"step {step}")

    def groups(self) -> Groups:
        """None: it is small, and computes a few frames at a time."""
        return Groups()

    def export(self, folder: Path, writer: Writer) -> None:
        writer(folder, self.measure)

    @torch.no_grad()
    def measure(self, folder: Path) -> None:
        """Adds the mean and deviation of its latents per channel, which the renderer's latents are normalised by, and
        the PSNR of its reconstructions, to a checkpoint. Both are of examples that come after those of the training."""
        model, errors = load_vae(folder).model, list[float]()
        latents, spreads = list[Tensor](), list[Tensor]()
        step = self._recipe.steps
        while len(errors) < MEASURED:
            for pixels in self._pixels(step).values():
                clean = pixels[None].to(model.device, model.dtype)
                posterior = model.encode(clean).latent_dist
                error = model.decode(posterior.mode()).sample.clamp(-1, 1) - clean
                errors.append(float(error.square().mean()) / 4)
                latents.append(posterior.mean[0].flatten(1).T.double())
                spreads.append(posterior.var[0].flatten(1).T.double())
            step += 1
        means, variances = torch.cat(latents), torch.cat(spreads)
        deviation = (means.var(0) + variances.mean(0)).sqrt()  # of samples, which the renderer learns from
        psnr = sum(-10 * math.log10(max(error, 1e-12)) for error in errors) / len(errors)
        place = component_folder(folder, "vae")
        found = {"latents_mean": means.mean(0).tolist(), "latents_std": deviation.tolist()}
        write_json(place / "config.json", {**read_json(place / "config.json"), **found})
        write_json(place / QUALITY, {"psnr": round(psnr, 2), "videos": len(errors)})


def _frames(example: Example) -> tuple[int, int]:
    """What the budget of the renderer's tokens counts here."""
    assert example.target is not None and example.target.pixels is not None
    return len(example.target.pixels), 0


def _sizes(example: Example) -> Sizes:
    """Its values in place of tokens."""
    assert example.target is not None and example.target.pixels is not None
    return Sizes(latent=example.target.pixels.numel())


def _moves(example: Example) -> bool:
    """What goes through the convolutions over time."""
    return _frames(example)[0] > 1


def _usable(example: Example) -> str | None:
    if example.target is None:
        return "no target"
    return "no pixels" if example.target.pixels is None else None


def _target(features: Features | None) -> Tensor:
    assert features is not None and features.pixels is not None
    return to_model(features.pixels)
