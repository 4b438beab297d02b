"""Runs: what goes on is what was stopped, to the bit; what cannot go on says why and leaves the last checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bernini.errors import UserError
from bernini.training import checkpoints, keeping
from bernini.training.recipe import Offload, Part
from bernini.training.stages import make_stage
from bernini.training.trainer import LOG, MODEL, Progress, Trainer

from . import small

STAGES = ("vae", "understanding", "planner", "renderer", "joint")


def run(recipe: small.Recipe, report: Callable[[Progress], None] = lambda progress: None) -> Trainer:
    trainer = Trainer(recipe, make_stage(recipe), report=report)
    assert trainer.train()
    return trainer


def end_of(run: Path) -> dict[str, Tensor]:
    folder = checkpoints.latest(run)
    assert folder is not None
    return load_file(folder / checkpoints.TENSORS)


def losses_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same(a: Path, b: Path) -> None:
    one, other = end_of(a), end_of(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert losses_of(a) == losses_of(b)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    stage: str, model: Path, features: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(stage, model, tmp_path / "whole", features)
    trainer = run(recipe)
    assert len(losses_of(tmp_path / "whole")) == recipe.steps
    assert len(list((tmp_path / "whole" / checkpoints.FOLDER).iterdir())) == recipe.keep

    def stop(progress: Progress) -> None:
        if progress.step in (2, 5):
            raise Stopped

    again = replace(recipe, output=str(tmp_path / "again"))
    for _ in range(2):
        with pytest.raises(Stopped):
            run(again, stop)
    run(again)
    assert_same(tmp_path / "whole", tmp_path / "again")

    started = load_file(checkpoints.latest(tmp_path / "whole") / checkpoints.TENSORS)  # type: ignore[operator]
    first = next(iter(trainer.weights.masters))
    assert not torch.equal(started[f"weights/{first}"], started[f"ema/{first}"])
    assert (tmp_path / "whole" / MODEL / "config.json").is_file()


def test_killed_ten_times_ends_with_the_same_bits(model: Path, features: Path, tmp_path: Path) -> None:
    script = Path(small.__file__).with_name("killed.py")

    def ran(output: Path, kills: int) -> dict[str, object]:
        command = [sys.executable, str(script), str(model), str(features), str(output), "joint", str(kills)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    assert ran(tmp_path / "whole", 0) == {"killed at": [], "status": 0}
    told = ran(tmp_path / "killed", 10)
    assert told["status"] == 0 and len(told["killed at"]) == 10  # type: ignore[arg-type]
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_the_weights_learn_and_the_average_is_exported(model: Path, features: Path, tmp_path: Path) -> None:
    recipe = small.recipe("renderer", model, tmp_path / "run", features)
    trainer = run(recipe)
    before = load_file(model / "bernini" / "model.safetensors")
    after = load_file(tmp_path / "run" / MODEL / "bernini" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("diff_dec.") for name in changed)
    mean = trainer.weights.ema["renderer/proj_out.weight"]
    assert torch.equal(after["diff_dec.transformer.proj_out.weight"], mean)


def test_a_planner_that_is_only_read(model: Path, features: Path, tmp_path: Path) -> None:
    """The renderer learns from what it learns from beside the planner, and the planner stays as it is, to the bit."""
    data = (Part(str(features), tasks={"t2v": 1.0, "r2v": 1.0}),)
    recipe = small.recipe("joint", model, tmp_path / "both", features, data=data, steps=2)
    run(recipe)
    run(replace(recipe, train_planner=False, output=str(tmp_path / "one")))
    both, one = losses_of(tmp_path / "both"), losses_of(tmp_path / "one")
    assert one[0]["dit"] == both[0]["dit"] and {"text", "visual"}.isdisjoint(one[0])
    assert one[1]["dit"] != both[1]["dit"] and one[1]["batch"] == both[1]["batch"]
    trained = end_of(tmp_path / "one")
    assert {name.split("/")[1] for name in trained if name.startswith("weights/")} == {"renderer", "text_encoder"}
    before = load_file(model / "bernini" / "model.safetensors")
    after = load_file(tmp_path / "one" / MODEL / "bernini" / "model.safetensors")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("diff_dec.") for name in changed)


def test_a_planner_that_is_only_read_takes_no_answers(model: Path, features: Path, tmp_path: Path) -> None:
    data = (Part(str(features), tasks={"t2v": 1.0, "understanding": 1.0}),)
    trainer = run(small.recipe("joint", model, tmp_path, features, data=data, steps=2, train_planner=False))
    assert trainer.skipped.counts["wrong stage"] == trainer.skipped.total > 0


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_other_precisions(precision: str, model: Path, features: Path, tmp_path: Path) -> None:
    recipe = small.recipe("renderer", model, tmp_path / precision, features, precision=precision, steps=3)
    run(recipe)
    exact = run(replace(recipe, precision="fp32", output=str(tmp_path / "fp32")))
    one, other = losses_of(tmp_path / precision), losses_of(tmp_path / "fp32")
    bound = 0.05 if precision == "bf16" else 1e-4
    assert all(abs(a["loss"] - b["loss"]) < bound * b["loss"] for a, b in zip(one, other, strict=True))
    assert all(master.dtype == torch.float32 for master in exact.weights.masters.values())


def test_recompute_changes_nothing(model: Path, features: Path, tmp_path: Path) -> None:
    recipe = small.recipe("joint", model, tmp_path / "kept", features, steps=3)
    run(recipe)
    run(replace(recipe, recompute=True, output=str(tmp_path / "again")))
    assert losses_of(tmp_path / "kept") == losses_of(tmp_path / "again")


@pytest.mark.parametrize(
    ("stage", "policy"), [("renderer", "all"), ("planner", "hidden"), ("joint", "hidden+attention")]
)
def test_offload_changes_nothing(
    stage: str, policy: str, model: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "LEAST", 1024)
    recompute = policy != "all"
    recipe = small.recipe(stage, model, tmp_path / "kept", features, steps=3, recompute=recompute)
    run(recipe)
    away = replace(recipe, offload=Offload(policy, host_gib=0.1), output=str(tmp_path / "away"))  # type: ignore[arg-type]
    trainer = run(away)
    assert_same(tmp_path / "kept", tmp_path / "away")
    counts = [offload.counts for offload in trainer.stage._keeping._offloads.values()]  # type: ignore[attr-defined]
    assert len(counts) == (2 if stage == "joint" else 1)
    assert all(count.offloaded > 0 and count.reloaded > 0 for count in counts)


def test_micro_batches_are_one_batch(model: Path, features: Path, tmp_path: Path) -> None:
    """A step's loss is over its samples, however they are cut into micro-batches."""
    recipe = small.recipe("joint", model, tmp_path, features, steps=1, precision="fp64")
    trainer = Trainer(recipe, make_stage(recipe))
    batch = trainer._micros(0)
    losses, norm = trainer._update(batch)
    totals: dict[str, float] = {}
    counts: dict[str, float] = {}
    fresh = Trainer(recipe, make_stage(recipe))
    for micro in batch:
        for name, value in fresh.stage.losses(micro, 0).items():
            totals[name] = totals.get(name, 0.0) + float(value.detach())
            counts[name] = counts.get(name, 0.0) + micro.counts[name]
    assert {name: totals[name] / counts[name] for name in totals} == pytest.approx(
        {name: value for name, value in losses.items() if name != "loss"}, rel=1e-12
    )
    assert norm > 0


