"""Balanced runs of processes: killed and gone on with fewer, they have the same batches, which weigh the same; and an
example that two processes share is learned as one process learns it. See ``train_worker.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorboard", reason="needs tensorboard, which training writes to")

from bernini.training.trainer import LOG

from ...training import small


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process; three that are killed, after which two go on; three with fewer examples than they are."""
    folder = tmp_path_factory.mktemp("balanced")
    model = small.write_model(folder / "model")
    features = small.write_features(folder / "features", model)

    even = {"samples": 3, "accumulate": 2, "balance": True, "window": 3}

    def job(name: str, **batch: Any) -> dict[str, Any]:
        return {
            "model": str(model), "features": str(features), "kind": "train", "stage": "renderer",
            "output": str(folder / name), "batch": {**even, **batch},
            "changes": {"steps": 7, "save_every": 2, "train_text_encoder": False},
            "optimizer": {"name": "adamw"},
        }  # fmt: skip

    few = {"samples": 2, "accumulate": 1, "window": 1, "split": 2}
    rounds = [
        {"size": 1, "jobs": [job("whole"), job("few", **few)]},
        {"size": 3, "jobs": [job("moved")], "kill": [3, 0.05]},
        {"size": 2, "jobs": [job("moved", split=2, fit=2)]},
        {"size": 3, "jobs": [job("shared", **few)]},
    ]
    file = folder / "rounds.json"
    file.write_text(json.dumps(rounds), encoding="utf-8")
    script = Path(__file__).with_name("train_worker.py")
    done = subprocess.run(
        [sys.executable, str(script), str(file)], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == [[0], [-9, -9, -9], [0, 0], [0, 0, 0]], done.stderr[-4000:]
    return folder


def assert_same_run(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for key in ("step", "tokens", "examples", "batch"):
        assert [line[key] for line in other] == [line[key] for line in one]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in other] == pytest.approx([line[key] for line in one], rel=1e-4)
    assert len({line["batch"] for line in one}) > 4


def test_killed_and_gone_on_with_fewer_processes(runs: Path) -> None:
    assert_same_run(*([json.loads(line) for line in (runs / name / LOG).open()] for name in ("whole", "moved")))
    last = json.loads((runs / "moved" / "checkpoints" / "step-00000007" / "state.json").read_text())
    assert last["work"]["used"][-1][0] == 7


def test_processes_that_share_an_example(runs: Path) -> None:
    """Two examples in a step of three: two of them have halves of one, the third has the other meanwhile."""
    assert_same_run(*([json.loads(line) for line in (runs / name / LOG).open()] for name in ("few", "shared")))
