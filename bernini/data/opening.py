"""A data set by what a person calls it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bernini.errors import UserError

from .dataset import DataSet
from .parquet import ParquetData
from .pixels import Reading
from .records import RawData
from .worlds import WorldData, shares

WORLD = "world"


def open_data(
    source: str | Path, *, tasks: Mapping[str, float] | None = None, count: int = 1000, seed: int = 0,
    split: str = "train", name: str | None = None, reading: Reading | None = None,
) -> DataSet:  # fmt: skip
    """``"world"``, a manifest (``.jsonl``), or parquet: a file or a folder of them.

    Args:
        tasks, count, seed, split: of the world: tasks with their shares (by default each as much), examples in all,
            seed of the first of each task.
        name: of files, ``<task>$<name>``, where rows do not name their tasks.
        reading: of pictures in files.

    Raises:
        UserError: nothing that can be opened.
    """
    if str(source) == WORLD:
        from .world import TASKS

        return WorldData(shares(tasks or dict.fromkeys(TASKS, 1.0), count), seed0=seed, split=split)
    path = Path(source)
    if path.is_dir() or path.suffix == ".parquet":
        return ParquetData(path, name=name, reading=reading)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder; expected 'world', a .jsonl manifest, or parquet files")
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise UserError(f"{source}: neither a .jsonl manifest nor a parquet file")
    return RawData(path, name=name, reading=reading)
