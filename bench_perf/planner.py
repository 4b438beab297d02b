"""Planning a request with the prefix kept against the released loop, which runs three full forwards at every step.

A language model of hidden size 512 with 8 layers, a decoder of width 512 and depth 4; 120 text and 300 target tokens,
25 steps, 5 decoder steps, float32. Both sides are whole runs, from input embeddings to the hidden states that become
contexts. Kept out on both: the vision tower, the text encoder and the projection onto the vocabulary. Attention is
``scaled_dot_product_attention`` on both; the release hands it a dense additive mask, ours needs none.

The peer is spared what the release also does: its last layer, whose output nobody reads. What is left is more tokens,
more branches. At real sizes :mod:`bench_perf.planner_flops` counts instead.

A pair of plans takes some twenty seconds on two cores. So few are timed, and the whole command ends in about four
minutes: three to five rounds that are judged, then one round of the first task with the default malloc, only told.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout
from bernini.kernels.attention.reference import interval_mask
from bernini.planner.decode import Prefix, Seeded, Whole, generate
from bernini.planner.heads import DecoderConfig
from bernini.planner.model import Attend, Planner, PlannerConfig
from bernini.planner.prompt import Conversation, Visual
from bernini.planner.settings import PlanSettings

from . import planner_flops
from .harness import Row, Timing, Watch, judged, once, take_turns

HIDDEN, LAYERS, HEADS, KEY_HEADS = 512, 8, 8, 2
DECODER = DecoderConfig(HIDDEN, 512, depth=4)
TEXT, TARGET = 120, Visual("video", (5, 6, 10))
REFERENCE = Visual("image", (1, 8, 8))
SETTINGS = PlanSettings(steps=25, decoder_steps=5)
BARS: dict[str, tuple[tuple[Visual, ...], float]] = {
    "v2v": ((TARGET,), 2.3),
    "t2v": ((), 3.5),
    "r2v": ((REFERENCE,) * 8, 2.6),
}
"""Sources of each task, and how many times faster the kept prefix must be."""
PREFIXES = (100, 500, 1000, 2000)
ROUNDS, BUDGET = (3, 5), 40.0
"""Least and most rounds, and the seconds after which no further round of whole plans begins."""


# --- the model and the requests -------------------------------------------------------------------------------------


def qwen(hidden: int, layers: int, heads: int, key_heads: int, intermediate: int, vocabulary: int) -> dict[str, Any]:
    """``config.json`` of a Qwen2.5-VL with a vision tower too small to matter."""
    half = hidden // heads // 2
    return {
        "model_type": "qwen2_5_vl", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "vocab_size": vocabulary, "rope_theta": 1e6, "tie_word_embeddings": False, "bos_token_id": 0,
        "eos_token_id": 1, "image_token_id": 2, "video_token_id": 3, "vision_start_token_id": 4,
        "vision_end_token_id": 5,
        "rope_scaling": {"type": "mrope", "mrope_section": [half // 4, (half - half // 4) // 2,
                                                            half - half // 4 - (half - half // 4) // 2]},
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
                          "out_hidden_size": hidden, "fullatt_block_indexes": [0]},
    }  # fmt: skip


def make_planner(dtype: torch.dtype = torch.float32) -> Planner:
    """Random weights. The feed-forward is twice as wide as the model, Qwen's 5.3 times: more is left to attention and
    to all that is no product of matrices."""
    torch.manual_seed(0)
    config = PlannerConfig(qwen(HIDDEN, LAYERS, HEADS, KEY_HEADS, 1024, 1000), 512, DECODER, TARGET.tokens)
    planner = Planner(config, understanding=False).eval()
    torch.nn.init.normal_(planner.mask_tokens)
    return planner.to(dtype)


def talk(text: int, sources: Sequence[Visual], target: Visual) -> Conversation:
    """A conversation of ``text`` text tokens in all, placed as the template does: a system turn, sources with a mark
    on either side, the prompt, and one mark behind the target."""
    between = 2 * (len(sources) - 1) if sources else 0
    opening = min(20, text - between - 2)
    segments = [Segment("text", (opening, 1, 1))] if sources else []
    for number, source in enumerate(sources):
        segments += [Segment("text", (2, 1, 1))] if number else []
        segments.append(Segment("source", source.grid))
    closing = text - 1 - (opening + between if sources else 0)
    segments += [Segment("text", (closing, 1, 1)), Segment("target", target.grid), Segment("text", (1, 1, 1))]
    layout = SegmentLayout(segments)
    ids = torch.arange(layout.tokens) % 1000
    return Conversation(ids, layout, (*sources, target))


@dataclass(frozen=True)
class Request:
    """The three conversations that guidance compares, with their input embeddings ``[T, N]``."""

    has_sources: bool
    talks: dict[str, Conversation]
    embeds: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def make(cls, planner: Planner, text: int, sources: Sequence[Visual], target: Visual) -> Request:
        talks = {
            "conditional": talk(text, sources, target),
            "text only": talk(text, (), target),
            "unconditional": talk(text, (), target),
        }
        generator = torch.Generator().manual_seed(1)
        seen = torch.randn(
            (sum(source.tokens for source in sources), planner.text_config.hidden_size), generator=generator
        )
        embeds = {name: planner.embed(spoken, seen) for name, spoken in talks.items()}
        return cls(bool(sources), talks, embeds)

    def pick(self, names: Sequence[str]) -> tuple[list[Conversation], list[Tensor]]:
        return [self.talks[name] for name in names], [self.embeds[name] for name in names]


# --- the two sides --------------------------------------------------------------------------------------------------


def ours(planner: Planner, request: Request, settings: PlanSettings = SETTINGS) -> tuple[Tensor, ...]:
    """(plan, hidden states of the conditional target, of its other tokens, of the unconditional text)."""
    weights = settings.weights(request.has_sources)
    names = [*weights, *({"unconditional"} - set(weights))]
    engine = Prefix(planner, *request.pick(names), active=len(weights), backend="sdpa")
    plan = generate(planner, engine, list(weights.values()), settings, Seeded(0))
    return plan, engine.step(plan, 1)[0], engine.hidden[0], engine.hidden[names.index("unconditional")]


class Released(Whole):
    """The released loop's forwards: every branch, whole, whatever the scales; at the end two more, for the contexts."""

    def __init__(self, planner: Planner, request: Request) -> None:
        self._planner, self.active = planner, 3
        self._conversations, self._embeds = request.pick(("conditional", "text only", "unconditional"))
        self.tokens = len(self._conversations[0].layout.target_index)
        self._masks = {
            id(talk): additive_mask(talk.layout, x) for talk, x in zip(self._conversations, self._embeds, strict=True)
        }

    def _full(self, conversation: Conversation, embeds: Tensor) -> Tensor:
        return self._planner.hidden(embeds, conversation.positions, self._masks[id(conversation)])

    def finish(self, plan: Tensor) -> tuple[Tensor, ...]:
        """As :func:`ours`."""
        found = []
        for number in (0, 2):
            talk, embeds = self._conversations[number], self._embeds[number]
            hidden = self._full(talk, embeds.index_copy(0, talk.layout.on(embeds.device).target_index, plan))
            rest = torch.from_numpy(talk.layout.indices(talk.layout.numbers("text", "source")))
            found += [hidden[talk.layout.target_index], hidden[rest]]
        return plan, found[0], found[1], found[3]


