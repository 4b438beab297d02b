"""Balanced batches: what a step learns is the plain mean's, for any number of ranks, and does not depend on them.

Ranks share one set of weights: each takes the gradients of its own losses, and these are added up. Where ranks compute
an example together they are threads (``simulate``), else they are run one after the other. What processes do is proved
in ``tests/proof/processes/test_balanced.py``.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bernini.errors import UserError
from bernini.parallel.group import Alone, Group
from bernini.parallel.mesh import Mesh, alone
from bernini.parallel.simulated import simulate
from bernini.parallel.workload import Sizes, terms
from bernini.renderer.config import RendererConfig
from bernini.training import checkpoints
from bernini.training import recipe as recipes
from bernini.training.batches import Drawn, Portion
from bernini.training.data import open_mixture
from bernini.training.models import open_models
from bernini.training.stages import assemble, make_stage
from bernini.training.trainer import LOG, Progress, Trainer
from bernini.training.work import Estimate, Load, counted

from . import small

STAGES = ("vae", "understanding", "planner", "renderer", "joint")
RANKS = {"renderer": (1, 2, 3, 4), "joint": (3,)}
"""Of a stage; two of the others. All go the same way."""
WINDOW = {"balance": True, "window": 3}
Gradients = dict[str, Tensor]


class Opened:
    """A stage's models, data and recipe, in float64; stages for any mesh share them."""

    def __init__(self, kind: str, model: Path, features: Path) -> None:
        made = small.recipe(kind, model, Path("unused"), features, precision="fp64", train_text_encoder=False)
        self.recipe, self.mixture = made, open_mixture(made)
        self._draws: dict[tuple[int, int, int], Any] = {}
        self.models = open_models(made, "cpu")
        if self.models.text is not None:
            self.models.text.encoder.model.double()
        for module in self.stage().parts.values():
            for parameter in module.parameters():
                parameter.data = parameter.data.double()
            for norm in module.modules():  # those of transformers round to float32, which depends on the loss's scale
                if type(norm).__name__ == "Qwen2_5_VLRMSNorm":
                    norm.forward = partial(_rms_norm, norm)  # type: ignore[method-assign]
                elif type(norm).__name__ == "WanUpsample":  # and so do those of diffusers
                    norm.forward = partial(torch.nn.Upsample.forward, norm)  # type: ignore[method-assign]
        self.parameters = {
            f"{part}.{name}": p for part, module in self.stage().parts.items() for name, p in module.named_parameters()
            if p.requires_grad
        }  # fmt: skip

    def stage(self, mesh: Mesh | None = None, **batch: Any) -> Any:
        recipe = replace(self.recipe, batch=replace(self.recipe.batch, **batch))
        stage = assemble(recipe, self.models, self.mixture, mesh or alone())
        pick = stage.batches.feed.pick

        def once(step: int, number: int) -> Any:  # ranks draw the same, which takes as long as all the rest
            key = (recipe.batch.samples, step, number)
            if key not in self._draws:
                self._draws[key] = pick(step, number)
            return self._draws[key]

        stage.batches.feed.pick = once  # type: ignore[method-assign]
        return stage

    def gradients(self, total: Tensor) -> Gradients:
        found = torch.autograd.grad(total, list(self.parameters.values()), allow_unused=True)
        return {name: g for name, g in zip(self.parameters, found, strict=True) if g is not None}

    def step(self, stage: Any, step: int, weighted: bool = True) -> tuple[dict[str, float], Gradients]:
        """This rank's part of a step's means and gradients, as the trainer takes them."""
        micros = [stage.micro(step, number) for number in range(stage.batches.count(step))]
        counts: Counter[str] = Counter()
        for micro in micros:
            counts.update(micro.counts)
        means: dict[str, float] = dict.fromkeys(counts, 0.0)
        sums: Gradients = {}
        for micro in micros:
            losses = stage.losses(micro, step)
            total = torch.zeros((), dtype=torch.float64)
            for name, loss in losses.items():
                means[name] += float(loss.detach()) / counts[name]
                weight = stage.weights[name] * (micro.weights.get(name, 1.0) if weighted else 1.0)
                total = total + weight * loss / counts[name]
            _add(sums, self.gradients(total))
        return means, sums

    def window(self, size: int, steps: int, weighted: bool = True, **batch: Any) -> tuple[list[Any], Gradients]:
        """(means of each step, mean of the steps' gradients) of so many ranks."""

        def rank(world: Group) -> Any:  # threads are for those that talk: the autoencoder is one thread's at a time
            stage = self.stage(Mesh(world, world, Alone(), torch.device("cpu")), **batch)
            stage.batches.least = 1  # these are too short to be cut
            stage.batches.meet()
            return [self.step(stage, step, weighted) for step in range(steps)]

        talk = batch.get("split", 1) > 1
        told = simulate(size, rank) if talk else [rank(Place(number, size)) for number in range(size)]
        means: list[Counter[str]] = []
        sums: Gradients = {}
        for step in range(steps):
            means.append(Counter())
            for ranks in told:
                for name, value in ranks[step][0].items():
                    means[step][name] += value  # type: ignore[assignment]
                _add(sums, ranks[step][1])
        return means, {name: value / steps for name, value in sums.items()}

    def plain(self, drawn: list[Drawn]) -> Gradients:
        """Of the mean over examples that are computed one by one."""
        stage, sums = self.stage(), Gradients()
        counts = Counter[str]()
        for one in drawn:
            stage.batches.portion = lambda step, number, one=one: Portion((one,), (one,), 1, ())
            counts.update(stage.micro(0, 0).counts)
        for one in drawn:
            stage.batches.portion = lambda step, number, one=one: Portion((one,), (one,), 1, ())
            losses: Mapping[str, Tensor] = stage.losses(stage.micro(0, 0), 0)
            total = sum(stage.weights[name] * loss / counts[name] for name, loss in losses.items())
            assert isinstance(total, Tensor)
            _add(sums, self.gradients(total))
        return sums


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def _add(sums: Gradients, more: Gradients) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def error(got: Gradients, want: Gradients) -> float:
    """The largest difference by the norm of each; of one that vanishes, by a thousandth of all together."""
    assert got.keys() == want.keys()
    whole = float(torch.stack([value.norm() for value in want.values()]).norm())
    assert whole > 0
    return max(
        float((got[name] - value).norm()) / max(float(value.norm()), 1e-3 * whole) for name, value in want.items()
    )


