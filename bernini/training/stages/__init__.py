"""The five things that can be trained, each a :class:`bernini.training.stage.Stage`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...parallel.mesh import Mesh, alone
from ..recipe import Recipe
from ..stage import Stage

if TYPE_CHECKING:
    from ...data.mixture import Mixture
    from ..models import Models


def make_stage(recipe: Recipe, device: str = "cpu", mesh: Mesh | None = None) -> Stage:
    """Opens the recipe's model and data.

    Args:
        device: where the models are put.
        mesh: the processes that train together; this one alone by default.

    Raises:
        UserError: one of them is missing or wrong.
    """
    from ..data import open_mixture
    from ..models import check_quality, open_models

    # Small things first: what is wrong with them is said before gigabytes are read.
    check_quality(recipe)
    mixture = open_mixture(recipe)
    return assemble(recipe, open_models(recipe, device), mixture, mesh)


def assemble(recipe: Recipe, models: Models, mixture: Mixture, mesh: Mesh | None = None) -> Stage:
    """A stage of models and data that are open."""
    from .joint import JointStage
    from .planner import PlannerStage
    from .renderer import RendererStage
    from .understanding import UnderstandingStage
    from .vae import VaeStage

    kinds: dict[str, Callable[[Recipe, Models, Mixture, Mesh], Stage]] = {
        "vae": VaeStage, "understanding": UnderstandingStage, "planner": PlannerStage, "renderer": RendererStage,
        "joint": JointStage,
    }  # fmt: skip
    return kinds[recipe.stage](recipe, models, mixture, mesh or alone())
