"""The planner of a full bundle on disk -> :class:`bernini.planner.model.Planner`, streamed in bounded memory.

``bernini/`` holds the weights of all parts under prefixes, ``mllm/`` the language model's config and tokenizer and no
weights (facts of the released model, section A.4). Dimensions are those of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import CheckpointError, mismatches
from ..weights import Stored, load_tensors, read_json, read_weights
from .heads import DecoderConfig
from .model import Planner, PlannerConfig
from .plan_file import identity

WEIGHTS_FOLDER, MLLM_FOLDER = "bernini", "mllm"
PREFIXES = {
    "mllm.visual.": "visual.",
    "mllm.model.visual.": "visual.",
    "mllm.model.language_model.": "text.",
    "mllm.model.": "text.",
    "mllm.lm_head.": "lm_head.",
    "vit_decoder.": "vit_decoder.",
    "connector.": "connector.",
    "mask_tokens": "mask_tokens",
}
"""Names in a bundle (old-style and new-style Qwen names) -> names here. The first that fits counts."""
IDENTIFYING = ("mask_tokens", "connector.pred_vit.4.weight", "connector.pred_vit.4.bias")
"""What a plan's model is told by."""


def planner_tensors(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The planner's tensors under its own names; averaged copies (``ema.``) are preferred."""
    found: dict[str, Stored] = {}
    for averaged in (False, True):
        for name, tensor in stored.items():
            if name.startswith("ema.") == averaged:
                plain = name.removeprefix("ema.")
                prefix = next((p for p in PREFIXES if plain.startswith(p)), None)
                if prefix is not None:
                    found[PREFIXES[prefix] + plain.removeprefix(prefix)] = tensor
    return found


@dataclass(frozen=True)
class PlannerSource:
    """A planner on disk: checked by its headers, its weights are not loaded."""

    folder: Path
    config: PlannerConfig
    tensors: dict[str, Stored]

    def load(
        self, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", understanding: bool = False
    ) -> Planner:
        """Reads the weights. Memory: the loaded weights and 16 MB.

        Args:
            understanding: also the last layer, norm and head of the language model, which planning does not need.
        """
        model = empty_planner(self.config, understanding=understanding)
        wanted = {name for name, _ in model.named_parameters()}
        place = (dtype, torch.device(device))
        for name, weight in load_tensors({n: t for n, t in self.tensors.items() if n in wanted}, lambda name: place):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
        told_by = dict(
            load_tensors({n: self.tensors[n] for n in IDENTIFYING}, lambda name: (torch.bfloat16, torch.device("cpu")))
        )
        model.identity = identity(told_by[name] for name in IDENTIFYING)
        return model.to(device).eval()


def empty_planner(config: PlannerConfig, *, understanding: bool) -> Planner:
    """A planner whose parameters take no memory; its buffers (rotary frequencies) are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return Planner(config, understanding=understanding)


def open_planner(folder: str | Path) -> PlannerSource:
    """Checks the planner of a full bundle.

    Raises:
        CheckpointError: a file is missing or broken, or a tensor missing or misshapen.
    """
    folder = Path(folder)
    root, mllm = read_json(folder / "config.json"), read_json(folder / MLLM_FOLDER / "config.json")
    tensors = planner_tensors(read_weights(folder / WEIGHTS_FOLDER))
    if "mask_tokens" not in tensors:
        raise CheckpointError(
            f"{folder / WEIGHTS_FOLDER}: has no tensor 'mask_tokens'; these are not a planner's weights"
        )
    config = derive(tensors, mllm, root, folder)
    try:
        expected = {name: tuple(p.shape) for name, p in empty_planner(config, understanding=True).named_parameters()}
    except Exception as error:  # transformers checks its configs in many ways, by version
        why = " ".join(str(error).split())
        raise CheckpointError(f"{folder / MLLM_FOLDER / 'config.json'}: no Qwen2.5-VL can have it ({why})") from None
    problems = mismatches(tensors, expected)
    if problems:
        raise CheckpointError(f"{folder / WEIGHTS_FOLDER}: {'; '.join(problems)}")
    return PlannerSource(folder, config, tensors)


def derive(tensors: Mapping[str, Stored], mllm: dict[str, Any], root: Mapping[str, Any], folder: Path) -> PlannerConfig:
    """Dimensions from the tensors; from the root config only what shapes do not tell."""

    def shape(name: str, dims: int = 2) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{folder / WEIGHTS_FOLDER}: the planner's tensor {name!r} is missing")
        found = tensors[name].shape
        if len(found) != dims:
            raise CheckpointError(
                f"{folder / WEIGHTS_FOLDER}: the planner's tensor {name!r} has the shape {list(found)}, and should "
                f"have {dims} dimensions"
            )
        return found

    try:
        shift = float(root.get("clip_diff_cfg", {}).get("shift", DecoderConfig.shift))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: clip_diff_cfg has no number as its shift ({error})") from None
    net = "vit_decoder.net."
    blocks = {int(m[1]) for m in (re.match(r"vit_decoder\.net\.res_blocks\.(\d+)\.", name) for name in tensors) if m}
    decoder = DecoderConfig(
        channels=shape(f"{net}input_proj.weight")[-1],
        width=shape(f"{net}input_proj.weight")[0],
        depth=len(blocks),
        shift=shift,
        frequencies=shape(f"{net}time_embed.mlp.0.weight")[-1],
    )
    gen_dim = shape("connector.proj_gen.0.weight")[0]
    return PlannerConfig(mllm, gen_dim, decoder, shape("mask_tokens", 3)[1])
