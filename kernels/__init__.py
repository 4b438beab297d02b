"""Fused kernels for video diffusion transformers, imported one by one.

``from bernini.kernels import qk_rope`` loads torch and that family only; importing the package itself loads
neither torch nor Triton. The folder stands at the top of the repository and is installed as ``bernini.kernels``.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention.op import attention as attention
    from .attention.op import interval_attention as interval_attention
    from .dispatch import which as which
    from .guidance.op import guide as guide
    from .modulate.op import modulate as modulate
    from .qk_rope.op import qk_rope as qk_rope
    from .qk_rope.tables import rope_tables as rope_tables
    from .rms_norm.op import rms_norm as rms_norm
    from .scatter.op import gather_rows as gather_rows
    from .scatter.op import scatter_rows as scatter_rows
    from .segments import Segment as Segment
    from .segments import SegmentLayout as SegmentLayout
    from .segments import segment_phases as segment_phases

_HOME = {
    "rms_norm": "rms_norm.op",
    "qk_rope": "qk_rope.op",
    "rope_tables": "qk_rope.tables",
    "modulate": "modulate.op",
    "guide": "guidance.op",
    "interval_attention": "attention.op",
    "attention": "attention.op",
    "scatter_rows": "scatter.op",
    "gather_rows": "scatter.op",
    "Segment": "segments",
    "SegmentLayout": "segments",
    "segment_phases": "segments",
    "which": "dispatch",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__name__", "__path__"]


class _Package(ModuleType):
    """Keeps ``bernini.kernels.rms_norm`` the function.

    A family's folder has its main function's name, and Python binds a sub-package to its parent when it is first
    imported; without this, what the name means would depend on the order of imports.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
