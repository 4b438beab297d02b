"""Tables of samples: the release's parquet files, with features or without, and ours (columns: :mod:`.rows`).

Rows are read a row group at a time, and the groups that were used last stay in memory. So reading in order costs one
group at a time, and reading at random is fast once what is used has been read.
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bernini.errors import UserError

from .example import Example, Skip
from .messages import read_messages, task_name
from .pixels import Reading
from .rows import COLUMNS, FEATURE_COLUMNS, PATCH, read_example
from .skips import Bad

METADATA = b"bernini"
"""Where :mod:`bernini.data.prepare` notes in a file's schema what it was made with."""
CACHE_BYTES = 2 * 2**30

TEXTS = ("key", "task", "source_name", "inputs")


class ParquetData:
    """Random access to the rows of one or more files, in the order of their names.

    Args:
        source: a folder of ``*.parquet``, a file, or several files.
        name: of the data set, ``<task>$<name>`` or a task; a row's own ``task`` or ``source_name`` counts where it is
            ``None``, and then what its pictures mean.
        reading: how pictures without features are read from their files; ``None``: they are not.
        fps: of videos that have features; by default what the files say, else that of ``reading``.
        patch: of the renderer; latents that it does not divide are skipped.
        root: where relative paths of pictures begin; by default the folder of the table.
        cache_bytes: of row groups kept in memory.

    Raises:
        UserError: no file, one that is no parquet, without the column ``inputs`` or with one of another type, or a
            folder that :func:`~bernini.data.prepare.prepare` has not finished.
    """

    def __init__(
        self, source: str | Path | Sequence[str | Path], *, name: str | None = None, reading: Reading | None = None,
        fps: float | None = None, patch: tuple[int, int, int] = PATCH, root: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:  # fmt: skip
        self.files = _files(source)
        self.name, self.reading = name, reading or Reading()
        self.patch = patch
        self.root = None if root is None else Path(root)
        self._metadata = [_opened(file) for file in self.files]
        self._names = [m.schema.to_arrow_schema().names for m in self._metadata]
        self.about: list[dict[str, Any] | None] = [_about(m) for m in self._metadata]
        if isinstance(source, str | Path) and Path(source).is_dir():
            _check_complete(Path(source), self.about)
        self.fps = fps or next((about["fps"] for about in self.about if about), self.reading.fps)
        self._groups: list[tuple[int, int, int]] = []  # (file, row group, its first row within the file)
        self._starts: list[int] = []  # of each group, its first row among all
        rows = 0
        for number, metadata in enumerate(self._metadata):
            inside = 0
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group, inside))
                self._starts.append(rows)
                inside += metadata.row_group(group).num_rows
                rows += metadata.row_group(group).num_rows
        self._rows, self._most = rows, cache_bytes
        self._cache: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def __len__(self) -> int:
        return self._rows

    @cached_property
    def identity(self) -> str:
        """Of the files: changes with their names and sizes, and with how their pictures are read."""
        listed = [(file.name, file.stat().st_size) for file in self.files]
        return hashlib.sha256(repr((listed, self.name, self.reading)).encode()).hexdigest()[:16]

    @property
    def skipped(self) -> list[Skip]:
        """What was left out when features were prepared."""
        return [Skip(*skip) for about in self.about if about for skip in about["skipped"]]

    @cached_property
    def parts(self) -> frozenset[str]:
        """``"vae"``, ``"vit"``: the features that all files hold."""
        found = [
            {part for part, end in (("vae", "_vae_latents"), ("vit", "_embeds"))
             if any(column.endswith(end) for column in names)}
            for names in self._names
        ]  # fmt: skip
        return frozenset(set.intersection(*found)) if found else frozenset()

    @cached_property
    def has_pixels(self) -> bool:
        """Whether pictures are read from their files: where there are no features."""
        return not self.parts and all({"images", "videos"} & set(names) for names in self._names)

    @cached_property
    def tasks(self) -> list[str]:
        """Of every row its task, ``""`` where it has none that is known. Reads three small columns."""
        import pyarrow.parquet as pq

        tasks: list[str] = []
        for file, metadata, names in zip(self.files, self._metadata, self._names, strict=True):
            wanted = [column for column in TEXTS if column in names]
            try:
                table = pq.read_table(file, columns=wanted, memory_map=True)
            except Exception:  # damaged: what its rows are is told when they are read
                tasks += [""] * metadata.num_rows
                continue
            tasks += [self._task(row) for row in table.to_pylist()]
        return tasks

    def of_task(self, task: str) -> Sequence[int]:
        """Numbers of the rows of that task."""
        return self._by_task.get(task, [])

    @cached_property
    def _by_task(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, task in enumerate(self.tasks):
            found.setdefault(task, []).append(number)
        return found

    def _task(self, row: Mapping[str, Any]) -> str:
        try:
            return task_name(self.name or row.get("task") or row.get("source_name"), read_messages(row["inputs"]))
        except Bad:
            return ""

    def __getitem__(self, index: int) -> Example | Skip:
        """The row of that number. Nothing that is wrong with a row raises.

        Raises:
            IndexError: no such row.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        group = bisect_right(self._starts, index) - 1
        number, _, first = self._groups[group]
        file = self.files[number]
        key = f"{file.name}#{first + index - self._starts[group]}"
        try:
            columns = self._group(group)
            row = {name: column[index - self._starts[group]].as_py() for name, column in columns.items()}
            key = row.get("key") or key
            talk = read_messages(row["inputs"])
            task = task_name(self.name or row.get("task") or row.get("source_name"), talk)
            load = partial(self.reading.load, folder=self.root or file.parent)
            return read_example(key, task, talk, row, load if self.has_pixels else None, self.patch)
        except Bad as bad:
            return bad.skip(key)

    def _group(self, group: int) -> dict[str, Any]:
        """The columns of a row group."""
        import pyarrow.parquet as pq

        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
        number, inside, _ = self._groups[group]
        metadata = self._metadata[number]
        wanted = [column for column in COLUMNS if column in self._names[number]]
        try:
            file = pq.ParquetFile(
                self.files[number], metadata=metadata, memory_map=True, page_checksum_verification=True
            )
            table = file.read_row_group(inside, columns=wanted)
            columns = {name: table.column(name).combine_chunks() for name in wanted}
        except Exception as error:  # pyarrow has an error of its own for every way to be damaged
            raise Bad("unreadable row", f"{self.files[number]}: {str(error).splitlines()[0]}") from None
        with self._lock:
            if group not in self._cache:
                self._cache[group] = columns
                self._bytes += table.nbytes
                while self._bytes > self._most and len(self._cache) > 1:
                    _, old = self._cache.popitem(last=False)
                    self._bytes -= sum(column.nbytes for column in old.values())
        return columns

    def __getstate__(self) -> dict[str, Any]:  # for workers: each has a cache of its own
        return {**self.__dict__, "_cache": OrderedDict(), "_bytes": 0, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def _files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    if not isinstance(source, str | Path):
        files = [Path(file) for file in source]
    elif Path(source).is_dir():
        files = sorted(file for file in Path(source).glob("*.parquet") if not file.name.startswith("."))
    else:
        files = [Path(source)]
    if not files:
        raise UserError(f"{source}: holds no parquet file")
    return files


def _opened(file: Path) -> Any:
    """A file's metadata.

    Raises:
        UserError: no such file, no parquet, or not the release's columns.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("parquet files are read with pyarrow: pip install 'bernini[train]'") from None
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as parquet ({str(error).splitlines()[0]})") from None
    if "inputs" not in schema.names:
        raise UserError(
            f"{file}: has no column 'inputs' with the messages of its samples; it has {', '.join(schema.names)}"
        )
    for name in schema.names:
        kind = schema.field(name).type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_null(kind)
        wrong = (name in TEXTS and not text) or (name in (*FEATURE_COLUMNS, "images", "videos") and not listed)
        if wrong:
            raise UserError(
                f"{file}: the column {name!r} is of the type {kind}, expected {'text' if name in TEXTS else 'a list'}"
            )
    return metadata


def _about(metadata: Any) -> dict[str, Any] | None:
    """What :mod:`bernini.data.prepare` noted; ``None`` for files of others."""
    noted = (metadata.metadata or {}).get(METADATA)
    return None if noted is None else json.loads(noted)


def _check_complete(folder: Path, about: Sequence[dict[str, Any] | None]) -> None:
    shards = {one["shards"] for one in about if one}
    if shards and len(about) < max(shards):
        raise UserError(
            f"{folder}: holds {len(about)} of {max(shards)} files; the same 'bernini data prepare' makes the others"
        )
