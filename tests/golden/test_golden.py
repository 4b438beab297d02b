"""The same numbers as the released system, set by set; ``--golden-dir DIR`` takes the sets from another folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import registry


def test_golden(golden_set: str, files: dict[str, Path], record_property: Callable[[str, object], None]) -> None:
    record_property("comparisons", registry.run(golden_set, files))
