"""Where things are in a checkpoint folder, and where the folder is.

``diffusers``: Bernini-R as published for diffusers. ``config.json`` (``model_type: bernini_renderer``),
``transformer/`` and ``transformer_2/`` (the high-noise and the low-noise expert), ``vae/``, ``text_encoder/``,
``tokenizer/``, ``scheduler/``; no ``model_index.json``. A model of one expert skips the other with
``skip_transformer_1`` or ``skip_transformer_2``; the one that is left serves all timesteps, whichever it is.

``raw``: the training export. ``bernini_renderer_high/`` and ``bernini_renderer_low/``, with the weights of other parts
among those of the expert. It has no other folders, and need not have a ``config.json``.

``bundle``: a full Bernini with its planner (``model_type: bernini``): ``bernini/`` holds the weights of all parts,
``mllm/`` the planner's config and tokenizer, ``transformer_config.json`` and ``transformer_2_config.json`` the experts'
dimensions, ``t5_text_encoder/`` and ``t5_tokenizer/`` the text parts. It, too, can skip an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .renderer.sampler import Which
from .weights import CheckpointError, read_json

BOUNDARY = 0.875
"""Share of the 1000 timesteps from which on the high-noise expert works, where no config says."""
DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt")
"""Files of a Hugging Face repository that are of use: configs, weights, tokenizers."""
CONFIGS = ("config.json", "transformer*config.json", "*/config.json")
"""Those of them that say what a checkpoint is; a few kilobytes."""
_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
BUNDLE_WEIGHTS = "bernini"
"""Folder of a bundle that holds the weights of all its parts."""
BUNDLE_CONFIGS: dict[Which, str] = {"high": "transformer_config.json", "low": "transformer_2_config.json"}


Kind = Literal["diffusers", "raw", "bundle"]


class ExpertPlace(NamedTuple):
    folder: Path
    which: Which
    """What its files call it: an expert that is alone plays ``high``, but may be stored as ``low``."""


@dataclass(frozen=True)
class Layout:
    """What a checkpoint folder says about itself."""

    kind: Kind
    model_type: str
    experts: dict[Which, ExpertPlace]
    """By the role they play. The folders need not exist."""
    boundary: float
    """Timestep, in 0..1000: from here up ``high`` works, below ``low``."""
    remark: str = ""
    """Something to warn about."""


def read_layout(folder: str | Path) -> Layout:
    """Finds out the layout of a checkpoint folder.

    Raises:
        CheckpointError: no folder, not a Bernini checkpoint, or settings that no checkpoint can have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    file = folder / "config.json"
    raw: dict[Which, Path] = {"high": folder / "bernini_renderer_high", "low": folder / "bernini_renderer_low"}
    present: list[Which] = [which for which, path in raw.items() if path.is_dir()]
    # A raw export need not have a config of its own; the folders' names say what it is.
    config = {"model_type": "bernini_renderer"} if present and not file.is_file() else read_json(file)
    model_type = config.get("model_type")
    bundle = model_type == "bernini"
    if not bundle and model_type != "bernini_renderer":
        if config.get("_class_name") == "WanTransformer3DModel":
            raise CheckpointError(f"{folder}: the folder of one expert; give the checkpoint folder above it")
        raise CheckpointError(f"{file}: model_type is {model_type!r}, expected 'bernini_renderer'")
    paths: dict[Which, Path] = raw if present else {"high": folder / "transformer", "low": folder / "transformer_2"}
    if bundle:
        present, paths = [], {"high": folder / BUNDLE_WEIGHTS, "low": folder / BUNDLE_WEIGHTS}
    skipped = {"high": config.get("skip_transformer_1"), "low": config.get("skip_transformer_2")}
    used: list[Which] = [which for which in paths if not skipped[which]]
    if not used:
        raise CheckpointError(f"{file}: skips both transformers")
    remark = ""
    if present and used != present and not file.is_file():
        used = present
        remark = f"{folder}: only {raw[present[0]].name} is here, so this expert serves all timesteps"
    roles: tuple[Which, ...] = ("high", "low")
    experts = {role: ExpertPlace(paths[which], which) for role, which in zip(roles, used, strict=False)}
    kind: Kind = "bundle" if bundle else "raw" if present else "diffusers"
    return Layout(kind, str(model_type), experts, _boundary(config, file), remark)


def _boundary(config: Mapping[str, Any], file: Path) -> float:
    share = config.get("switch_dit_boundary")
    share = BOUNDARY if share is None else share
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise CheckpointError(f"{file}: switch_dit_boundary must be a number from 0 to 1, is {share!r}")
    return float(share) * 1000


def has_planner(model: str | Path) -> bool:
    """Whether this is a full Bernini, by its ``config.json`` alone. False if that cannot be had: what is wrong with a
    checkpoint is said when it is opened."""
    folder = config_folder(model, ("config.json",))
    try:
        return folder is not None and read_json(folder / "config.json").get("model_type") == "bernini"
    except CheckpointError:
        return False


def config_folder(model: str | Path, patterns: Sequence[str] = CONFIGS) -> Path | None:
    """A folder with a checkpoint's configs, of a repository fetched without anything else; ``None`` if it cannot be
    had."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(_REPOSITORY, str(model)):
        return None
    try:
        return _download(str(model), list(patterns))
    except CheckpointError:
        return None


def component_folder(root: str | Path, name: str) -> Path:
    """The folder of a part beside the experts: ``vae``, ``text_encoder``, ``tokenizer`` or ``scheduler``.

    Full bundles call the text parts ``t5_text_encoder`` and ``t5_tokenizer``; those are found, too.

    Raises:
        CheckpointError: the checkpoint does not have this part.
    """
    root = Path(root)
    for folder in (root / name, root / f"t5_{name}"):
        if folder.is_dir() and any(folder.iterdir()):
            return folder
    if (root / "bernini_renderer_high").is_dir() or (root / "bernini_renderer_low").is_dir():
        why = "a raw export holds the experts only; take the other parts from a Bernini-R-Diffusers checkpoint"
    else:
        why = "the checkpoint is incomplete" if root.is_dir() else "there is no such checkpoint"
    raise CheckpointError(f"{root / name}: no such folder, or it is empty; {why}")


def resolve(model: str | Path, *, parts: Sequence[str] | None = None) -> Path:
    """A checkpoint folder from what a person wrote: the folder itself, or ``owner/name`` on Hugging Face.

    A repository is fetched into Hugging Face's cache, or found there.

    Args:
        parts: fetch only these folders of a repository (and what lies at its top), e.g. ``("vae", "tokenizer")``.

    Raises:
        CheckpointError: no such folder, or the repository cannot be had.
    """
    folder, name = Path(model).expanduser(), str(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: a file; a checkpoint is a folder")
    if not re.fullmatch(_REPOSITORY, name):
        raise CheckpointError(f"{folder}: no such folder")
    if parts is None:
        return _download(name, list(DOWNLOADED))
    folders = [name for part in parts for name in (part, f"t5_{part}")]  # as in component_folder
    return _download(name, ["config.json", *(f"{folder}/{end}" for folder in folders for end in DOWNLOADED)])


def _download(name: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except errors.GatedRepoError:
        why = "its owner grants access on request; ask for it on its page, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "neither a folder here nor a repository on Hugging Face that you may read"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "no such folder here; Hugging Face cannot be reached, and the repository is not in its cache"
    except Exception as error:  # a download fails in many ways, of several libraries
        text = " ".join(str(error).split())  # the hub's messages have several lines
        why = f"cannot be fetched from Hugging Face ({type(error).__name__}: {text})"
    raise CheckpointError(f"{name}: {why}")
