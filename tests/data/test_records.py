"""Raw files and the synthetic world as data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bernini.data.example import Example, Skip
from bernini.data.opening import open_data
from bernini.data.parquet import ParquetData
from bernini.data.pixels import Reading
from bernini.data.records import RawData
from bernini.data.world import TASKS, sample
from bernini.data.worlds import WorldData, example_of
from bernini.errors import UserError
from bernini.geometry import Geometry
from bernini.media import read_image, read_video
from bernini.media_write import write_image, write_video

READING = Reading(fps=8, num_frames=9, size=(32, 32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, and a clip of 32 frames at 8 a second, each 7 levels brighter than the one before."""
    frames = torch.arange(32)[:, None, None, None].mul(7).expand(32, 32, 32, 3).to(torch.uint8)
    write_video(tmp_path / "clip.mp4", frames, 8)
    for name, level in (("dark.png", 20), ("light.png", 220)):
        write_image(tmp_path / name, torch.full((32, 32, 3), level, dtype=torch.uint8))
    return tmp_path


def manifest(folder: Path, *lines: Any) -> RawData:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "list.jsonl").write_text(text)
    return RawData(folder / "list.jsonl", reading=READING)


def only(data: RawData) -> Example:
    example = data[0]
    assert isinstance(example, Example), example
    return example


def test_in_full_and_in_short(folder: Path, table: Any) -> None:
    full = {
        "task": "rv2v",
        "inputs": [{"type": "image"}, {"type": "text", "text": "add it"}, {"type": "video"}, {"type": "video_gen"}],
        "videos": [{"video_path": "clip.mp4"}, {"video_path": str(folder / "clip.mp4"), "duration": 2}],
        "images": ["dark.png"],
    }
    short = {"key": "mine", "prompt": "add it", "videos": ["clip.mp4"], "images": ["dark.png"], "target": "clip.mp4"}
    data = manifest(folder, full, "", short)
    first, second = data[0], data[1]
    assert isinstance(first, Example) and isinstance(second, Example) and len(data) == 2
    assert (first.key, second.key) == ("list.jsonl#1", "mine") and first.task == second.task == "rv2v"
    assert first.prompt == second.prompt == "add it"
    clip = read_video(folder / "clip.mp4", fps=8, num_frames=9, size=(32, 32)).frames
    for example in (first, second):
        assert [source.kind for source in example.sources] == ["video", "image"]
        video, image = (source.pixels for source in example.sources)
        assert video is not None and image is not None and torch.equal(video, clip)
        assert torch.equal(image, read_image(folder / "dark.png", size=(32, 32))[None])
    assert list(data.of_task("rv2v")) == [0, 1] and data.fps == 8 and data.has_pixels
    rows = [{**full, "images": full["images"], "videos": [{**video, "crop_method": None} for video in full["videos"]]}]
    stored = ParquetData(table(rows, "raw.parquet"), reading=READING)[0]
    assert isinstance(stored, Example) and stored.target is not None and first.target is not None
    assert torch.equal(stored.target.pixels, first.target.pixels)  # type: ignore[arg-type]


def test_targets_and_answers(folder: Path) -> None:
    data = manifest(
        folder,
        {"prompt": "brighter", "images": ["dark.png"], "target": "light.png"},
        {"prompt": "how bright?", "images": ["dark.png"], "answer": "not very"},
        {"answer": "a text alone"},
    )
    edited, asked, text = (data[n] for n in range(3))
    assert isinstance(edited, Example) and edited.task == "i2i" and edited.target and edited.target.kind == "image"
    assert edited.target.pixels is not None and edited.target.pixels.float().mean() > 200
    assert isinstance(asked, Example) and (asked.task, asked.answer) == ("understanding", "not very")
    assert isinstance(text, Example) and text.answer == "a text alone" and not text.sources


@pytest.mark.parametrize(
    ("about", "first", "last"),
    [({}, 0, 8), ({"duration": 1}, 0, 7), ({"duration": 1, "crop_method": "right"}, 24, 31),
     ({"duration": 2, "crop_method": "center"}, 8, 16), ({"duration": 99, "crop_method": "right"}, 0, 8)],
)  # fmt: skip
def test_clips_are_cut_as_in_the_release(folder: Path, about: dict[str, Any], first: int, last: int) -> None:
    """``duration`` seconds at the left, in the middle or at the right; a whole source is read from its start."""
    row = {
        "inputs": [{"type": "text", "text": "x"}, {"type": "video_gen"}],
        "videos": [{"video_path": "clip.mp4"} | about],
    }
    target = only(manifest(folder, row)).target
    assert target is not None and target.pixels is not None
    levels = target.pixels.float().mean((1, 2, 3)) / 7
    assert len(levels) == 9 and abs(levels[0] - first) < 0.5 and abs(levels[-1] - last) < 0.5


