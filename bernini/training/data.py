"""The data of a recipe, opened and checked against the models that will read them."""

from __future__ import annotations

from typing import Literal

from ..data.dataset import DataSet
from ..data.encoder import load_encoder
from ..data.features import check_features
from ..data.mixture import Mixture, Part
from ..data.opening import open_data
from ..data.world import TASKS
from ..errors import UserError
from . import recipe as recipes

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
        _, prints = load_encoder(recipe.model, parts=needs)
        for part, found in zip(recipe.data, data, strict=True):
            missing = [feature for feature in needs if feature not in found.parts]
            if missing:
                raise UserError(
                    f"{part.source} has no {missing[0].upper()} features; make them with: bernini data prepare "
                    f"{part.source} --model {recipe.model} --output DIR --parts {','.join(needs)}"
                )
            check_features(
                found,
                vae_fingerprint=prints.get("vae"),
                vit_fingerprint=prints.get("vit"),
                trust_unmarked=part.trust_unmarked,
            )
    return Mixture(
        [
            Part(found, part.weight, part.tasks, part.start, part.end, part.decay)
            for part, found in zip(recipe.data, data, strict=True)
        ]
    )


def _open(part: recipes.Part) -> DataSet:
    tasks = dict.fromkeys(part.tasks or TASKS, 1.0)
    return open_data(part.source, tasks=tasks, count=part.count * len(tasks), seed=part.first)
