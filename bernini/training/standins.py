"""What a rehearsal has in place of a checkpoint and of data: models without values, texts without words, examples whose
features are zeros that take no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bernini.kernels import interval_attention
from bernini.kernels.attention import backends

from ..data.example import Example, Features
from ..errors import UserError
from ..planner.prompt import Template
from ..planner.vision import VisionRules
from ..renderer.latents import patch_grid
from ..renderer.model import Renderer
from ..renderer.text import TextEncoder
from .conversations import sample
from .dimensions import Dimensions
from .models import NEEDS, Models, TrainedPlanner, TrainedRenderer, TrainedText
from .recipe import Recipe

SOURCES: Mapping[str, tuple[Literal["video", "image"], ...]] = {
    "rv2v": ("video", "image"), "v2v": ("video",), "r2v": ("image", "image"), "i2v": ("image",), "t2v": (),
    "i2i": ("image",), "t2i": (), "understanding": ("image",),
}  # fmt: skip
"""What the made-up examples of a task start from; from the dearest task to the cheapest."""

SIZE = (480, 848)
"""Height and width of pictures where the checkpoint does not say: those of the paper's stages II and III."""

PROMPT_TOKENS = 100
"""Of every made-up text."""


BACKEND = "rehearsal"


# --- models without memory --------------------------------------------------------------------------------------------


def empty_models(recipe: Recipe, sizes: Dimensions) -> Models:
    """What the recipe's stage needs, on the meta device in float32; rotary frequencies as well.

    Raises:
        UserError: the checkpoint has no such expert, or no planner.
    """
    needs = NEEDS[recipe.stage]
    if "renderer" in needs and recipe.expert not in sizes.experts:
        known = " or ".join(map(repr, sizes.experts))
        raise UserError(f"{recipe.model}: expert must be {known}, and the recipe says {recipe.expert!r}")
    if "planner" in needs and sizes.planner is None:
        raise UserError(f"{recipe.model} has no planner, which stage {recipe.stage!r} trains")
    channels = next(iter(sizes.experts.values())).in_channels
    models = Models(Path(recipe.model), sizes.geometry, latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    with torch.device("meta"):
        if "renderer" in needs:
            renderer = Renderer(sizes.experts[recipe.expert], backend=BACKEND)
            models.renderer = TrainedRenderer(renderer, sizes.boundary)
        if "planner" in needs:
            models.planner = _planner(sizes)
        if "text" in needs:
            models.text = _text(sizes)
    return models


@contextmanager
def fused_attention() -> Iterator[None]:
    """A backend with the outputs of a fused kernel: on the meta device torch's own keeps the scores of all pairs."""

    def run(q: Tensor, k: Tensor, v: Tensor, borders_q: Any, borders_k: Any, scale: float) -> Tensor:
        first, last = torch.empty((2, len(q)), dtype=torch.int32, device=q.device)
        return interval_attention(q, k, v, first, last, scale=scale)

    backends.add(backends.Backend(BACKEND, lambda device, dtype: None if device.type == "meta" else "rehearses", run))
    try:
        yield
    finally:
        del backends.BACKENDS[BACKEND]


def _planner(sizes: Dimensions) -> TrainedPlanner:
    from ..planner.model import Planner

    assert sizes.planner is not None
    model = Planner(sizes.planner, understanding=True)
    return TrainedPlanner(model, Template(_Tokenizer(), model.ticks), VisionRules.of(model.vision_config, {}), end=0)


def _text(sizes: Dimensions) -> TrainedText:
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(UMT5Config(**sizes.text)).requires_grad_(False).eval()
    # transformers reads a mask back, to do without it where nothing is masked; nothing is, all texts have one length.
    model.register_forward_pre_hook(lambda module, args: (args[0], None))
    return TrainedText(TextEncoder(_Tokenizer(), model, sizes.geometry.text_tokens))


@dataclass
class _Encoded:
    input_ids: Tensor
    attention_mask: Tensor


class _Tokenizer:
    """Stands in for both tokenizers: every text has as many tokens; which ones does not matter where none are read."""

    unk_token_id = -1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * PROMPT_TOKENS if text else []

    def convert_tokens_to_ids(self, name: str) -> int:
        return 0

    def __call__(self, texts: Sequence[str], *, max_length: int, **_: Any) -> _Encoded:
        shape = (len(texts), min(PROMPT_TOKENS, max_length))
        return _Encoded(torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long))


