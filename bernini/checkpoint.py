"""Checkpoint folders <-> modules: which tensors are an expert's, what its dimensions are, loading and saving.

Weights are safetensors, in one file or in shards with an index (:mod:`bernini.weights`), in the folders of
:mod:`bernini.layouts`. In raw exports and bundles an expert's tensors have a prefix, with ``ema.`` in front of it for
averaged weights, which are preferred.

Where a ``config.json`` and the tensors disagree about the dimensions, the tensors are right: one released checkpoint
was first published with another one's config.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .layouts import BUNDLE_CONFIGS, component_folder, read_layout, resolve
from .renderer.config import RendererConfig
from .renderer.model import KEEP_IN_FP32, Renderer
from .renderer.sampler import Experts, Which
from .weights import (
    CheckpointError,
    Stored,
    load_tensors,
    read_json,
    read_weights,
    some,
    stream_tensors,
    weight_files,
    write_json,
)

__all__ = [
    "WEIGHTS", "CheckpointError", "CheckpointWarning", "ExpertFiles", "ExpertSource", "component_folder",
    "load_experts", "load_renderer", "open_expert", "open_experts", "read_json", "read_layout", "resolve",
    "save_renderer", "stream_tensors", "weight_files", "write_json",
]  # fmt: skip

WEIGHTS = "diffusion_pytorch_model.safetensors"
PREFIXES: dict[Which, tuple[str, ...]] = {
    "high": ("diff_dec.transformer.", "transformer.", ""),
    "low": ("diff_dec.transformer_2.", "diff_dec_low.transformer_2.", "transformer_2.", ""),
}
"""What stands before an expert's tensor names (raw exports, bundles); ``ema.`` may stand before that."""
PARTS = ("patch_embedding", "condition_embedder", "blocks", "proj_out", "scale_shift_table")
"""First components of the transformer's own names."""


class CheckpointWarning(UserWarning):
    """Something about a checkpoint is wrong or strange, but it can be used."""


# --- tensors and dimensions -------------------------------------------------------------------------------------------


def expert_tensors(stored: Mapping[str, Stored], which: Which) -> dict[str, Stored]:
    """An expert's tensors under the model's own names; empty if there are none.

    The first of :data:`PREFIXES` that occurs is taken, and of each tensor the averaged copy (``ema.``) if there is one.
    What lies outside of the prefix belongs to other parts and is left out. Without prefix, everything is the expert's.
    """
    for prefix in PREFIXES[which]:
        plain = {name.removeprefix(prefix): s for name, s in stored.items() if name.startswith(prefix)}
        ema = f"ema.{prefix}"
        averaged = {name.removeprefix(ema): s for name, s in stored.items() if name.startswith(ema)}
        if any(name.split(".")[0] in PARTS for name in (*plain, *averaged)):
            # Without a prefix the plain names include the averaged ones.
            return {name: s for name, s in plain.items() if prefix or not name.startswith(ema)} | averaged
    return {}


