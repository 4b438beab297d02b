"""The suite, its files and its report, with oracles in place of models; the command with a random one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn", reason="needs scikit-learn, whose digits are drawn")

from bernini import cli, cli_eval, shipped
from bernini.data import world
from bernini.data.scene import Frames
from bernini.data.world import Sample, sample
from bernini.errors import UserError
from bernini.evaluation import report
from bernini.evaluation.suite import (
    TASKS,
    Cell,
    Result,
    Results,
    cells,
    evaluate,
    generator,
    request_of,
    samples,
)
from bernini.request import settle


def truth(made: Sample) -> Frames:
    assert made.target is not None
    return made.target


def nothing(made: Sample) -> Frames:
    """The first source, as long as it has to be; black without any."""
    assert made.target is not None
    if made.videos:
        return made.videos[0]
    if made.images:
        return np.repeat(made.images[0][None], len(made.target), 0)
    return np.full_like(made.target, 10)


def test_the_truth_passes_every_bar(tmp_path: Path) -> None:
    results = evaluate(truth, count=2, reconstruct=lambda frames: frames)
    assert len(results.rows) == 2 * len(cells()) == 2 * 38
    found = report.bars(results)
    assert len(found) == 8 and all(bar.holds for bar in found)
    assert [bar.figure for bar in found[:6]] == [100] * 6 and found[7].figure == 0
    assert all(row.followed for row in results.rows)
    assert len(results.shown) == 20 and {each.name.split()[0] for each in results.shown} == set(TASKS)
    report.grid(results.shown, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.height > 20 * 96 and picture.width > 14 * 96
    text = report.markdown(results, "the truth")
    assert (
        text.startswith("# the truth\n") and "| v2v recolor followed | 100.0 % |" in text and "ceiling 100.0 %" in text
    )
    assert len(report.tables(results)) == 2


def test_doing_nothing_passes_no_edit() -> None:
    results = evaluate(nothing, tasks=("v2v", "i2i", "rv2v", "t2v"), count=2, reconstruct=lambda frames: frames)
    # A digit may take the place of another one of its color: that is told by its identity alone.
    assert not any(row.followed for row in results.rows if row.kind != "digit")
    found = {bar.name: bar for bar in report.bars(results)}
    assert found["background PSNR in local edits"].holds, "it leaves everything as it was"
    failed = ("v2v recolor followed", "v2v background followed", "v2v shape followed", "rv2v right digit image")
    assert not any(found[name].holds for name in failed)


def test_a_poor_autoencoder_lowers_the_bar_of_identity() -> None:
    blank = evaluate(truth, tasks=["r2v:digit"], count=3, reconstruct=lambda frames: np.zeros_like(frames))
    (bar,) = report.bars(blank)
    assert (bar.bound, bar.figure, bar.note) == (0, 100, "ceiling 0.0 %")
    assert report.bars(evaluate(truth, tasks=["r2v:digit"], count=1))[0].bound == 65


# --- cells and samples ------------------------------------------------------------------------------------------------


def test_cells_and_their_samples() -> None:
    assert cells(["v2v:recolor", "t2v"], ["unseen"]) == [Cell("v2v", "recolor", "unseen"), Cell("t2v", "", "unseen")]
    assert Cell("r2v", "digit", "unseen") not in cells()
    held = set(world.digit_numbers(True).tolist())
    for made in samples(Cell("rv2v", "digit", "test"), 5):
        assert made.split == "test" and made.scene is not None and made.scene.main.digit in held
    for made in samples(Cell("r2v", "object", "unseen"), 5):
        assert made.scene is not None and (made.scene.main.color, made.scene.main.shape) in world.WITHHELD
    edited = list(samples(Cell("i2i", "shape", "test"), 5))
    assert [made.seed for made in edited] == list(range(5)) and {made.edit for made in edited} == {"shape"}


@pytest.mark.parametrize(
    ("tasks", "splits", "message"),
    [
        (["t3v"], ["test"], "unknown task 't3v'; there are t2i, t2v"),
        (["i2i:motion"], ["test"], "i2i has no 'motion'; there are recolor, background"),
        (["t2v:blue"], ["test"], "t2v has no 'blue'$"),
        (["t2v"], ["train"], "unknown split 'train'; there are test, unseen"),
    ],
)
def test_unknown_cells(tasks: Sequence[str], splits: Sequence[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cells(tasks, splits)


@pytest.mark.parametrize("planner", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_every_sample_is_a_request(task: str, planner: bool) -> None:
    made = sample(task, 3, "unseen")
    request = request_of(made, steps=2, seed=100)
    settled = settle(request, planner=planner)
    assert made.target is not None
    assert (settled.task, settled.frames, settled.steps) == ("r2v" if task == "i2v" else task, len(made.target), 2)
    assert (request.prompt, request.seed, request.size, request.fps) == (made.prompt, 103, (32, 32), 8)
    assert (len(request.videos), len(request.images)) == (len(made.videos), len(made.images))


# --- going on ---------------------------------------------------------------------------------------------------------


class Counting:
    """The truth, until the given number of samples was made."""

    def __init__(self, most: int = 10**9) -> None:
        self.made, self.most = 0, most

    def __call__(self, made: Sample) -> Frames:
        if self.made == self.most:
            raise KeyboardInterrupt
        self.made += 1
        return truth(made)


def run(generate: Any, folder: Path, **settings: Any) -> Results:
    return evaluate(generate, tasks=["t2i", "i2i:shape"], count=3, folder=folder, settings=settings)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    whole = run(Counting(), tmp_path / "whole", steps=4)
    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        run(Counting(5), part, steps=4)
    file = part / "results.jsonl"
    assert len(file.read_text().splitlines()) == 6
    file.write_text(file.read_text()[:-20])  # killed while it wrote
    rest = Counting()
    resumed = run(rest, part, steps=4)
    assert rest.made == 12 - 4 and resumed.rows == whole.rows
    assert file.read_text() == (tmp_path / "whole/results.jsonl").read_text()
    assert [(each.name, each.frames.tobytes()) for each in resumed.shown] == [
        (each.name, each.frames.tobytes()) for each in whole.shown
    ]
    again = Counting()
    assert run(again, part, steps=4).rows == whole.rows and again.made == 0
    (part / "frames/t2i-test.npy").write_bytes(b"damaged")
    assert len(run(again, part, steps=4).shown) == 2 and again.made == 1, "what is to be shown is made again"


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    run(Counting(), tmp_path, steps=4)
    with pytest.raises(UserError, match="results of other settings; give another --output"):
        run(Counting(), tmp_path, steps=5)
    (tmp_path / "results.jsonl").write_text(json.dumps({"settings": {"steps": 4}}) + "\n{}\n")
    with pytest.raises(UserError, match="a line is no result"):
        run(Counting(), tmp_path, steps=4)
    with pytest.raises(UserError, match="cannot be used as an output folder"):
        run(Counting(), tmp_path / "results.jsonl", steps=4)


def test_a_result_survives_its_line() -> None:
    (row,) = evaluate(truth, tasks=["rv2v:digit"], count=1, reconstruct=lambda frames: frames).rows
    assert Result(**json.loads(json.dumps(asdict(row)))) == row and row.ceiling is True


# --- figures ----------------------------------------------------------------------------------------------------------


def test_wilson_in_numbers() -> None:
    assert report.wilson(85, 100) == pytest.approx((0.7672, 0.9069), abs=2e-4)
    assert report.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=2e-4)
    assert report.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=2e-4)
    assert report.wilson(0, 0) == (0.0, 1.0)


def rows(split: str, right: int, total: int, shape: str = "ring") -> list[Result]:
    return [Result("v2v", "recolor", split, n, shape, {"color": n < right}, psnr=20.0 + n) for n in range(total)]


def test_bars_in_numbers() -> None:
    results = Results((*rows("test", 9, 10), *rows("unseen", 7, 10), *rows("test", 0, 5, "digit")))
    recolor, background, gap = report.bars(results)
    assert (recolor.figure, recolor.samples, recolor.holds) == (60.0, 15, False)
    assert background.figure == pytest.approx((245 + 110) / 15) and background.samples == 15
    assert (gap.figure, gap.samples, gap.holds) == (pytest.approx(20.0), 20, False), "digits have no held-out twins"
    assert gap.low is not None and gap.high is not None and gap.low < 20 < gap.high
    assert report.bars(Results(())) == [] and report.tables(Results(())) == []


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bernini.toy import write_toy

    return write_toy(tmp_path_factory.mktemp("eval") / "toy")


def test_the_command(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "toy", "--model", str(toy), "--output", str(tmp_path / "out"), "--count", "1", "--steps", "1",
             "--tasks", "t2i", "rv2v:digit"]  # fmt: skip
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "rv2v right digit image" in shown and "ceiling" in shown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "frames", "grid.png", "report.md", "results.jsonl"
    ]  # fmt: skip
    before = (tmp_path / "out/results.jsonl").read_bytes()
    assert cli.main(words) == 0 and (tmp_path / "out/results.jsonl").read_bytes() == before
    assert len(before.splitlines()) == 1 + 3
    assert cli.main([*words, "--seed", "1"]) == 2
    assert "results of other settings" in capsys.readouterr().err


def test_a_model_is_repeatable(toy: Path) -> None:
    from bernini import Bernini

    model = Bernini.from_pretrained(toy)
    made = sample("v2v", 0, "test", edit="recolor")
    first, second, other = (generator(model, steps=1, seed=seed)(made) for seed in (5, 5, 6))
    assert first.dtype == np.uint8 and first.shape == (9, 32, 32, 3)
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_wrong_input(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "none")
    for options, message in (
        ([], "no model is shipped with this installation; give --model DIR"),
        (["--model", str(tmp_path / "none")], "none: no such folder"),
        (["--model", str(tmp_path), "--tasks", "t9v"], "unknown task 't9v'; there are t2i"),
    ):
        assert cli.main(["eval", "toy", *options]) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_is_known_by_what_it_holds(toy: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(toy, copy)
    assert cli_eval.fingerprint(copy) == cli_eval.fingerprint(toy)
    file = next(copy.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert cli_eval.fingerprint(copy) != cli_eval.fingerprint(toy)
