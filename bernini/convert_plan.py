"""What ``bernini convert`` writes: which tensors go into which file, in which order and type.

One file per part and number type, of averaged tensors only the averaged copy; the tensors of a block side by side. See
:mod:`bernini.convert` for the writing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bernini.offload.weights import MappedFile

from .checkpoint import WEIGHTS, component_folder, expert_tensors, read_layout
from .layouts import BUNDLE_WEIGHTS, Layout
from .renderer.model import KEEP_IN_FP32
from .weights import BUFFER, DTYPES, CheckpointError, Stored, read_weights

PAGE = 4096
"""Bytes: where a file's data begins, so that it can be mapped by itself."""
SPELLED = {kind: name for name, kind in DTYPES.items()}
IN_FP32 = ("wo",)
"""Layers of the text encoder that stay float32 where the rest is float16, as transformers loads it."""


@dataclass(frozen=True)
class Part:
    """One file to be.

    Args:
        file: relative to the folder.
        tensors: by the name in the file, in its order: where each is, and its type in the file.
    """

    file: Path
    tensors: dict[str, tuple[Stored, str]]

    def header(self) -> bytes:
        """Of the safetensors file, so long that the data begins a page."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (stored, dtype) in self.tensors.items():
            start, end = end, end + stored.numel * DTYPES[dtype].itemsize
            entries[name] = {"dtype": dtype, "shape": list(stored.shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        return len(text).to_bytes(8, "little") + text

    def source(self, root: Path) -> str:
        """Changes when a file that it is made from changes, or what is made of it."""
        said = hashlib.sha256(self.header())
        for file in sorted({stored.file for stored, _ in self.tensors.values()}):
            about = file.stat()
            said.update(f"{os.path.relpath(file, root)} {about.st_size} {about.st_mtime_ns}\n".encode())
        return said.hexdigest()

    def pieces(self) -> Iterator[memoryview]:
        """The file's bytes in order: the header, then at most 16 MB at a time."""
        yield memoryview(self.header())
        files: dict[Path, MappedFile] = {}
        for stored, dtype in self.tensors.values():
            kind = stored.torch_dtype
            assert kind is not None, "checked when it was planned"
            if stored.file not in files:
                files[stored.file] = MappedFile(stored.file)
            flat = files[stored.file].tensor(stored.start, (stored.numel,), kind)
            step = BUFFER // max(kind.itemsize, DTYPES[dtype].itemsize)
            for start in range(0, len(flat), step):
                piece = flat[start : start + step].to(DTYPES[dtype]).contiguous()
                yield piece.view(torch.uint8).numpy().data

    @property
    def size(self) -> int:
        return len(self.header()) + sum(s.numel * DTYPES[dtype].itemsize for s, dtype in self.tensors.values())


def plan(source: Path, dtype: torch.dtype) -> list[Part]:
    """The files of the converted folder.

    Raises:
        CheckpointError: a part is missing or broken, or has values of a type that torch does not have.
    """
    layout = read_layout(source)
    folders: dict[Path, dict[str, dict[str, tuple[Stored, torch.dtype]]]] = {}
    if layout.kind == "bundle":
        folders[Path(BUNDLE_WEIGHTS)] = _bundle(source / BUNDLE_WEIGHTS, layout, dtype)
    else:
        for place in layout.experts.values():
            found = expert_tensors(read_weights(place.folder), place.which)
            if not found:
                raise CheckpointError(f"{place.folder}: holds no weights of the {place.which}-noise expert")
            folders[place.folder.relative_to(source)] = {"": {n: (s, _expert(n, dtype)) for n, s in found.items()}}
    if layout.kind != "raw":
        text, vae = component_folder(source, "text_encoder"), component_folder(source, "vae")
        folders[text.relative_to(source)] = {"": {n: (s, _text(n, dtype)) for n, s in read_weights(text).items()}}
        stored = read_weights(vae)
        folders[vae.relative_to(source)] = {"": {n: (s, s.torch_dtype or torch.uint8) for n, s in stored.items()}}
    return [part for folder, groups in folders.items() for part in _parts(folder, groups)]


def _bundle(
    folder: Path, layout: Layout, dtype: torch.dtype
) -> dict[str, dict[str, tuple[Stored, torch.dtype]]]:  # fmt: skip
    """Groups of a bundle's tensors by the first word of their names; the planner is one group."""
    stored = read_weights(folder)
    used = {"high": "diff_dec", "low": "diff_dec_low"}
    left_out = {word for which, word in used.items() if which not in {place.which for place in layout.experts.values()}}
    groups: dict[str, dict[str, tuple[Stored, torch.dtype]]] = defaultdict(dict)
    for name in sorted(stored, key=lambda name: name.startswith("ema.")):  # averaged copies take the others' place
        plain = name.removeprefix("ema.")
        word = plain.split(".")[0]
        if word in left_out:
            continue
        group = word if word in (*used.values(), "t5_text_encoder") else "planner"
        kind = _expert(plain, dtype) if word in used.values() else _text(plain, dtype) if "t5" in word else dtype
        groups[group][plain] = stored[name], kind
    return groups


def _parts(folder: Path, groups: Mapping[str, Mapping[str, tuple[Stored, torch.dtype]]]) -> Iterator[Part]:
    """One file per group and type; one of the usual name if that is all there is."""
    files: dict[str, dict[str, tuple[Stored, str]]] = defaultdict(dict)
    for group, tensors in groups.items():
        for name in sorted(tensors, key=_natural):
            stored, kind = tensors[name]
            if stored.torch_dtype is None:
                raise CheckpointError(
                    f"{stored.file}: {name!r} has the type {stored.dtype}, which this PyTorch does not have"
                )
            kind = kind if stored.is_floating else stored.torch_dtype
            files[f"{group or 'model'}.{str(kind).removeprefix('torch.')}.safetensors"][name] = stored, SPELLED[kind]
    usual = "model.safetensors" if "text_encoder" in folder.name else WEIGHTS
    for file, found in files.items():
        yield Part(folder / (usual if len(files) == 1 else file), found)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``blocks.2`` before ``blocks.10``."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in name.split(".")]


def _expert(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if any(word in KEEP_IN_FP32 for word in name.split(".")) else dtype


def _text(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 and any(word in IN_FP32 for word in name.split(".")) else dtype
