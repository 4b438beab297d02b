"""Tensors that are spread over ranks, in files that any number of ranks can read.

Each rank writes one safetensors file, with its rows of what is spread and the whole of what is its own. Which rows they
are stands in the file's metadata; a tensor that is not mentioned there is whole. So what one process writes is a plain
safetensors file, and every file of a folder can be opened with the library alone.

    {"rows": {"weights/renderer/proj_out.weight": [first row, rows of all ranks]}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from .fsdp import Rows

SUFFIX = ".safetensors"


class Broken(ValueError):
    """Files that do not hold what they should."""


class Piece(NamedTuple):
    """Of a tensor, the part that a rank writes.

    Args:
        rows: which they are; ``None`` for the whole.
    """

    tensor: Tensor
    rows: Rows | None = None


def file_of(name: str, rank: int, size: int) -> str:
    """What a rank's file is called: of one process ``name.safetensors``, of more with the rank's number."""
    return f"{name}{SUFFIX}" if size == 1 else f"{name}-{rank + 1:05d}-of-{size:05d}{SUFFIX}"


def content(pieces: Mapping[str, Piece]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """(tensors, metadata) of a rank's file, copied to the host: the pieces may change from now on."""
    some = {name: piece for name, piece in pieces.items() if piece.rows is None or piece.rows.stop > piece.rows.start}
    rows = {name: [piece.rows.start, piece.rows.total] for name, piece in some.items() if piece.rows is not None}
    tensors = {name: piece.tensor.detach().to("cpu", copy=True).contiguous() for name, piece in some.items()}
    return tensors, {"rows": json.dumps(rows)} if rows else None


class _Found(NamedTuple):
    file: Any
    start: int
    stop: int
    total: int


class Pieces:
    """The files of a folder, open; see :func:`opened`. Only what is asked for is read."""

    def __init__(self, files: list[Any]) -> None:
        self._found: dict[str, list[_Found]] = {}
        self._shapes: dict[str, list[int]] = {}
        for file in files:
            rows = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                shape = list(file.get_slice(name).get_shape())
                start, total = rows.get(name, (0, shape[0] if shape else 1))
                self._found.setdefault(name, []).append(_Found(file, start, start + (shape[0] if shape else 1), total))
                self._shapes[name] = [total, *shape[1:]] if shape else []

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._shapes[name])

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """A tensor, or some rows of it.

        Raises:
            Broken: it is not there, or not all of it.
        """
        if name not in self._found:
            raise Broken(f"has no {name}")
        pieces, shape = self._found[name], self._shapes[name]
        if not shape:
            return pieces[0].file.get_tensor(name)
        start, stop = (0, shape[0]) if rows is None else (rows.start, rows.stop)
        if len(pieces) == 1 and (pieces[0].start, pieces[0].stop) == (start, stop):
            return pieces[0].file.get_tensor(name)
        full = pieces[0].file.get_slice(name)[0:0].new_empty((stop - start, *shape[1:]))
        there = 0
        for piece in pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                part = piece.file.get_slice(name)[first - piece.start : last - piece.start]
                full[first - start : last - start] = part
                there += last - first
        if there != stop - start:
            raise Broken(f"has {there} of {stop - start} rows of {name}; a file of it is missing")
        return full


@contextmanager
def opened(folder: Path, name: str) -> Iterator[Pieces]:
    """All files of that name in a folder.

    Raises:
        Broken: none is there. What the library raises, where one cannot be read.
    """
    files = sorted(folder.glob(f"{name}*{SUFFIX}"))
    if not files:
        raise Broken(f"has no {name}{SUFFIX}")
    with ExitStack() as stack:
        yield Pieces([stack.enter_context(safe_open(str(file), framework="pt")) for file in files])
