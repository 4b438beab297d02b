"""Why an example cannot be used: a small set of reasons, raised inside, counted and logged outside."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from .example import Example, Skip

REASONS: Mapping[str, str] = {
    "wrong schema": "columns or messages that are not as the schema has them, or contradict each other or the task",
    "unknown task": "a task that is none of the release's nor of ours",
    "empty text": "nothing is asked for, or nothing answered",
    "no target": "neither a picture to make nor an answer to give",
    "two targets": "more than one picture to make",
    "unreadable image": "missing, damaged, or no image",
    "unreadable video": "missing, damaged, or no video",
    "empty clip": "a video of no frames or no seconds",
    "bad pixels": "not uint8 RGB, or of a size that a model cannot take",
    "not finite": "a pixel or a feature is no finite number",
    "unreadable features": "bytes that hold no tensor",
    "misshaped features": "features whose shape does not fit their grid, or each other",
    "wrong stage": "lacks what the stage that is trained reads",
    "unreadable row": "the file is damaged where the row is",
}
"""Every reason of a :class:`~bernini.data.example.Skip`, and what it means."""

LOGGED = 5
"""Of each reason so many are logged one by one; all are counted."""

logger = logging.getLogger("bernini.data")


class Bad(Exception):
    """Ends the reading of one example; becomes its :class:`~bernini.data.example.Skip`.

    Args:
        reason: one of :data:`REASONS`.
        detail: which part it is and what was wrong with it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def skip(self, key: str) -> Skip:
        return Skip(key, self.reason, self.detail)


class SkipLog:
    """Counts what was skipped, and logs the first few of each reason as warnings of the logger ``bernini.data``.

    An example that comes again is counted once: ``counts`` are of examples, not of visits.

    Args:
        quiet: nothing is logged.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[Skip]] = {}
        self._keys: set[str] = set()

    def add(self, skip: Skip) -> None:
        if skip.key in self._keys:
            return
        self._keys.add(skip.key)
        self.counts[skip.reason] += 1
        few = self.first.setdefault(skip.reason, [])
        if len(few) < LOGGED:
            few.append(skip)
            if not self.quiet:
                logger.warning("skipped %s: %s (%s)", skip.key, skip.reason, skip.detail)

    def usable(self, examples: Iterable[Example | Skip]) -> list[Example]:
        """The examples; what is not one is counted."""
        kept = []
        for example in examples:
            if isinstance(example, Skip):
                self.add(example)
            else:
                kept.append(example)
        return kept

    @property
    def total(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        """``"3 skipped: 2 unreadable video, 1 empty text"``, or nothing if none was."""
        if not self.total:
            return ""
        return f"{self.total} skipped: " + ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON can hold it."""
        return {"counts": dict(self.counts), "keys": sorted(self._keys)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.counts, self._keys = Counter(state["counts"]), set(state["keys"])
