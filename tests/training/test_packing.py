"""Packing changes nothing: many samples in one micro-batch have the losses and gradients of one after the other."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bernini.data.example import Example
from bernini.data.parquet import ParquetData
from bernini.training.feed import Picked
from bernini.training.stage import Micro
from bernini.training.stages import make_stage
from bernini.training.weights import Weights

from . import small

STAGES = ("renderer", "planner", "joint")
BOUNDS = {"fp64": 1e-10, "fp32": 1e-5}
STEP = 3
Gradients = dict[str, Tensor]


class Chosen:
    """Stands in for the feed: the examples that it was told."""

    examples: tuple[Example, ...] = ()

    def pick(self, step: int, number: int) -> Picked:
        return Picked(self.examples, Counter())


class Opened:
    """A stage whose micro-batches are chosen by hand, in a precision."""

    def __init__(self, kind: str, precision: str, model: Path, features: Path, **changes: object) -> None:
        recipe = small.recipe(kind, model, Path("unused"), features, precision=precision, **changes)
        self.stage: Any = make_stage(recipe)
        self.weights = Weights(self.stage.parts, precision, ema=0.0, keep_wide=self.stage.keep_wide)
        self.stage.batches.feed = self.feed = Chosen()
        data = ParquetData(str(features))
        found: dict[str, list[Example]] = {}
        for number in range(len(data)):
            example = data[number]
            assert isinstance(example, Example)
            found.setdefault(example.task, []).append(example)
        # One of each task, and two of understanding, one with a picture and one without where there are both.
        talks = sorted(found.pop("understanding"), key=lambda example: len(example.sources))
        self.examples = tuple(examples[0] for examples in found.values())
        if kind != "renderer":
            self.examples += (talks[0], talks[-1])

    def micro(self, examples: Sequence[Example]) -> Micro:
        self.feed.examples = tuple(examples)
        return self.stage.micro(STEP, 0)

    def run(self, micros: Sequence[Micro]) -> tuple[dict[str, float], Gradients]:
        """Means over all micro-batches, and the gradients of their weighted sum, as the trainer takes them."""
        self.weights.forget()
        counts: Counter[str] = Counter()
        for micro in micros:
            counts.update(micro.counts)
        means: dict[str, float] = dict.fromkeys(counts, 0.0)
        for micro in micros:
            losses: Mapping[str, Tensor] = self.stage.losses(micro, STEP)
            assert losses.keys() == micro.counts.keys()
            total = sum(self.stage.weights[name] * loss / counts[name] for name, loss in losses.items())
            assert isinstance(total, Tensor)
            total.backward()
            self.weights.collect()
            for name, loss in losses.items():
                means[name] += float(loss.detach()) / counts[name]
        found = {name: w.grad.clone() for name, w in self.weights.masters.items() if w.grad is not None}
        return means, found


def assert_same(
    got: tuple[dict[str, float], Gradients], want: tuple[dict[str, float], Gradients], bound: float
) -> None:
    assert got[0].keys() == want[0].keys() and got[1].keys() == want[1].keys()
    assert all(value > 0 for value in want[0].values())
    assert got[0] == pytest.approx(want[0], rel=bound)
    whole = float(torch.stack([gradient.double().norm() for gradient in want[1].values()]).norm())
    for name, gradient in want[1].items():
        error = float((got[1][name] - gradient).double().norm())
        # What vanishes, as the gradient of a bias that softmax does not see, is measured by the others.
        assert error <= bound * max(float(gradient.double().norm()), 1e-3 * whole), (name, error, whole)


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("kind", STAGES)
def test_packed_samples_have_the_losses_and_gradients_of_single_ones(
    kind: str, precision: str, model: Path, features: Path
) -> None:
    opened = Opened(kind, precision, model, features)
    packed = opened.run([opened.micro(opened.examples)])
    singles = opened.run([opened.micro([example]) for example in opened.examples])
    assert_same(packed, singles, BOUNDS[precision])
    some = [name for name, gradient in singles[1].items() if bool(gradient.any())]
    assert len(some) > 0.9 * len(singles[1])


@pytest.mark.parametrize("kind", STAGES)
def test_order_and_company_change_no_random_number(kind: str, model: Path, features: Path) -> None:
    """Packs of several sizes in another order: the same draws, so the same means."""
    opened = Opened(kind, "fp64", model, features)
    want = opened.run([opened.micro(opened.examples)])
    shuffled = random.Random(5).sample(opened.examples, len(opened.examples))
    assert [example.key for example in shuffled] != [example.key for example in opened.examples]
    got = opened.run([opened.micro(shuffled[:3]), opened.micro(shuffled[3:])])
    assert_same(got, want, BOUNDS["fp64"])


@pytest.mark.parametrize("kind", STAGES)
def test_the_bounds_would_notice_another_draw(kind: str, model: Path, features: Path) -> None:
    """At another step noise, masks and drops differ, and so do the losses."""
    opened = Opened(kind, "fp64", model, features)
    here = opened.micro(opened.examples)
    there = opened.stage.micro(STEP + 1, 0)
    with torch.no_grad():
        one, other = (opened.stage.losses(micro, STEP) for micro in (here, there))
    changed = [name for name in one if abs(float(one[name] - other[name])) > 1e-3 * float(one[name])]
    assert changed == [name for name in one if name != "text"]


@pytest.mark.parametrize("kind", ["planner", "joint"])
def test_a_batch_of_understanding_alone_is_packed_too(kind: str, model: Path, features: Path) -> None:
    opened = Opened(kind, "fp64", model, features)
    talks = [example for example in opened.examples if example.target is None]
    assert_same(opened.run([opened.micro(talks)]), opened.run([opened.micro([talk]) for talk in talks]), 1e-10)


@pytest.mark.parametrize(
    ("ratio", "share"), [((1e4, 1e-2), (1.0, 1.0)), ((1.0, 1.0), (0.1, 0.9)), ((1.0, 1e4), (0.0, 0.2))]
)
def test_a_mask_ratio_of_the_recipe(
    ratio: tuple[float, float], share: tuple[float, float], model: Path, features: Path
) -> None:
    """Instead of the paper's, which hides more than nine of ten; one token of each target is always masked."""
    opened = Opened("joint", "fp32", model, features, mask_ratio=ratio)
    masked = opened.micro(opened.examples).content.talk.draws.masked
    assert share[0] <= float(masked.double().mean()) <= share[1]
    assert (
        float(Opened("joint", "fp32", model, features).micro(opened.examples).content.talk.draws.masked.double().mean())
        > 0.7
    )
