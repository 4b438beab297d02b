"""Set-up shared by all tests."""

from __future__ import annotations

import importlib.util
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


def _bench_perf() -> None:
    """Makes ``import bench_perf`` work: it is not installed, and the root is off the path."""
    folder = ROOT / "bench_perf"
    spec = importlib.util.spec_from_file_location(
        "bench_perf", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["bench_perf"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench_perf"])


_bench_perf()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``tests/proof`` belongs to ``make proof``: it runs only where it is named."""
    proof = ROOT / "tests" / "proof"
    named = any(Path(argument.split("::")[0]).resolve().is_relative_to(proof) for argument in config.args)
    return True if collection_path == proof and not named else None