@pytest.fixture(scope="module")
def opened(model: Path, features: Path) -> Any:
    return cache(lambda kind: Opened(kind, model, features))


class Place(Alone):
    """A rank among others that it does not talk to."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size  # type: ignore[misc]


def at(rank: int, size: int) -> Mesh:
    return Mesh(Place(rank, size), Place(rank, size), Alone(), torch.device("cpu"))


def _name(drawn: Drawn) -> tuple[int, str]:
    return drawn.step, drawn.example.key


def drawn(stage: Any, steps: int) -> list[Drawn]:
    return [one for step in range(steps) for part in stage.batches._draw(step) for one in part[0]]


@pytest.mark.parametrize("kind", STAGES)
def test_a_windows_gradient_is_that_of_the_plain_mean(kind: str, opened: Any) -> None:
    own = opened(kind)
    want = own.plain(drawn(own.stage(), 3))
    for size in RANKS.get(kind, (2,)):
        _, got = own.window(size, 3, **WINDOW)
        # On plain pictures patches are alike to the vision tower, and differences of near equals keep fewer digits.
        assert error(got, want) < (1e-9 if kind == "understanding" else 1e-10), size
    if kind == "renderer":  # without the weights the steps' means count alike, however many examples they have
        assert error(own.window(2, 3, weighted=False, **WINDOW)[1], want) > 1e-3


@pytest.mark.parametrize("kind", ["renderer", "joint"])
def test_examples_that_several_ranks_share(kind: str, opened: Any) -> None:
    """Few examples for many ranks: large ones are cut, and others computed meanwhile."""
    own, few = opened(kind), {"balance": True, "split": 4, "samples": 3, "accumulate": 1}
    stage = own.stage(**few)
    want = own.plain(drawn(stage, 1))
    for size in (2, 3, 4):
        batches = own.stage(at(0, size), **few).batches
        batches.least = 1
        assert size < 4 or any(placed.ranks > 1 for placed in batches._plans(0)), size
        assert error(own.window(size, 1, **few)[1], want) < 1e-10, size


@pytest.mark.parametrize("kind", STAGES)
def test_balanced_or_not_a_step_has_the_same_losses(kind: str, opened: Any) -> None:
    own = opened(kind)
    want, _ = own.window(1, 2)
    for size in RANKS.get(kind, (2,)):
        assert own.window(size, 2, balance=True)[0] == [pytest.approx(means, rel=1e-10) for means in want], size


@pytest.mark.parametrize("kind", STAGES)
def test_a_step_has_the_same_examples_on_any_ranks(kind: str, opened: Any) -> None:
    own = opened(kind)
    alone_ = own.stage(**WINDOW)
    steps = own.recipe.steps
    assert steps % 3  # the last window is shorter
    have = [alone_.batches.members(step) for step in range(steps)]
    for first in range(0, steps, 3):
        window = [one for part in have[first : first + 3] for one in part]
        wanted = [
            one
            for step in range(first, min(first + 3, steps))
            for part in alone_.batches._draw(step)
            for one in part[0]
        ]
        assert sorted(map(_name, window)) == sorted(map(_name, wanted))
    assert any(one.step != step for step, part in enumerate(have) for one in part)
    for size in (1, 2, 3, 4):
        stages = [own.stage(at(rank, size), **WINDOW) for rank in range(size)]
        for step in (5, 1, 6, 2):  # a run that goes on begins anywhere
            found = [[stage.batches.portion(step, n) for n in range(stage.batches.count(step))] for stage in stages]
            for ranks in zip(*found, strict=True):
                assert len({tuple(map(_name, portion.examples)) for portion in ranks}) == 1
                given = [_name(one) for portion in ranks for one in portion.own[: portion.real]]
                assert sorted(given) == sorted(map(_name, ranks[0].examples))
            everybody = [one for portion in found[0] for one in portion.examples]
            assert sorted(map(_name, everybody)) == sorted(map(_name, have[step]))


def test_steps_of_a_window_and_ranks_of_a_step_have_as_much_work(opened: Any) -> None:
    own, many = opened("renderer"), {"samples": 24, "accumulate": 1}
    seconds = own.stage().batches.estimate.first.seconds

    def spread(parts: list[Any], stage: Any) -> float:
        loads = [sum(seconds(stage.batches._sizes(one.example)) for one in part) for part in parts]
        return max(loads) / min(loads)

    stage = own.stage(**many, **WINDOW)
    assert spread([part[0][0] for part in map(stage.batches._draw, range(3))], stage) > 1.2
    assert spread([stage.batches.members(step) for step in range(3)], stage) < 1.05
    for batch, holds in (({}, False), ({"balance": True}, True)):
        stages = [own.stage(at(rank, 4), **many, **batch) for rank in range(4)]
        parts = [stage.batches.portion(0, 0).own for stage in stages]
        assert (spread(parts, stages[0]) < 1.15) == holds


def test_a_step_that_does_not_fit_has_more_micro_batches(opened: Any) -> None:
    own = opened("renderer")
    stage = own.stage(balance=True, accumulate=1)
    tokens = [stage.batches.feed.cost(one.example)[0] for one in stage.batches.members(0)]
    tight = own.stage(balance=True, accumulate=1)
    tight.batches._batch = replace(tight.batches._batch, renderer_tokens=max(tokens), planner_tokens=max(tokens))
    assert stage.batches.count(0) == 1 < tight.batches.count(0)
    for number in range(tight.batches.count(0)):
        assert sum(tight.batches.feed.cost(one.example)[0] for one in tight.batches.portion(0, number).own) <= max(
            tokens
        )


def test_work_is_fitted_to_times_and_goes_on_from_a_checkpoint() -> None:
    true = [0.05, 3e-4, 2e-7, 0, 0, 0, 0, 0]
    dice, first = random.Random(0), counted(RendererConfig(), None, again=False)
    one, other = Estimate(first, 5), Estimate(first, 5)
    for step in range(1, 41):
        loads = [Load(tuple(Sizes(renderer=dice.randint(100, 9000)) for _ in range(4)), (1,) * 4) for _ in range(2)]
        times = [sum(a * b for a, b in zip(true, terms(load.samples), strict=True)) for load in loads]
        before = one.at(step + 1)
        said = one.note(step, loads, [100.0, 100.0] if step == 1 else times)  # the first step is slow for other reasons
        assert other.note(step, loads, [1e9, 1e9] if step == 1 else times) == said
        assert (said is not None) == (step % 5 == 0)
        assert one.at(step) == before  # the next batch is being made by it
        assert (one.at(step + 1) != before) == (step % 5 == 0)
        if step == 22:
            other = Estimate(first, 5)
            other.restore(json.loads(json.dumps(one.state())))
            other._warm = True
        assert all(one.at(at) == other.at(at) for at in range(step, 60))
    assert one.at(50).seconds(Sizes(renderer=5000)) == pytest.approx(3e-4 * 5000 + 2e-7 * 5000**2, rel=0.02)
    assert Estimate(first).note(7, [Load()], [1.0]) is None and Estimate(first).state() is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["batch.window=2"], r"batch.balance must be true where batch.window is used, is false"),
        (["batch.fit=-1"], "at least 0"),
        (["batch.balance=true", "batch.split=3"], "a power of two"),
    ],
)
def test_recipes_that_cannot_be(changes: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipes.load("toy/renderer", changes)


def test_checkpoints_older_than_a_key_go_on(model: Path, features: Path, tmp_path: Path) -> None:
    recipe = small.recipe("renderer", model, tmp_path / "run", features, steps=1)
    assert Trainer(recipe, make_stage(recipe)).train()
    facts = next((tmp_path / "run").glob("checkpoints/*/state.json"))
    found = json.loads(facts.read_text())
    del found["recipe"]["batch"]["window"], found["work"]
    facts.write_text(json.dumps(found))
    Trainer(replace(recipe, batch=replace(recipe.batch, balance=True, split=2, fit=3)), make_stage(recipe)).resume()
    dealt = replace(recipe, batch=replace(recipe.batch, balance=True, window=2))
    with pytest.raises(UserError, match=r"another recipe \(batch.window was 1, is 2\)"):
        Trainer(dealt, make_stage(dealt)).resume()


def test_stopped_in_a_window_it_ends_with_the_same_bits(model: Path, features: Path, tmp_path: Path) -> None:
    made = small.recipe("renderer", model, tmp_path / "whole", features, train_text_encoder=False)
    made = replace(made, batch=replace(made.batch, samples=2, **WINDOW))
    assert Trainer(made, make_stage(made)).train()

    def stop(progress: Progress) -> None:
        if progress.step in (2, 5):
            raise InterruptedError

    again = replace(made, output=str(tmp_path / "again"))
    for _ in range(2):
        with pytest.raises(InterruptedError):
            Trainer(again, make_stage(again), report=stop).train()
    assert Trainer(again, make_stage(again)).train()
    ends = [checkpoints.load(checkpoints.latest(tmp_path / name))[0] for name in ("whole", "again")]  # type: ignore[arg-type]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    lines = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / name / LOG).open()] for name in ("whole", "again")
    ]
    assert lines[0] == lines[1] and len({line["batch"] for line in lines[0]}) == made.steps
