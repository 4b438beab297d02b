"""``bernini data``: prepare with the models of a checkpoint, and check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bernini.cli import main
from bernini.data.encoder import load_encoder
from bernini.data.example import Example
from bernini.data.features import check_features
from bernini.data.parquet import ParquetData
from bernini.data.world import sample
from bernini.data.worlds import example_of
from bernini.errors import UserError
from bernini.geometry import Geometry
from bernini.layouts import resolve
from bernini.media import Clip
from bernini.planner.loading import open_planner
from bernini.planner.stage import _frames
from bernini.toy import write_toy
from bernini.toy_full import write_toy_full

pytest.importorskip("sklearn", reason="needs scikit-learn, whose digits are drawn")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_full(tmp_path_factory.mktemp("model") / "toy")


def test_prepare_and_check(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "prepare", "world", "--model", str(toy), "--output", str(tmp_path / "out"), "--tasks",
               "t2i=2,rv2v", "--count", "6", "--seed", "5", "--rows", "4"]  # fmt: skip
    assert main(command) == 0
    assert f"{tmp_path / 'out'}: 6 examples in 2 files" in capsys.readouterr().out
    assert main(command) == 0
    assert "2 of them made before" in capsys.readouterr().out
    data = ParquetData(tmp_path / "out")
    assert [(example.key, example.task) for example in map(data.__getitem__, range(6))] == [
        *((f"world/train/t2i/{n}", "t2i") for n in range(5, 9)), *((f"world/train/rv2v/{n}", "rv2v") for n in (5, 6))
    ]  # fmt: skip
    encoder, marks = load_encoder(toy)
    check_features(data, vae_fingerprint=marks["vae"], vit_fingerprint=marks["vit"])
    assert main(["data", "check", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.split("\n")
    assert [line.split() for line in out[:3]] == [["rv2v", "2"], ["t2i", "4"], ["usable", "6"]]
    example = data[4]
    (fresh,) = encoder([example_of(sample("rv2v", 5))], 8)
    assert isinstance(example, Example) and isinstance(fresh, Example) and example.target and fresh.target
    torch.testing.assert_close(example.target.vae_mean, fresh.target.vae_mean, rtol=1e-3, atol=1e-4)


def test_the_encoder_sees_what_the_planner_sees(toy: Path) -> None:
    """The vision tower alone, without the rest of the planner, says the same as the whole planner's stage."""
    encoder, marks = load_encoder(toy, parts=["vit"])
    assert encoder.parts == ("vit",) and set(marks) == {"vit"} and encoder.rules is not None and encoder.see is not None
    planner = open_planner(resolve(toy)).load()
    example = example_of(sample("rv2v", 3))
    (made,) = encoder([example], 8)
    assert isinstance(made, Example)
    for raw, got in zip(example.visuals, made.visuals, strict=True):
        assert raw.pixels is not None and got.vit is not None and got.vit_grid is not None
        seen = _frames(Clip(raw.pixels, 8) if raw.kind == "video" else raw.pixels[0], Geometry.read(toy))
        patches, grid = encoder.rules.patches(seen)
        torch.testing.assert_close(got.vit, planner.see(patches, [grid]))
        visual = encoder.rules.visual(raw.kind, len(seen), *raw.pixels.shape[1:3])
        assert (visual.kind, visual.grid) == (raw.kind, got.vit_grid)


def test_check_tells_what_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[Any] = [{"prompt": "x", "target": "none.mp4"}, {"prompt": "", "target": "none.mp4"}, {"answer": "fine"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["data", "check", str(tmp_path / "list.jsonl")]) == 1
    out = capsys.readouterr().out
    rows = dict(line.rsplit(maxsplit=1) for line in out.split("\n")[:5])
    assert rows == {"understanding": "1", "usable": "1", "unreadable video": "1", "empty text": "1", "skipped": "2"}
    assert "list.jsonl#1: unreadable video: " in out and "no such file" in out
    assert main(["data", "check", str(tmp_path / "list.jsonl"), "--limit", "1"]) == 1


def test_what_was_left_out_is_told_again(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.jsonl").write_text('{"prompt": "x", "target": "none.mp4"}\n{"answer": "fine"}')
    out = tmp_path / "out"
    assert main(["data", "prepare", str(tmp_path / "list.jsonl"), "--model", str(toy), "--output", str(out)]) == 0
    said = capsys.readouterr()
    assert "1 examples in 1 file" in said.out and "1 skipped: 1 unreadable video" in said.err
    assert main(["data", "check", str(out)]) == 0
    assert "left out when prepared: 1 unreadable video" in capsys.readouterr().out


def test_wrong_use(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renderer = write_toy(tmp_path / "renderer")
    output = ["--output", str(tmp_path / "out")]
    for arguments, words in (
        (["world", "--model", str(tmp_path / "none"), *output], "no such folder"),
        (["world", "--model", str(renderer), *output], "has no planner"),
        (["world", "--model", str(toy), *output, "--parts", "vae,clip"], "parts are vae and vit"),
        (["world", "--model", str(toy), *output, "--tasks", "x2y"], "task 'x2y'"),
        (["world", "--model", str(toy), *output, "--tasks", "t2i=many"], "'many' is no number"),
        (["world", "--model", str(toy), *output, "--split", "all"], "no split 'all'"),
        ([str(tmp_path / "none.jsonl"), "--model", str(toy), *output], "no such file"),
        ([str(tmp_path), "--model", str(toy), *output], "holds no parquet file"),
    ):
        assert main(["data", "prepare", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    encoder, _ = load_encoder(renderer, parts=["vae"])
    assert encoder.parts == ("vae",) and encoder.stride == 16
    with pytest.raises(UserError, match="got none"):
        load_encoder(toy, parts=[])
