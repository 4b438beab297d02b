"""Safetensors files, read within a fixed amount of memory.

A checkpoint may be far larger than the machine's memory, and often is float32 where bfloat16 is wanted. So no tensor
is ever in memory in its stored form: 16 MB at a time go from the file into a buffer and from there, cast, to their
place.

A file is eight bytes of header length (little endian), a JSON header with every tensor's type, shape and byte range,
and the data (https://huggingface.co/docs/safetensors). The header is read here rather than by the library because the
byte ranges are needed, and because a broken file should be described, not only refused.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

BUFFER = 16 * 2**20
"""Bytes of source data that are in memory at any time."""
LONGEST_HEADER = 100_000_000
"""The format's own limit; a longer "length" means that the file is something else."""
STANDARD = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""Names that diffusers and transformers give the weights; others beside them are variants of the same tensors."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's types that this torch can hold. Other types are listed but cannot be loaded."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


# --- JSON -----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, not readable as JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is this a Bernini checkpoint folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- one file -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file."""

    file: Path
    dtype: str
    """In the format's spelling: ``"F32"``, ``"BF16"``, ..."""
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte from the beginning of the file."""
    size: int
    """In bytes."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return DTYPES.get(self.dtype)

    @property
    def is_floating(self) -> bool:
        return self.torch_dtype is not None and self.torch_dtype.is_floating_point


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, without reading their data.

    Raises:
        CheckpointError: not readable, not safetensors, truncated, or a header that contradicts itself.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            first = handle.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":  # of "version https://git-lfs.github.com/spec/v1"
                raise CheckpointError(f"{file}: a Git LFS pointer instead of the weights; fetch them with git lfs pull")
            if len(first) == 8 and length > LONGEST_HEADER:
                raise CheckpointError(f"{file}: not a safetensors file")
            if 8 + length > size or len(first) < 8:
                raise CheckpointError(f"{file}: truncated in its header, after {size} bytes")
            text = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged, its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: damaged, its header holds a {type(header).__name__}")
    tensors = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    # As the format demands, the ranges follow each other without gaps and fill the file.
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != end:
            raise CheckpointError(f"{file}: damaged, {name!r} begins at byte {tensor.start} instead of {end}")
        end += tensor.size
    if size < end:
        raise CheckpointError(f"{file}: truncated, {size} bytes instead of {end}")
    if size > end:
        raise CheckpointError(f"{file}: damaged, {size - end} bytes more than its header describes")
    return tensors


def _entry(file: Path, name: str, entry: Any, data: int) -> Stored:
    """One tensor of a header, checked in itself. ``data`` is where the file's data begins."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end - begin))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: damaged, its header describes {name!r} as {entry!r:.80}")
    stored = Stored(file, dtype, shape, data + begin, end - begin)
    if stored.torch_dtype is not None and stored.numel * stored.torch_dtype.itemsize != stored.size:
        raise CheckpointError(f"{file}: damaged, {name!r} is {dtype} {list(shape)} in {stored.size} bytes")
    return stored


# --- one folder -----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What the weight files of a folder hold, and what is wrong with them (messages that name the file)."""

    files: list[Path] = field(default_factory=list)
    tensors: dict[str, Stored] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def scan(folder: Path) -> Found:
    """Reads the headers of a model folder: the shards of its index, or the single file. Raises nothing."""
    found = Found()
    index, names = _index(folder, found.problems)
    files, missing = _files(folder, index, names)
    found.problems += missing
    for file in files:
        try:
            header = read_header(file)
        except CheckpointError as error:
            found.problems.append(str(error))
            continue
        found.files.append(file)
        twice = header.keys() & found.tensors.keys()
        if twice:
            found.problems.append(f"{file}: holds {some(twice)}, and so does another file of this folder")
        found.tensors |= header
    if index is not None and not found.problems:
        lost = sorted(names.keys() - found.tensors.keys())
        if lost:
            found.problems.append(f"{index}: no file holds {some(lost)}, which it names")
    return found