def derive(
    tensors: Mapping[str, Stored], config: Mapping[str, Any]
) -> tuple[RendererConfig, dict[str, tuple[Any, Any]]]:
    """The dimensions of a transformer, from the shapes of its tensors.

    What shapes do not tell comes from ``config``, the contents of a ``config.json``. Heads are the width over
    ``attention_head_dim``, or over 128 if that does not divide it.

    Returns:
        the config, and for each setting that ``config`` states otherwise (what it states, what the tensors say).

    Raises:
        ValueError: settings that no renderer has.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def size(name: str, axis: int, ndim: int = 2) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] if len(shape) == ndim else None

    embedding = shapes.get("patch_embedding.weight", ())
    patch = embedding[2:] if len(embedding) == 5 and 0 not in embedding else None
    outputs = size("proj_out.weight", 0)
    blocks = {int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", name) for name in shapes) if match}
    found: dict[str, Any] = {
        "num_layers": min(max(blocks) + 1, len(shapes)) if blocks else None,  # at most what can be meant seriously
        "ffn_dim": size("blocks.0.ffn.net.0.proj.weight", 0),
        "in_channels": size("patch_embedding.weight", 1, 5),
        "out_channels": outputs // (patch[0] * patch[1] * patch[2]) if patch and outputs else None,
        "text_dim": size("condition_embedder.text_embedder.linear_1.weight", 1),
        "freq_dim": size("condition_embedder.time_embedder.linear_1.weight", 1),
        "patch_size": patch,
    }
    width = size("patch_embedding.weight", 0, 5)
    if width:
        head = config.get("attention_head_dim", RendererConfig.attention_head_dim)
        if type(head) is not int or head < 1 or width % head:
            head = RendererConfig.attention_head_dim
        if width % head:
            raise ValueError(f"a width of {width} is no multiple of the {head} values of a head")
        found |= {"num_attention_heads": width // head, "attention_head_dim": head}
    found = {key: value for key, value in found.items() if value}
    stated = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items() if v is not None}
    differing = {key: (stated[key], value) for key, value in found.items() if key in stated and stated[key] != value}
    merged = {**stated, **found}
    for setting in fields(RendererConfig):
        value = merged.get(setting.name, setting.default)
        if type(setting.default) in (int, float) and not (type(value) in (int, type(setting.default)) and value > 0):
            raise ValueError(f"{setting.name} must be a positive number, is {value!r}")
    sides = merged.get("patch_size", RendererConfig.patch_size)
    if type(sides) is not tuple or len(sides) != 3 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"patch_size must be three positive whole numbers, is {sides!r}")
    return RendererConfig.from_dict(merged), differing


@cache
def expected_shapes(config: RendererConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a renderer."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Renderer(config).named_parameters()}


def mismatches(tensors: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """How an expert's tensors differ from those its dimensions ask for: at most one message per kind."""

    def count(names: list[str], one: str, many: str) -> str:
        return f"{len(names)} {one if len(names) == 1 else many}"

    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    common = sorted(tensors.keys() & expected.keys())
    shaped = [name for name in common if tensors[name].shape != expected[name]]
    integer = [name for name in common if not tensors[name].is_floating]
    messages = []
    if missing:
        messages.append(f"{count(missing, 'tensor is', 'tensors are')} missing: {some(missing)}")
    if extra:
        messages.append(f"{count(extra, 'unexpected tensor', 'unexpected tensors')}: {some(extra)}")
    if shaped:
        first = f"{shaped[0]!r} is {list(tensors[shaped[0]].shape)}, expected {list(expected[shaped[0]])}"
        messages.append(f"{count(shaped, 'tensor has', 'tensors have')} a wrong shape: {first}")
    if integer:
        first = f"{integer[0]!r} is {tensors[integer[0]].dtype}"
        messages.append(f"{count(integer, 'tensor is', 'tensors are')} not of a known floating-point type: {first}")
    return messages


# --- experts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertSource:
    """One expert on disk: its files are there and complete, its weights are not loaded."""

    folder: Path
    config: RendererConfig
    tensors: dict[str, Stored]

    def load(self, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Renderer:
        """The expert in ``dtype`` except for the parts that stay float32 (``KEEP_IN_FP32``).

        Memory: the loaded weights and 16 MB.

        Raises:
            CheckpointError: a file cannot be read (any more).
        """
        with torch.device("meta"):
            model = Renderer(self.config)
        device = torch.device(device)

        def place(name: str) -> tuple[torch.dtype, torch.device]:
            kept = any(part in KEEP_IN_FP32 for part in name.split("."))
            return torch.float32 if kept else dtype, device

        for name, weight in load_tensors(self.tensors, place):
            _put(model, name, weight)
        return model.eval()


def _put(model: nn.Module, name: str, weight: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))


