"""A case: one call of a kernel's wrapper at real size, and what must be true of it. A broken variant: one wrong edit.

Everything that is proved about generated code comes out of these calls; nothing is described twice. A family lists its
cases and its broken variants in ``cases/<family>.py``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

FAMILIES = ("rms_norm", "qk_rope", "modulate", "scatter", "attention", "guidance")

TOKENS, WIDTH = 440_000, 5120
"""The longest sequence of the paper's training, and the width of the 14B renderer: more than 2^31 elements."""


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        name: what it is, e.g. ``"rms_norm forward"``; unique.
        module: of the wrapper, under ``bernini.kernels``, e.g. ``"rms_norm.kernel"``.
        call: calls a wrapper of that module, given the module and a dtype, on ``device="cuda"`` tensors that it makes
            itself (``torch.empty``; inside, they are fake).
        minimum: bytes that any implementation must read and write, for a dtype.
        launches: how many Triton kernels the call may start.
        dtypes: of the data; the first is always proved, the others where something changed.
        narrow: global accesses (SASS instructions) below 128 bits that each kernel may have, with the reason; ones that
            are not listed are faults. E.g. ``{"qk_rope_kernel": (12, "four row numbers and the phases of a pair")}``.
        bounded: sums and products in 32 bits that the address lint may pass, by source line fragment, with the reason.
        registers, barriers: budgets per kernel of the case; registers per thread on NVIDIA.
        values: contents of small integer arguments that decide how often something is loaded, by argument name.
    """

    name: str
    module: str
    call: Callable[[Any, torch.dtype], None]
    minimum: Callable[[torch.dtype], int]
    launches: int
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    narrow: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    bounded: Mapping[str, str] = field(default_factory=dict)
    registers: int = 128
    barriers: int = 8
    values: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def load(self) -> ModuleType:
        return importlib.import_module(f"bernini.kernels.{self.module}")


@dataclass(frozen=True)
class Broken:
    """A kernel with one mistake, made by replacing ``old`` (which must occur exactly once) by ``new`` in its source.

    Args:
        name: the mistake.
        module: as in :class:`Case`.
        old, new: the edit.
        caught_by: the check that must refuse it: ``"semantics"`` (wrong numbers in the interpreter) or a check of
            :mod:`bench_perf.proof.checks`: ``"spills"``, ``"widths"``, ``"lint"``, ``"traffic"``, ``"fp64"``,
            ``"atomics"``, ``"registers"``, ``"barriers"``, ``"launches"``.
        case: name of the case that shows it; not needed for ``"semantics"``.
    """

    name: str
    module: str
    old: str
    new: str
    caught_by: str
    case: str | None = None

    def load(self) -> ModuleType:
        """The module with the mistake, as a module of its own beside the right one."""
        full = f"bernini.kernels.{self.module}"
        right = importlib.import_module(full)
        assert right.__file__ is not None
        source = Path(right.__file__).read_text("utf-8")
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {source.count(self.old)} times in {full}, not once")
        text = source.replace(self.old, self.new)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = Path(
            tempfile.gettempdir(), f"bernini_broken_{digest}.py"
        )  # Triton reads a kernel's source from its file
        path.write_text(text, "utf-8")
        name = f"{full}_broken_{digest}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module


def cases() -> list[Case]:
    """All cases of all families."""
    return [case for family in FAMILIES for case in _family(family).CASES]


def broken() -> list[Broken]:
    """All broken variants of all families."""
    return [variant for family in FAMILIES for variant in _family(family).BROKEN]


def _family(name: str) -> Any:
    return importlib.import_module(f"{__package__}.cases.{name}")
