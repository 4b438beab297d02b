"""A command of several processes (torchrun): one of them speaks and writes, all of them work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bernini.parallel.mesh import Mesh


@contextmanager
def together(device: str | None, *, sequence: int = 1, agree: Mapping[str, Any] | None = None) -> Iterator[Mesh]:
    """The mesh; see :func:`bernini.parallel.launch.running`. Ranks but the first print nothing in it.

    Args:
        device: as on the command line; by default a GPU if there is one.
    """
    from bernini.parallel.launch import running
    from bernini.parallel.mesh import alone, torchrun

    if not torchrun():  # says nothing of devices, which the command has looked at or will
        yield alone()
        return
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    with running(device, sequence=sequence, agree=agree) as mesh:
        if mesh.first:
            yield mesh
            return
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            yield mesh


def options(args: argparse.Namespace) -> dict[str, str]:
    """What was asked for on the command line, to be the same on all ranks."""
    return {name: str(value) for name, value in sorted(vars(args).items()) if name != "run"}


def sizes(folder: Path) -> dict[str, int]:
    """Files of a checkpoint, if it is a folder here, with their lengths: ranks must have the same ones."""
    if not folder.is_dir():
        return {}
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".json"))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