def open_expert(
    folder: str | Path, which: Which = "high", *, needs_config: bool = True, config_file: Path | None = None
) -> ExpertSource:
    """Checks an expert's folder by its config and its files' headers; reads no weights.

    Args:
        which: whose prefixes to look for in files that hold several parts.
        needs_config: whether ``config.json`` must be there. Raw exports have none for the transformer.
        config_file: where that config is, if not in the folder under that name (bundles).

    Warns:
        CheckpointWarning: ``config.json`` states other dimensions than the tensors have.

    Raises:
        CheckpointError: a file is missing or broken, or a tensor missing, unexpected or misshapen.
    """
    folder = Path(folder)
    file = folder / "config.json" if config_file is None else config_file
    config = read_json(file) if needs_config or file.is_file() else {}
    tensors = expert_tensors(read_weights(folder), which)
    if not tensors:
        raise CheckpointError(f"{folder}: its weights are not those of the {which}-noise expert of a renderer")
    try:
        derived, differing = derive(tensors, config)
        expected = expected_shapes(derived)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
    problems = mismatches(tensors, expected)
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")
    if differing:
        says = ", ".join(f"{key} {stated} (tensors: {found})" for key, (stated, found) in differing.items())
        warnings.warn(
            f"{file}: wrong dimensions, those of the tensors are used: {says}", CheckpointWarning, stacklevel=2
        )
    return ExpertSource(folder, derived, tensors)


@dataclass(frozen=True)
class ExpertFiles:
    """The experts of a checkpoint on disk, to be loaded one by one."""

    experts: dict[Which, ExpertSource]
    boundary: float
    """Timestep, in 0..1000: from here up ``high`` works, below ``low``."""
    dtype: torch.dtype
    device: str | torch.device

    @property
    def config(self) -> RendererConfig:
        return self.experts["high"].config

    @property
    def has_low(self) -> bool:
        """False where one expert, called ``high``, serves all timesteps."""
        return "low" in self.experts

    def load(self, which: Which) -> Renderer:
        """Reads an expert's weights; nothing is kept here, so it goes when the caller lets go of it.

        Raises:
            CheckpointError: a file cannot be read (any more); KeyError: no such expert.
        """
        return self.experts[which].load(dtype=self.dtype, device=self.device)


def open_experts(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> ExpertFiles:
    """Checks the experts of a checkpoint, in any layout that can be run; reads no weights.

    Warns:
        CheckpointWarning: wrong dimensions in a config; an expert that is alone where two may be meant.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing or wrong.
    """
    folder = Path(folder)
    layout = read_layout(folder)
    if layout.remark:
        warnings.warn(layout.remark, CheckpointWarning, stacklevel=2)
    bundle, needs_config = layout.kind == "bundle", layout.kind != "raw"
    for place in layout.experts.values():
        if not place.folder.is_dir():
            raise CheckpointError(f"{place.folder}: no such folder; the checkpoint is incomplete")
    experts = {
        role: open_expert(
            place.folder, place.which, needs_config=needs_config,
            config_file=folder / BUNDLE_CONFIGS[place.which] if bundle else None,
        )
        for role, place in layout.experts.items()
    }  # fmt: skip
    if "low" in experts:
        high, low = experts["high"].config, experts["low"].config
        for key in ("in_channels", "out_channels", "patch_size", "text_dim"):
            if getattr(high, key) != getattr(low, key):
                what = f"the experts do not fit together, their {key} are {getattr(high, key)} and {getattr(low, key)}"
                raise CheckpointError(f"{folder}: {what}")
    return ExpertFiles(experts, layout.boundary, dtype, device)


def load_experts(folder: str | Path, *, dtype: torch.dtype, device: str | torch.device) -> Experts:
    """All experts of a checkpoint, loaded; see :func:`open_experts`."""
    files = open_experts(folder, dtype=dtype, device=device)
    return Experts(files.load("high"), files.load("low") if files.has_low else None, files.boundary)


def load_renderer(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Renderer:
    """One expert from its own folder; see :func:`open_expert` and :meth:`ExpertSource.load`."""
    return open_expert(folder).load(dtype=dtype, device=device)


def save_renderer(model: Renderer, folder: str | Path) -> None:
    """Writes ``config.json`` and one safetensors file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model.config.to_dict())
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
