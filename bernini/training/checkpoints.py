"""Checkpoints of a run: written whole or not at all, the last ones kept, the same bits back.

    RUN/checkpoints/step-00001200/state.safetensors    weights, averaged weights, optimizer state
    RUN/checkpoints/step-00001200/state.json           step, recipe, counters

A folder is written under another name, flushed to the disk, and renamed: whatever is found under its real name is
complete. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError

FOLDER, TENSORS, FACTS = "checkpoints", "state.safetensors", "state.json"


def save(run: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, keep: int) -> Path:
    """Writes the checkpoint of ``step`` and removes all but the last ``keep``.

    Raises:
        UserError: it could not be written, for example on a full disk; those before it are untouched.
    """
    folder = run / FOLDER / f"step-{step:08d}"
    work = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, work / TENSORS)
        (work / FACTS).write_text(json.dumps({"step": step, **facts}, indent=1), encoding="utf-8")
        for file in (work / TENSORS, work / FACTS, work):
            _flush(file)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        last = latest(run)
        left = f"the last good one is {last}" if last else "there is none before it"
        raise UserError(f"the checkpoint of step {step} could not be written to {folder} ({error}); {left}") from None
    for old in _all(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run; what a killed process left half-written is passed over."""
    found = _all(run)
    return found[-1] if found else None


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of a checkpoint.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return load_file(folder / TENSORS), json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder}: cannot be read ({error}); remove it, and the run goes on from the one before"
        ) from None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], prefix: str) -> dict[str, Tensor]:
    """The state of an optimizer under its parameters' names."""
    return {
        f"{prefix}{names[parameter]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], prefix: str, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    of = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        if key.startswith(prefix):
            name, _, what = key.removeprefix(prefix).rpartition("/")
            parameter = of[name]
            # Counters of steps live on the CPU, and so does everything that is not shaped as its parameter.
            place = parameter.device if value.shape == parameter.shape else "cpu"
            optimizer.state[parameter][what] = value.to(place)


def _all(run: Path) -> list[Path]:
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def _flush(path: Path) -> None:
    """To the disk, so that a rename never comes before what was written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
