"""What the stages of a request take beside the weights, in bytes on the device.

The renderer and the VAE are run on the device ``meta`` at the request's own sizes (two layers of the renderer: more
hold no more at once), so there is no formula to go out of date. The text encoder and the planner, whose inputs are
short, are bounded by formulas that say what they count; tests hold all of them against what really is alive.

Letters: T tokens, N width, e bytes of a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from bernini.kernels import Segment, SegmentLayout

from ..geometry import Geometry
from ..media import Clip
from ..presets import SYSTEM_PROMPTS
from ..renderer.config import RendererConfig
from ..renderer.latents import patch_grid
from ..renderer.model import KEEP_IN_FP32, Renderer
from ..renderer.vae import VideoAutoencoder
from ..renderer.vae_chunks import encode
from ..request import Request, Settings
from ..sources import result_shape
from .peak import peak_bytes

Stage = Literal["planning", "text", "encoding", "sampling", "decoding"]
STAGES: tuple[Stage, ...] = ("planning", "text", "encoding", "sampling", "decoding")
SPARE = 1.1
"""Factor on what is measured or bounded: for workspaces inside of kernels."""
PIECES = 3
"""Latent frames after which a piece of a video takes no more than the one before it."""
CONTEXTS = 3
"""Texts that the renderer reads at most: positive, negative, planned."""


@dataclass(frozen=True)
class Job:
    """What a request asks of memory.

    Args:
        target: (frames, height, width) of the result.
        sources: (frames, height, width) of each.
        branches: forwards of the renderer per step.
        steps: of sampling.
        planning: steps of the planner; 0 where it does not run.
        letters: bytes of the longest text that the planner reads.
        fps: frames per second, of which the planner sees some.
    """

    target: tuple[int, int, int]
    sources: tuple[tuple[int, int, int], ...]
    branches: int
    steps: int
    planning: int
    letters: int
    fps: float = 16.0

    @classmethod
    def of(cls, request: Request, chosen: Settings) -> Job:
        """``request`` with its sources read."""
        clips = [(len(v.frames), *v.frames.shape[1:3]) for v in request.videos if isinstance(v, Clip)]
        images = [(1, *i.shape[:2]) for i in request.images if isinstance(i, torch.Tensor)]
        texts = (request.prompt, chosen.negative_prompt)
        system = max(len(text.encode()) for text in SYSTEM_PROMPTS.values())
        return cls(
            result_shape(request, chosen), (*clips, *images), len(chosen.plan.branches), chosen.steps,
            0 if chosen.planning is None else chosen.planning.steps,
            max(len(text.encode()) for text in texts) + system + 64 + 8 * (len(clips) + len(images)), chosen.fps,
        )  # fmt: skip

    @property
    def media(self) -> int:
        """Bytes of the sources' frames on the host."""
        return sum(3 * math.prod(shape) for shape in self.sources)


@dataclass(frozen=True)
class Model:
    """Dimensions of a checkpoint, as far as they decide about memory.

    Args:
        vae: on the device ``meta``.
        text: the text encoder's config.
        planner: (language model's config, vision tower's config, rules of its processor), if there is one.
    """

    renderer: RendererConfig
    vae: VideoAutoencoder
    text: Any
    text_tokens: int
    planner: tuple[Any, Any, Any] | None
    geometry: Geometry
    dtype: torch.dtype
    on_host: bool
    """Whether the device is the CPU: what lies on the host counts as well."""


def needs(model: Model, job: Job) -> dict[Stage, int]:
    """Bytes beside the weights, by stage; stages that do not run are left out."""
    shapes = [model.vae.latent_shape(*shape) for shape in job.sources]
    target = model.vae.latent_shape(*job.target)
    planned = _visual_tokens(model, job) + job.letters if model.planner else 0
    context = max(model.text_tokens, model.text_tokens + planned if planned else 0)
    texts = CONTEXTS * context * model.renderer.text_dim * model.dtype.itemsize
    latents = sum(math.prod(shape) * 4 for shape in (*shapes, target))
    found: dict[Stage, int] = {"text": _text(model) + texts}
    if model.planner and job.planning:
        found["planning"] = _planning(model, job) + texts
    if job.sources:
        found["encoding"] = max(_encoding(model, shape) for shape in job.sources) + latents + texts
    found["sampling"] = _sampling(model, job, shapes, target, context) + 2 * latents + texts
    found["decoding"] = _decoding(model, target) + 2 * latents + texts
    host = job.media if model.on_host else 0
    if model.on_host:
        found["decoding"] += 3 * math.prod(job.target)
    return {stage: int(bytes * SPARE) + host for stage, bytes in found.items()}


