"""Checkpoints of a run: written whole or not at all, the last kept, the same bits back, for any number of processes.

    RUN/checkpoints/step-00001200/state.safetensors    weights, averaged weights, optimizer state
    RUN/checkpoints/step-00001200/state.json           step, recipe, counters

Of several processes each writes a file with its rows, ``state-00001-of-00004.safetensors``
(:mod:`bernini.parallel.checkpoints`). A folder is written under another name, flushed to the disk, and renamed when
every process is done: whatever is found under its real name is complete. Nothing is pickled.

Tensors are copied to the host when a checkpoint is begun; the rest is done beside the next steps (:class:`Saving`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..parallel.checkpoints import Broken, Piece, Pieces, content, file_of, opened
from ..parallel.fsdp import Rows
from ..parallel.group import Alone, Group
from .optim import Stepper

FOLDER, NAME, FACTS = "checkpoints", "state", "state.json"
TENSORS = file_of(NAME, 0, 1)


class Saving:
    """A checkpoint that is being written: this process's file by a thread. :meth:`finish` gives it its name.

    Args:
        pieces: of this process; they may change when this returns.
        facts: for the first process to write.
        keep: how many checkpoints stay.
    """

    def __init__(
        self, run: Path, step: int, pieces: Mapping[str, Piece], facts: Mapping[str, Any], *, keep: int, world: Group
    ) -> None:
        self._run, self._step, self._keep, self._world = run, step, keep, world
        self.folder = run / FOLDER / f"step-{step:08d}"
        self._work = self.folder.with_name(f".{self.folder.name}.part")
        tensors, metadata = content(pieces)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        text = json.dumps({"step": step, **facts}, indent=1)
        self._written: Future[None] = self._pool.submit(self._write, tensors, metadata, text)
        self._pool.shutdown(wait=False)

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, str] | None, facts: str) -> None:
        self._work.mkdir(parents=True, exist_ok=True)
        file = self._work / file_of(NAME, self._world.rank, self._world.size)
        if metadata is None:
            save_file(tensors, file)
        else:
            save_file(tensors, file, metadata=metadata)
        _flush(file)
        if self._world.rank == 0:
            (self._work / FACTS).write_text(facts, encoding="utf-8")
            _flush(self._work / FACTS)

    @property
    def done(self) -> bool:
        """Whether this process's file is written, or could not be."""
        return self._written.done()

    def wait(self) -> None:
        """For this process's file, whatever becomes of it."""
        self._written.exception()

    def finish(self) -> Path:
        """Gives the folder its name and removes all but the last ``keep``. All processes do this, when all are done.

        Raises:
            UserError: it could not be written, for example on a full disk; those before it are untouched.
        """
        try:
            told = self._world.tell(_words(self._written.exception()))
            failed = next((words for words in told if words is not None), None)
            if failed is None and self._world.rank == 0:
                _flush(self._work)
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                self._work.rename(self.folder)
                _flush(self.folder.parent)
        except OSError as error:
            failed = str(error)
        failed = next((words for words in self._world.tell(failed) if words is not None), None)
        if failed is not None:
            if self._world.rank == 0:
                shutil.rmtree(self._work, ignore_errors=True)
            last = latest(self._run)
            left = f"the last good one is {last}" if last else "there is none before it"
            raise UserError(
                f"the checkpoint of step {self._step} could not be written to {self.folder} ({failed}); {left}"
            )
        if self._world.rank == 0:
            for old in _all(self._run)[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)
        return self.folder


def _words(error: BaseException | None) -> str | None:
    if error is None or isinstance(error, OSError | SafetensorError):
        return None if error is None else str(error)
    raise error


def save(
    run: Path, step: int, pieces: Mapping[str, Piece], facts: Mapping[str, Any], *, keep: int,
    world: Group | None = None,
) -> Path:  # fmt: skip
    """Writes the checkpoint of ``step`` and waits for it; see :class:`Saving`."""
    return Saving(run, step, pieces, facts, keep=keep, world=world or Alone()).finish()


def clear(run: Path) -> None:
    """Removes what killed processes left half-written."""
    for part in (run / FOLDER).glob(".step-*.part"):
        shutil.rmtree(part, ignore_errors=True)


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run; what a killed process left half-written is passed over."""
    found = _all(run)
    return found[-1] if found else None


@contextmanager
def reading(folder: Path) -> Iterator[tuple[Pieces, dict[str, Any]]]:
    """(tensors, facts) of a checkpoint; of the tensors only what is asked for is read.

    Raises:
        UserError: it cannot be read.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        with opened(folder, NAME) as pieces:
            yield pieces, facts
    except (OSError, SafetensorError, json.JSONDecodeError, Broken) as error:
        raise UserError(
            f"{folder}: cannot be read ({error}); remove it, and the run goes on from the one before"
        ) from None


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of a checkpoint, all of it.

    Raises:
        UserError: it cannot be read.
    """
    with reading(folder) as (pieces, facts):
        return {name: pieces.read(name) for name in pieces}, facts


def optimizer_pieces(
    optimizer: Stepper, names: Mapping[Tensor, str], prefix: str, rows: Mapping[str, Rows | None]
) -> dict[str, Piece]:
    """The state of an optimizer under its parameters' names.

    Args:
        rows: what of each parameter, and so of what is shaped as it, is here; all of those that are not named.
    """
    found = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            spread = rows.get(names[parameter]) if tensor.dim() else None
            found[f"{prefix}{names[parameter]}/{key}"] = Piece(tensor, spread)
    return found


def restore_optimizer(
    optimizer: Stepper, names: Mapping[Tensor, str], prefix: str, rows: Mapping[str, Rows | None],
    pieces: Pieces,
) -> None:  # fmt: skip
    """The inverse of :func:`optimizer_pieces`. What belongs to none of ``names`` is left to other processes."""
    of = {name: parameter for parameter, name in names.items()}
    for key in pieces:
        if key.startswith(prefix):
            name, _, what = key.removeprefix(prefix).rpartition("/")
            parameter = of.get(name)
            if parameter is None:
                continue
            # Counters of steps live on the CPU, and so does everything that is not shaped as its parameter.
            shaped = len(pieces.shape(key)) > 0
            value = pieces.read(key, rows.get(name) if shaped else None)
            optimizer.state[parameter][what] = value.to(parameter.device if shaped else "cpu")


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
