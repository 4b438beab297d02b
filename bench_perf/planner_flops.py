"""Floating-point operations of a plan, counted exactly, at the sizes of the released checkpoint.

Counted are the products of matrices (2 for each multiply and add), from input embeddings to the contexts: the language
model, the connector and the decoder. ``tests/test_bench_planner.py`` holds these formulas against torch's own counter.
Left out on both sides: the vision tower, the text encoder and everything that works element by element. Attention is
counted by the pairs that are computed: ours skips what the mask hides, the release's dense mask does not.

Where the facts leave the released loop's way open, its cheaper reading counts: no vocabulary projection, the connector
at revealed positions only, nothing projected twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from bernini.planner.decode import revealed_by_step
from bernini.planner.settings import PlanSettings

from .harness import Row, judged


@dataclass(frozen=True)
class Dims:
    """Sizes of a planner; ViT embeddings are as wide as the language model."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    gen: int
    width: int
    depth: int
    frequencies: int = 256


QWEN_7B = Dims(3584, 28, 28, 4, 18944, gen=4096, width=4096, depth=16)


@dataclass(frozen=True)
class Sizes:
    """Tokens of a request. ``before`` counts those in front of the target, one mark follows it.

    Args:
        before: in the conditional conversation; ``bare`` in the two without sources.
    """

    before: int
    bare: int
    target: int

    @property
    def has_sources(self) -> bool:
        return self.before > self.bare

    def of(self, branch: str) -> int:
        return self.before if branch == "conditional" else self.bare


def linear(rows: int, *widths: int) -> int:
    """A chain of linear layers."""
    return sum(2 * rows * a * b for a, b in pairwise(widths))


def layer(d: Dims, rows: int, pairs: int, queries: int | None = None) -> int:
    """One layer of the language model.

    Args:
        rows: tokens that give keys and values.
        pairs: of a query and a key, computed for each head.
        queries: tokens that go on, all by default. The keys and values of a part are computed a second time.
    """
    on = rows if queries is None else queries
    keys = 2 * linear(rows + (queries or 0), d.hidden, d.key_heads * (d.hidden // d.heads))
    return keys + linear(on, d.hidden, d.hidden, d.hidden) + 3 * linear(on, d.hidden, d.intermediate) + (
        4 * pairs * d.hidden
    )  # fmt: skip


def decoder(d: Dims, tokens: int, branches: int, steps: int) -> int:
    """Our sampler: conditions once, the noisy values once for all branches."""
    rows = tokens * branches
    tables = linear(steps * rows, d.width, (3 * d.depth + 2) * d.width)
    once = linear(steps, d.frequencies, d.width, d.width) + linear(rows, d.hidden, d.width) + tables
    return once + steps * (linear(tokens, d.hidden, d.width) + _blocks(d, rows))


def released_decoder(d: Dims, tokens: int, branches: int, steps: int) -> int:
    """The network once a step, on all branches."""
    rows = tokens * branches
    embed = linear(1, d.frequencies, d.width, d.width) + 2 * linear(rows, d.hidden, d.width)
    return steps * (embed + linear(rows, d.width, (3 * d.depth + 2) * d.width) + _blocks(d, rows))


def _blocks(d: Dims, rows: int) -> int:
    return d.depth * linear(rows, d.width, d.width, d.width) + linear(rows, d.width, d.hidden)


def contexts(d: Dims, sizes: Sizes) -> int:
    return linear(sizes.before + sizes.target + 1 + sizes.bare + 1, d.hidden, d.gen, d.gen)


def ours(d: Dims, sizes: Sizes, settings: PlanSettings) -> int:
    """Prefixes once, then the target's tokens of the branches that count, then the filled target once more."""
    used, target = d.layers - 1, sizes.target
    active = list(settings.weights(sizes.has_sources))
    prefixes = [sizes.of(branch) + 1 for branch in {**dict.fromkeys(active), "unconditional": None}]
    total = sum(used * layer(d, rows, rows * (rows + 1) // 2) for rows in prefixes)
    rows, keys = len(active) * target, sum(sizes.of(branch) + target for branch in active)
    for count in revealed(target, settings, parity=False):
        if count:
            total += (used - 1) * layer(d, rows, target * keys) + layer(d, rows, count * keys, len(active) * count)
            total += 3 * linear(len(active) * count, d.hidden, d.hidden)
            total += decoder(d, count, len(active), settings.decoder_steps)
    return total + used * layer(d, target, target * (sizes.before + target)) + contexts(d, sizes)


def released(
    d: Dims,
    sizes: Sizes,
    settings: PlanSettings,
    *,
    layers: int | None = None,
    sampler: Callable[[Dims, int, int, int], int] = released_decoder,
    parity: bool = True,
) -> int:
    """Three full forwards a step under a dense mask, and two for the contexts.

    Args:
        layers: how many run; all of them as released, though the last one's output is not read.
        sampler: of the decoder.
        parity: whether at least one token is revealed at every step.
    """
    layers = d.layers if layers is None else layers

    def forward(before: int) -> int:
        tokens = before + sizes.target + 1
        return layers * layer(d, tokens, tokens * tokens)

    total = forward(sizes.before) + forward(sizes.bare) + contexts(d, sizes)
    for count in revealed(sizes.target, settings, parity=parity):
        total += forward(sizes.before) + 2 * forward(sizes.bare) + 3 * linear(3 * count, d.hidden, d.hidden)
        total += sampler(d, count, 3, settings.decoder_steps)
    return total


def revealed(target: int, settings: PlanSettings, *, parity: bool) -> Sequence[int]:
    return [len(tokens) for tokens in revealed_by_step(torch.arange(target), settings.steps, parity=parity)]


TEXT, FRAME, CLIP = 120, 64, 300
"""Text tokens of a conversation, the marks among them; an image of 224 x 224; 81 frames of 480 x 848."""
REQUESTS: dict[str, tuple[int, int]] = {
    "t2i": (0, FRAME),
    "i2i": (FRAME, FRAME),
    "t2v": (0, CLIP),
    "v2v": (CLIP, CLIP),
    "r2v": (8 * FRAME, CLIP),
    "rv2v": (CLIP + FRAME, CLIP),
}
"""Source and target tokens of each task."""


def rows() -> list[Row]:
    settings = PlanSettings()
    found = []
    for task, (sources, target) in REQUESTS.items():
        sizes = Sizes(TEXT - 1 + sources, TEXT - 1, target)
        found.append(
            judged(
                f"operations of a plan, {task}",
                ours(QWEN_7B, sizes, settings) / 1e12,
                released(QWEN_7B, sizes, settings) / 1e12,
                unit="TFLOP",
                shape=f"{TEXT} + {sources} + {target} tokens, 7B",
                note=f"counted; peer: released loop; {settings.steps} steps, {settings.decoder_steps} decoder steps",
            )
        )
    return found
