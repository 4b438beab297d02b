"""Features of a whole data set, made once: files that training reads instead of pictures.

A file holds the features of so many examples, and in its schema what it was made with and what was left out. It appears
whole or not at all, so work that was stopped goes on with the first file that is missing, and ends with the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bernini import __version__
from bernini.errors import UserError

from .dataset import DataSet
from .example import Example, Skip
from .features import FeatureEncoder
from .parquet import METADATA
from .rows import write_row
from .skips import SkipLog

FORMAT = "bernini features 1"
ROWS = 1024
WINDOW, WINDOW_BYTES = 64, 256 * 2**20
"""Examples whose pixels are in memory at a time, and bytes of pixels after which no more are taken. Shapes that are
alike among them are encoded together."""
GROUP_BYTES = 2 * 2**20
"""Of a row group, about: what a reader fetches for one row."""
PENDING = ".part"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` has done.

    Args:
        files: all of the data set, in order.
        rows: examples in them.
        made: how many of the files were made now; the others were there.
        skipped: of all files.
    """

    files: tuple[Path, ...]
    rows: int
    made: int
    skipped: SkipLog


def prepare(
    data: DataSet, output: str | Path, encoder: FeatureEncoder, fingerprints: Mapping[str, str], *,
    limit: int | None = None, rows: int = ROWS, progress: Progress | None = None,
) -> Prepared:  # fmt: skip
    """Writes the features of a data set as ``part-00000.parquet`` and so on; files that are there are not made again.

    Args:
        fingerprints: of the encoder's models, by part.
        limit: only so many of the first examples.
        rows: examples of a file.

    Raises:
        UserError: the data come with features already, or the folder holds files of other data or other models, or
            cannot be written.
    """
    if data.parts:
        raise UserError(f"the data hold {' and '.join(sorted(data.parts))} features already; give the pictures instead")
    output, total = Path(output), len(data) if limit is None else min(limit, len(data))
    shards = -(-total // rows)
    about = _about(data, encoder, fingerprints, total, rows, shards)
    report = progress or (lambda stage, done, total: None)
    log, files, made, kept = SkipLog(), [], 0, 0
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made a folder ({error.strerror})") from None
    _check_others(output, shards)
    for number in range(shards):
        file = output / f"part-{number:05d}.parquet"
        first, last = number * rows, min((number + 1) * rows, total)
        if file.exists():
            skipped = _finished(file, about)
        else:
            skipped = []
            with _Writer(file, encoder, about) as writer:
                for examples in _windows(data, first, last):
                    report("encoding", first, total)
                    first += len(examples)
                    for example in encoder(examples, data.fps):
                        if isinstance(example, Skip):
                            skipped.append(example)
                        else:
                            writer.add(example)
                writer.finish(skipped)
            made += 1
        for skip in skipped:
            log.add(skip)
        kept += last - number * rows - len(skipped)
        files.append(file)
        report("encoding", last, total)
    return Prepared(tuple(files), kept, made, log)


def _about(
    data: DataSet, encoder: FeatureEncoder, fingerprints: Mapping[str, str], total: int, rows: int, shards: int
) -> dict[str, Any]:
    """What the files of a data set have in common."""
    vae, rules = encoder.vae, encoder.rules
    return {
        "format": FORMAT,
        "version": __version__,
        "source": data.identity,
        "examples": total,
        "rows": rows,
        "shards": shards,
        "fps": data.fps,
        "vae": fingerprints.get("vae"),
        "vae_strides": None if vae is None else [vae.temporal_stride, vae.spatial_stride],
        "vit": fingerprints.get("vit"),
        "vit_patch": None if rules is None else [rules.temporal, rules.patch, rules.merge],
        "vit_frames": None if rules is None else [list(encoder.frames_for_vit(n, data.fps)) for n in (9, 17, 81)],
    }


def _check_others(output: Path, shards: int) -> None:
    """That nothing else is in the folder, which would be read as part of the data set."""
    expected = {f"part-{number:05d}.parquet" for number in range(shards)}
    others = sorted(file.name for file in output.glob("*.parquet") if file.name not in expected)
    if others:
        raise UserError(f"{output}: holds {others[0]}, which is not of this data set; give a folder of its own")
    for left in output.glob(f".*{PENDING}"):  # of a run that was killed
        with suppress(OSError):
            left.unlink()


def _finished(file: Path, about: Mapping[str, Any]) -> list[Skip]:
    """What was left out of a file that is there.

    Raises:
        UserError: it was made of other data, with other models or in another way.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        noted = json.loads((pq.read_metadata(file).metadata or {})[METADATA])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(f"{file}: not made by 'bernini data prepare', or damaged ({error}); remove it") from None
    for key, value in about.items():
        if key != "version" and noted.get(key) != value:
            raise UserError(
                f"{file}: was made with {key} {noted.get(key)}, and now it is {value}; give another folder, or remove "
                f"this one"
            )
    return [Skip(*skip) for skip in noted["skipped"]]


def _windows(data: DataSet, first: int, last: int) -> Iterator[list[Example | Skip]]:
    """Examples as they are encoded together. What is together depends on the data alone, as the last bits may on it."""
    window: list[Example | Skip] = []
    size = 0
    for number in range(first, last):
        example = data[number]
        window.append(example)
        if isinstance(example, Example):
            size += sum(visual.pixels.numel() for visual in example.visuals if visual.pixels is not None)
        if len(window) == WINDOW or size >= WINDOW_BYTES or number == last - 1:
            yield window
            window, size = [], 0


class _Writer:
    """One file, row group by row group; it is there under its name after :meth:`finish`, and not otherwise.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, file: Path, encoder: FeatureEncoder, about: Mapping[str, Any]) -> None:
        self.file, self.about, self.parts = file, about, encoder.parts
        self.merge = 1 if encoder.rules is None else encoder.rules.merge
        self.part = file.with_name(f".{file.name}.{os.getpid()}{PENDING}")
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> _Writer:
        import pyarrow.parquet as pq

        self.schema = _schema(self.parts)
        try:
            self.handle = self.part.open("wb")
        except OSError as error:
            raise self._failed(error) from None
        # Features are as good as noise: neither compression nor dictionaries make them smaller.
        self.writer = pq.ParquetWriter(
            self.handle, self.schema, compression="none", use_dictionary=["task"], write_page_checksum=True
        )
        return self

    def add(self, example: Example) -> None:
        row = write_row(example, self.parts, self.merge)
        self._rows.append(row)
        self._bytes += sum(len(cell) for cells in row.values() if isinstance(cells, list) for cell in cells)
        if self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        try:
            if self._rows:
                self.writer.write_table(pa.Table.from_pylist(self._rows, self.schema))
        except OSError as error:
            raise self._failed(error) from None
        self._rows, self._bytes = [], 0

    def finish(self, skipped: Sequence[Skip]) -> None:
        self._flush()
        noted = {**self.about, "skipped": [[skip.key, skip.reason, skip.detail] for skip in skipped]}
        try:
            self.writer.add_key_value_metadata({METADATA: json.dumps(noted, ensure_ascii=False).encode()})
            self.writer.close()
            self.handle.flush()
            os.fsync(self.handle.fileno())
            os.replace(self.part, self.file)
        except OSError as error:
            raise self._failed(error) from None

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):  # on a full disk closing fails once more
            self.writer.close()
        with suppress(OSError):
            self.handle.close()
        with suppress(OSError):
            self.part.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.file}: cannot be written ({error.strerror or error})")


def _schema(parts: Sequence[str]) -> Any:
    import pyarrow as pa

    fields = [("key", pa.string()), ("task", pa.string()), ("inputs", pa.string())]
    for kind in ("image", "video"):
        if "vit" in parts:
            fields.append((f"{kind}_embeds", pa.list_(pa.binary())))
            fields.append((f"{kind}_grid_thw", pa.list_(pa.list_(pa.int32()))))
        if "vae" in parts:
            fields.append((f"{kind}_vae_latents", pa.list_(pa.binary())))
    return pa.schema(fields)