def read_weights(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder by name.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    found = scan(folder)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more like this)" if len(found.problems) > 1 else ""
        raise CheckpointError(found.problems[0] + more)
    return found.tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those of its index, or the single one.

    Raises:
        CheckpointError: there is none, or one is missing.
    """
    problems: list[str] = []
    files, missing = _files(folder, *_index(folder, problems))
    if problems or missing:
        raise CheckpointError((problems + missing)[0])
    return files


def _index(folder: Path, problems: list[str]) -> tuple[Path | None, dict[str, str]]:
    """The folder's index, if it has one, and the file of each tensor."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        return None, {}
    index = next((i for i in indices if i.name.removesuffix(".index.json") in STANDARD), indices[0])
    try:
        names = read_json(index).get("weight_map")
    except CheckpointError as error:
        problems.append(str(error))
        return index, {}
    # Names only: a path could lead anywhere.
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        problems.append(f"{index}: its weight_map must give the file name of every tensor")
        return index, {}
    return index, names


def _files(folder: Path, index: Path | None, names: Mapping[str, str]) -> tuple[list[Path], list[str]]:
    """The weight files that are there, and messages about those that are not."""
    if index is not None:
        files = [folder / name for name in sorted(set(names.values()))]
        missing = [f"{file}: named in {index.name}, but there is no such file" for file in files if not file.is_file()]
        return [file for file in files if file.is_file()], missing
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    files = next(([file] for name in STANDARD for file in files if file.name == name), files)
    if not files:
        return [], [f"{folder}: holds no .safetensors weights"]
    # Shards without their index still say how many they should be.
    numbers = [re.search(r"-(\d+)-of-(\d+)\.safetensors$", file.name) for file in files]
    shards = {int(match[1]): int(match[2]) for match in numbers if match}
    lost = sorted(set(range(1, max(shards.values(), default=0) + 1)) - shards.keys())
    return files, [f"{folder}: shard {number} of {max(shards.values())} is missing" for number in lost]


# --- data -----------------------------------------------------------------------------------------------------------


def load_tensors(
    stored: Mapping[str, Stored], place: Callable[[str], tuple[torch.dtype, torch.device]]
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one at a time, in the order of the files.

    Beside the tensors themselves at most :data:`BUFFER` bytes of memory are used; tensors that keep their dtype on the
    CPU are read where they stay.

    Args:
        stored: from :func:`read_header` or :func:`read_weights`.
        place: dtype and device of a tensor, by its name.

    Raises:
        CheckpointError: a type that torch does not know, or a file that cannot be read (any more).
    """
    by_file = defaultdict(list)
    for name, tensor in stored.items():
        by_file[tensor.file].append(name)
    buffer = torch.empty(BUFFER, dtype=torch.uint8)
    for file, names in by_file.items():
        try:
            with FileIO(file) as handle:
                for name in sorted(names, key=lambda name: stored[name].start):
                    dtype, device = place(name)
                    out = torch.empty(stored[name].shape, dtype=dtype, device=device)
                    _copy(handle, stored[name], out, buffer)
                    yield name, out
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None


def stream_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every file, as stored, one at a time."""
    cpu = torch.device("cpu")
    for file in files:
        stored = read_header(file)
        dtypes = {name: tensor.torch_dtype or torch.uint8 for name, tensor in stored.items()}
        yield from load_tensors(stored, lambda name, dtypes=dtypes: (dtypes[name], cpu))  # type: ignore[misc]


def _copy(handle: FileIO, stored: Stored, out: Tensor, buffer: Tensor) -> None:
    """Reads a tensor's values into ``out`` (contiguous), cast to its dtype."""
    kind = stored.torch_dtype
    if kind is None:
        raise CheckpointError(f"{stored.file}: holds values of the type {stored.dtype}, which torch does not have")
    handle.seek(stored.start)
    flat = out.view(-1)
    if out.dtype == kind and out.device.type == "cpu":
        _read(handle, stored.file, flat.view(torch.uint8))
        return
    step = len(buffer) // kind.itemsize
    for begin in range(0, len(flat), step):
        part = flat[begin : begin + step]
        raw = buffer[: len(part) * kind.itemsize]
        _read(handle, stored.file, raw)
        part.copy_(raw.view(kind))


def _read(handle: FileIO, file: Path, raw: Tensor) -> None:
    """Fills a tensor of bytes from the file's position on. A read may return less than was asked for."""
    room = raw.numpy().data
    while room:
        got = handle.readinto(room)
        if not got:
            raise CheckpointError(f"{file}: ended while it was read; was it replaced meanwhile?")
        room = room[got:]


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first names, and how many more: ``'a', 'b', 'c' and 4 more``."""
    ranked = sorted(names)
    more = f" and {len(ranked) - limit} more" if len(ranked) > limit else ""
    return ", ".join(repr(name) for name in ranked[:limit]) + more
