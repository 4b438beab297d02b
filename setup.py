"""The import mapping, and the native library.

Folders at the top of the repository become sub-packages of ``bernini``. The library is built by CMake: into the wheel,
into ``kernels/native`` for an editable install, and there again by ``python setup.py native``. Without CMake or a
C++ compiler, or with ``BERNINI_NATIVE=0``, the build goes on without it and says so; code that does not compile is an
error.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ROOMS = {
    "bernini": "bernini",
    "bernini.kernels": "kernels",
    "bernini.parallel": "parallel",
    "bernini.offload": "offload",
}
LIBRARY = "libbernini_native.so"


def _tool(name: str) -> str | None:
    """A program that pip installed beside this Python, whose folder need not be on PATH, or else the system's."""
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]))


def _configure(cmake: str, work: Path) -> str | None:
    """Returns why CMake cannot build here, or ``None``."""
    ninja = _tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    run = subprocess.run([cmake, "-S", ROOT, "-B", work, *generator], capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return None
    said = [line.strip() for line in run.stderr.splitlines() if not line.startswith("CMake Error")]
    return next((line for line in said if "compiler" in line.lower()), run.stderr.strip())


def build_library(target: Path, work: Path) -> None:
    """Builds the library in the folder ``work`` and puts it at ``target``."""
    cmake = _tool("cmake")
    if os.environ.get("BERNINI_NATIVE") == "0":
        why = "BERNINI_NATIVE=0"
    elif not sys.platform.startswith("linux"):
        why = f"it is made for Linux, not {sys.platform}"
    elif cmake is None:
        why = "CMake was not found"
    else:
        why = _configure(cmake, work)
        if why and (work / "CMakeCache.txt").exists():  # perhaps only a stale cache, e.g. of a tree that was moved
            shutil.rmtree(work)
            why = _configure(cmake, work)
    if why:
        target.unlink(missing_ok=True)
        print(f"bernini: building without the native library: {why}", file=sys.stderr)
        return
    run = subprocess.run([cmake, "--build", work], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        print(run.stdout, run.stderr, file=sys.stderr)
        raise SystemExit("bernini: the native library does not compile (BERNINI_NATIVE=0 builds without it)")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Replaced, not overwritten: another process may have the old file mapped.
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(work / LIBRARY, fresh)
    fresh.replace(target)


def build_in_tree() -> None:
    build_library(ROOT / "kernels/native" / LIBRARY, ROOT / "build/native")


class Native(Command):
    """``python setup.py native``: only the library, into the source folder, rebuilding what changed."""

    description = "build the native library into the source folder"
    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        build_in_tree()


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            build_in_tree()
        else:
            with tempfile.TemporaryDirectory() as work:
                build_library(self.library(), Path(work))

    def library(self) -> Path:
        return Path(self.build_lib, "bernini/kernels/native", LIBRARY).resolve()

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        built = not self.editable_mode and self.library().exists()
        return [*super().get_outputs(include_bytecode), *([str(self.library())] if built else [])]


class BdistWheel(bdist_wheel):
    """Tags the wheel by its content: the library is tied to a platform but to no Python."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.get_finalized_command("build_py").library().exists()
        # What setuptools asks to choose the folder of platform-dependent files; it knows of no library but extensions.
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    package_dir=ROOMS,
    packages=sorted(
        name for room, folder in ROOMS.items() for name in [room, *(f"{room}.{sub}" for sub in find_packages(folder))]
    ),
    cmdclass={"native": Native, "build_py": BuildPy, "bdist_wheel": BdistWheel},
)
