"""Training on several processes is the training of one: gradients, curves, bits, what a killed run goes on with, and
the exported model. One script forks the ranks of all rounds, see ``train_worker.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("tensorboard", reason="needs tensorboard, which training writes to")

from bernini import cli
from bernini.training import checkpoints
from bernini.training.trainer import LOG, MODEL

from ...training import small

STAGES = ("vae", "understanding", "planner", "renderer", "joint", "joint-read")
"""The last one reads a planner that is not trained."""
STEPS = 50
ONE_BY_ONE = [[0], [1], [2], [3], [4]]
PLAIN = {"pixels": ONE_BY_ONE, "features": [[0], [29], [13], [31], [30]], "targets": [[0], [9], [13], [21], [26]]}
"""Examples of each micro-batch: the plain mean. Of the features 28 and up are of understanding."""
PACKED = {
    "pixels": {"all": [[0, 1, 2, 3, 4]], "cut": [[0, 1], [2, 3, 4]]},
    "features": {"all": [[0, 29, 13, 31, 30]], "lacks": [[29, 31], [0], [13, 30]]},
    "targets": {"all": [[0, 9, 13, 21, 26]], "lacks": [[0], [9, 13], [21, 26]]},
}
"""Other ways to cut the same examples; of two and more ranks some have none in a micro-batch, or none of a kind."""


def kind(stage: str) -> str:
    if stage == "joint-read":
        return "targets"
    return "pixels" if stage in ("vae", "understanding", "renderer") else "features"


class Rounds:
    """What the ranks are told to do, and where they leave it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given = {"model": str(small.write_model(folder / "model"))}
        self.given["features"] = str(small.write_features(folder / "features", folder / "model"))

    def gradients(self, stage: str, size: int, **changes: Any) -> dict[str, Any]:
        packings = PACKED[kind(stage)] if size > 1 else {"plain": PLAIN[kind(stage)], **PACKED[kind(stage)]}
        return {
            **self.given, "kind": "gradients", "stage": stage.split("-")[0],
            "output": str(self.folder / f"{stage}-{size}"),
            "changes": {"precision": "fp64", "train_planner": stage != "joint-read", **changes},
            "optimizer": {"clip": 1e9}, "packings": packings,
        }  # fmt: skip

    def train(self, name: str, steps: int, optimizer: str, **changes: Any) -> dict[str, Any]:
        """Of a renderer on a few pictures; three examples in a micro-batch, so that the last of four ranks has none."""
        return {
            **self.given, "kind": "train", "stage": "renderer", "output": str(self.folder / name),
            "optimizer": {"name": optimizer, "lr": 1e-3}, "batch": {"samples": 3, "accumulate": 1},
            "changes": {"steps": steps, "save_every": steps, "train_text_encoder": False, **changes},
        }  # fmt: skip

    def run(self, rounds: list[dict[str, Any]]) -> None:
        file = self.folder / "rounds.json"
        file.write_text(json.dumps(rounds), encoding="utf-8")
        script = Path(__file__).with_name("train_worker.py")
        done = subprocess.run(
            [sys.executable, str(script), str(file)], capture_output=True, text=True, check=False, timeout=1500
        )
        assert done.returncode == 0, done.stderr[-4000:]
        codes = json.loads(done.stdout.splitlines()[-1])
        assert len(codes) == len(rounds), done.stderr[-4000:]
        for number, spec in enumerate(rounds):
            assert all((code == 0) != ("kill" in spec) for code in codes[number]), (number, done.stderr[-4000:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rounds = Rounds(tmp_path_factory.mktemp("fsdp"))
    curve = {"precision": "fp64", "recompute": True}
    elastic = rounds.train("elastic", 12, "adamw", save_every=2)

    def jobs(size: int) -> list[dict[str, Any]]:
        found = [rounds.train(f"curve-{size}", STEPS, "muon", **curve)]
        stages = ("joint",) if size == 4 else STAGES
        # UMT5 rounds to float32 inside: parts of its gradients, of ranks with the same text, add up to 1e-8 only.
        found += [
            rounds.gradients(stage, size, recompute=size == 2, train_text_encoder=stage == "renderer")
            for stage in stages
        ]
        return found

    rounds.run(
        [
            {"size": 1, "jobs": [*jobs(1), rounds.train("steady", 12, "adamw", save_every=2)]},
            {"size": 2, "jobs": [
                *jobs(2), *(rounds.train(name, 6, "muon", precision="bf16") for name in ("once", "twice"))
            ]},
            {"size": 4, "sequence": 2, "jobs": jobs(4)},
            {"size": 4, "jobs": [elastic], "kill": [3, 0.05]},
            {"size": 2, "jobs": [elastic], "kill": [7, 0.02]},
            {"size": 3, "jobs": [elastic]},
        ]
    )  # fmt: skip
    return rounds.folder


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines()]


def end_of(run: Path) -> dict[str, Tensor]:
    last = checkpoints.latest(run)
    assert last is not None
    return checkpoints.load(last)[0]


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of a tensor's norm; of one that vanishes, a thousandth of all norms together."""
    assert one.keys() == other.keys()
    whole = float(torch.stack([value.double().norm() for value in one.values()]).norm())
    return max(
        float((value - other[name]).double().norm()) / max(float(value.double().norm()), 1e-3 * whole)
        for name, value in one.items()
    )


@pytest.mark.parametrize(
    ("stage", "size"), [*((stage, size) for stage in STAGES for size in (1, 2)), ("joint", 4)]
)  # fmt: skip
def test_gradients_are_those_of_the_plain_mean(folder: Path, stage: str, size: int) -> None:
    want = load_file(folder / f"{stage}-1.plain")
    told = json.loads((folder / f"{stage}-1.plain.json").read_text())
    for packing in PACKED[kind(stage)]:
        got = load_file(folder / f"{stage}-{size}.{packing}")
        assert largest_difference(want, got) < 1e-10
        assert json.loads((folder / f"{stage}-{size}.{packing}.json").read_text()) == pytest.approx(told, rel=1e-10)
    assert sum(bool(gradient.any()) for gradient in want.values()) > 0.9 * len(want)


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_curve(folder: Path, size: int) -> None:
    one, other = losses(folder / "curve-1"), losses(folder / f"curve-{size}")
    assert len(one) == len(other) == STEPS
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in other] == pytest.approx([line[key] for line in one], rel=1e-5)
    for key in ("tokens", "examples", "lr"):
        assert [line[key] for line in other] == [line[key] for line in one]
    assert one[-1]["loss"] != one[0]["loss"]


