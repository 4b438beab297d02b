from __future__ import annotations

from pathlib import Path

import pytest

from . import small


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_model(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return small.write_features(tmp_path_factory.mktemp("features"), model)
