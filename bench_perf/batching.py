"""How samples become micro-batches: packed by our feed, or sorted, cut and padded as is usual; and what that costs.

Lengths are those of three streams: the renderer's tokens (none where nothing is rendered), its context, the planner's
conversation. Padding goes to the longest of the batch in each stream by itself. Rows without a target take no part in
the padded renderer: a competent loader leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

from bernini.data.example import Example
from bernini.training.feed import Feed
from bernini.training.recipe import Batch, Recipe

from . import workload

BUDGET = 150_000
"""Tokens of a micro-batch, for each model: the released training's (facts, section F)."""
T5_TOKENS = 512

Batches = list[list[int]]
"""Numbers of samples."""


class Lengths(NamedTuple):
    renderer: int
    context: int
    planner: int


def full_lengths(record: workload.Record) -> Lengths:
    """At the released sizes. The context holds the text twice, as T5 and as the planner reads it, then what else the
    planner gave: its sources, and a tenth of its target (table 3 masks nine tenths)."""
    if record.target is None:
        return Lengths(0, 0, record.planner_tokens)
    given = record.planner_tokens - round(0.9 * record.target.vit_tokens)
    return Lengths(record.renderer_tokens, max(T5_TOKENS, record.text_tokens + given), record.planner_tokens)


def packed(lengths: Sequence[Lengths], budget: int = BUDGET) -> Batches:
    """What :class:`bernini.training.feed.Feed` makes of the samples in their order."""
    examples = [Example(str(number), "t2v", "") for number in range(len(lengths))]

    def cost(example: Example) -> tuple[int, int]:
        own = lengths[int(example.key)]
        return own.renderer, own.planner

    recipe, batches, done = Recipe("joint", "", "", 1), Batches(), 0
    while done < len(lengths):
        coming = iter(range(done, len(lengths)))
        mixture = SimpleNamespace(
            pick=lambda *_, coming=coming: (0, next(coming)), parts=[SimpleNamespace(data=examples)]
        )
        limits = Batch(len(lengths) - done, renderer_tokens=budget, planner_tokens=budget)
        picked = Feed(replace(recipe, batch=limits), mixture, cost).pick(0, len(batches))  # type: ignore[arg-type]
        batches.append([int(example.key) for example in picked.examples])
        done += len(picked.examples)
    return batches


def padded(lengths: Sequence[Lengths], window: int, budget: int = BUDGET) -> Batches:
    """Each window of samples sorted by length, then cut where samples x longest would pass the budget of a model.

    Args:
        window: samples that are sorted together; 1 keeps their order and cuts it.
    """
    batches: Batches = []
    together = len(lengths) if window == 1 else window
    for start in range(0, len(lengths), together):
        numbers = list(range(start, min(start + together, len(lengths))))
        if window > 1:
            numbers.sort(key=lambda number: (lengths[number].renderer, lengths[number].planner))
        batch: list[int] = []
        for number in numbers:
            if batch and any(size > budget for size in _padded_sizes([lengths[n] for n in (*batch, number)])):
                batches.append(batch)
                batch = []
            batch.append(number)
        batches.append(batch)
    return batches


def _padded_sizes(rows: Sequence[Lengths]) -> tuple[int, int]:
    made = [row.renderer for row in rows if row.renderer]
    return len(made) * max(made, default=0), len(rows) * max(row.planner for row in rows)


def computed(lengths: Sequence[Lengths], batches: Batches) -> list[Lengths]:
    """Of every sample the lengths that padding gives it."""
    out: dict[int, Lengths] = {}
    for batch in batches:
        rows = [lengths[number] for number in batch]
        most = Lengths(*(max(column) for column in zip(*rows, strict=True)))
        for number, row in zip(batch, rows, strict=True):
            out[number] = most if row.renderer else Lengths(0, 0, most.planner)
    return [out[number] for number in range(len(lengths))]


def utilisation(lengths: Sequence[Lengths], batches: Batches, budget: int = BUDGET) -> float:
    """Useful renderer tokens, as a part of what the budget has room for in the batches that render."""
    rendering = sum(any(lengths[number].renderer for number in batch) for batch in batches)
    return sum(row.renderer for row in lengths) / (rendering * budget)


@dataclass(frozen=True)
class Dims:
    """Sizes of both models.

    Args:
        ffn, planner_ffn: widths of the feed-forwards; the planner's has three matrices.
        key_width: of the planner's keys, all heads together.
    """

    width: int = 5120
    ffn: int = 13824
    layers: int = 40
    planner_width: int = 3584
    planner_ffn: int = 18944
    key_width: int = 512
    planner_layers: int = 28


FULL = Dims()
"""One 14B expert with the 7B planner."""


class Work(NamedTuple):
    """Operations of forward and backward."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


def work(lengths: Sequence[Lengths], dims: Dims = FULL) -> Work:
    """Of the transformer layers of both models over samples of these (computed) lengths, nothing recomputed.

    Backward counts twice for products with weights and 2.5 times for attention, whose scores it computes again. The
    planner's attention counts in full on both sides, masked pairs too: it is nothing beside the rest. Left out: heads,
    embeddings and what works element by element, in which padding costs as much as in products with weights.
    """
    linear = attention = 0.0
    n, kept = dims.width, dims.planner_width
    for renderer, context, planner in lengths:
        linear += dims.layers * (renderer * 2 * (6 * n * n + 2 * n * dims.ffn) + context * 4 * n * n)
        attention += dims.layers * 4 * renderer * (renderer + context) * n
        each = 2 * (2 * kept * kept + 2 * kept * dims.key_width + 3 * kept * dims.planner_ffn)
        linear += dims.planner_layers * planner * each
        attention += dims.planner_layers * 4 * planner * planner * kept
    return Work(3.0 * linear, 3.5 * attention)