# --- examples without data --------------------------------------------------------------------------------------------


class Shown:
    """Stands in for a mixture: these examples one after the other, whatever is drawn."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.parts, self._next = (_Part(examples),), 0

    def pick(self, uniforms: Sequence[float], progress: float) -> tuple[int, int]:
        self._next += 1
        return 0, (self._next - 1) % len(self.parts[0].data)


@dataclass(frozen=True)
class _Part:
    data: Sequence[Example]


def shown_examples(recipe: Recipe, sizes: Dimensions, models: Models) -> Shown:
    """One example of every task of the recipe that there is still room for, and then as many as fit.

    Raises:
        UserError: not even one fits.
    """
    asked = {task for part in recipe.data for task in (part.tasks or SOURCES)}
    if "planner" not in NEEDS[recipe.stage]:
        asked.discard("understanding")
    examples = [_example(task, sizes, models) for task in SOURCES if task in asked]
    costs = {example.task: _cost(example, sizes, models) for example in examples}
    left, chosen = (recipe.batch.renderer_tokens, recipe.batch.planner_tokens), list[Example]()
    # Answers first: without one the head has no gradient.
    for most, order in (1, sorted(examples, key=lambda e: e.answer is None)), (recipe.batch.samples, examples):
        for example in order:
            need = costs[example.task]
            fit = min(most, recipe.batch.samples - len(chosen), *(b // a for a, b in zip(need, left, strict=True) if a))
            left = (left[0] - fit * need[0], left[1] - fit * need[1])
            chosen += [replace(example, key=f"{example.task}/{len(chosen) + n}") for n in range(fit)]
    if not chosen:
        raise UserError(
            f"no example fits in batch.renderer_tokens = {left[0]} and batch.planner_tokens = {left[1]}; those of "
            + ", ".join(f"{task} have {' and '.join(map(str, need))}" for task, need in costs.items())
        )
    return Shown(chosen)


def _example(task: str, sizes: Dimensions, models: Models) -> Example:
    sources = tuple(_features(kind, sizes, models) for kind in SOURCES[task])
    if task == "understanding":
        return Example(task, task, "question", sources, answer="answer")
    return Example(task, task, "prompt", sources, _features("image" if task.endswith("2i") else "video", sizes, models))


def _features(kind: Literal["image", "video"], sizes: Dimensions, models: Models) -> Features:
    """Zeros that take no memory, in the shapes of a picture at the checkpoint's default size and length."""
    geometry = sizes.geometry
    frames = 1 if kind == "image" else geometry.num_frames
    size = geometry.size or SIZE
    found = Features(kind)
    if models.renderer is not None:
        config = models.renderer.model.config
        tall, wide = (side // geometry.pixel_stride * p for side, p in zip(size, config.patch_size[1:], strict=True))
        shape = (config.in_channels, (frames - 1) // geometry.frame_stride + 1, tall, wide)
        found = replace(found, vae_mean=torch.zeros(1).expand(shape), vae_logvar=torch.zeros(1).expand(shape))
    if models.planner is not None:
        fps = geometry.fps
        seen = 1 if kind == "image" else len(geometry.frame_indices(frames, fps, fps, frames, "full_vit"))
        grid = models.planner.rules.visual(kind, seen, *size).grid
        width = models.planner.model.config.decoder.channels
        found = replace(found, vit=torch.zeros(1).expand(math.prod(grid), width), vit_grid=grid)
    return found


def _cost(example: Example, sizes: Dimensions, models: Models) -> tuple[int, int]:
    """Tokens of the renderer and of the planner."""
    drawn = seen = 0
    if models.renderer is not None and example.target is not None:
        patch = models.renderer.model.config.patch_size
        latents = [picture.vae_mean for picture in example.visuals]
        drawn = sum(math.prod(patch_grid(tuple(latent.shape), patch)) for latent in latents if latent is not None)
    if models.planner is not None:
        seen = sample(models.planner.template, example, end=models.planner.end).conversation.layout.tokens
    return drawn, seen