def test_another_recipe_is_refused(model: Path, features: Path, tmp_path: Path) -> None:
    recipe = small.recipe("renderer", model, tmp_path / "run", features, steps=1)
    run(recipe)
    run(replace(recipe, keep=3))  # how often is saved may change
    with pytest.raises(UserError, match=r"another recipe \(seed was 0, is 1\)"):
        run(replace(recipe, seed=1))


@pytest.mark.parametrize(
    ("save_every", "words"),
    [(2, r"stopped at step 3: the loss 'dit' is nan, with the examples world/.*good checkpoint is .*step-00000002"),
     (1, r"stopped at step 3: weights/renderer/proj_out.bias is not finite; the last good .*step-00000002")],
)  # fmt: skip
def test_what_is_not_finite_stops_the_run(
    save_every: int, words: str, model: Path, features: Path, tmp_path: Path
) -> None:
    recipe = small.recipe("renderer", model, tmp_path / "run", features, save_every=save_every)

    def spoil(progress: Progress) -> None:
        if progress.step == 3:
            with torch.no_grad():
                trainer.weights.masters["renderer/proj_out.bias"].fill_(float("nan"))

    trainer = Trainer(recipe, make_stage(recipe), report=spoil)
    with pytest.raises(UserError, match=words):
        trainer.train()
    folder = checkpoints.latest(tmp_path / "run")
    assert folder is not None and all(bool(torch.isfinite(x).all()) for x in checkpoints.load(folder)[0].values())


def test_a_full_disk_leaves_the_last_checkpoint(
    model: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small.recipe("renderer", model, tmp_path / "run", features)
    real = checkpoints.save_file

    def full(tensors: dict[str, Tensor], file: Path) -> None:
        if "00000004" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match=r"step 4 could not be written .*No space left.*the last good one .*00000003"):
        run(recipe)
    assert sorted(path.name for path in (tmp_path / "run" / checkpoints.FOLDER).iterdir()) == [
        "step-00000002", "step-00000003",
    ]  # fmt: skip
    monkeypatch.undo()
    run(recipe)
    run(replace(recipe, output=str(tmp_path / "whole")))
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_half_written_checkpoints_are_passed_over(model: Path, features: Path, tmp_path: Path) -> None:
    recipe = small.recipe("renderer", model, tmp_path / "run", features, steps=2)
    run(recipe)
    work = tmp_path / "run" / checkpoints.FOLDER / ".step-00000009.part"
    work.mkdir()
    (work / checkpoints.TENSORS).write_bytes(b"half")
    assert checkpoints.latest(tmp_path / "run").name == "step-00000002"  # type: ignore[union-attr]
    with (tmp_path / "run" / LOG).open("a") as log:
        log.write('{"step": 3, "lo')
    run(recipe)
    assert [line["step"] for line in losses_of(tmp_path / "run")] == [1, 2]
