"""Which golden sets there are, the files each needs, and who checks it.

A set is a file ``<set>.safetensors`` or a pair of weights and cases. A checker is a module beside this one with a
function ``check(files) -> int``: it takes the paths by role (``"cases"``, ``"weights"``) and returns how many
comparisons it made. It checks what its files hold, so that a subset of a set is checked as well. A set whose part of
the package does not exist yet says so and is skipped.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import compare

Files = dict[str, Path]
Check = Callable[[Files], int]


class GoldenError(ValueError):
    """The folder does not hold what it should."""


@dataclass(frozen=True)
class Checker:
    """``module`` is imported when its set is checked. ``takes`` says whether ``check`` wants the paths or, for a set
    of one file, its tensors and metadata."""

    module: str
    takes: str = "files"

    def load(self) -> Check:
        check = importlib.import_module(f".{self.module}", __package__).check
        return check if self.takes == "files" else lambda files: check(*compare.load(files["cases"]))


@dataclass(frozen=True)
class GoldenSet:
    checker: Checker
    files: dict[str, str]
    """File names without the suffix, by role."""


def _single(name: str, checker: Checker) -> GoldenSet:
    return GoldenSet(checker, {"cases": name})


def _pair(name: str, checker: Checker, weights: str | None = None) -> GoldenSet:
    return GoldenSet(checker, {"weights": weights or f"{name}_weights", "cases": f"{name}_cases"})


SETS: dict[str, GoldenSet] = {
    "sa3d_rope": _single("sa3d_rope", Checker("check_sa3d_rope")),
    "renderer_forward": _pair("renderer_forward", Checker("check_renderer_forward")),
    "port_renderer": _pair("port_renderer", Checker("check_port_renderer")),
    "guidance": _single("guidance", Checker("check_guidance", takes="tensors")),
    "preprocess": _single("preprocess", Checker("check_preprocess")),
    "sampler": _pair("sampler", Checker("check_sampler")),
    "noise_training": GoldenSet(
        Checker("check_noise_training"), {"weights": "renderer_forward_weights", "cases": "noise_training"}
    ),
    "connector_vit_decoder": _single("connector_vit_decoder", Checker("check_connector_vit_decoder")),
    "planner_layouts": _single("planner_layouts", Checker("check_planner_layouts")),
    "planner_forward": _pair("planner_forward", Checker("check_planner_forward"), weights="planner_weights"),
    "planner_loop": _pair("planner_loop", Checker("check_planner_loop")),
    "planner_rng": _single("planner_rng", Checker("check_planner_rng")),
    "contexts": _single("contexts", Checker("check_contexts")),
    "full_packing": _single("full_packing", Checker("check_full_packing")),
}


def find(directory: Path) -> dict[str, Files]:
    """The sets in a folder, with their files by role.

    Raises:
        GoldenError: no such folder, nothing in it, a tensor file that belongs to no set, or a set that lacks a file.
    """
    if not directory.is_dir():
        raise GoldenError(f"{directory}: no such folder")
    present = {path.stem: path for path in sorted(directory.glob("*.safetensors"))}
    if not present:
        raise GoldenError(f"{directory}: holds no .safetensors file")
    known = {stem for golden in SETS.values() for stem in golden.files.values()}
    if unknown := sorted(present.keys() - known):
        raise GoldenError(f"{directory}: {unknown[0]}.safetensors belongs to no known set ({', '.join(SETS)})")
    # A file that several sets share does not announce any of them by itself, unless it is all that is there.
    owners = {stem: [name for name, golden in SETS.items() if stem in golden.files.values()] for stem in present}
    named = {name for name, golden in SETS.items() if golden.files["cases"] in present}
    named |= {names[0] for stem, names in owners.items() if not named.intersection(names)}
    found = {}
    for name in (name for name in SETS if name in named):
        stems = SETS[name].files
        if missing := [stem for stem in stems.values() if stem not in present]:
            raise GoldenError(f"{directory}: the set {name} lacks {missing[0]}.safetensors")
        found[name] = {role: present[stem] for role, stem in stems.items()}
    return found


def run(name: str, files: Files) -> int:
    """Checks one set and returns the number of comparisons.

    Raises:
        AssertionError: a value is off, or the checker compared nothing.
    """
    checker = SETS[name].checker
    assert isinstance(checker, Checker), f"{name} has no checker"
    compared = checker.load()(files)
    if compared < 1:
        raise AssertionError(f"{name}: the checker found nothing to compare")
    return compared
