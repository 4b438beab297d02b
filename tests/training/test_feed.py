"""Which examples come: a pure function, within the budgets, and never one that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bernini.data.example import Example, Skip
from bernini.data.mixture import Mixture, Part
from bernini.errors import UserError
from bernini.training.feed import PATIENCE, Feed
from bernini.training.recipe import Batch, Recipe
from bernini.training.recipe import Part as RecipePart
from bernini.training.stages import make_stage
from bernini.training.trainer import Trainer

from . import small


class Numbers:
    """Examples whose prompt is as long as their number; every third one is broken."""

    fps, identity, parts, has_pixels = 8.0, "numbers", frozenset[str](), True

    def __init__(self, count: int, broken: int = 3) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example | Skip:
        if index % self.broken == 0:
            return Skip(str(index), "unreadable video", "damaged")
        return Example(str(index), "t2v", "x" * index)

    def of_task(self, task: str) -> Sequence[int]:
        return range(self.count)


RECIPE = Recipe(
    "renderer", "m", "o", 10, data=(RecipePart("world"),), batch=Batch(renderer_tokens=100, planner_tokens=60)
)


def feed(data: Numbers, **changes: object) -> Feed:
    return Feed(replace(RECIPE, **changes), Mixture([Part(data)]), lambda e: (len(e.prompt), 5))  # type: ignore[arg-type]


def test_it_is_a_pure_function_and_keeps_the_budgets() -> None:
    one = feed(Numbers(40))
    for step in range(6):
        picked = one.pick(step, 0)
        assert picked == feed(Numbers(40)).pick(step, 0)
        assert picked.examples and sum(len(e.prompt) for e in picked.examples) <= 100
        assert 5 * len(picked.examples) <= 60
        assert all(int(example.key) % 3 for example in picked.examples)
        assert all(skip.reason == "unreadable video" for skip in picked.skipped)
    picks = {tuple(e.key for e in one.pick(step, number).examples) for step in range(4) for number in range(4)}
    assert len(picks) == 16
    assert feed(Numbers(40), seed=1).pick(0, 0) != one.pick(0, 0)
    assert any(one.pick(step, 0).skipped for step in range(6))


def test_at_most_so_many_samples() -> None:
    assert len(feed(Numbers(4, broken=9), batch=Batch(samples=2)).pick(0, 0).examples) == 2


def test_what_can_never_work_is_said() -> None:
    with pytest.raises(UserError, match=f"none of {PATIENCE} examples in a row .* unreadable video"):
        feed(Numbers(40, broken=1)).pick(0, 0)
    with pytest.raises(UserError, match=r"has \d{3} and 5 tokens, and a micro-batch has room for 100"):
        feed(Numbers(400, broken=1000)).pick(1, 0)


def test_bad_examples_are_counted_and_the_run_goes_on(
    model: Path, features: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = small.recipe("renderer", model, tmp_path / "run", features, steps=2)
    everything = replace(recipe.data[0], tasks={})  # understanding has no target, so the renderer cannot use it
    notes: list[str] = []
    trainer = Trainer(replace(recipe, data=(everything,)), make_stage(replace(recipe, data=(everything,))),
                      note=notes.append)  # fmt: skip
    assert trainer.train()
    assert trainer.skipped.counts["wrong stage"] > 0
    assert any("wrong stage" in note for note in notes)
    assert "skipped world/train/understanding" in caplog.text
    again = Trainer(replace(recipe, data=(everything,)), make_stage(replace(recipe, data=(everything,))))
    again.resume()
    assert again.skipped.counts == trainer.skipped.counts


def test_features_of_another_model_are_refused(model: Path, features: Path, tmp_path: Path) -> None:
    from bernini.toy_full import write_checkpoint

    other = write_checkpoint(tmp_path / "other", small.SPEC, seed=2)
    with pytest.raises(UserError, match="made by|another"):
        make_stage(small.recipe("renderer", other, tmp_path / "run", features))
    with pytest.raises(UserError, match="has no VAE features"):
        make_stage(replace(small.recipe("renderer", model, tmp_path / "run", features), data=(RecipePart("world"),)))


def test_the_renderer_waits_for_a_good_autoencoder(model: Path, features: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say how well .* asks for 30 dB"):
        make_stage(small.recipe("renderer", model, tmp_path / "run", features, least_psnr=30.0))
    vae = Trainer(small.recipe("vae", model, tmp_path / "vae", features, steps=1), make_stage(
        small.recipe("vae", model, tmp_path / "vae", features, steps=1)))  # fmt: skip
    vae.train()
    with pytest.raises(UserError, match="reconstructs to .* dB, and the recipe asks for 30 dB"):
        make_stage(small.recipe("renderer", tmp_path / "vae" / "model", tmp_path / "run", features, least_psnr=30.0))
