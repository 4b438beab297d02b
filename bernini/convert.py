"""A checkpoint written once more, in the form in which it is used: one file per part and number type, to be mapped.

Released weights are float32 with averaged copies beside the plain ones, in shards that mix the parts. Read in bfloat16
they are cast at every start, and blocks that are streamed (:mod:`bernini.offload.weights`) are cast at every step. A
converted folder has the layout of the one that it was made from, so it is a checkpoint like any other; of averaged
tensors only the averaged copy, in the type that loading in ``dtype`` gives; the tensors of a block side by side, from a
page's beginning on. The VAE stays as it is: it always runs in float32.

Writing goes through pieces of 16 MB. A log beside the unfinished file has the SHA-256 of each; who starts again checks
those that are there and goes on behind them. ``converted.json`` has the sum of each finished file, as ``sha256sum``
gives it; starting again when all is done checks them, and writes a file that fails once more.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .convert_plan import Part, plan
from .errors import UserError
from .weights import BUFFER, read_json, write_json

MANIFEST = "converted.json"
"""What a converted folder was made from, and the sums of its files."""
CONFIGS = ("*.json", "*.model", "*.txt", "*.jinja")
"""Files that are copied."""
Progress = Callable[[str, int, int], None]


def convert(source: Path, output: Path, dtype: torch.dtype, progress: Progress | None = None) -> dict[str, int]:
    """Writes a converted folder, or goes on with it, or checks it.

    Args:
        dtype: that experts, planner and text encoder will run in.
        progress: called with (file, bytes done, bytes).

    Returns:
        how many files were ``written`` and how many ``checked``, and the ``bytes`` of all.

    Raises:
        UserError: an output folder that is something else, or no room on the disk.
        CheckpointError: the source is missing something or broken.
    """
    _check_folders(source, output)
    parts = plan(source, dtype)
    made_from = {"source": str(source.resolve()), "dtype": str(dtype).removeprefix("torch.")}
    manifest = _manifest(output, made_from)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _check_room(output, parts, manifest)
        counts = {"written": 0, "checked": 0, "bytes": sum(part.size for part in parts)}
        for part in parts:
            name, whence = part.file.as_posix(), part.source(source)
            done = manifest["files"].get(name)
            report = _reporting(progress, name, part.size)
            if done and done["from"] == whence and _sum(output / part.file, report) == done["sha256"]:
                counts["checked"] += 1
                continue
            manifest["files"].pop(name, None)
            _save(output, {**manifest, "complete": False})
            sha256 = _write(part, output / part.file, whence, report)
            manifest["files"][name] = {"bytes": part.size, "sha256": sha256, "from": whence}
            _save(output, {**manifest, "complete": False})
            counts["written"] += 1
        _write_indices(output, parts)
        _copy_configs(source, output)
        _save(output, {**manifest, "complete": True})
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); the same command goes on") from None
    return counts


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(part: Part, file: Path, whence: str, report: Callable[[int], None]) -> str:
    """Writes a file, behind what of it is there and right; returns its SHA-256."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished, log = file.with_name(f"{file.name}.part"), file.with_name(f"{file.name}.part.log")
    known = _log(log, whence)
    whole, done = hashlib.sha256(), 0
    with open(unfinished, "r+b" if unfinished.exists() else "w+b") as out, open(log, "a+", encoding="ascii") as lines:
        lines.truncate(0)
        lines.write(f"{whence}\n")
        trusted = True
        for number, piece in enumerate(part.pieces()):
            if trusted:
                there = out.read(len(piece))
                digest = hashlib.sha256(there).hexdigest()
                trusted = len(there) == len(piece) and number < len(known) and known[number] == digest
                if not trusted:
                    out.seek(done)
                    out.truncate()
            if not trusted:
                out.write(piece)
                digest = hashlib.sha256(piece).hexdigest()
            out.flush()
            whole.update(there if trusted else piece)
            lines.write(f"{digest}\n")
            lines.flush()
            done += len(piece)
            report(done)
        out.truncate(done)
        os.fsync(out.fileno())
    unfinished.replace(file)
    log.unlink()
    return whole.hexdigest()


def _log(log: Path, whence: str) -> list[str]:
    """Sums of the pieces that are there, if they were made from the same."""
    try:
        first, *rest = log.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []
    return rest if first == whence else []


def _write_indices(output: Path, parts: list[Part]) -> None:
    """For folders of several files."""
    folders: dict[Path, list[Part]] = defaultdict(list)
    for part in parts:
        folders[part.file.parent].append(part)
    for folder, members in folders.items():
        if len(members) > 1:
            names = {name: part.file.name for part in members for name in part.tensors}
            stem = "diffusion_pytorch_model" if folder.name.startswith("transformer") else "model"
            total = sum(part.size for part in members)
            write_json(
                output / folder / f"{stem}.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": names},
            )


def _copy_configs(source: Path, output: Path) -> None:
    """Everything small that is no index of the old files; the folder's own ``config.json`` last."""
    found = {file for pattern in CONFIGS for file in source.rglob(pattern) if file.is_file()}
    names = sorted(file.relative_to(source) for file in found if not file.name.endswith(".safetensors.index.json"))
    for name in sorted(names, key=lambda name: name == Path("config.json")):
        if name != Path(MANIFEST) and not any(word.startswith(".") for word in name.parts):
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, output / name)


# --- checking ---------------------------------------------------------------------------------------------------------


def _check_folders(source: Path, output: Path) -> None:
    inside, outside = output.resolve(), source.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise UserError(f"{output}: must be a folder apart from the checkpoint {source}")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: a file; choose a new folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise UserError(f"{output}: holds something else; choose a new folder")


def _manifest(output: Path, made_from: Mapping[str, str]) -> dict[str, Any]:
    """Of a conversion that was begun, or a new one."""
    if not (output / MANIFEST).is_file():
        return {**made_from, "files": {}}
    found = read_json(output / MANIFEST)
    for key, value in made_from.items():
        if found.get(key) != value:
            raise UserError(
                f"{output}: was begun with the {key} {found.get(key)!r}, not {value!r}; choose a new folder"
            )
    files = found.get("files")
    good = isinstance(files, dict) and all(
        isinstance(entry, dict) and {"bytes", "sha256", "from"} <= entry.keys() for entry in files.values()
    )
    return {**made_from, "files": files if good else {}}


def _check_room(output: Path, parts: list[Part], manifest: Mapping[str, Any]) -> None:
    there = [output / part.file for part in parts]
    have = sum(
        file.stat().st_size for file in (*there, *(f.with_name(f"{f.name}.part") for f in there)) if file.exists()
    )
    missing, free = sum(part.size for part in parts) - have, shutil.disk_usage(output).free
    if missing > free:
        raise UserError(
            f"{output}: {missing / 1e9:.1f} GB are to be written, and the disk has {free / 1e9:.1f} GB left"
        )


def _sum(file: Path, report: Callable[[int], None]) -> str:
    """SHA-256 of a file; empty if it cannot be read."""
    said, done = hashlib.sha256(), 0
    try:
        with open(file, "rb") as handle:
            while piece := handle.read(BUFFER):
                said.update(piece)
                done += len(piece)
                report(done)
    except OSError:
        return ""
    return said.hexdigest()


def _save(output: Path, manifest: Mapping[str, Any]) -> None:
    work = output / f"{MANIFEST}.new"
    write_json(work, dict(manifest))
    work.replace(output / MANIFEST)


def _reporting(progress: Progress | None, name: str, size: int) -> Callable[[int], None]:
    return (lambda done: None) if progress is None else (lambda done: progress(name, done, size))
