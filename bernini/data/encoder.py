"""The models of a checkpoint that make features, loaded without its other parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bernini.errors import UserError
from bernini.geometry import Geometry
from bernini.layouts import component_folder, has_planner, resolve
from bernini.renderer.vae import VideoAutoencoder
from bernini.weights import CheckpointError, load_tensors, read_json

from .features import PARTS, FeatureEncoder, See, vae_fingerprint, vit_fingerprint


def load_encoder(
    model: str | Path, *, parts: Sequence[str] = PARTS, device: str = "cpu", dtype: torch.dtype = torch.float32,
    batch: int = 16,
) -> tuple[FeatureEncoder, dict[str, str]]:  # fmt: skip
    """The VAE (float32) and the vision tower (``dtype``) of a checkpoint.

    Args:
        model: a folder, or a Hugging Face repository.
        parts: which of ``"vae"`` and ``"vit"``.

    Returns:
        the encoder, and the fingerprint of each part.

    Raises:
        CheckpointError: a part is missing or wrong. UserError: the vision tower is wanted of a checkpoint without one.
    """
    if not parts or set(parts) - set(PARTS):
        raise UserError(f"parts are {' and '.join(PARTS)}, got {', '.join(parts) or 'none'}")
    if "vit" in parts and not has_planner(model):
        resolve(str(model), parts=("vae",))  # raises where there is nothing at all
        raise UserError(f"{model}: has no planner, whose vision tower is wanted; --parts vae makes do without")
    folder = resolve(str(model)) if "vit" in parts else resolve(str(model), parts=("vae",))
    geometry = Geometry.read(folder)

    def frames_for_vit(frames: int, fps: float) -> list[int]:
        return geometry.frame_indices(frames, fps, fps, frames, "full_vit")

    encoder = FeatureEncoder(frames_for_vit=frames_for_vit, stride=geometry.pixel_stride, device=device, batch=batch)
    found: dict[str, str] = {}
    if "vae" in parts:
        vae = load_vae(folder, device)
        encoder, found["vae"] = replace(encoder, vae=vae), vae_fingerprint(vae)
    if "vit" in parts:
        visual, see, rules = _vision(folder, device, dtype)
        encoder, found["vit"] = replace(encoder, see=see, rules=rules), vit_fingerprint(visual, rules)
    return encoder, found


def load_vae(folder: Path, device: str = "cpu") -> VideoAutoencoder:
    """The autoencoder of a checkpoint, in float32.

    Raises:
        CheckpointError: it is missing or wrong.
    """
    from diffusers import AutoencoderKLWan

    place = component_folder(folder, "vae")
    try:
        model = AutoencoderKLWan.from_pretrained(str(place), local_files_only=True, torch_dtype=torch.float32)
    except Exception as error:  # it raises what its many files raise
        raise CheckpointError(f"{place}: cannot be loaded ({type(error).__name__}: {error})") from None
    return VideoAutoencoder(model.to(device).eval())


def _vision(folder: Path, device: str, dtype: torch.dtype) -> tuple[nn.Module, See, Any]:
    """The vision tower, what sees with it, and the rules of its pictures."""
    from bernini.planner.loading import MLLM_FOLDER, empty_planner, open_planner
    from bernini.planner.vision import VisionRules

    source = open_planner(folder)
    planner = empty_planner(source.config, understanding=False)
    tensors = {name: tensor for name, tensor in source.tensors.items() if name.startswith("visual.")}
    for name, weight in load_tensors(tensors, lambda name: (dtype, torch.device(device))):
        parent, _, leaf = name.rpartition(".")
        setattr(planner.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
    planner.visual.to(device).eval()
    planner.mask_tokens = nn.Parameter(planner.mask_tokens.to(dtype), requires_grad=False)  # tells the planner's dtype
    file = folder / MLLM_FOLDER / "preprocessor_config.json"
    rules = VisionRules.of(planner.vision_config, read_json(file) if file.is_file() else {})
    return planner.visual, planner.see, rules
