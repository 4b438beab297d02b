"""Wheels with and without a C++ compiler, each installed into an empty environment. Nothing is fetched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = next(path for path in sys.path if (Path(path) / "torch").is_dir())
LIBRARY = "bernini/kernels/native/libbernini_native.so"
PARTS = (
    "bernini",
    "kernels",
    "parallel",
    "offload",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "CMakeLists.txt",
)

# Row copies by whichever implementation there is; the native one by name too, to know which that was.
COMPUTE = """
import sys, warnings
sys.path.append({site!r})
warnings.simplefilter("ignore", RuntimeWarning)
import torch
from bernini.kernels import gather_rows, rms_norm, scatter_rows
from bernini.kernels.native import loader
torch.manual_seed(0)
x, index = torch.randn(500, 64), torch.randperm(500)
out = scatter_rows(torch.zeros(500, 64), [gather_rows(x, index[:300])], [index[:300]])
out = torch.zeros(500, 64) if out is None else out
print(rms_norm(out).double().sum().item().hex(), loader.missing(), sep="|")
"""


def build(source: Path, target: Path, **environment: str) -> Path:
    """A wheel of the tree ``source``, made with the tools that are installed here."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        target,
    ]
    subprocess.run([*command, source], env=os.environ | environment, check=True)
    (wheel,) = target.glob("*.whl")
    return wheel


def install(wheel: Path, home: Path) -> Path:
    """The Python of a new environment that holds this wheel and nothing else."""
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin/python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", wheel]
    subprocess.run(command, check=True)
    return python


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is made of, without anything that was built in it."""
    copy = tmp_path_factory.mktemp("tree")
    for part in map(ROOT.joinpath, PARTS):
        if part.is_dir():
            shutil.copytree(part, copy / part.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(part, copy)
    return copy


def run(python: Path, code: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code], cwd=python.parent, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def check_bare(python: Path) -> None:
    """What works in an environment without torch."""
    code = "import bernini, bernini.kernels, bernini.parallel, bernini.offload; print(bernini.__version__)"
    version = run(python, code)
    shown = subprocess.run([python.with_name("bernini"), "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"bernini {version}"


def test_wheels(tree: Path, tmp_path: Path) -> None:
    without = build(tree, tmp_path / "without", CXX=str(tmp_path / "no-compiler"))
    assert without.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(without).namelist()
    assert LIBRARY not in names
    for module in ("bernini/cli.py", "bernini/kernels/dispatch.py", "bernini/parallel/__init__.py"):
        assert module in names
    plain = install(without, tmp_path / "plain")
    check_bare(plain)

    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    built = build(tree, tmp_path / "with")
    assert "-py3-none-linux_" in built.name
    assert LIBRARY in zipfile.ZipFile(built).namelist()
    native = install(built, tmp_path / "native")
    check_bare(native)

    plain_sum, plain_why = run(plain, COMPUTE.format(site=SITE)).split("|")
    native_sum, native_why = run(native, COMPUTE.format(site=SITE)).split("|")
    assert plain_why == "is not part of this installation; install bernini again where a C++ compiler is found"
    assert native_why == "None"
    assert float.fromhex(plain_sum) == pytest.approx(float.fromhex(native_sum), rel=1e-6)


def test_code_that_does_not_compile_is_an_error(tree: Path, tmp_path: Path) -> None:
    broken = tmp_path / "tree"
    shutil.copytree(tree, broken, ignore=shutil.ignore_patterns("build"))
    (broken / "kernels/native/native.cpp").write_text("this is not C++\n")
    with pytest.raises(subprocess.CalledProcessError):
        build(broken, tmp_path / "broken")
    assert build(broken, tmp_path / "skipped", BERNINI_NATIVE="0").name.endswith("-any.whl")
