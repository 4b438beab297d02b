"""Renderers that tell segments apart in other ways, for the ablation of SA-3D RoPE (paper section 6.6, figure 15).

==============  =====================================================================================================
arm             what tells the target, a source video and a reference image apart
==============  =====================================================================================================
``sa3d``        the segment's phase in the rotary embedding: :class:`bernini.renderer.model.Renderer` as it is
``plain``       nothing: the usual 3D RoPE, in which places start again at 0 in every segment
``embeddings``  the same, and a learned row per segment id that is added to the hidden states at every layer
==============  =====================================================================================================

Only the blocks differ. They get the layout with its phases and hand it on without them, so training and sampling take
any arm where they take a renderer, and every other part of it is the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bernini.kernels import SegmentLayout
from bernini.kernels.segments import MAX_TRAINED_SOURCES

from ..renderer.config import RendererConfig
from ..renderer.model import Block, Renderer, Stream

if TYPE_CHECKING:
    from ..renderer.model import Layout

RENDERER = RendererConfig(num_attention_heads=4, attention_head_dim=32, num_layers=4, ffn_dim=512, freq_dim=128)
"""Of the ablation: two thirds of the toy's width and layers, so that an arm is trained in minutes."""


class PlainBlock(Block):
    """A block under the usual 3D RoPE."""

    def forward(
        self, stream: Stream, time_B6N: Tensor, k_LHD: Tensor, v_LHD: Tensor, layout: Layout, *rest: Any
    ) -> Stream:
        return super().forward(stream, time_B6N, k_LHD, v_LHD, without_phases(layout), *rest)


class EmbeddedBlock(PlainBlock):
    """The same with a learned row for each segment id, zero at the beginning."""

    def __init__(self, config: RendererConfig) -> None:
        super().__init__(config)
        # The first axis is as in the modulation's tables, and keeps it out of Muon's hands.
        self.segments = nn.Parameter(torch.zeros(1, MAX_TRAINED_SOURCES + 1, config.width))

    def forward(
        self, stream: Stream, time_B6N: Tensor, k_LHD: Tensor, v_LHD: Tensor, layout: Layout, *rest: Any
    ) -> Stream:
        rows = segment_ids(layout).to(stream.residual.device)
        stream = stream._replace(residual=stream.residual + self.segments[0, rows].to(stream.residual.dtype))
        return super().forward(stream, time_B6N, k_LHD, v_LHD, layout, *rest)


BLOCKS: dict[str, Callable[[RendererConfig], Block]] = {
    "sa3d": Block, "plain": PlainBlock, "embeddings": EmbeddedBlock,
}  # fmt: skip


def make_renderer(arm: str, config: RendererConfig, seed: int) -> Renderer:
    """An arm with random weights: those that arms have in common are equal for a seed.

    Args:
        arm: a key of :data:`BLOCKS`.

    Raises:
        KeyError: no such arm.
    """
    make = BLOCKS[arm]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        renderer = Renderer(config)
        common = renderer.state_dict()
        renderer.blocks = nn.ModuleList(make(config) for _ in range(config.num_layers))
    renderer.load_state_dict({**renderer.state_dict(), **common})
    return renderer


@lru_cache(256)
def without_phases(layout: Layout) -> SegmentLayout:
    """The layout with every segment in phase 0, where the segment's rotation is none. Kept, with its device copies."""
    assert isinstance(layout, SegmentLayout)  # arms are trained by one process
    return SegmentLayout([replace(segment, phase=0.0) for segment in layout.segments])


@lru_cache(256)
def segment_ids(layout: Layout) -> Tensor:
    """int64 ``[T]``, on the host: the phase of each token's segment as a row number.

    Raises:
        ValueError: a phase that is no whole number up to five; the world has no sample with more sources.
    """
    assert isinstance(layout, SegmentLayout)
    phases = [segment.phase for segment in layout.segments]
    wrong = [phase for phase in phases if phase != int(phase) or phase > MAX_TRAINED_SOURCES]
    if wrong:
        raise ValueError(f"segment embeddings: there are rows for 0 to {MAX_TRAINED_SOURCES}, and none for {wrong[0]}")
    counts = torch.tensor([segment.tokens for segment in layout.segments])
    return torch.tensor([int(phase) for phase in phases]).repeat_interleave(counts)
