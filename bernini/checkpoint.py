"""Checkpoint folders in the released Bernini-R layout <-> modules.

``config.json`` (``model_type: bernini_renderer``), ``transformer/`` and, for the two-expert models,
``transformer_2/`` (the high-noise and the low-noise expert), ``vae/``, ``text_encoder/``, ``tokenizer/``,
``scheduler/``. There is no ``model_index.json``. Weights are safetensors, in one file or in shards with an index.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import UserError
from .renderer.config import RendererConfig
from .renderer.model import KEEP_IN_FP32, Renderer
from .renderer.sampler import Experts

WEIGHTS = "diffusion_pytorch_model.safetensors"


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, not readable as JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is this a Bernini checkpoint folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those of its index, or the single one."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(read_json(indices[0]).get("weight_map", {}).values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{missing[0]}: named in {indices[0].name}, but there is no such file")
    if not files:
        raise CheckpointError(f"{folder}: holds no .safetensors weights")
    return files


def stream_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one at a time, memory-mapped: only the tensor at hand is resident."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118, a file is no mapping
                    yield name, handle.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged or not a safetensors file ({error})") from None


def fill(module: nn.Module, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype, device: str, where: str) -> None:
    """Gives a module built on the meta device its weights, each cast on its own.

    Raises:
        CheckpointError: a tensor is missing, unexpected or has another shape than the module's.
    """
    wanted = dict(module.named_parameters())
    for name, tensor in tensors:
        if name not in wanted:
            raise CheckpointError(f"{where}: unexpected tensor {name!r} {list(tensor.shape)}")
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(f"{where}: {name} is {list(tensor.shape)}, expected {list(wanted[name].shape)}")
        kept = any(part in name.split(".") for part in KEEP_IN_FP32)
        parent, _, leaf = name.rpartition(".")
        weight = tensor.to(device=device, dtype=torch.float32 if kept else dtype, copy=True)
        setattr(module.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
        del wanted[name]
    if wanted:
        raise CheckpointError(f"{where}: {len(wanted)} tensors are missing, the first is {min(wanted)!r}")


def load_renderer(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Renderer:
    """One expert from its folder, in ``dtype`` except for the parts that stay float32 (``KEEP_IN_FP32``)."""
    folder = Path(folder)
    config = RendererConfig.from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Renderer(config)
    fill(model, stream_tensors(weight_files(folder)), dtype, device, str(folder))
    return model.eval()


def save_renderer(model: Renderer, folder: str | Path) -> None:
    """Writes ``config.json`` and one safetensors file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model.config.to_dict())
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_experts(folder: str | Path, *, dtype: torch.dtype, device: str) -> Experts:
    """The transformers of a Bernini-R checkpoint, with the timestep at which they take turns."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "bernini_renderer":
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}, expected 'bernini_renderer'"
        )
    high = load_renderer(folder / "transformer", dtype=dtype, device=device)
    if config.get("skip_transformer_2", False):
        return Experts(high)
    low = load_renderer(folder / "transformer_2", dtype=dtype, device=device)
    return Experts(high, low, boundary=float(config.get("switch_dit_boundary", 0.875)) * 1000)
