"""What a call of ``bernini generate`` takes, by stage: weights, and what is computed beside them.

    planning, text, encoding, decoding    as ``bernini generate --memory`` plans them (:mod:`bernini.memory.needs`)
    sampling                              the sampler's own step, run fake on one of the ranks that share the sequence

Weights are those of the real modules, made on the meta device: experts, text encoder and planner in the request's
dtype, the autoencoder in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..errors import UserError
from ..presets import PRESETS
from ..renderer.guidance import PLANS, Plan
from ..training.dimensions import Dimensions
from .fakes import Device, Phantom, attention, faked
from .ledger import Ledger
from .sample import kinds

BACKEND = "estimate"


@dataclass(frozen=True)
class Call:
    """What is generated.

    Args:
        frames: of the result and of every source video.
        size: (height, width) of all pictures.
        ranks: that share the sequence.
    """

    task: str
    frames: int
    size: tuple[int, int]
    ranks: int = 1
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Taken:
    """Bytes on a rank's device.

    Args:
        weights: by part; ``expert`` once for each.
        beside: what each stage takes beside the weights.
        tokens: of the longest of the packed sequences that the renderer sees.
    """

    weights: Mapping[str, int]
    beside: Mapping[str, int]
    tokens: int

    @property
    def resident(self) -> Mapping[str, int]:
        """By stage, all weights kept."""
        return {stage: sum(self.weights.values()) + more for stage, more in self.beside.items()}

    @property
    def low_memory(self) -> Mapping[str, int]:
        """By stage, with ``--low-memory``: the planner is there for planning, and one expert for sampling."""
        own = {"planning": ("planner",), "sampling": ("expert high",), "decoding": ("expert high",)}
        stays = ("text encoder", "autoencoder")
        return {
            stage: more + sum(self.weights.get(part, 0) for part in (*stays, *own.get(stage, ())))
            for stage, more in self.beside.items()
        }


def taken(sizes: Dimensions, call: Call, vae: Any = None) -> Taken:
    """
    Args:
        vae: the autoencoder's config; the released one's by default.

    Raises:
        UserError: a task that is unknown, or a size that does not fit the strides.
    """
    from diffusers import AutoencoderKLWan

    from ..memory.needs import Job, Model, needs
    from ..renderer.vae import VideoAutoencoder

    with torch.device("meta"):
        coder = AutoencoderKLWan.from_config(vae) if vae else AutoencoderKLWan()
    opened = VideoAutoencoder(coder.eval(), exact=True)  # as on a GPU
    found = _weights(sizes, call.dtype, coder)
    planner = None
    if sizes.planner is not None:
        from ..planner.model import qwen_configs
        from ..planner.vision import VisionRules

        text, vision = qwen_configs(sizes.planner.mllm)
        planner = (text, vision, VisionRules.of(vision, {}))
    config = next(iter(sizes.experts.values()))
    from transformers import UMT5Config

    model = Model(
        config, opened, UMT5Config(**sizes.text), sizes.geometry.text_tokens, planner, sizes.geometry, call.dtype,
        on_host=False,
    )  # fmt: skip
    shapes = [(1 if kind == "image" else call.frames, *call.size) for kind in kinds(call.task)]
    plan = _plan(sizes, call.task)
    job = Job(shapes[-1], tuple(shapes[:-1]), len(plan.branches), 40, 1 if planner else 0, 2000)
    beside: dict[str, int] = {str(stage): size for stage, size in needs(model, job).items()}
    beside["sampling"], tokens = _sampling(sizes, call, opened, shapes)
    return Taken(found, beside, tokens)


def _plan(sizes: Dimensions, task: str) -> Plan:
    tasks = PRESETS[sizes.geometry.default_preset(sizes.planner is not None)]
    name = "r2v" if task == "i2v" else task
    if name not in tasks:
        raise UserError(f"task {task!r} is none of the preset's: {', '.join(tasks)}")
    return PLANS[tasks[name].mode]


def _weights(sizes: Dimensions, dtype: torch.dtype, coder: nn.Module) -> dict[str, int]:
    from transformers import UMT5Config, UMT5EncoderModel

    from ..renderer.model import KEEP_IN_FP32, Renderer

    found: dict[str, int] = {}
    with torch.device("meta"):
        for name, config in sizes.experts.items():
            found[f"expert {name if len(sizes.experts) > 1 else 'high'}"] = sum(
                p.numel() * (4 if any(part in KEEP_IN_FP32 for part in key.split(".")) else dtype.itemsize)
                for key, p in Renderer(config).named_parameters()
            )
        text = UMT5EncoderModel(UMT5Config(**sizes.text))
        found["text encoder"] = sum(p.numel() for p in text.parameters()) * dtype.itemsize
        if sizes.planner is not None:
            from ..planner.model import Planner

            planner = Planner(sizes.planner, understanding=False)
            found["planner"] = sum(p.numel() for p in planner.parameters()) * dtype.itemsize
    found["autoencoder"] = sum(p.numel() * 4 for p in coder.parameters())
    return found


def _sampling(sizes: Dimensions, call: Call, coder: Any, shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """(bytes beside the weights in steps of the sampler, tokens)."""
    from bernini.kernels import Segment, SegmentLayout, segment_phases

    from ..parallel.share import Share
    from ..renderer.latents import patch_grid
    from ..renderer.model import KEEP_IN_FP32, Renderer
    from ..renderer.sampler import Experts, Guidance, sample
    from ..renderer.schedule import make_solver

    config = next(iter(sizes.experts.values()))
    with torch.device("meta"):
        renderer = Renderer(config, backend=BACKEND).eval().requires_grad_(False)
    for name, parameter in renderer.named_parameters():
        if not any(part in KEEP_IN_FP32 for part in name.split(".")):
            parameter.data = parameter.data.to(call.dtype)
    grids = [patch_grid(coder.latent_shape(*shape), config.patch_size) for shape in shapes]
    phases = segment_phases(len(grids) - 1)
    sources = [Segment("source", grid, phase) for grid, phase in zip(grids, phases, strict=False)]
    layout = SegmentLayout([*sources, Segment("target", grids[-1])])
    share = Share(cast("Any", Phantom(call.ranks)))
    videos = kinds(call.task)[:-1].count("video")
    plan, context = _plan(sizes, call.task), sizes.geometry.text_tokens
    with Device(), attention(BACKEND):
        faked(renderer)
        ledger = Ledger(None, renderer.parameters(), [])
        before = ledger.parts[0].total or sum(p.numel() * p.element_size() for p in renderer.parameters())
        with ledger:
            rows = [torch.empty((segment.tokens, config.patch_values)) for segment in layout.segments]
            texts = {name: torch.empty((context, config.text_dim), dtype=call.dtype)
                     for name in ("positive", "negative", "planned")}  # fmt: skip
            sample(
                Experts(renderer), layout, videos, rows[:-1], rows[-1], texts, plan,
                Guidance(dict.fromkeys(("vid", "img", "txt", "tgt"), 2.0)),
                make_solver("unipc", "release", 2, 5.0), share=share,
            )  # fmt: skip
    return max(part.total for part in ledger.parts) - before, layout.tokens


def vae_config(folder: str) -> Any:
    """Of a checkpoint's folder; ``None`` for a released name."""
    from ..training.models import vae_config as read

    path = Path(folder).expanduser()
    return read(path) if path.is_dir() else None


__all__ = ["Call", "Taken", "taken", "vae_config"]
