"""What importing the package costs, and that it lives beside Hugging Face's ``kernels``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "triton", "numpy", "diffusers", "transformers")

TIMED = """
import json, sys, time
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
print(json.dumps([seconds, [name for name in {heavy} if name in sys.modules]]))
"""

# sys.path as the interpreter leaves it for `-m` in the root, then what the entry points do about it.
BESIDE = """
import importlib.util, runpy, sys
sys.path.insert(0, {root!r})
sys.argv = ["{module}", "{option}"]
try:
    runpy.run_module("{module}", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code, stop.code
import diffusers, transformers
import kernels
print(kernels.__file__)
"""


def run(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("module", ["bernini", "bernini.kernels", "bernini.parallel", "bernini.offload"])
def test_import_is_light(module: str, tmp_path: Path) -> None:
    times = []
    for _ in range(3):
        seconds, loaded = json.loads(run(TIMED.format(module=module, heavy=HEAVY), tmp_path))
        assert loaded == []
        times.append(seconds)
    assert min(times) < 0.3


def test_the_tests_do_not_see_the_root() -> None:
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]


@pytest.mark.parametrize(("module", "option"), [("bernini", "--version"), ("bench_perf", "--help")])
def test_hugging_face_kernels_from_the_root(module: str, option: str) -> None:
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("Hugging Face's `kernels` is not installed")
    found = Path(run(BESIDE.format(root=str(ROOT), module=module, option=option), ROOT)).resolve()
    assert not found.is_relative_to(ROOT / "kernels")


def test_unknown_names_are_attribute_errors() -> None:
    import bernini

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bernini.nothing  # noqa: B018
