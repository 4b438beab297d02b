"""Training on packed batches against batches sorted by length and padded, on the workload mix (forward and backward).

Stage III's step on both sides: planner, connector, decoder and renderer with all three losses, float32, as
:class:`bernini.training.stages.joint.JointStage` computes them. The mix is shrunk so that it runs on two cores: frames
of 5 x 9 tokens where it has 30 x 53, and by the same factor of 35 all other lengths, both budgets and the widths of
both models; so attention's share of the operations stays what it is at full size. The depth shrinks to two layers. The
text encoder, whose padding is the same on both sides, is left out: its states are given.

Which window the peer sorts is the whole question: with all samples at hand padding all but vanishes, without sorting it
costs as much again as the work itself. The bar is for 32 samples, between three and four packed batches, as a data
loader keeps some batches ahead. The other windows are measured once each and told. Larger ones also make batches of one
kind, images or long videos alone; what that does to learning is not measured here.

:mod:`bench_perf.batching` counts operations at full size before anything is measured: these are the ``TFLOP`` rows. For
these samples they predict 1.88 against batches that are not sorted, 1.23, 1.19, 1.14 and 1.06 against those sorted in
windows of 16, 32, 64 and 256.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bernini.planner.training import Batch, Draws, Outputs, draw, forward, pack
from bernini.renderer.text import assemble_context
from bernini.training.flow import pack_renderer, renderer_losses
from bernini.training.losses import decoder_losses, next_token_losses

from . import padded, workload
from .batching import BUDGET, T5_TOKENS, Batches, Lengths, computed, full_lengths, utilisation, work
from .batching import packed as packed_batches
from .batching import padded as padded_batches
from .harness import Row, Timing, Watch, judged, once, take_turns
from .shrunk import DIMS, HIDDEN, RENDERER, SHRINK, Item, Models, items, shrunk

SAMPLES, WINDOW, WINDOWS, BAR = 256, 32, (1, 16, 64, 256), 2.0
ROUNDS, SECONDS = (3, 7), 45.0
"""Least and most rounds of the judged pair, and the seconds after which no further one begins."""

Losses = dict[str, Tensor]


# --- the two sides --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """A micro-batch as a data loader hands it over. The last two are the padded side's."""

    items: tuple[Item, ...]
    batch: Batch
    draws: Draws
    talks: padded.PaddedTalks | None = None
    latents: padded.PaddedLatents | None = None

    @property
    def made(self) -> list[Item]:
        return [item for item in self.items if item.latents is not None]


def content(chosen: Sequence[Item], *, pad: bool) -> Content:
    batch = pack([item.talk for item in chosen])
    draws = draw(batch, HIDDEN, [torch.Generator().manual_seed(item.seed) for item in chosen])
    if not pad:
        return Content(tuple(chosen), batch, draws)
    samples = [item.latents for item in chosen if item.latents is not None]
    latents = padded.PaddedLatents.of(pack_renderer(samples, RENDERER.patch_size).layout) if samples else None
    return Content(tuple(chosen), batch, draws, padded.PaddedTalks.of(batch), latents)


def losses(models: Models, content: Content) -> Losses:
    """By name, of each sample that has the loss (``text``, ``visual``: zero for the others), packed or padded."""
    found, planner = Losses(), models.planner
    outputs: Outputs
    if content.talks is None:
        outputs = forward(planner, content.batch, content.draws)
    else:
        outputs = padded.planner_outputs(planner, content.batch, content.draws, content.talks)
    if outputs.text is not None:
        found["text"] = next_token_losses(outputs.text)
    if outputs.flow is not None:
        found["visual"] = decoder_losses(planner.vit_decoder, outputs.flow)
    if content.made:
        plans = [plan for plan in outputs.contexts if plan is not None]
        contexts = [
            assemble_context(item.text.to(plan.dtype), plan, tokens=shrunk(T5_TOKENS))
            for item, plan in zip(content.made, plans, strict=True)
            if item.text is not None
        ]
        samples = [item.latents for item in content.made if item.latents is not None]
        batch = pack_renderer(
            [replace(sample, context=context) for sample, context in zip(samples, contexts, strict=True)],
            RENDERER.patch_size,
        )
        if content.latents is None:
            found["dit"] = renderer_losses(models.renderer, batch)
        else:
            found["dit"] = padded.renderer_losses(models.renderer, batch, contexts, content.latents)
    return found


def train(models: Models, contents: Sequence[Content]) -> dict[str, Tensor]:
    """Forward and backward of all micro-batches; returns the losses by name and sample, ``[SAMPLES]`` each."""
    models.forget()
    found: dict[str, Tensor] = {}
    for each in contents:
        own = losses(models, each)
        total = torch.stack([loss.sum() for loss in own.values()]).sum()
        total.backward()
        for name, loss in own.items():
            rows = each.made if name == "dit" else each.items
            for item, value in zip(rows, loss.tolist(), strict=True):
                found.setdefault(name, torch.zeros(SAMPLES, dtype=torch.float64))[item.seed] = value
    return found


def same(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = 1e-5) -> None:
    """Nobody is timed computing something else.

    Raises:
        RuntimeError: a sample's loss differs.
    """
    if got.keys() != want.keys():
        raise RuntimeError(f"bench_perf packing: losses {sorted(got)} against {sorted(want)}")
    for name, values in want.items():
        error = (got[name] - values).abs() / values.abs().clamp_min(1e-12)
        worst = int(error.argmax())
        if not float(error[worst]) <= bound:
            raise RuntimeError(
                f"bench_perf packing: loss {name!r} of sample {worst} differs by {float(error[worst]):.2g}"
            )


