"""Parts of a checkpoint with their blocks left in its files: what :class:`bernini.offload.weights.WeightStream` needs.

What does not belong to a block (embeddings, heads, norms) is loaded. Files are mapped, not read: their pages belong to
the system. A GPU copies faster and beside its computation from page-locked memory, so there the blocks go into an arena
if the machine has twice their size to spare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bernini.offload.weights import MappedFile, Weight, WeightStream, in_arena, window_bytes

from ..checkpoint import ExpertSource
from ..planner.loading import IDENTIFYING, PlannerSource, empty_planner
from ..planner.model import Planner
from ..planner.plan_file import identity
from ..renderer.model import KEEP_IN_FP32, Renderer
from ..weights import CheckpointError, Stored, load_tensors, read_weights

DtypeOf = Callable[[str], torch.dtype]
"""Of a parameter on the device, by its name."""
EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight")
"""UMT5's names of one tensor; a file may have either or both."""


def expert_dtype(dtype: torch.dtype) -> DtypeOf:
    return lambda name: torch.float32 if any(part in KEEP_IN_FP32 for part in name.split(".")) else dtype


def text_dtype(model: Any, dtype: torch.dtype) -> DtypeOf:
    """As ``from_pretrained`` chooses: some layers stay float32 where the rest is float16."""
    kept = (getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    return lambda name: torch.float32 if any(part in kept for part in name.split(".")) else dtype


def empty_expert(source: ExpertSource) -> Renderer:
    with torch.device("meta"):
        return Renderer(source.config).eval()


def empty_text(folder: Path) -> Any:
    """A UMT5 encoder whose parameters take no memory.

    Raises:
        CheckpointError: its config cannot be used.
    """
    from accelerate import init_empty_weights
    from transformers import UMT5Config, UMT5EncoderModel

    try:
        config = UMT5Config.from_pretrained(str(folder), local_files_only=True)
        with init_empty_weights(include_buffers=False):
            return UMT5EncoderModel(config).eval()
    except Exception as error:  # transformers checks its configs in many ways, by version
        raise CheckpointError(f"{folder}: cannot be loaded ({type(error).__name__}: {error})") from error


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a renderer, a UMT5 encoder or a planner that are streamed, by name."""
    lists = ("blocks", "encoder.block", "visual.blocks", "text.layers")
    names = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {f"{name}.{n}": block for name in lists for n, block in enumerate(names.get(name, ()))}


def sizes(model: nn.Module, dtype_of: DtypeOf) -> tuple[int, int]:
    """Bytes on the device of all parameters, and of those that stay when its blocks are streamed, with the window."""
    bytes_of = {name: p.numel() * dtype_of(name).itemsize for name, p in model.named_parameters()}
    blocks = blocks_of(model)
    weights = [
        {n: Weight(p.detach().to("meta"), dtype_of(f"{name}.{n}")) for n, p in block.named_parameters()}
        for name, block in blocks.items()
    ]
    inside = sum(bytes_of[f"{name}.{n}"] for name, block in blocks.items() for n, _ in block.named_parameters())
    return sum(bytes_of.values()), sum(bytes_of.values()) - inside + window_bytes(weights)


def stream_expert(
    source: ExpertSource, dtype: torch.dtype, device: str | torch.device
) -> tuple[Renderer, WeightStream]:
    """As :meth:`ExpertSource.load`, with its blocks streamed."""
    model = empty_expert(source)
    return model, fill(model, source.tensors, expert_dtype(dtype), device)


def stream_text(folder: Path, dtype: torch.dtype, device: str | torch.device) -> tuple[Any, WeightStream]:
    """As ``UMT5EncoderModel.from_pretrained``, with its blocks streamed."""
    model = empty_text(folder)
    stored = read_weights(folder)
    for name, other in (EMBEDDING, EMBEDDING[::-1]):
        if other in stored:
            stored.setdefault(name, stored[other])
    stream = fill(model, stored, text_dtype(model, dtype), device)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model, stream


def stream_planner(
    source: PlannerSource, dtype: torch.dtype, device: str | torch.device
) -> tuple[Planner, WeightStream]:
    """As :meth:`PlannerSource.load`, with the blocks of both of its towers streamed, through one window."""
    model = empty_planner(source.config, understanding=False)
    stream = fill(model, source.tensors, lambda name: dtype, device)
    told_by = {name: source.tensors[name] for name in IDENTIFYING}
    found = dict(load_tensors(told_by, lambda name: (torch.bfloat16, torch.device("cpu"))))
    model.identity = identity(found[name] for name in IDENTIFYING)
    return model.to(device).eval(), stream


def fill(model: nn.Module, stored: Mapping[str, Stored], dtype_of: DtypeOf, device: str | torch.device) -> WeightStream:
    """Loads what is outside of the blocks, and begins to stream these.

    Raises:
        CheckpointError: a tensor is missing, misshapen or of an unknown type, or a file cannot be read.
    """
    device, blocks = torch.device(device), blocks_of(model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name not in stored or stored[name].shape != tuple(parameter.shape):
            what = f"is {list(stored[name].shape)}" if name in stored else "is missing"
            where = next(iter(stored.values())).file.parent if stored else "the checkpoint"
            raise CheckpointError(f"{where}: the tensor {name!r} {what}, and should be {list(parameter.shape)}")
    inside = {f"{name}.{n}" for name, block in blocks.items() for n, _ in block.named_parameters()}
    rest = {name: stored[name] for name in parameters if name not in inside}
    for name, weight in load_tensors(rest, lambda name: (dtype_of(name), device)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
    files: dict[Path, MappedFile] = {}
    weights = [
        {n: Weight(_mapped(stored[f"{name}.{n}"], files), dtype_of(f"{name}.{n}")) for n, _ in block.named_parameters()}
        for name, block in blocks.items()
    ]
    return WeightStream([*blocks.values()], _page_locked(weights, device), device=device)


def _mapped(stored: Stored, files: dict[Path, MappedFile]) -> torch.Tensor:
    kind = stored.torch_dtype
    if kind is None:
        raise CheckpointError(f"{stored.file}: holds values of the type {stored.dtype}, which torch does not have")
    try:
        if stored.file not in files:
            files[stored.file] = MappedFile(stored.file)
        return files[stored.file].tensor(stored.start, stored.shape, kind)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{stored.file}: cannot be read ({error})") from None


def _page_locked(weights: Sequence[Mapping[str, Weight]], device: torch.device) -> Sequence[Mapping[str, Weight]]:
    from bernini.offload.arena import Arena

    total = sum(weight.size + 4096 for block in weights for weight in block.values())  # the arena's alignment
    if device.type != "cuda" or 2 * total > _available():
        return weights
    return in_arena(weights, Arena(total))


def _available() -> int:
    """Bytes of the machine's memory that nobody uses; 0 where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0
