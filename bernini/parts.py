"""The parts of a checkpoint beside the experts: looked at, and loaded through the libraries they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bernini.parallel.share import Share

from .checkpoint import CheckpointError, read_json
from .geometry import MLLM_CONFIG, Geometry

if TYPE_CHECKING:
    from .planner.loading import PlannerSource
    from .planner.model import Planner
    from .planner.stage import PlannerStage
    from .planner.vision import VisionRules


def read_geometry(folder: Path, vae_file: Path, vae: Any, renderer: dict[str, Any]) -> Geometry:
    """From the parts' configs as they were loaded, and the checkpoint's own, which a raw export need not have."""
    root, mllm = (read_json(path) if path.is_file() else {} for path in (folder / "config.json", folder / MLLM_CONFIG))
    return Geometry.of(root, dict(vae), renderer, mllm, folder=folder, vae_file=vae_file)


def open_stage(
    folder: Path, attention: str, geometry: Geometry, share: Share
) -> tuple[PlannerSource, VisionRules, Callable[[Planner], PlannerStage]]:
    """Checks a bundle's planner, and loads nothing of it: its source, the rules of its vision tower, and what makes a
    stage of a loaded planner."""
    from transformers import AutoTokenizer

    from .planner.loading import MLLM_FOLDER, open_planner
    from .planner.model import qwen_configs
    from .planner.stage import PlannerStage
    from .planner.vision import VisionRules

    source = open_planner(folder)
    tokenizer = load_part(folder / MLLM_FOLDER, AutoTokenizer.from_pretrained)
    file = folder / MLLM_FOLDER / "preprocessor_config.json"
    try:
        rules = VisionRules.of(qwen_configs(source.config.mllm)[1], read_json(file) if file.is_file() else {})
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None

    def make(planner: Planner) -> PlannerStage:
        return PlannerStage(planner, tokenizer, rules, backend=attention, geometry=geometry, share=share)

    return source, rules, make


def load_part(folder: Path, load: Callable[..., Any], **options: Any) -> Any:
    """A library's ``from_pretrained`` on a local folder, its many errors turned into one that names the folder."""
    try:
        return load(str(folder), local_files_only=True, **options)
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({type(error).__name__}: {error})") from error
