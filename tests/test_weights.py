"""Safetensors files: what is read is what was written, within bounded memory, and what is broken is described."""

from __future__ import annotations

import contextlib
import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bernini import weights
from bernini.renderer.config import RendererConfig
from bernini.weights import CheckpointError, load_tensors, read_header, read_weights, scan, stream_tensors, weight_files

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def header(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: object = (1,), begin: int = 0, end: int = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "matrix": torch.randn(37, 11, generator=generator),
        "wide": torch.randn(3, 50, generator=generator, dtype=torch.float64),
        "half": torch.randn(101, generator=generator).half(),
        "brain": torch.randn(7, 9, generator=generator).bfloat16(),
        "eight": torch.randn(65, generator=generator).to(torch.float8_e4m3fn),
        "five": torch.randn(65, generator=generator).to(torch.float8_e5m2),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
        "whole": torch.arange(70),
        "truth": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


# --- reading --------------------------------------------------------------------------------------------------------


def test_header_is_the_librarys(file: Path) -> None:
    ours = {name: (tensor.torch_dtype, tensor.shape) for name, tensor in read_header(file).items()}
    assert ours == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in load_file(file).items()}


def test_stream_gives_everything_as_stored(file: Path) -> None:
    ours, theirs = dict(stream_tensors([file])), load_file(file)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert torch.equal(ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("buffer", [8, 64, 200, weights.BUFFER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cast_in_pieces_is_the_cast(file: Path, dtype: torch.dtype, buffer: int, monkeypatch) -> None:
    monkeypatch.setattr(weights, "BUFFER", buffer)
    floating = {name: tensor for name, tensor in read_header(file).items() if tensor.is_floating}
    assert {"whole", "truth"} == read_header(file).keys() - floating.keys()
    ours, theirs = dict(load_tensors(floating, lambda name: (dtype, CPU))), load_file(file)
    for name, tensor in ours.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor.nan_to_num(7.0), theirs[name].to(dtype).nan_to_num(7.0)), name


def test_no_more_than_the_buffer_is_asked_for(file: Path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "BUFFER", 64)
    asked = []
    read = weights._read
    monkeypatch.setattr(weights, "_read", lambda handle, path, raw: (asked.append(len(raw)), read(handle, path, raw)))
    floating = {name: tensor for name, tensor in read_header(file).items() if tensor.is_floating}
    for _ in load_tensors(floating, lambda name: (torch.float64 if name != "wide" else torch.float32, CPU)):
        pass
    assert sum(asked) == sum(tensor.size for tensor in floating.values()) and max(asked) == 64


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A process of its own loads 240 MB of float32 as bfloat16; its anonymous memory is sampled from here."""
    sys.path.append(str(ROOT))
    try:
        bench = importlib.import_module("bench_perf.load")
    finally:
        sys.path.remove(str(ROOT))
    config = RendererConfig(num_attention_heads=8, num_layers=1, ffn_dim=18000)  # two tensors exceed the limit
    size = 2 * bench.parameters(config)
    assert 100e6 < size < 130e6
    bench.write_zeros(tmp_path / "checkpoint", config)
    one = bench.measure("one", tmp_path / "checkpoint")
    assert 0.9 * size < one.anonymous <= size + 64 * 2**20
    assert one.file < 16 * 2**20, "the source must not be mapped either"


# --- broken files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated in its header, after 0 bytes"),
        (b"\x10\0\0", "truncated in its header, after 3 bytes"),
        (header({"a": entry()}, bytes(4))[:20], "truncated in its header, after 20 bytes"),
        (header({"a": entry()}, bytes(3)), r"truncated, \d+ bytes instead of \d+"),
        (header({"a": entry()}, bytes(6)), "damaged, 2 bytes more than its header describes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer instead of the weights"),
        (b"PK\x03\x04" * 9, "not a safetensors file"),
        ((5).to_bytes(8, "little") + b"hello", "its header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "its header holds a list"),
        (header({"a": [1]}), r"its header describes 'a' as \[1\]"),
        (header({"a": {"dtype": "F32", "shape": [1]}}), "its header describes 'a' as"),
        (header({"a": entry(shape=["x"])}, bytes(4)), "its header describes 'a' as"),
        (header({"a": entry(shape=[-1, -1])}, bytes(4)), "its header describes 'a' as"),
        (header({"a": entry(begin=4, end=0)}, bytes(4)), "its header describes 'a' as"),
        (header({"a": entry(shape=[2])}, bytes(4)), r"'a' is F32 \[2\] in 4 bytes"),
        (header({"a": entry(), "b": entry()}, bytes(4)), "'b' begins at byte"),
        (header({"a": entry(begin=4, end=8)}, bytes(8)), "'a' begins at byte"),
    ],
)
def test_broken_header(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"broken.safetensors: .*{message}"):
        read_header(path)


def test_any_damage_is_a_checkpoint_error_or_none(file: Path) -> None:
    whole, dice = file.read_bytes(), random.Random(0)
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        damaged = bytearray(whole[: dice.choice([len(whole), dice.randrange(len(whole))])])
        for _ in range(dice.randrange(3) if damaged else 0):
            damaged[dice.randrange(min(end, len(damaged)))] = dice.randrange(256)
        file.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            for _ in stream_tensors([file]):
                pass


def test_unknown_types_are_listed_but_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header({"a": entry("F4", [8])}, bytes(4)))
    assert not read_header(path)["a"].is_floating
    with pytest.raises(CheckpointError, match="values of the type F4"):
        list(stream_tensors([path]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["straight", "through the buffer"])
def test_a_file_that_changes_after_its_header_was_read(file: Path, dtype: torch.dtype) -> None:
    stored = {"matrix": read_header(file)["matrix"]}
    file.write_bytes(file.read_bytes()[: stored["matrix"].start + 100])
    with pytest.raises(CheckpointError, match="x.safetensors: ended while it was read"):
        list(load_tensors(stored, lambda name: (dtype, CPU)))
    file.unlink()
    with pytest.raises(CheckpointError, match="x.safetensors: cannot be read"):
        list(load_tensors(stored, lambda name: (dtype, CPU)))


# --- folders --------------------------------------------------------------------------------------------------------


def shards(folder: Path, *, index: bool = True) -> None:
    names = {f"t{n}": f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)}
    for name, shard in names.items():
        save_file({name: torch.ones(2)}, folder / shard)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def reindex(**change: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shards(folder)
        path = folder / "model.safetensors.index.json"
        names = json.loads(path.read_text())["weight_map"]
        path.write_text(json.dumps({"weight_map": {**names, **change}}))

    return apply


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path: Path, index: bool) -> None:
    shards(tmp_path, index=index)
    assert [path.name[6:11] for path in weight_files(tmp_path)] == ["00001", "00002", "00003"]
    assert sorted(read_weights(tmp_path)) == ["t1", "t2", "t3"]


def test_variants_of_the_same_weights_are_left_alone(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    shards(tmp_path)
    assert len(weight_files(tmp_path)) == 3, "an index goes before a single file"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "holds no .safetensors weights"),
        (lambda f: (shards(f), (f / "model-00002-of-00003.safetensors").unlink()), "00002-of-00003.safetensors: named"),
        (
            lambda f: (shards(f, index=False), (f / "model-00002-of-00003.safetensors").unlink()),
            "shard 2 of 3 is missing",
        ),
        (lambda f: (shards(f, index=False), (f / "model-00003-of-00003.safetensors").unlink()), "shard 3 of 3 is"),
        (reindex(t4="model-00001-of-00003.safetensors"), "index.json: no file holds 't4', which it names"),
        (reindex(t4="../outside.safetensors"), "must give the file name of every tensor"),
        (reindex(t4=7), "must give the file name of every tensor"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json: cannot be read as JSON"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "must give the file name of every tensor"),
        (
            lambda f: [save_file({"a": torch.ones(1)}, f / f"{number}.safetensors") for number in (1, 2)],
            "2.safetensors: holds 'a', and so does another file",
        ),
    ],
)  # fmt: skip
def test_broken_folders(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path)


def test_scan_lists_all_problems_and_reads_the_rest(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"")
    found = scan(tmp_path)
    assert list(found.tensors) == ["t2"] and len(found.files) == 1 and len(found.problems) == 2
    with pytest.raises(CheckpointError, match=r"\(and 1 more like this\)"):
        read_weights(tmp_path)
