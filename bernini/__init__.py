"""Edits and generates video: a planner and a diffusion renderer, built from fused kernels upward.

Importing this loads neither torch nor Triton; ``bernini.Bernini`` brings them when it is first named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Bernini as Bernini

__version__ = "0.1.0"
__all__ = ["Bernini", "__version__"]


def __getattr__(name: str) -> Any:
    if name != "Bernini":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .pipeline import Bernini

    globals()[name] = Bernini
    return Bernini


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__name__", "__path__"]