def _text(model: Model) -> int:
    """Scores, bias and weights of one layer's attention over all tokens, and the widest of its hidden states."""
    config, tokens, each = model.text, model.text_tokens, model.dtype.itemsize
    scores = config.num_heads * tokens**2 * (4 * each + 3 * 4)
    width = 5 * config.d_model + 4 * config.num_heads * config.d_kv + 4 * config.d_ff
    return scores + tokens * width * max(each, 4) + tokens * 64


def _visual_tokens(model: Model, job: Job) -> int:
    assert model.planner is not None
    rules, seen = model.planner[2], model.geometry
    total = 0
    for frames, height, width in (*job.sources, job.target):
        count = 1 if frames == 1 else len(seen.frame_indices(frames, job.fps, job.fps, frames, "full_vit"))
        total += rules.visual("video" if frames > 1 else "image", max(count, 1), height, width).tokens
    return total


def _planning(model: Model, job: Job) -> int:
    """Three conversations: their states, keys and values of every layer, and the tower's patches before them."""
    assert model.planner is not None
    text, vision, rules = model.planner
    each, visuals = model.dtype.itemsize, _visual_tokens(model, job)
    rows = 3 * (visuals + job.letters)
    heads = text.hidden_size // text.num_attention_heads
    cached = 2 * rows * text.num_key_value_heads * heads * each * text.num_hidden_layers
    states = rows * (14 * text.hidden_size + 4 * text.intermediate_size) * each + rows * heads * 8 * 4
    patches = visuals * rules.merge**2
    scores = vision.num_heads * patches**2 * 4 * 2  # where no fused attention serves the tower
    pixels = patches * 3 * rules.temporal * rules.patch**2 * 4 * 5
    seen = patches * (10 * vision.hidden_size + 4 * vision.intermediate_size) * max(each, 4) + scores + pixels
    return max(cached + states, seen) + rows * text.hidden_size * each * 4


def _encoding(model: Model, shape: tuple[int, int, int]) -> int:
    frames, height, width = shape
    some = min(frames, 1 + 4 * (PIECES - 1)) if model.vae.in_pieces else frames
    pixels = torch.empty((some, height, width, 3), dtype=torch.uint8, device="meta")
    return peak_bytes(lambda: encode(model.vae, Clip(pixels, 1.0), "meta"))


def _decoding(model: Model, latent: tuple[int, ...]) -> int:
    """The last piece is on its way to bytes while the next is not begun: three times its pixels at most."""
    if not model.vae.in_pieces:
        return peak_bytes(lambda: model.vae.decode(torch.empty(latent, device="meta"))) + 9 * _pixels(model, latent)
    some = (latent[0], min(latent[1], PIECES), *latent[2:])
    states = 4 * 4 * (math.prod(latent) - math.prod(some))

    def run() -> None:
        for part in model.vae.decode_pieces(torch.empty(some, device="meta")):
            torch.empty((3, *part.own.shape), device="meta")

    return peak_bytes(run) + states


def _pixels(model: Model, latent: tuple[int, ...]) -> int:
    return latent[1] * model.vae.temporal_stride * latent[2] * latent[3] * model.vae.spatial_stride**2


def _sampling(
    model: Model, job: Job, sources: list[tuple[int, int, int, int]], target: tuple[int, ...], context: int
) -> int:
    """One forward of everything, keys and values of the texts for all layers, and the states of solver and guidance."""
    config = model.renderer
    grids = [patch_grid(shape, config.patch_size) for shape in sources]
    own = patch_grid(target, config.patch_size)
    layout = SegmentLayout(
        [*(Segment("source", grid, float(n + 1)) for n, grid in enumerate(grids)), Segment("target", own)]
    )
    with torch.device("meta"):
        renderer = Renderer(replace(config, num_layers=min(2, config.num_layers)), backend="sdpa").eval()
    for name, parameter in renderer.named_parameters():
        if not any(part in KEEP_IN_FP32 for part in name.split(".")):
            parameter.data = parameter.data.to(model.dtype)
    tokens, one = layout.tokens, math.prod(own) * config.patch_values * 4
    with torch.no_grad():
        text = renderer.text_context(torch.empty((context, config.text_dim), dtype=model.dtype, device="meta"))
    forward = peak_bytes(
        lambda: renderer(
            torch.empty((tokens, config.patch_values), device="meta"), layout, torch.empty(1, device="meta"), text
        )
    )
    kept = 2 * CONTEXTS * config.num_layers * context * config.width * model.dtype.itemsize
    kept += 4 * context * max(config.width, config.text_dim) * model.dtype.itemsize
    inputs = job.branches * tokens * config.patch_values * 4
    return forward + kept + inputs + (2 * job.branches + 10) * one
