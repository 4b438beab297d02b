"""Training on padded batches, as it is usual: every stream as long as the longest of the batch, and masks in attention.

A competent form of it. Modules, weights and fused kernels are those of the packed side; what differs is pads in the
layers of both transformers, and attention: ``scaled_dot_product_attention`` over the whole batch with a mask of one row
per sample (renderer) or a dense hybrid mask (planner), and without any where nothing is padded. It is spared what a
padded batch need not do: embeddings, the connector, the decoder, the vocabulary and the losses see no pads, only
answers have queries in the last layer, and masks and indices are made beforehand.

Shapes: B rows, L tokens of the longest, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bernini.kernels import Segment, SegmentLayout
from bernini.kernels.attention import backends
from bernini.kernels.attention.reference import interval_mask
from bernini.planner import training
from bernini.planner.model import Attend, Planner
from bernini.planner.training import Batch, Draws, NextTokens, Outputs
from bernini.renderer.model import Renderer
from bernini.training.flow import RendererBatch

BACKEND = "bench_padded"


@dataclass(frozen=True)
class Rows:
    """A packed sequence as B rows of L.

    Args:
        count, longest: B and L.
        place: int64, where each packed token goes among the ``B * L``.
        real: bool ``[B, L]``.
    """

    count: int
    longest: int
    place: Tensor
    real: Tensor

    @classmethod
    def of(cls, borders: Sequence[int]) -> Rows:
        lengths = torch.tensor([stop - start for start, stop in pairwise(borders)])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        return cls(*real.shape, real.flatten().nonzero().flatten(), real)

    @property
    def mask(self) -> Tensor | None:
        """``[B, 1, 1, L]``, 0 or -inf; none without pads."""
        if bool(self.real.all()):
            return None
        return torch.zeros(self.real.shape).masked_fill_(~self.real, -torch.inf)[:, None, None]

    def fill(self, tokens: Tensor) -> Tensor:
        """``[T, N]`` -> ``[B * L, N]``, zeros between."""
        return tokens.new_zeros((self.count * self.longest, tokens.shape[1])).index_copy(0, self.place, tokens)


# --- the planner ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaddedTalks:
    """What :func:`planner_outputs` needs beside the packed batch.

    Args:
        positions: int64 ``[3, B * L]``.
        mask: ``[B, 1, L, L]``, 0 or -inf.
        asked: int64 ``[B, Q]``, places whose next token is learned, filled up with a row's first; ``None`` without.
        answered: int64, which of the ``B * Q`` are real, in packed order.
        labels, owners: of these.
    """

    rows: Rows
    positions: Tensor
    mask: Tensor
    asked: Tensor | None
    answered: Tensor
    labels: Tensor
    owners: Tensor

    @classmethod
    def of(cls, batch: Batch) -> PaddedTalks:
        layout = batch.layout
        rows = Rows.of(layout.cu_seqlens)
        count, longest = rows.count, rows.longest
        positions = torch.zeros((3, count * longest), dtype=torch.int64)
        positions[:, rows.place] = batch.conversation.positions
        starts, ends, second = layout.on("cpu").intervals
        visible = interval_mask(starts, ends, *(second or (None, None)), layout.tokens)
        # A pad's query sees its row's first token: softmax over nothing is not a number.
        mask = torch.full((count, longest, longest), -torch.inf)
        mask[:, :, 0] = 0
        learned: list[Tensor] = []
        for row, (start, stop) in enumerate(pairwise(layout.cu_seqlens)):
            own = visible[start:stop, start:stop]
            mask[row, : stop - start, : stop - start] = torch.zeros(own.shape).masked_fill_(~own, -torch.inf)
            learned.append(batch.learned[start:stop].nonzero().flatten() - 1)
        widest = max(len(places) for places in learned)
        asked = answered = torch.zeros(0, dtype=torch.int64)
        if widest:
            asked = torch.stack([F.pad(places, (0, widest - len(places))) for places in learned])
            asked += torch.arange(count)[:, None] * longest
            real = torch.arange(widest) < torch.tensor([len(places) for places in learned])[:, None]
            answered = real.flatten().nonzero().flatten()
        owners = torch.repeat_interleave(torch.arange(count), torch.tensor([len(places) for places in learned]))
        labels = batch.conversation.ids[batch.learned]
        return cls(rows, positions, mask[:, None], asked if widest else None, answered, labels, owners)


def planner_outputs(planner: Planner, batch: Batch, draws: Draws, padded: PaddedTalks) -> Outputs:
    """As :func:`bernini.planner.training.forward`."""
    embeds = padded.rows.fill(training._embeds(planner, batch, draws))
    filled = planner.hidden(embeds, padded.positions, _dense(padded.mask))
    hidden = filled[padded.rows.place]
    text = None
    if padded.asked is not None:
        at = padded.asked.flatten()
        seen = padded.mask[:, 0].flatten(0, 1)[at].unflatten(0, padded.asked.shape)[:, None]
        states = planner._partly(planner.text.layers[-1], filled, padded.positions, _dense(seen), at)
        logits = planner.lm_head(planner.text.norm(states[padded.answered]))
        counts = torch.bincount(padded.owners, minlength=padded.rows.count)
        text = NextTokens(logits, padded.labels, padded.owners, counts)
    flow = training._flow(planner, batch, draws, hidden)
    return Outputs(text, flow, *training._contexts(planner, batch, draws, hidden))


def _dense(mask: Tensor) -> Attend:
    """Attention of B rows under a mask ``[B, 1, Q, L]``."""

    def attend(layer: int, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> Tensor:
        return _batched(q_THD, k_SGD, v_SGD, len(mask), mask, scale)

    return attend


def _batched(q: Tensor, k: Tensor, v: Tensor, rows: int, mask: Tensor | None, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


# --- the renderer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaddedLatents:
    """``layout``: the packed one with pads behind every sample, as text without a place in the grid."""

    rows: Rows
    layout: SegmentLayout

    @classmethod
    def of(cls, layout: SegmentLayout) -> PaddedLatents:
        rows, segments = Rows.of(layout.cu_seqlens), list[Segment]()
        for sample, (start, stop) in enumerate(pairwise(layout.cu_seqlens)):
            segments += [segment for segment in layout.segments if segment.sample == sample]
            pads = rows.longest - (stop - start)
            segments += [Segment("text", (pads, 1, 1), sample=sample)] if pads else []
        return cls(rows, SegmentLayout(segments))


def renderer_losses(
    renderer: Renderer, batch: RendererBatch, contexts: Sequence[Tensor], padded: PaddedLatents
) -> Tensor:
    """As :func:`bernini.training.flow.renderer_losses`."""
    rows, texts = padded.rows, Rows.of([0, *torch.tensor([len(c) for c in contexts]).cumsum(0).tolist()])
    context = pad_sequence(list(contexts), batch_first=True)
    borders = tuple(row * texts.longest for row in range(texts.count + 1))
    with _masked(renderer, rows, texts):
        text = renderer.text_context(context.flatten(0, 1), borders)
        velocity = renderer(rows.fill(batch.tokens), padded.layout, batch.timestep, text)
    error = (velocity - batch.velocity).square().mean(1)
    return torch.stack([part.mean() for part in error.split(batch.target_tokens)])


@contextmanager
def _masked(renderer: Renderer, rows: Rows, texts: Rows) -> Iterator[None]:
    """The renderer's attention goes over whole rows, for as long as this lasts."""
    masks = cycle((rows.mask, texts.mask))  # a block attends to its own tokens first, then to the text

    def run(q: Tensor, k: Tensor, v: Tensor, at_q: tuple[int, ...], at_k: tuple[int, ...], scale: float) -> Tensor:
        return _batched(q, k, v, rows.count, next(masks), scale)

    backends.add(backends.Backend(BACKEND, lambda device, dtype: None, run))
    before, renderer.backend = renderer.backend, BACKEND
    try:
        yield
    finally:
        renderer.backend = before
        del backends.BACKENDS[BACKEND]