def test_the_same_bits_at_equal_size(folder: Path) -> None:
    once, twice = end_of(folder / "once"), end_of(folder / "twice")
    assert once.keys() == twice.keys()
    assert all(torch.equal(value, twice[name]) for name, value in once.items())
    strip = [{key: value for key, value in line.items() if key != "seconds"} for line in losses(folder / "once")]
    again = [{key: value for key, value in line.items() if key != "seconds"} for line in losses(folder / "twice")]
    assert strip == again


def test_a_checkpoint_has_everything_once(folder: Path) -> None:
    """The state of several ranks is that of one, whatever they were many."""
    one, other = end_of(folder / "curve-1"), end_of(folder / "curve-4")
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}
    assert any("momentum_buffer" in name for name in one) and any("exp_avg_sq" in name for name in one)
    assert largest_difference(one, other) < 1e-5
    last = checkpoints.latest(folder / "curve-4")
    assert last is not None
    sizes = [file.stat().st_size for file in last.glob("*.safetensors")]
    assert len(sizes) == 4
    alone = checkpoints.latest(folder / "curve-1")
    assert alone is not None
    assert max(sizes) < 0.5 * (alone / checkpoints.TENSORS).stat().st_size


def test_killed_and_gone_on_with_other_sizes(folder: Path) -> None:
    """4 -> 2 -> 3 ranks: the same batches, and what one process does but for rounding."""
    one, other = losses(folder / "steady"), losses(folder / "elastic")
    assert [line["step"] for line in other] == list(range(1, 13))
    assert [line["tokens"] for line in other] == [line["tokens"] for line in one]
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    found = sorted((folder / "elastic" / checkpoints.FOLDER).iterdir())
    assert [path.name for path in found] == ["step-00000010", "step-00000012"]


def test_the_export_is_that_of_one_process(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the same checkpoint, of three ranks: what three wrote at the end, and what ``bernini export`` writes."""
    output = folder / "exported"
    assert cli.main(["export", str(folder / "elastic"), str(output)]) == 0
    assert capsys.readouterr().out.split() == [str(output)]
    files = {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
    assert files == {path.relative_to(folder / "model") for path in (folder / "model").rglob("*") if path.is_file()}
    for file in files:
        assert (output / file).read_bytes() == (folder / "elastic" / MODEL / file).read_bytes(), file
    mean = end_of(folder / "elastic")["ema/renderer/proj_out.weight"]
    weights = load_file(output / "bernini" / "model.safetensors")
    assert torch.equal(weights["diff_dec.transformer.proj_out.weight"], mean)
    start = load_file(folder / "model" / "bernini" / "model.safetensors")
    changed = {name for name, value in weights.items() if not torch.equal(value, start[name])}
    assert changed and all(name.startswith("diff_dec.") for name in changed)


def test_export_says_what_is_missing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(tmp_path), str(tmp_path / "new")]) == 2
    assert "has no checkpoint" in capsys.readouterr().err
    assert cli.main(["export", str(folder / "elastic"), str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
