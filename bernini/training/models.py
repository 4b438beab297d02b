"""A checkpoint's models, opened for training, and where their tensors came from, so that they can be written back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..checkpoint import ExpertSource, component_folder, open_experts, read_json, resolve
from ..data.encoder import load_vae
from ..errors import UserError
from ..geometry import Geometry
from ..renderer.model import Renderer
from ..renderer.text import TextEncoder
from .recipe import Recipe, StageName

if TYPE_CHECKING:
    from ..planner.loading import PlannerSource
    from ..planner.model import Planner
    from ..planner.prompt import Template
    from ..planner.vision import VisionRules

QUALITY = "reconstruction.json"
"""Beside an autoencoder's weights: what its training found out about it."""
NEEDS: dict[StageName, tuple[str, ...]] = {
    "vae": ("vae",),
    "understanding": ("planner",),
    "planner": ("planner",),
    "renderer": ("renderer", "text"),
    "joint": ("planner", "renderer", "text"),
}
"""What a stage works with."""


@dataclass
class TrainedRenderer:
    """One expert. ``boundary``: the timestep from which on the expert for much noise works, 0 to 1000."""

    model: Renderer
    boundary: float = 875.0
    source: ExpertSource | None = None


@dataclass
class TrainedPlanner:
    """A planner with all that next-token logits need, its template and the rules of its vision tower.

    Args:
        end: the token that an answer ends with.
    """

    model: Planner
    template: Template
    rules: VisionRules
    end: int | None = None
    source: PlannerSource | None = None


@dataclass
class TrainedText:
    """The renderer's text encoder."""

    encoder: TextEncoder


@dataclass
class Models:
    """Those that a stage needs; the others are ``None``.

    Args:
        start: folder of the checkpoint that the run starts from.
        latents_mean, latents_std: of the autoencoder, per channel.
    """

    start: Path
    geometry: Geometry
    renderer: TrainedRenderer | None = None
    planner: TrainedPlanner | None = None
    text: TrainedText | None = None
    vae: Any = None
    latents_mean: Sequence[float] = ()
    latents_std: Sequence[float] = ()


def open_models(recipe: Recipe, device: str = "cpu") -> Models:
    """What the recipe's stage needs of its model, in float32.

    Raises:
        UserError: the checkpoint is missing or broken, or has not the expert that is named.
    """
    start, needs = resolve(recipe.model), NEEDS[recipe.stage]
    geometry = Geometry.read(start)
    config = vae_config(start)
    models = Models(
        start, geometry, latents_mean=config.get("latents_mean", ()), latents_std=config.get("latents_std", ())
    )
    if "vae" in needs:
        models.vae = load_vae(start, device).model.requires_grad_(True).train()
    if "renderer" in needs:
        models.renderer = _open_renderer(start, recipe.expert, device)
    if "planner" in needs:
        models.planner = open_trained_planner(start, device)
    if "text" in needs:
        models.text = _open_text(start, geometry, device)
    return models


def _open_renderer(folder: Path, expert: str, device: str) -> TrainedRenderer:
    files = open_experts(folder)
    if (expert == "only") == files.has_low:
        has = "two experts: expert must be 'high' or 'low'" if files.has_low else "one expert: expert must be 'only'"
        raise UserError(f"{folder} has {has}, and the recipe says {expert!r}")
    source = files.experts["low" if expert == "low" else "high"]
    return TrainedRenderer(source.load(device=device).requires_grad_(True), files.boundary, source)


def open_trained_planner(folder: Path, device: str = "cpu") -> TrainedPlanner:
    """
    Raises:
        CheckpointError: the checkpoint has no planner, or a broken one.
    """
    from transformers import AutoTokenizer

    from ..planner.loading import MLLM_FOLDER, open_planner
    from ..planner.prompt import Template
    from ..planner.vision import VisionRules

    source = open_planner(folder)
    model = source.load(understanding=True, device=device).requires_grad_(True)
    tokenizer = AutoTokenizer.from_pretrained(str(folder / MLLM_FOLDER), local_files_only=True)
    file = folder / MLLM_FOLDER / "preprocessor_config.json"
    rules = VisionRules.of(model.vision_config, read_json(file) if file.is_file() else {})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return TrainedPlanner(model, Template(tokenizer, model.ticks), rules, end, source)


def _open_text(folder: Path, geometry: Geometry, device: str) -> TrainedText:
    from transformers import AutoTokenizer, UMT5EncoderModel

    place = component_folder(folder, "text_encoder")
    model = UMT5EncoderModel.from_pretrained(str(place), local_files_only=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(component_folder(folder, "tokenizer")), local_files_only=True)
    model = model.requires_grad_(False).to(device).eval()
    return TrainedText(TextEncoder(tokenizer, model, geometry.text_tokens))


def check_quality(recipe: Recipe) -> None:
    """
    Raises:
        UserError: the recipe asks for a better autoencoder than the one of its model.
    """
    start, least = resolve(recipe.model), recipe.least_psnr
    if least > 0:
        file = component_folder(start, "vae") / QUALITY
        found = read_json(file).get("psnr") if file.is_file() else None
        if not isinstance(found, int | float) or found < least:
            has = "does not say how well it reconstructs" if found is None else f"reconstructs to {found} dB"
            raise UserError(
                f"{start}: its autoencoder {has}, and the recipe asks for {least:g} dB (least_psnr); train it longer"
            )


def vae_config(folder: Path) -> dict[str, Any]:
    return read_json(component_folder(folder, "vae") / "config.json")


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Keeps only the inputs of blocks for backward, which computes the rest again (activation checkpointing)."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
