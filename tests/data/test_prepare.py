"""Files of features: what goes in comes out, whole or not at all, and the same after an interruption."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bernini.data import prepare as module
from bernini.data.example import Example, Skip
from bernini.data.features import FeatureEncoder
from bernini.data.parquet import ParquetData
from bernini.data.prepare import prepare
from bernini.data.worlds import WorldData
from bernini.errors import UserError

MARKS = {"vae": "v", "vit": "w"}


class Faulty:
    """A data set some of whose examples cannot be used."""

    fps, identity, parts, has_pixels = 8.0, "faulty", frozenset[str](), True

    def __init__(self, world: WorldData, bad: set[int], stop: int | None = None) -> None:
        self.world, self.bad, self.stop, self.read = world, bad, stop, list[int]()

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> Example | Skip:
        if index == self.stop:
            raise KeyboardInterrupt
        self.read.append(index)
        return Skip(f"bad {index}", "unreadable video", "why") if index in self.bad else self.world[index]

    def of_task(self, task: str) -> range:
        return range(0)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_examples_come_back(world: WorldData, encoder: FeatureEncoder, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    done = prepare(world, tmp_path, encoder, MARKS, rows=5, progress=lambda *step: steps.append(step))
    assert [file.name for file in done.files] == [f"part-0000{n}.parquet" for n in range(3)] == sorted(files(tmp_path))
    assert (done.rows, done.made, done.skipped.total) == (12, 3, 0) and steps[-1] == ("encoding", 12, 12)
    data = ParquetData(tmp_path)
    assert (len(data), data.fps, data.parts, data.skipped) == (12, 8.0, {"vae", "vit"}, [])
    expected = encoder([world[n] for n in range(12)], 8)
    for number, want in enumerate(expected):
        got = data[number]
        assert isinstance(got, Example) and isinstance(want, Example)
        assert (got.key, got.task, got.prompt, got.answer) == (want.key, want.task, want.prompt, want.answer)
        for a, b in zip(got.visuals, want.visuals, strict=True):
            assert a.kind == b.kind and a.vit_grid == b.vit_grid and a.vit is not None and b.vit is not None
            torch.testing.assert_close(a.vae_mean, b.vae_mean, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(a.vae_logvar, b.vae_logvar, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(a.vit.float(), b.vit, rtol=1e-3, atol=1e-5)
            assert a.vit.dtype == torch.float16
    assert list(data.of_task("v2v")) == list(world.of_task("v2v")) == [3, 4, 5]


def test_parts_can_be_left_out(world: WorldData, encoder: FeatureEncoder, tmp_path: Path) -> None:
    for part, one in (("vae", replace(encoder, see=None, rules=None)), ("vit", replace(encoder, vae=None))):
        prepare(world, tmp_path / part, one, {part: "x"})
        data = ParquetData(tmp_path / part)
        assert data.parts == {part}
        for number in range(len(data)):
            example = data[number]
            assert isinstance(example, Example)
            assert all((v.vit is None, v.vae_mean is None) == (part == "vae", part == "vit") for v in example.visuals)


def test_values_that_half_precision_cannot_hold(world: WorldData, encoder: FeatureEncoder, tmp_path: Path) -> None:
    see = encoder.see
    assert see is not None
    large = replace(encoder, see=lambda patches, grids: see(patches, grids) * 1e5, vae=None)
    prepare(world, tmp_path, large, MARKS)
    example = ParquetData(tmp_path)[3]
    assert isinstance(example, Example) and example.target is not None and example.target.vit is not None
    assert example.target.vit.dtype == torch.bfloat16 and example.target.vit.abs().max() > 65504


def test_an_interrupted_run_ends_with_the_same_bytes(world: WorldData, encoder: FeatureEncoder, tmp_path: Path) -> None:
    whole = prepare(Faulty(world, {1, 7}), tmp_path / "whole", encoder, MARKS, rows=4)
    with pytest.raises(KeyboardInterrupt):
        prepare(Faulty(world, {1, 7}, stop=6), tmp_path / "cut", encoder, MARKS, rows=4)
    assert list(files(tmp_path / "cut")) == ["part-00000.parquet"], "nothing half-written"
    with pytest.raises(UserError, match=r"holds 1 of 3 files; the same 'bernini data prepare'"):
        ParquetData(tmp_path / "cut")
    (tmp_path / "cut" / ".part-00001.parquet.1.part").write_bytes(b"what a killed run leaves")
    source = Faulty(world, {1, 7})
    again = prepare(source, tmp_path / "cut", encoder, MARKS, rows=4)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert source.read == list(range(4, 12)) and (again.made, again.rows) == (2, 10)
    assert again.skipped.counts == whole.skipped.counts == {"unreadable video": 2}
    data = ParquetData(tmp_path / "cut")
    assert len(data) == 10 and [skip.key for skip in data.skipped] == ["bad 1", "bad 7"]
    assert data.skipped[0] == Skip("bad 1", "unreadable video", "why")


def test_a_folder_of_something_else_is_refused(world: WorldData, encoder: FeatureEncoder, tmp_path: Path) -> None:
    prepare(world, tmp_path, encoder, MARKS, rows=6)
    before = files(tmp_path)
    for change, words in (
        ({"data": Faulty(world, set())}, "made with source world/train.* now it is faulty"),
        ({"fingerprints": {"vae": "other", "vit": "w"}}, "made with vae v, and now it is other"),
        ({"limit": 7}, "made with examples 12, and now it is 7"),
        ({"encoder": replace(encoder, frames_for_vit=lambda n, fps: [0, 1])}, "vit_frames"),
        ({"limit": 4}, "holds part-00001.parquet, which is not of this data set"),
    ):
        given: dict[str, Any] = {"data": world, "encoder": encoder, "fingerprints": MARKS, "rows": 6, **change}
        with pytest.raises(UserError, match=words):
            prepare(output=tmp_path, **given)
    (tmp_path / "part-00000.parquet").write_bytes(b"damaged")
    with pytest.raises(UserError, match="not made by 'bernini data prepare', or damaged"):
        prepare(world, tmp_path, encoder, MARKS, rows=6)
    assert files(tmp_path)["part-00001.parquet"] == before["part-00001.parquet"]


def test_features_are_not_passed_off_as_another_models(
    world: WorldData, encoder: FeatureEncoder, tmp_path: Path
) -> None:
    prepare(world, tmp_path / "first", encoder, MARKS)
    with pytest.raises(UserError, match="hold vae and vit features already"):
        prepare(ParquetData(tmp_path / "first"), tmp_path / "second", encoder, {"vae": "new", "vit": "new"})


def test_a_full_disk_is_said_and_leaves_nothing(
    world: WorldData, encoder: FeatureEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UserError, match=r"part-00000\.parquet: cannot be written \(No space left on device\)"):
        prepare(world, tmp_path / "out", encoder, MARKS)
    assert files(tmp_path / "out") == {}
    monkeypatch.undo()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be made a folder"):
        prepare(world, tmp_path / "file" / "out", encoder, MARKS)


def test_windows_do_not_grow_with_the_pictures(
    world: WorldData, encoder: FeatureEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_BYTES", 9 * 32 * 32 * 3)
    sizes = [len(window) for window in module._windows(world, 0, 12)]
    assert sum(sizes) == 12 and len(sizes) > 5 and sizes[0] == 3 + 1, "three images, and the clip that fills it"
    monkeypatch.setattr(module, "GROUP_BYTES", 1)
    prepare(world, tmp_path, encoder, MARKS)
    data = ParquetData(tmp_path)
    last = data[11]
    assert len(data._groups) == len(data) == 12 and isinstance(last, Example) and last.key.endswith("/understanding/3")
