"""Edits and generates video: a planner and a diffusion renderer, built from fused kernels upward.

Importing this loads neither torch nor Triton; ``bernini.Bernini`` and the others bring them when they are first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Bernini as Bernini
    from .renderer.patch import patch_diffusers as patch_diffusers
    from .renderer.patch import unpatch_diffusers as unpatch_diffusers

_HOME = {
    "Bernini": "pipeline",
    "patch_diffusers": "renderer.patch",
    "unpatch_diffusers": "renderer.patch",
}

__version__ = "0.1.0"
__all__ = ["Bernini", "__version__", "patch_diffusers", "unpatch_diffusers"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__name__", "__path__"]
