from __future__ import annotations

from pathlib import Path

import pytest

from bernini.errors import UserError
from bernini.training import recipe as recipes

GOOD = """
stage = "renderer"
model = "m"
output = "o"
steps = 10
[optimizer]
lr = 1e-4
betas = [0.9, 0.95]
[[data]]
source = "world"
tasks = ["t2v", "v2v"]
[[data]]
source = "pairs"
weight = 3
decay = true
tasks = {i2i = 2}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(GOOD)
    return path


def test_values_defaults_and_overrides(file: Path) -> None:
    made = recipes.load(file, ["steps=20", "optimizer.lr=2", "output=runs/a b", "data.1.weight=0.5", "ema=0"])
    assert (made.steps, made.optimizer.lr, made.output, made.ema) == (20, 2.0, "runs/a b", 0.0)
    assert made.optimizer.betas == (0.9, 0.95) and made.optimizer.clip == 1.0
    assert made.data[0].tasks == {"t2v": 1.0, "v2v": 1.0} and made.data[1].tasks == {"i2i": 2.0}
    assert made.data[1].weight == 0.5 and made.data[1].decay and made.batch.accumulate == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps=0", "steps must be positive"),
        ("steps=ten", "steps: must be int"),
        ("stage=draw", "none of 'vae'"),
        ("optimizer.momentum=1", "unknown key 'momentum'"),
        ("optimizer.betas=[1]", "must have 2 entries"),
        ("speed=1", "unknown key 'speed'"),
        ("lr", "expected key=value"),
        ("data.7.weight=1", "no entry '7'"),
        ("data.0=1", "name a key of an entry"),
        ("data.0.weight=-1", "positive weight"),
        ("data.0.start=0.5", "start = 0"),
        ("noise.low=0.9", None),
        ("noise.low=1.5", "a range inside"),
        ("ema=1", "below 1"),
        ("train_planner=false", "train_planner must be true in the stage"),
        ("dropout.text=2", "a probability"),
        ("mask_ratio=[1]", "two positive numbers, or empty"),
        ("mask_ratio=[0, 1]", "two positive numbers, or empty"),
    ],
)
def test_wrong_values_say_what_is_wrong(file: Path, override: str, words: str | None) -> None:
    more = ["data.1.start=0.5"] if override == "data.0.start=0.5" else []
    if words is None:
        assert recipes.load(file, [override]).noise.low == 0.9
        return
    with pytest.raises(UserError, match=words):
        recipes.load(file, [override, *more])


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recipe nothing"):
        recipes.load("nothing")
    (tmp_path / "bad.toml").write_text("stage = ")
    with pytest.raises(UserError, match="is not TOML"):
        recipes.load(tmp_path / "bad.toml")
    (tmp_path / "short.toml").write_text('stage = "vae"\nmodel = "m"\noutput = "o"\n')
    with pytest.raises(UserError, match="has no 'steps'"):
        recipes.load(tmp_path / "short.toml")


@pytest.mark.parametrize("name", recipes.shipped())
def test_shipped_recipes_parse(name: str) -> None:
    assert recipes.load(name).data
