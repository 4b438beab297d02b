"""Makes one test of every golden set in ``--golden-dir``, by default those shipped in ``data``."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import registry

DATA = Path(__file__).with_name("data")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_set" in metafunc.fixturenames:
        directory = metafunc.config.getoption("--golden-dir", default=None)
        found = registry.find(Path(directory) if directory else DATA)
        metafunc.parametrize(("golden_set", "files"), list(found.items()), ids=list(found))
