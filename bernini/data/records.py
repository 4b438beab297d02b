"""Raw samples: a list of image and video files in JSONL, one sample a line, in the release's columns or in short.

In full, as a row of a parquet table (:mod:`.rows`; ``inputs`` may be the list itself instead of JSON in a string)::

    {"task": "v2v", "inputs": [{"type": "text", "text": "make it snow"}, {"type": "video"}, {"type": "video_gen"}],
     "videos": [{"video_path": "in.mp4", "duration": 5, "crop_method": "center"}, {"video_path": "out.mp4"}]}

The same in short; ``target`` is told by its suffix, an image or a video::

    {"task": "v2v", "prompt": "make it snow", "videos": ["in.mp4"], "target": "out.mp4"}
    {"prompt": "how many birds are there?", "images": ["birds.png"], "answer": "two"}

``key`` is the file's name and the line's number where a line has none. Relative paths begin at the manifest's folder.
Tables of the release without features are read by :class:`.parquet.ParquetData`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bernini.errors import UserError
from bernini.media_write import is_picture

from .example import Example, Skip
from .messages import read_messages, task_name
from .pixels import Reading
from .rows import read_example
from .skips import Bad

SHORT = ("prompt", "target", "answer")


class RawData:
    """A manifest's samples with pixels, read when they are asked for.

    Args:
        manifest: JSONL; empty lines do not count.
        reading: frame rate, frames and sizes.
        name: of the data set, ``<task>$<name>``, where the lines do not name their tasks.

    Raises:
        UserError: no such file, no text, or not one line.
    """

    parts: frozenset[str] = frozenset()
    has_pixels = True

    def __init__(self, manifest: str | Path, *, reading: Reading | None = None, name: str | None = None) -> None:
        self.manifest, self.reading, self.name = Path(manifest), reading or Reading(), name
        try:
            text = self.manifest.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{manifest}: cannot be read as a manifest ({error})") from None
        self._lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not self._lines:
            raise UserError(f"{manifest}: is empty; a manifest has one sample a line, as JSON")
        self.fps = self.reading.fps
        described = repr((text, self.reading, name))
        self.identity = hashlib.sha256(described.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Example | Skip:
        """Nothing that is wrong with a line or its files raises.

        Raises:
            IndexError: no such line.
        """
        number, line = self._lines[index]
        key = f"{self.manifest.name}#{number}"
        try:
            row = _row(line)
            key = row.get("key") or key
            talk = read_messages(row["inputs"])
            task = task_name(self.name or row.get("task") or row.get("source_name"), talk)
            return read_example(key, task, talk, row, partial(self.reading.load, folder=self.manifest.parent))
        except Bad as bad:
            return bad.skip(key)

    def of_task(self, task: str) -> Sequence[int]:
        return self._by_task.get(task, [])

    @cached_property
    def _by_task(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, (_, line) in enumerate(self._lines):
            try:
                row = _row(line)
                named = self.name or row.get("task") or row.get("source_name")
                found.setdefault(task_name(named, read_messages(row["inputs"])), []).append(number)
            except Bad:
                continue
        return found


def _row(line: str) -> dict[str, Any]:
    """A line as a row of the table.

    Raises:
        Bad: ``wrong schema``.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Bad("wrong schema", f"the line is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise Bad("wrong schema", f"the line holds a {type(row).__name__}, expected an object")
    for name in ("key", "task", "source_name", *SHORT):
        if not isinstance(row.get(name), str | None):
            raise Bad("wrong schema", f"{name} is {type(row[name]).__name__}, expected text")
    for name in ("images", "videos"):
        if not isinstance(row.get(name), list | None):
            raise Bad("wrong schema", f"{name} is {type(row[name]).__name__}, expected a list")
    if "inputs" in row:
        both = [name for name in SHORT if name in row]
        if both:
            raise Bad("wrong schema", f"has inputs and {both[0]}, which say the same")
        return row
    if not any(name in row for name in SHORT):
        raise Bad("wrong schema", "has neither inputs nor a prompt")
    return _in_full(row)


def _in_full(row: Mapping[str, Any]) -> dict[str, Any]:
    files = {kind: list(row.get(f"{kind}s") or []) for kind in ("image", "video")}
    messages: list[dict[str, Any]] = [{"type": "text", "text": row.get("prompt") or ""}]
    messages += [{"type": kind} for kind in ("video", "image") for _ in files[kind]]
    if row.get("target"):
        kind = "image" if is_picture(row["target"]) else "video"
        files[kind].append(row["target"])
        messages.append({"type": f"{kind}_gen", "has_loss": 1})
    if row.get("answer") is not None:
        messages.append({"type": "text", "text": row["answer"], "has_loss": 1})
    return {**row, "inputs": messages, "images": files["image"], "videos": files["video"]}
