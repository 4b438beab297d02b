"""The recipes of the real sizes build and make one step, without the memory of their models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bernini import cli
from bernini.data.mixture import TABLE_2
from bernini.errors import UserError
from bernini.training.recipe import Part, Recipe, load, shipped
from bernini.training.rehearsal import rehearse

from . import small

REAL = {
    "renderer-1.3b": {"renderer": 1.419},
    "renderer-14b-high": {"renderer": 14.288},
    "renderer-14b-low": {"renderer": 14.288},
    "planner": {"planner": 9.107},
    "joint": {"planner": 9.138, "renderer": 14.288},
}
"""Trained parameters of each part, in thousand millions (facts, section A)."""

ALONE = """
import json, resource, sys
from bernini.training.recipe import load
from bernini.training.rehearsal import rehearse
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
budgets = ["batch.renderer_tokens=40000", "batch.planner_tokens=2000"]
done = {name: vars(rehearse(load(name, budgets))) for name in sys.argv[1:]}
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({**done, "grown": grown * 1024}))
"""


@pytest.fixture(scope="module")
def rehearsed() -> dict[str, Any]:
    """All of them, in a process whose memory is theirs alone."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *REAL], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_little_memory(rehearsed: dict[str, Any]) -> None:
    assert rehearsed["grown"] < 2 * 2**30


def test_all_real_sizes_ship() -> None:
    assert {name for name in shipped() if not name.startswith("toy/")} == REAL.keys()


@pytest.mark.parametrize("name", REAL)
def test_a_step_at_full_size(name: str, rehearsed: dict[str, Any]) -> None:
    recipe, done = load(name), rehearsed[name]
    assert {part: round(count / 1e9, 3) for part, count in done["parameters"].items()} == REAL[name]
    trained = sum(done["parameters"].values())
    # Some stay in float32 while they compute, the others have a copy in bfloat16.
    assert 5.9 * trained < done["weights"] <= 6 * trained
    assert done["gradients"] == done["average"] == 4 * trained
    assert 8 * trained <= done["optimizer"] < 8.001 * trained
    assert done["working"] > 0.5 * 2**30
    room = 40000 if recipe.stage == "renderer" else 2000
    assert 0.8 * room < done["tokens"] < 45000


@pytest.mark.parametrize("name", REAL)
def test_the_data_are_table_2s(name: str) -> None:
    recipe, rows = load(name), {"planner": ["I"], "renderer": ["II-1", "II-2"], "joint": ["III-1", "III-2"]}
    for row, progress in zip(rows[recipe.stage], (1.0,) if recipe.stage == "planner" else (0.0, 1.0), strict=True):
        active = [part for part in recipe.data if part.start <= progress < part.end or progress == part.end == 1]
        assert sum(part.weight for part in active) == pytest.approx(sum(TABLE_2[row].values()))
        for part in active:
            if len(part.tasks) > 1:
                assert sum(part.tasks.values()) == pytest.approx(part.weight)


def test_a_rehearsal_counts_what_a_run_has(model: Path, features: Path, tmp_path: Path) -> None:
    recipe = small.recipe("joint", model, tmp_path, features)
    done = rehearse(replace(recipe, batch=replace(recipe.batch, samples=8), data=(Part("anything"),)))
    assert set(done.tasks) == set(small.TASKS)
    # In float32 the masters compute.
    trained = sum(done.parameters.values())
    assert (done.weights, done.gradients, done.average) == (4 * trained, 4 * trained, 4 * trained)
    assert done.total > 16 * trained and "GiB" in done.describe()


def test_the_command_prints_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        f"stage = 'renderer'\nmodel = '{model}'\noutput = '{tmp_path}/run'\nsteps = 1\n[[data]]\nsource = 'x'"
    )
    assert cli.main(["train", str(file), "batch.samples=2", "--rehearse"]) == 0
    assert "micro-batch" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_recompute_saves_memory(model: Path, features: Path, tmp_path: Path) -> None:
    recipe = small.recipe("renderer", model, tmp_path, features)
    assert rehearse(replace(recipe, recompute=True)).working < rehearse(recipe).working


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "somebody/else"}, "neither a folder here nor a released model"),
        ({"expert": "only"}, "expert must be 'high' or 'low'"),
        ({"stage": "joint"}, "has no planner"),
        ({"stage": "vae"}, "reads pixels"),
        ({"small": True}, "no example fits"),
    ],
)
def test_wrong_use_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    recipe: Recipe = load("renderer-14b-high")
    if changes.pop("small", False):
        recipe = replace(recipe, batch=replace(recipe.batch, renderer_tokens=10))
    with pytest.raises(UserError, match=message):
        rehearse(replace(recipe, **changes))
