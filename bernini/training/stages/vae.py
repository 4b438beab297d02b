"""Training of the video autoencoder: reconstruction, with a light pull of its posteriors towards unit variance."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint import component_folder
from ...data.example import Example, Features
from ...data.mixture import Mixture
from ...media import from_model, to_model
from ...weights import read_weights
from ..draws import generator
from ..export import write_model
from ..feed import Feed
from ..models import Models
from ..recipe import Recipe
from ..stage import Micro

MEASURED = 512
"""Videos from which the latents' mean and deviation are taken at the end."""


class VaeStage:
    """Losses: ``pixels`` and ``squares``, mean absolute and squared error of values in [-1, 1]; ``kl``, per value."""

    def __init__(self, recipe: Recipe, models: Models, mixture: Mixture) -> None:
        self._recipe, self._models = recipe, models
        self.model = models.vae
        self.parts: Mapping[str, nn.Module] = {"vae": self.model}
        self.weights = {"pixels": recipe.loss.pixels, "squares": recipe.loss.squares, "kl": recipe.loss.kl}
        self._feed = Feed(recipe, mixture, _frames, usable=_usable)

    def keep_wide(self, name: str) -> bool:
        return False

    def micro(self, step: int, number: int) -> Micro:
        picked = self._feed.pick(step, number)
        pixels = {example.key: _target(example.target) for example in picked.examples}
        frames = sum(x.shape[1] for x in pixels.values())
        return Micro(pixels, dict.fromkeys(self.weights, float(len(pixels))), frames, tuple(pixels), picked.skipped)

    def losses(self, micro: Micro, step: int) -> Mapping[str, Tensor]:
        sums: dict[str, list[Tensor]] = defaultdict(list)
        shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for key, pixels in micro.content.items():
            shapes[tuple(pixels.shape)].append(key)
        for keys in shapes.values():
            clean = torch.stack([micro.content[key] for key in keys]).to(self.model.device, self.model.dtype)
            posterior = self.model.encode(clean).latent_dist
            noise = torch.stack(
                [torch.randn(posterior.mean.shape[1:], generator=generator(self._recipe.seed, key, step, "posterior"))
                 for key in keys]
            )  # fmt: skip
            latent = posterior.mean + posterior.std * noise.to(posterior.mean)
            error = (self.model.decode(latent).sample - clean).flatten(1)
            sums["pixels"].append(error.abs().mean(1).sum())
            sums["squares"].append(error.square().mean(1).sum())
            sums["kl"].append(posterior.kl().sum() / posterior.mean[0].numel())
        return {name: torch.stack(parts).sum() for name, parts in sums.items()}

    def samples(self, folder: Path, step: int) -> None:
        """A few videos above their reconstructions."""
        from ...contact_sheet import contact_sheet

        rows = []
        for key, pixels in list(self.micro(0, 0).content.items())[:4]:
            clean = pixels[None].to(self.model.device, self.model.dtype)
            rebuilt = self.model.decode(self.model.encode(clean).latent_dist.mode()).sample[0]
            mse = float((rebuilt.clamp(-1, 1) - clean[0]).square().mean() / 4)
            rows += [(key, from_model(pixels)), (f"rebuilt, {-10 * math.log10(mse):.1f} dB", from_model(rebuilt))]
        folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, folder / f"{step:08d}.png", f"step {step}")

    def export(self, folder: Path) -> None:
        """With the mean and deviation of its latents per channel, which the renderer's latents are normalised by."""
        found: list[Tensor] = []
        step = 0
        while sum(len(x) for x in found) < MEASURED and step < MEASURED:
            for pixels in self.micro(step, 0).content.values():
                latent = self.model.encode(pixels[None].to(self.model.device, self.model.dtype)).latent_dist.mode()
                found.append(latent.transpose(0, 1).flatten(1).T.double().unsqueeze(0))
            step += 1
        values = torch.cat([x[0] for x in found])
        mean, std = values.mean(0), values.std(0)
        self.model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        place = component_folder(self._models.start, "vae")
        dtype = next(iter(read_weights(place).values())).torch_dtype
        stored = copy.deepcopy(self.model).to(dtype)
        write_model(self._models.start, folder, {}, {place.name: lambda path: stored.save_pretrained(str(path))})


def _frames(example: Example) -> tuple[int, int]:
    """What the budget of the renderer's tokens counts here."""
    assert example.target is not None and example.target.pixels is not None
    return len(example.target.pixels), 0


def _usable(example: object) -> str | None:
    target = getattr(example, "target", None)
    return "no target" if target is None else "no pixels" if target.pixels is None else None


def _target(features: Features | None) -> Tensor:
    assert features is not None and features.pixels is not None
    return to_model(features.pixels)
