"""The sample that an estimate computes: latents and embeddings of a stated size, without values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from bernini.kernels import SegmentLayout

from ..data.example import Example
from ..errors import UserError
from ..planner.training import Draws
from ..renderer.latents import patch_grid
from ..training import standins
from ..training.dimensions import Dimensions
from ..training.flow import RendererSample
from ..training.models import NEEDS, Models
from ..training.recipe import Recipe
from ..training.stage import Micro, Stage
from ..training.stages.joint import Both
from ..training.stages.planner import Content
from ..training.stages.renderer import Item
from ..training.texts import full_prompt
from .fakes import Device


@dataclass(frozen=True)
class Work:
    """One sample.

    Args:
        task: a key of :data:`bernini.training.standins.SOURCES`.
        size: height and width of all pictures, in pixels.
        latents: latent frames of each video, sources first; images have one.
    """

    task: str
    size: tuple[int, int]
    latents: tuple[int, ...]


def kinds(task: str) -> tuple[Literal["video", "image"], ...]:
    """Of the pictures of a task, the target last.

    Raises:
        UserError: no such task, or one that renders nothing.
    """
    known = [name for name in standins.SOURCES if name != "understanding"]
    if task not in known:
        raise UserError(f"no task {task!r}; an estimate knows {', '.join(known)}")
    return (*standins.SOURCES[task], "image" if task.endswith("2i") else "video")


def of_frames(sizes: Dimensions, task: str, frames: int, size: tuple[int, int]) -> Work:
    """Videos of so many frames.

    Raises:
        UserError: sides that are no multiples of the checkpoint's stride, or no such task.
    """
    geometry = sizes.geometry
    if any(side < 1 or side % geometry.pixel_stride for side in size):
        raise UserError(f"size {size[0]}x{size[1]}: both sides must be multiples of {geometry.pixel_stride}")
    count = (geometry.frame_count(frames) - 1) // geometry.frame_stride + 1
    return Work(task, size, tuple(1 if kind == "image" else count for kind in kinds(task)))


def of_tokens(sizes: Dimensions, task: str, tokens: int, size: tuple[int, int]) -> Work:
    """Videos as long as so many tokens of the renderer's packed sequence allow; the target gets what is left over.

    Raises:
        UserError: too few for one latent frame of each, or a task without videos.
    """
    found, frame = of_frames(sizes, task, 1, size), frame_tokens(sizes, size)
    videos = [kind == "video" for kind in kinds(task)]
    if not any(videos):
        raise UserError(f"task {task!r} has no video that could be longer; leave out the number of tokens")
    left = tokens // frame - videos.count(False)
    each, over = divmod(left, sum(videos))
    if each < 1:
        raise UserError(
            f"{tokens} tokens are too few for task {task!r}: a frame of {size[0]}x{size[1]} has {frame}, and it has "
            f"{len(videos)} pictures"
        )
    counts = [each if video else 1 for video in videos]
    counts[max(n for n, video in enumerate(videos) if video)] += over
    return replace(found, latents=tuple(counts))


def frame_tokens(sizes: Dimensions, size: tuple[int, int]) -> int:
    """Tokens of a latent frame."""
    return math.prod(side // sizes.geometry.pixel_stride for side in size)


def renderer_tokens(sizes: Dimensions, work: Work) -> int:
    return sum(work.latents) * frame_tokens(sizes, work.size)


@dataclass(frozen=True)
class Batch:
    micro: Micro
    layouts: Mapping[str, SegmentLayout]


def shown(models: Models) -> Any:
    """Stands in for a mixture that nothing is picked of."""
    return standins.Shown([])


def micro(recipe: Recipe, stage: Stage, models: Models, sizes: Dimensions, work: Work, device: Device) -> Batch:
    """The micro-batch of the one sample, as the stage makes it of data. Latents and noise are on the host."""
    needs, layouts = NEEDS[recipe.stage], dict[str, SegmentLayout]()
    parts = [
        standins._features(kind, _lengthened(sizes, work, count), models)
        for kind, count in zip(kinds(work.task), work.latents, strict=True)
    ]
    example = Example(work.task, work.task, "prompt", tuple(parts[:-1]), parts[-1])
    content: Any = None
    if "planner" in needs:
        content = stage.talks.content((example,), 0)  # type: ignore[attr-defined]
        layouts["planner"] = content.batch.layout
        content = replace(content, draws=_thin(content.draws, recipe.copies))
        content.batch.conversation.positions  # noqa: B018 - made on the host, once
    if "renderer" in needs:
        with device:
            item = _item(example)
        shapes = [tuple(x.shape) for x in (*item.sample.sources, item.sample.target)]
        layouts["renderer"] = _layout(shapes, models)
        content = [item] if content is None else Both(content, (item,), (True,))
    tokens = sum(layout.tokens for layout in layouts.values())
    counts = {name: 1.0 for name in ("visual", "dit") if name in stage.weights}
    return Batch(Micro(content, counts, tokens, (example.key,), (), 1), layouts)


def _lengthened(sizes: Dimensions, work: Work, latents: int) -> Dimensions:
    frames = (latents - 1) * sizes.geometry.frame_stride + 1
    return replace(sizes, geometry=replace(sizes.geometry, size=work.size, num_frames=frames))


def _thin(draws: Draws, copies: int) -> Draws:
    """Noise that takes no memory."""
    count, width = draws.noise.shape[1:]
    return replace(draws, noise=torch.zeros(1).expand(copies, count, width))


def _item(example: Example) -> Item:
    assert example.target is not None
    shapes = [picture.vae_mean.shape for picture in example.visuals if picture.vae_mean is not None]
    latents = [torch.empty(shape, device="meta") for shape in shapes]
    nothing = torch.empty((1, 0))
    sample = RendererSample(tuple(latents[:-1]), latents[-1], nothing, 0.5, 500.0, torch.empty_like(latents[-1]))
    return Item(example, full_prompt(example.task, example.prompt), sample)


def _layout(shapes: list[tuple[int, ...]], models: Models) -> SegmentLayout:
    from bernini.kernels import Segment, segment_phases

    assert models.renderer is not None
    patch = models.renderer.model.config.patch_size
    grids = [patch_grid(shape, patch) for shape in shapes]
    phases = segment_phases(len(grids) - 1)
    sources = [Segment("source", grid, phase) for grid, phase in zip(grids, phases, strict=False)]
    return SegmentLayout([*sources, Segment("target", grids[-1])])


__all__ = ["Batch", "Content", "Work", "frame_tokens", "kinds", "micro", "of_frames", "of_tokens"]
