"""The data of a recipe, opened and checked against the models that will read them."""

from __future__ import annotations

from typing import Literal

from ..checkpoint import resolve
from ..data.dataset import DataSet
from ..data.features import check_features, vae_fingerprint, vit_fingerprint
from ..data.mixture import Mixture, Part
from ..data.parquet import ParquetData
from ..data.worlds import WorldData
from ..errors import UserError
from . import recipe as recipes
from .models import open_trained_planner, open_vae

FEATURES: dict[recipes.StageName, tuple[Literal["vae", "vit"], ...]] = {
    "vae": (), "understanding": (), "planner": ("vit",), "renderer": ("vae",), "joint": ("vae", "vit"),
}  # fmt: skip
"""What a stage reads instead of pixels."""


def open_mixture(recipe: recipes.Recipe) -> Mixture:
    """
    Raises:
        UserError: data that are missing or broken, without these features, or with those of another model.
    """
    data = [_open(part) for part in recipe.data]
    needs = FEATURES[recipe.stage]
    if needs:
        model = resolve(recipe.model)
        vae = vae_fingerprint(open_vae(model)) if "vae" in needs else None
        vit = None
        if "vit" in needs:
            planner = open_trained_planner(model)
            vit = vit_fingerprint(planner.model.visual, planner.rules)
        for part, found in zip(recipe.data, data, strict=True):
            missing = [feature for feature in needs if feature not in found.parts]
            if missing:
                raise UserError(
                    f"{part.source} has no {missing[0].upper()} features; make them with: bernini data prepare "
                    f"{part.source} --model {model} --output DIR --parts {','.join(needs)}"
                )
            check_features(found, vae_fingerprint=vae, vit_fingerprint=vit, trust_unmarked=part.trust_unmarked)
    return Mixture(
        [
            Part(found, part.weight, part.tasks, part.start, part.end, part.decay)
            for part, found in zip(recipe.data, data, strict=True)
        ]
    )


def _open(part: recipes.Part) -> DataSet:
    if part.source == "world":
        from ..data.world import TASKS

        return WorldData(dict.fromkeys(part.tasks or TASKS, part.count), seed0=part.first)
    return ParquetData(part.source)
