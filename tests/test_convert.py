"""``bernini convert``: a folder that is a checkpoint like any other, in the bits of loading; resumed, checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bernini import Bernini, cli, convert, convert_plan
from bernini.checkpoint import load_renderer, open_experts
from bernini.convert import MANIFEST
from bernini.convert_plan import PAGE
from bernini.errors import UserError
from bernini.inspect import inspect
from bernini.planner.loading import open_planner
from bernini.request import Request
from bernini.toy import write_toy
from bernini.toy_full import write_toy_full
from bernini.weights import CheckpointError, read_header, weight_files

BF16 = torch.bfloat16
REQUEST = Request("a house", num_frames=1, size=(16, 16), steps=1, planning_steps=2, decoder_steps=1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_full(tmp_path_factory.mktemp("model") / "full")


@pytest.fixture(scope="module")
def lean(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "lean"
    counts = convert.convert(full, folder, BF16)
    assert counts["written"] == len(json.loads((folder / MANIFEST).read_text())["files"]) > 4 and not counts["checked"]
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_plan, "BUFFER", 2**14)


def sums(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_bundle_makes_the_same_pictures(full: Path, lean: Path) -> None:
    first, second = (Bernini.from_pretrained(folder, dtype=BF16).generate(REQUEST).frames for folder in (full, lean))
    assert torch.equal(first, second)
    report = inspect(lean)
    assert not report.problems and report.layout == "bundle"
    streamed = Bernini.from_pretrained(lean, dtype=BF16, memory=2**40)
    assert torch.equal(streamed.generate(REQUEST).frames, first)


def test_tensors_are_those_that_loading_gives(full: Path, lean: Path) -> None:
    for which in ("high", "low"):
        old, new = (open_experts(folder, dtype=BF16).load(which).state_dict() for folder in (full, lean))
        assert old.keys() == new.keys()
        assert all(old[name].dtype == new[name].dtype and torch.equal(old[name], new[name]) for name in old)
    old, new = (open_planner(folder).load(dtype=BF16, understanding=True) for folder in (full, lean))
    assert old.identity == new.identity
    assert all(torch.equal(p, q) for p, q in zip(old.parameters(), new.parameters(), strict=True))


def test_a_file_has_one_type_begins_a_page_and_keeps_blocks_together(lean: Path) -> None:
    for file in weight_files(lean / "bernini"):
        stored = read_header(file)
        assert len({at.dtype for at in stored.values()}) == 1, file
        assert min(at.start for at in stored.values()) % PAGE == 0
        order = [name.split(".") for name in sorted(stored, key=lambda name: stored[name].start)]
        numbers = [
            int(words[words.index("blocks") + 1]) for words in order if "transformer" in words and "blocks" in words
        ]
        assert numbers == sorted(numbers)
    names = {file.name for file in weight_files(lean / "bernini")}
    assert {"diff_dec.bfloat16.safetensors", "diff_dec.float32.safetensors", "planner.bfloat16.safetensors"} <= names
    assert json.loads((lean / MANIFEST).read_text())["complete"] is True


def test_averaged_copies_take_the_place_of_the_others(toy: Path, tmp_path: Path) -> None:
    """A raw export, whose experts have averaged copies and other parts beside them."""
    raw = tmp_path / "raw"
    weights = load_file(toy / "transformer" / "diffusion_pytorch_model.safetensors")
    for folder, prefix in (("high", "diff_dec.transformer."), ("low", "diff_dec_low.transformer_2.")):
        (raw / f"bernini_renderer_{folder}").mkdir(parents=True)
        shutil.copyfile(toy / "transformer" / "config.json", raw / f"bernini_renderer_{folder}" / "config.json")
        plain = {f"{prefix}{name}": tensor + 1 for name, tensor in weights.items()}
        ema = {f"ema.{prefix}{name}": tensor for name, tensor in weights.items() if "attn1" in name}
        save_file(
            {**plain, **ema, "vae.other": torch.ones(3)}, raw / f"bernini_renderer_{folder}" / "model.safetensors"
        )
    convert.convert(raw, tmp_path / "new", torch.float32)
    old, new = (open_experts(folder).load("low").state_dict() for folder in (raw, tmp_path / "new"))
    assert all(torch.equal(old[name], new[name]) for name in old)
    found = {name for file in weight_files(tmp_path / "new" / "bernini_renderer_low") for name in read_header(file)}
    assert found == weights.keys()


def test_the_renderer_alone_and_the_vae_as_it_was(toy: Path, tmp_path: Path) -> None:
    convert.convert(toy, tmp_path / "new", torch.float16)
    assert load_renderer(tmp_path / "new" / "transformer", dtype=torch.float16).dtype == torch.float16
    old, new = (load_file(weight_files(folder / "vae")[0]) for folder in (toy, tmp_path / "new"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    files = [load_file(file) for file in weight_files(tmp_path / "new" / "text_encoder")]
    text = {name: tensor for file in files for name, tensor in file.items()}
    assert len(files) == 2 and all(
        tensor.dtype == (torch.float32 if ".wo." in name else torch.float16) for name, tensor in text.items()
    )
    assert not inspect(tmp_path / "new").problems


# --- interrupted ------------------------------------------------------------------------------------------------------


class Enough(BaseException):
    """As a signal."""


@pytest.mark.parametrize("after", [1, 7, 30])
def test_it_goes_on_where_it_was(full: Path, lean: Path, tmp_path: Path, after: int) -> None:
    """The work is stopped after some pieces, and what is there is damaged in one of the ways that a crash has."""
    done = 0

    def stop(name: str, at: int, total: int) -> None:
        nonlocal done
        done += 1
        if done == after:
            raise Enough

    new = tmp_path / "new"
    with pytest.raises(Enough):
        convert.convert(full, new, BF16, stop)
    with pytest.raises(UserError):
        Bernini.from_pretrained(new)
    for unfinished in new.rglob("*.part"):
        if after == 7:  # the last bytes never came to the disk
            with open(unfinished, "r+b") as file:
                file.truncate(unfinished.stat().st_size - 100)
        if after == 30:  # a page of zeros
            with open(unfinished, "r+b") as file:
                file.seek(unfinished.stat().st_size // 2)
                file.write(bytes(64))
    pieces = _pieces(full)
    written = []
    real = convert._write

    def counted(part: Any, *rest: Any) -> str:
        written.append(part.file)
        return real(part, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "_write", counted)
        counts = convert.convert(full, new, BF16)
    assert sums(new) == sums(lean) and not list(new.rglob("*.part*"))
    assert (
        counts["written"] == len(written) and counts["checked"] + counts["written"] == len(sums(lean)) and pieces > 40
    )


def _pieces(full: Path) -> int:
    return sum(1 for part in convert.plan(full, BF16) for _ in part.pieces())


def test_pieces_that_are_there_are_kept(toy: Path, tmp_path: Path) -> None:
    part = convert.plan(toy, BF16)[0]
    file, reports = tmp_path / "f.safetensors", list[int]()

    def stop(done: int) -> None:
        reports.append(done)
        if len(reports) == 5:
            raise Enough

    with pytest.raises(Enough):
        convert._write(part, file, "from", stop)
    unfinished = tmp_path / "f.safetensors.part"
    before = unfinished.stat()
    kept = unfinished.read_bytes()
    sha256 = convert._write(part, file, "from", lambda done: None)
    assert file.stat().st_ino == before.st_ino and file.read_bytes().startswith(kept) and len(kept) == reports[-1]
    assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    # What was made from something else is not gone on with.
    shutil.copyfile(file, unfinished)
    (tmp_path / "f.safetensors.part.log").write_text("another\n" + "0" * 64 + "\n")
    assert convert._write(part, file, "from", lambda done: None) == sha256


def test_when_all_is_done_it_checks_and_mends(toy: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    total = convert.convert(toy, new, BF16)["written"]
    good = sums(new)
    file = weight_files(new / "transformer")[0]
    with open(file, "r+b") as handle:
        handle.seek(-3, 2)
        handle.write(b"xyz")
    assert sums(new) != good
    assert convert.convert(toy, new, BF16) | {"bytes": 0} == {"written": 1, "checked": total - 1, "bytes": 0}
    assert sums(new) == good
    manifest = json.loads((new / MANIFEST).read_text())
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == good


# --- misuse -----------------------------------------------------------------------------------------------------------


def test_folders_that_will_not_do(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: str, output: Path, dtype: torch.dtype = BF16, source: Path = toy) -> None:
        with pytest.raises(UserError, match=words):
            convert.convert(source, output, dtype)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    refused("something else", tmp_path / "other")
    refused("a file", tmp_path / "other" / "mine.txt")
    refused("apart from", toy)
    refused("apart from", toy / "inside")
    convert.convert(toy, tmp_path / "new", BF16)
    refused("begun with the dtype 'bfloat16', not 'float16'", tmp_path / "new", torch.float16)
    assert (tmp_path / "other" / "mine.txt").read_text() == "mine"
    broken = tmp_path / "broken"
    shutil.copytree(toy, broken)
    (broken / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="transformer_2"):
        convert.convert(broken, tmp_path / "x", BF16)
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    refused("the disk has", tmp_path / "y")


def test_the_command(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(toy), str(tmp_path / "new"), "--dtype", "float32"]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(tmp_path / "new") and "written" in told.err
    one, other = (load_renderer(folder / "transformer").state_dict() for folder in (toy, tmp_path / "new"))
    assert all(_same(one[name], other[name]) for name in one)
    assert cli.main(["convert", str(toy), str(toy)]) == 2
    assert "apart from" in capsys.readouterr().err


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