# --- the rows -------------------------------------------------------------------------------------------------------


def told() -> bool:
    """Whether this is the run with the default malloc, which nothing judges."""
    return "MALLOC_MMAP_MAX_" not in os.environ


@dataclass(frozen=True)
class Arranged:
    """The same samples as one side gets them, shrunk and at full size."""

    contents: list[Content]
    small: list[Lengths]
    full: list[Lengths]
    used: float

    @classmethod
    def of(cls, samples: Sequence[Item], full: Sequence[Lengths], window: int | None) -> Arranged:
        """``window``: ``None`` packs."""
        small = [item.lengths for item in samples]
        budget = round(BUDGET / SHRINK)

        def cut(lengths: Sequence[Lengths], room: int) -> Batches:
            return packed_batches(lengths, room) if window is None else padded_batches(lengths, window, room)

        here, there = cut(small, budget), cut(full, BUDGET)
        contents = [content([samples[n] for n in batch], pad=window is not None) for batch in here]
        if window is None:
            return cls(contents, small, list(full), utilisation(full, there))
        return cls(contents, computed(small, here), computed(full, there), utilisation(full, there))


def title(window: int) -> str:
    return "unsorted" if window == 1 else f"sorted in windows of {window}"


def run(samples: int = SAMPLES) -> list[Row]:
    models, records = Models.make(), workload.sample(samples)
    mixed, full = items(records), [full_lengths(record) for record in records]
    useful = sum(item.lengths.renderer + item.lengths.planner for item in mixed)
    ours, peer = (Arranged.of(mixed, full, window) for window in (None, WINDOW))
    shape = f"{samples} samples, {useful} tokens"
    if told():
        with Watch() as watch:
            mine, theirs = rounds(*(partial(train, models, side.contents) for side in (ours, peer)), most=1)
        return [_timed(WINDOW, mine, theirs, useful, shape, watch, bar=BAR)]
    others = {window: Arranged.of(mixed, full, window) for window in WINDOWS if window <= samples}
    rows = [_counted(window, ours, side) for window, side in {WINDOW: peer, **others}.items()]
    want = train(models, ours.contents)
    same(train(models, peer.contents), want)
    with Watch() as watch:
        mine, theirs = rounds(*(partial(train, models, side.contents) for side in (ours, peer)), most=ROUNDS[1])
    shares = " and ".join(f"{attention_share(models, side.contents[:6]):.0%}" for side in (ours, peer))
    note = f"{_expected(ours, peer)}; attention takes {shares} of the time"
    first = _timed(WINDOW, mine, theirs, useful, shape, watch, bar=BAR, note=note)
    for window, side in others.items():
        with Watch() as watch:
            before = time.perf_counter()
            got = train(models, side.contents)
            once = Timing.of([time.perf_counter() - before])
        same(got, want)
        rows.append(_timed(window, mine, once, useful, shape, watch, note=_expected(ours, side) + "; peer once"))
    return [first, *rows]


def _timed(
    window: int, mine: Timing, theirs: Timing, useful: int, shape: str, watch: Watch, bar: float | None = None,
    note: str = "",
) -> Row:  # fmt: skip
    a, b = mine.per(useful), theirs.per(useful)
    note = f"{note}; " if note else ""
    text = f"peer: padded, with masks; {note}min..p80 {a.spread('us')} against {b.spread('us')} us"
    return judged(
        f"training, packed against {title(window)}", a.median * 1e6, b.median * 1e6, unit="us / useful token",
        dtype="float32", bar=bar, shape=shape, unfit=watch.unfit, note=text,
    )  # fmt: skip


def _expected(ours: Arranged, peer: Arranged) -> str:
    """What the counts of the shrunk mix say of the ratio."""
    return f"expected from operations {work(peer.small, DIMS).total / work(ours.small, DIMS).total:.2f}"


def _counted(window: int, ours: Arranged, peer: Arranged) -> Row:
    """The prediction at full size."""
    mine, theirs = work(ours.full), work(peer.full)
    waste = [sum(column) for column in zip(*peer.full, strict=True)]
    needed = [sum(column) for column in zip(*ours.full, strict=True)]
    names = ("renderer", "context", "planner")
    listed = ", ".join(f"{name} {a / b:.2f}" for name, a, b in zip(names, waste, needed, strict=True))
    return judged(
        f"counted at 14B, packed against {title(window)}", mine.total / 1e12, theirs.total / 1e12, unit="TFLOP",
        shape=f"{len(ours.full)} samples, {needed[0] + needed[2]} tokens",
        note=f"tokens computed per useful one: {listed}; attention's share {mine.attention / mine.total:.0%} against "
        f"{theirs.attention / theirs.total:.0%}; the budget is used to {ours.used:.0%} against {peer.used:.0%}",
    )  # fmt: skip


def rounds(*sides: Callable[[], Any], most: int) -> list[Timing]:
    """As the harness's ``interleave``, for long calls; whoever compared their outputs has warmed them up."""
    return take_turns([partial(once, side) for side in sides], (ROUNDS[0], most), SECONDS)


def attention_share(models: Models, contents: Sequence[Content]) -> float:
    """The part of the time that attention's own operations take, forward and backward."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        train(models, contents)
    events = seen.key_averages()
    mine = ("scaled_dot_product", "interval_attention")
    attention = sum(event.self_cpu_time_total for event in events if any(name in event.key for name in mine))
    return float(attention / sum(event.self_cpu_time_total for event in events))