def clip(about: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "x", "videos": [{"video_path": "clip.mp4"} | about], "target": "clip.mp4"}


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        ("{", "wrong schema", "not JSON"),
        ("[1]", "wrong schema", "list"),
        ({"images": ["dark.png"]}, "wrong schema", "neither inputs nor a prompt"),
        ({"prompt": "x", "inputs": "[]"}, "wrong schema", "which say the same"),
        ({"prompt": 3}, "wrong schema", "prompt is int"),
        ({"prompt": "x", "images": "dark.png"}, "wrong schema", "images is str"),
        ({"prompt": "x", "images": [3], "target": "light.png"}, "wrong schema", "name of a file"),
        ({"prompt": "x", "task": "t2v", "target": "light.png"}, "wrong schema", "target of t2v"),
        ({"prompt": "x", "task": "x2x", "target": "light.png"}, "unknown task", "x2x"),
        ({"prompt": "x"}, "no target", "loss"),
        ({"prompt": " ", "target": "light.png"}, "empty text", "prompt"),
        ({"prompt": "x", "answer": ""}, "empty text", "answer"),
        ({"prompt": "x", "target": "none.png"}, "unreadable image", "no such file"),
        ({"prompt": "x", "target": "text.png"}, "unreadable image", "not an image"),
        ({"prompt": "x", "images": ["nan.tiff"], "target": "light.png"}, "unreadable image", "floating-point"),
        ({"prompt": "x", "target": "data:x.png"}, "unreadable image", "only files"),
        ({"prompt": "x", "target": "none.mp4"}, "unreadable video", "no such file"),
        ({"prompt": "x", "target": "text.mp4"}, "unreadable video", "cannot be read as a video"),
        ({"prompt": "x", "target": "cut.mp4"}, "unreadable video", "cut.mp4"),
        ({"prompt": "x", "target": "empty.mp4"}, "unreadable video", "is empty"),
        (clip({"duration": 0}), "empty clip", "0 sec"),
        (clip({"duration": 0.01}), "empty clip", "no frame"),
        (clip({"duration": "5"}), "wrong schema", "seconds"),
        (clip({"crop_method": "up"}), "wrong schema", "'up'"),
        (clip({"video_path": None}), "wrong schema", "name of a file"),
    ],
)  # fmt: skip
def test_bad_lines_are_skipped_with_their_reason(folder: Path, line: Any, reason: str, words: str) -> None:
    (folder / "text.png").write_text("this is a text")
    (folder / "text.mp4").write_text("this is a text")
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:300])
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(folder / "nan.tiff")
    data = manifest(folder, line, {"prompt": "x", "target": "light.png"})
    skip = data[0]
    assert isinstance(skip, Skip) and (skip.key, skip.reason) == ("list.jsonl#1", reason), skip
    assert words in skip.detail
    assert isinstance(data[1], Example)


def test_files_are_read_as_the_checkpoint_wants_them(folder: Path) -> None:
    toy = Geometry(pixel_stride=8, frame_stride=2, fps=8, num_frames=7, size=(24, 40))
    reading = Reading.of(toy)
    assert (reading.fps, reading.num_frames, reading.size, reading.max_size) == (8, 7, (40, 24), 848)
    clip, image = reading.load("video", "clip.mp4", folder).pixels, reading.load("image", "dark.png", folder).pixels
    assert clip is not None and image is not None and clip.shape == (7, 24, 40, 3) and image.shape == (1, 24, 40, 3)
    loose = Reading.of(toy, max_size=20, min_size=1, fps=4)
    clip = loose.load("video", {"video_path": "clip.mp4"}, folder).pixels
    assert loose.fps == 4 and clip is not None and clip.shape == (7, 16, 16, 3), "sides are multiples of 8, not of 16"
    assert Reading.of(Geometry()) == Reading()


def test_manifests_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a manifest"):
        RawData(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        RawData(tmp_path / "empty.jsonl")
    for name, words in (("none", "expected 'world', a .jsonl manifest"), ("a.png", "neither a .jsonl manifest")):
        (tmp_path / "a.png").touch()
        with pytest.raises(UserError, match=words):
            open_data(tmp_path / name)


# --- the world --------------------------------------------------------------------------------------------------------

pytest.importorskip("sklearn", reason="needs scikit-learn, whose digits are drawn")


def test_the_world_is_a_data_set() -> None:
    data = WorldData({"v2v": 2, "t2i": 1_000_000}, seed0=40, split="test")
    assert len(data) == 1_000_002 and data.of_task("t2i") == range(2, 1_000_002) and not len(data.of_task("r2v"))
    for index, task, seed in ((0, "v2v", 40), (1, "v2v", 41), (2, "t2i", 40), (-1, "t2i", 1_000_039)):
        example, made = data[index], sample(task, seed, "test")
        assert isinstance(example, Example) and example.key == f"world/test/{task}/{seed}"
        assert example.task == task and example.prompt == made.prompt and example.target is not None
        assert np.array_equal(example.target.pixels, made.target)  # type: ignore[arg-type]
        assert example.target.kind == ("image" if task == "t2i" else "video")
    with pytest.raises(IndexError):
        data[len(data)]
    assert data.identity != WorldData({"v2v": 2, "t2i": 1_000_000}, split="test").identity


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_as_an_example(task: str) -> None:
    for seed in range(8):
        made = sample(task, seed)
        example = example_of(made)
        pictures = [*made.videos, *(image[None] for image in made.images)]
        assert [source.kind for source in example.sources] == ["video"] * len(made.videos) + ["image"] * len(
            made.images
        )
        for source, picture in zip(example.sources, pictures, strict=True):
            assert source.pixels is not None and np.array_equal(source.pixels, picture)
        assert (example.answer, example.target is None) == (made.answer, made.target is None)


def test_worlds_that_are_not() -> None:
    for arguments, words in (
        (({"t2x": 1},), "task 't2x'"), (({},), "no task"), (({"t2i": 0},), "positive"),
        (({"t2i": 1}, "train", -1), "not negative"), (({"t2i": 1}, "all"), "no split 'all'; there are train, test"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            WorldData(arguments[0], **dict(zip(("split", "seed0"), arguments[1:], strict=False)))  # type: ignore[arg-type]
