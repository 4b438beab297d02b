"""The workload mix and both models, shrunk alike so that stage III trains on two cores, see :mod:`.packing`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout
from bernini.planner.heads import DecoderConfig
from bernini.planner.model import Planner, PlannerConfig
from bernini.planner.prompt import Conversation, Visual
from bernini.planner.training import MASK_RATIOS, Sample
from bernini.renderer.config import RendererConfig
from bernini.renderer.model import Renderer
from bernini.training.flow import RendererSample

from . import workload
from .batching import T5_TOKENS, Dims, Lengths
from .planner import qwen

SIDES, VIT_SIDES = (5, 9), (1, 2)
SHRINK = 30 * 53 / (SIDES[0] * SIDES[1])
CHANNELS, VOCABULARY, MASK_TOKENS = 16, 1000, 64
RENDERER = RendererConfig(
    num_attention_heads=3, attention_head_dim=48, num_layers=2, ffn_dim=384, in_channels=CHANNELS,
    out_channels=CHANNELS, text_dim=112, freq_dim=32,
)  # fmt: skip
HIDDEN, LAYERS, HEADS, KEY_HEADS, INTERMEDIATE = 96, 3, 4, 2, 512
DECODER = DecoderConfig(HIDDEN, 112, depth=2)
DIMS = Dims(144, 384, 2, HIDDEN, INTERMEDIATE, HIDDEN // HEADS * KEY_HEADS, LAYERS - 1)
TASKS = {"T2I": "t2i", "T2V": "t2v", "I2I": "i2i", "V2V": "v2v", "I2V": "r2v", "IV2V": "rv2v"}


@dataclass(frozen=True)
class Models:
    planner: Planner
    renderer: Renderer

    @classmethod
    def make(cls, dtype: torch.dtype = torch.float32) -> Models:
        """Random weights."""
        torch.manual_seed(0)
        mllm = qwen(HIDDEN, LAYERS, HEADS, KEY_HEADS, INTERMEDIATE, VOCABULARY)
        planner = Planner(PlannerConfig(mllm, RENDERER.text_dim, DECODER, MASK_TOKENS))
        torch.nn.init.normal_(planner.mask_tokens)
        return cls(planner.to(dtype), Renderer(RENDERER).to(dtype))

    def forget(self) -> None:
        for model in (self.planner, self.renderer):
            model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Item:
    """A sample of the shrunk mix with everything random drawn; ``latents`` and ``text`` (states of T5) where it is
    rendered."""

    seed: int
    talk: Sample
    latents: RendererSample | None
    text: Tensor | None
    lengths: Lengths


def shrunk(tokens: int) -> int:
    return max(2, round(tokens / SHRINK))


def items(records: Sequence[workload.Record]) -> list[Item]:
    return [_item(number, record) for number, record in enumerate(records)]


def _item(seed: int, record: workload.Record) -> Item:
    random = torch.Generator().manual_seed(seed)
    text = shrunk(record.text_tokens)
    visuals = [
        Visual("image" if segment.frames == 1 else "video", (segment.vit_grid[0], *VIT_SIDES))
        for segment in record.segments
    ]
    seen = [torch.randn((visual.tokens, HIDDEN), generator=random) for visual in visuals]
    target = None if record.target is None else seen.pop()
    segments = [Segment("source", visual.grid) for visual in visuals[: len(seen)]] + [Segment("text", (text, 1, 1))]
    segments += [] if target is None else [Segment("target", visuals[-1].grid)]
    layout = SegmentLayout(segments)
    ids = torch.randint(10, VOCABULARY, (layout.tokens,), generator=random)
    learned = torch.zeros(layout.tokens, dtype=torch.bool)
    spoken = Conversation(ids, layout, tuple(visuals))
    sources = torch.cat(seen) if seen else None
    if target is None:
        learned[layout.tokens - text // 2 :] = True
        return Item(seed, Sample(spoken, learned, sources), None, None, Lengths(0, 0, layout.tokens))
    latents = [
        torch.randn((CHANNELS, segment.grid[0], 2 * SIDES[0], 2 * SIDES[1]), generator=random)
        for segment in record.segments
    ]
    sigma = float(torch.rand((), generator=random))
    noise = torch.randn(latents[-1].shape, generator=random)
    made = RendererSample(tuple(latents[:-1]), latents[-1], torch.empty((1, 0)), sigma, 1000 * sigma, noise)
    states = torch.randn((text, RENDERER.text_dim), generator=random)
    rendered = sum(segment.grid[0] for segment in record.segments) * SIDES[0] * SIDES[1]
    given = layout.tokens - round(0.9 * len(target))
    lengths = Lengths(rendered, max(shrunk(T5_TOKENS), text + given), layout.tokens)
    return Item(seed, Sample(spoken, learned, sources, target, MASK_RATIOS[TASKS[record.task]]), made, states, lengths)
