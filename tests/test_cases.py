"""Case files: what they may hold, where their media are looked for, and lists of them run with one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import drawings
import pytest
import torch

from bernini import Bernini, cli
from bernini.cases import Case, read_case, read_cases, to_request
from bernini.errors import UserError
from bernini.media import read_video
from bernini.media_write import write_image, write_video
from bernini.request import Request
from bernini.toy import write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("model") / "toy")


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def video(path: Path, frames: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, drawings.draw_clip(frames, 32, 48).frames, 16)
    return path


def run(toy: Path, *words: str | Path) -> int:
    return cli.main([str(word) for word in ("generate", "--model", toy, *words)])


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_key_reaches_the_request(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.png", "c.png", "d.png"):
        (tmp_path / name).touch()
    value = {
        "task_type": "rv2v", "prompt": "p", "neg_prompt": "n", "guidance_mode": "rv2v", "video": "a.mp4",
        "image": "b.png", "images": ["c.png", "d.png"], "output": "o.mp4", "num_frames": 33, "height": 32, "width": 48,
        "fps": 12.5, "seed": 2**63, "num_inference_steps": 7, "flow_shift": 3, "max_image_size": 640, "omega_vid": 1,
        "omega_img": 2, "omega_txt": 3, "omega_tgt": 0.5, "omega_scale": 0.7, "eta": 0, "norm_threshold": [9, 8],
        "momentum": -0.5,
    }  # fmt: skip
    case = read_case(write(tmp_path / "one.json", value))
    assert (case.name, case.output) == ("one", tmp_path / "o.mp4")
    assert to_request(case.options, still=False) == Request(
        "p", videos=[tmp_path / "a.mp4"], images=[tmp_path / name for name in ("b.png", "c.png", "d.png")],
        task="rv2v", mode="rv2v", negative_prompt="n", num_frames=33, size=(32, 48), fps=12.5, seed=2**63, steps=7,
        flow_shift=3, max_size=640, scales={"vid": 1, "img": 2, "txt": 3, "tgt": 0.5}, switch_factor=0.7, eta=0,
        thresholds=(9, 8), momentum=-0.5,
    )  # fmt: skip


def test_little_is_needed(tmp_path: Path) -> None:
    bare = read_case(write(tmp_path / "bare.json", {"prompt": "p"}))
    assert bare == Case("bare", {"prompt": "p"})
    marked = read_case(write(tmp_path / "marked.json", '\ufeff{"prompt": "é", "seed": null, "norm_threshold": 5}'))
    assert marked == Case("marked", {"prompt": "é", "thresholds": (5.0,)}), "null is as if it was not there"


def test_media_are_looked_for_in_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public = "assets/testcases/v2v/a.mp4"
    root = tmp_path / "collection"
    places = [tmp_path / "cases" / public, tmp_path / "cwd" / public, root / "v2v/a.mp4"]
    path = write(tmp_path / "cases/one.json", {"prompt": "p", "video": public})
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(UserError, match="a.mp4: no such file; looked for .*; --case-root DIR tells where"):
        read_case(path)
    with pytest.raises(UserError) as caught:
        read_case(path, root)
    assert all(str(place) in str(caught.value) for place in places), "all that were tried are named"
    for number in (2, 1, 0):  # each comes before the one found so far
        places[number].parent.mkdir(parents=True, exist_ok=True)
        places[number].touch()
        (found,) = read_case(path, root).options["videos"]
        assert found.absolute() == places[number]
    absolute = write(tmp_path / "cases/two.json", {"prompt": "p", "video": [str(places[2]), str(places[1])]})
    assert read_case(absolute).options["videos"] == [places[2], places[1]]
    with pytest.raises(UserError, match=r"three.json: image: /no/b.png: no such file$"):
        read_case(write(tmp_path / "three.json", {"prompt": "p", "image": "/no/b.png"}))


def test_results_go_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the case or from the working directory, and never into the collection that ``--case-root`` names."""
    monkeypatch.chdir(tmp_path)
    public = Path("assets/testcases/t2v/o.mp4")
    path = write(tmp_path / "cases/one.json", {"prompt": "p", "output": str(public)})
    (tmp_path / "root/t2v").mkdir(parents=True)
    for folder in (None, tmp_path, tmp_path / "cases"):  # each comes before the one found so far
        if folder is not None:
            (folder / public).parent.mkdir(parents=True)
        output = read_case(path, tmp_path / "root").output
        assert output is not None and output.absolute() == (folder or tmp_path) / public


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "is not JSON (line 1, column 2"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON (nested)"),
        ([{"prompt": "p"}], "must hold a JSON object, holds a list"),
        ("3", "must hold a JSON object, holds a number"),
        ({}, "the key 'prompt' is missing"),
        ({"prompt": None}, "the key 'prompt' is missing"),
        ({"prompt": 5}, "prompt: must be text, got a number"),
        ({"prompt": ["a"]}, "prompt: must be text, got a list"),
        ({"prompt": "p", "promt": "q"}, "unknown key 'promt'; did you mean 'prompt'?"),
        ({"prompt": "p", "omega_video": 1}, "unknown key 'omega_video'; did you mean 'omega_vid'?"),
        ({"prompt": "p", "zzz": 1}, "unknown key 'zzz'; there are task_type, prompt"),
        ({"prompt": "p", "video": 3}, "video: must be a path or a list of paths, got a number"),
        ({"prompt": "p", "images": ["a.png", None]}, "images: must be a path or a list of paths, got null"),
        ({"prompt": "p", "image": ""}, "image: must be a path or a list of paths, got an empty text"),
        ({"prompt": "p", "num_frames": 0}, "num_frames: must be positive, got 0"),
        ({"prompt": "p", "num_frames": "9"}, "num_frames: '9' is not a whole number"),
        ({"prompt": "p", "num_inference_steps": 2.5}, "num_inference_steps: 2.5 is not a whole number"),
        ({"prompt": "p", "num_inference_steps": True}, "num_inference_steps: True is not a whole number"),
        ({"prompt": "p", "seed": -1}, "seed: must be a whole number from 0"),
        ({"prompt": "p", "height": 32}, "height and width belong together"),
        ({"prompt": "p", "fps": 0}, "fps: must be from 0.1 to 1000"),
        ('{"prompt": "p", "omega_txt": NaN}', "omega_txt: must be a finite number, got nan"),
        ('{"prompt": "p", "eta": 1e999}', "eta: must be a finite number, got inf"),
        ({"prompt": "p", "eta": 10**400}, "eta: must be a finite number, got inf"),
        ({"prompt": "p", "omega_vid": "1"}, "omega_vid: '1' is not a number"),
        ({"prompt": "p", "norm_threshold": []}, "norm_threshold: takes 1 to 3 numbers, got 0"),
        ({"prompt": "p", "norm_threshold": [1, 2, 3, 4]}, "norm_threshold: takes 1 to 3 numbers, got 4"),
        ({"prompt": "p", "norm_threshold": [1, "x"]}, "norm_threshold: 'x' is not a number"),
        ({"prompt": "p", "flow_shift": 0}, "flow_shift: must be positive, got 0"),
    ],
)
def test_wrong_cases_are_named(tmp_path: Path, capsys: Any, value: Any, message: str) -> None:
    path = write(tmp_path / "bad.json", value)
    assert cli.main(["generate", "--model", "none", "--case", str(path), "--output", str(tmp_path / "o.mp4")]) == 2
    error = capsys.readouterr().err
    assert f"bernini generate: {path}: " in error and message in error and len(error.splitlines()) == 1, error
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.json"]


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00{")
    for name, message in {
        "gone.json": "no such file",
        "bytes.json": "not a text in UTF-8",
        "": "cannot be read",
    }.items():
        with pytest.raises(UserError, match=message):
            read_case(tmp_path / name)


def test_lists(tmp_path: Path) -> None:
    cases = read_cases(write(tmp_path / "some.json", [{"prompt": "a"}, {"promt": "b"}, 3, {"prompt": "c"}]))
    assert cases[0] == Case("some_001", {"prompt": "a"}) and cases[3] == Case("some_004", {"prompt": "c"})
    assert "some.json, case 2: unknown key 'promt'" in str(cases[1])
    assert "some.json, case 3: must hold a JSON object, holds a number" in str(cases[2])
    lines = read_cases(write(tmp_path / "lines.jsonl", '{"prompt": "a"}\n\n{"prompt": \n{"prompt": "c"}\n'))
    assert [case.name for case in lines if isinstance(case, Case)] == ["lines_001", "lines_003"]
    assert "lines.jsonl, line 3: is not JSON" in str(lines[1])
    for name, text, message in (
        ("one.json", '{"prompt": "a"}', "must hold a list of cases, holds an object; a single case is for --case"),
        ("none.jsonl", "\n", "holds no case"),
        ("none.json", "[]", "holds no case"),
        ("list.txt", "[]", "is a .json or a .jsonl file"),
    ):
        with pytest.raises(UserError, match=message):
            read_cases(write(tmp_path / name, text))


# --- running ----------------------------------------------------------------------------------------------------------


def test_a_case_is_the_same_as_options(toy: Path, tmp_path: Path) -> None:
    """And options given beside a case override it."""
    source = video(tmp_path / "in.mp4")
    value = {"prompt": "snow", "video": "in.mp4", "num_inference_steps": 2, "seed": 3, "output": "case.mp4"}
    path = write(tmp_path / "case.json", value)
    assert run(toy, "--case", path) == 0
    assert (
        run(toy, "--prompt", "snow", "--video", source, "--steps", "2", "--seed", "3", "--output", tmp_path / "o.mp4")
        == 0
    )
    made, same = (read_video(tmp_path / name).frames for name in ("case.mp4", "o.mp4"))
    assert made.shape == (5, 32, 48, 3) and torch.equal(made, same)
    other = video(tmp_path / "other.mp4", frames=9)
    options = ["--seed", "4", "--prompt", "rain", "--video", other, "--output", tmp_path / "p.mp4"]
    assert run(toy, "--case", path, *options) == 0
    model = Bernini.from_pretrained(toy)
    expected = model("rain", videos=[other], steps=2, seed=4)
    write_video(tmp_path / "q.mp4", expected.frames, expected.fps)
    got = read_video(tmp_path / "p.mp4").frames
    assert got.shape[0] == 9 and torch.equal(got, read_video(tmp_path / "q.mp4").frames)


def test_the_output_of_a_case(toy: Path, tmp_path: Path, capsys: Any) -> None:
    fast = ["--size", "32x32", "--steps", "1", "--num-frames", "1"]
    bare = write(tmp_path / "cases/bare.json", {"prompt": "p", "task_type": "t2i"})
    assert run(toy, "--case", bare, *fast) == 2
    assert "give an --output; the case names none" in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    assert run(toy, "--case", bare, *fast, "--output", tmp_path / "results") == 0
    named = write(tmp_path / "cases/named.json", {"prompt": "p", "output": "assets/testcases/t2i/mine.webp"})
    assert run(toy, "--case", named, *fast, "--output", tmp_path / "results") == 0
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["bare.png", "mine.webp"]
    assert run(toy, "--case", named, *fast) == 2
    assert "does not exist); the case names it, --output overrides it" in capsys.readouterr().err


def test_a_list_goes_on_after_a_failure(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One model for all; what fails is told, the rest is made, and the exit code is 2."""
    video(tmp_path / "in.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    write_image(tmp_path / "in.png", drawings.draw_house(32, 48))
    loads: list[Any] = []
    load = Bernini.from_pretrained
    monkeypatch.setattr(Bernini, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k))
    make = Bernini.generate

    def generate(self: Bernini, request: Request, *more: Any) -> Any:
        if request.prompt == "fault":
            raise RuntimeError("a fault of ours")
        return make(self, request, *more)

    monkeypatch.setattr(Bernini, "generate", generate)
    items: list[Any] = [
        {"prompt": "a", "video": "in.mp4"},
        {"prompt": "b", "video": "broken.mp4"},
        {"prompt": "c", "image": "in.png", "task_type": "i2i"},
        {"prompt": "d", "video": "gone.mp4"},
        {"prompt": "e", "task_type": "r2v"},
        {"prompt": "f", "video": "in.mp4", "output": "elsewhere/mine.gif"},
        {"prompt": "g", "video": "in.mp4", "output": "mine.gif"},
        {"prompt": "fault", "video": "in.mp4"},
    ]
    path = write(tmp_path / "list.json", items)
    out = tmp_path / "out"
    assert run(toy, "--inputs", path, "--output", out, "--steps", "1") == 2
    said = capsys.readouterr()
    assert sorted(entry.name for entry in out.iterdir()) == ["list_001.mp4", "list_003.png", "mine.gif"]
    assert len(loads) == 1
    for message in (
        "list_002: " + str(tmp_path / "broken.mp4"),
        str(path) + ", case 4: video: gone.mp4: no such file",
        "list_005: task r2v needs a source image",
        "list_007: " + str(out / "mine.gif") + " is the output of list_006 already",
        "list_008: Traceback",  # that one is no bad input
    ):
        assert f"bernini generate: {message}" in said.err, said.err
    assert said.err.count("Traceback") == 1 and "RuntimeError: a fault of ours" in said.err
    assert f"{path}: 3 of 8 cases made; 5 failed: " in said.out


def test_a_list_that_works(toy: Path, tmp_path: Path, capsys: Any) -> None:
    case = {"prompt": "a", "task_type": "t2i", "height": 32, "width": 32}
    path = write(tmp_path / "list.jsonl", f"{json.dumps(case)}\n{json.dumps({**case, 'seed': 1})}\n")
    (tmp_path / "out").mkdir()
    assert run(toy, "--inputs", path, "--output", tmp_path / "out", "--steps", "1") == 0
    assert f"{path}: 2 of 2 cases made\n" in capsys.readouterr().out
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["list_001.png", "list_002.png"]


def test_a_list_that_cannot_begin(toy: Path, tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "list.json", [{"prompt": "a", "video": "gone.mp4"}])
    shutil.copy(path, tmp_path / "file")
    for words, message in (
        (["--inputs", path, "--output", tmp_path / "file"], "file: cannot be made a folder"),
        (["--inputs", path, "--output", tmp_path / "o.mp4"], "a file name, but a folder is needed"),
        (
            ["--inputs", path, "--output", tmp_path / "no" / "out"],
            "cannot be made a folder (No such file or directory)",
        ),
        (["--inputs", path, "--frames-dir", tmp_path / "f"], "--frames-dir is for a single result"),
        (["--inputs", path, "--output", tmp_path / "new"], "gone.mp4: no such file"),
        (["--inputs", tmp_path / "no.json"], "no.json: no such file"),
    ):
        assert run(tmp_path / "no model", *words) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "list.json"], "an empty folder is not left"