def released(planner: Planner, request: Request, settings: PlanSettings = SETTINGS) -> tuple[Tensor, ...]:
    """What :func:`ours` returns, computed as released: three branches at every step."""
    text = 1.0 if settings.text_cfg is None else settings.text_cfg
    engine = Released(planner, request)
    weights = [settings.visual_cfg, text - settings.visual_cfg, 1 - text]
    return engine.finish(generate(planner, engine, weights, settings, Seeded(0)))


def additive_mask(layout: SegmentLayout, like: Tensor) -> Attend:
    """The hybrid mask as the release has it: dense, 0 or -inf; made once."""
    starts, ends, second = layout.on(like.device).intervals
    visible = interval_mask(starts, ends, *(second or (None, None)), layout.tokens)
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, -torch.inf)

    def attend(layer: int, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_SGD, v_SGD))
        grouped = q_THD.shape[1] != k_SGD.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return attend


def same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Nobody is timed computing something else.

    Raises:
        RuntimeError: the sides differ.
    """
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        error = float((a - b).norm() / b.norm())
        if not error < 1e-4:
            raise RuntimeError(f"bench_perf planner: output {number} differs by {error:.2g} from the released loop's")


# --- the rows -------------------------------------------------------------------------------------------------------


def told() -> bool:
    """Whether this is the run with the default malloc, which nothing judges."""
    return "MALLOC_MMAP_MAX_" not in os.environ


def rounds(*sides: Callable[[], Any], budget: float) -> list[Timing]:
    """As the harness's ``interleave``, for long calls: fewer rounds, and no call to warm up, which is the caller's."""
    return take_turns([partial(once, side) for side in sides], (1, 1) if told() else ROUNDS, budget)


def plans(planner: Planner) -> list[Row]:
    rows = []
    for task, (sources, bar) in list(BARS.items())[: 1 if told() else None]:
        request = Request.make(planner, TEXT, sources, TARGET)
        same(*(side(planner, request, PlanSettings(2, 2)) for side in (ours, released)))
        with Watch() as watch:
            sides = partial(ours, planner, request), partial(released, planner, request)
            mine, theirs = rounds(*sides, budget=BUDGET)
        seen = sum(source.tokens for source in sources)
        spread = f"min..p80 {mine.spread('s')} against {theirs.spread('s')} s"
        rows.append(
            judged(
                f"plan {task}, {SETTINGS.steps} steps", mine.median, theirs.median, unit="s", dtype="float32", bar=bar,
                shape=f"{TEXT} + {seen} + {TARGET.tokens} tokens", unfit=watch.unfit,
                note=f"peer: three full forwards a step, without the last layer; {spread}",
            )
        )  # fmt: skip
    return rows


def slope(planner: Planner) -> Row:
    """How a step's time grows with the prefix: a least-squares line over :data:`PREFIXES`, for one branch.

    What is left to grow is the attention of the target's queries over the prefix's keys.
    """
    states = torch.randn(TARGET.tokens, HIDDEN)
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    with Watch() as watch:
        for length in PREFIXES:
            spoken = talk(length, (), TARGET)
            embeds = planner.embed(spoken, None)
            prefix = Prefix(planner, [spoken], [embeds], active=1, backend="sdpa")
            attend = additive_mask(spoken.layout, embeds)
            full = partial(planner.hidden, embeds, spoken.positions, attend)
            step = partial(prefix.step, states)
            step(), full()
            timings = rounds(step, full, budget=1.0)
            for side, timing in zip(times.values(), timings, strict=True):
                side.append(timing.median * 1e3)
    mine, theirs = (line(PREFIXES, side) for side in times.values())
    listed = "; ".join(f"{name} {', '.join(f'{ms:.3g}' for ms in side)} ms" for name, side in times.items())
    return judged(
        "growth of a step with its prefix", mine, theirs, unit="ms / 1000 tokens", dtype="float32",
        shape=f"{TARGET.tokens} target tokens", unfit=watch.unfit,
        note=f"peer: one full forward; prefixes of {', '.join(map(str, PREFIXES))} tokens: {listed}",
    )  # fmt: skip


def line(xs: Sequence[int], ys: Sequence[float]) -> float:
    """Slope of the least-squares line, per 1000 of x."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (xs, ys))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum()) * 1000


@torch.no_grad()
def run() -> list[Row]:
    planner = make_planner()
    if told():
        return plans(planner)
    return [*plans(planner), slope(planner), *planner_flops.rows()]
