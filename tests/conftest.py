"""Set-up shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` and xdist's workers put the working directory on the path. From the repository's root our `kernels`
# folder would then shadow Hugging Face's package, which diffusers and transformers import.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

settings.register_profile("bernini", deadline=None, derandomize=True)
settings.load_profile("bernini")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder with the tensors that the official code computed (default: what the test that wants them ships)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Read by torch when it is first imported, here, in xdist's workers and in the tests' own processes.
    os.environ.setdefault("OMP_NUM_THREADS", "1" if getattr(config.option, "numprocesses", None) else "2")
