"""Which implementation of an op runs, and why.

Every op has up to three implementations: ``triton`` (GPUs), ``native`` (the C++ twin, or torch's own where torch is
already right) and ``reference`` (plain PyTorch, every device and dtype, the definition of right); before them may come
a library's, where that is known to be faster, and ``tiled`` (for CPUs, from pieces that torch's own kernel computes)
stands in for a C++ twin. A call takes the first one that is declared for its device, dtype, rounding and width.
``BERNINI_KERNELS=triton|native|tiled|reference`` forces one for every op and fails where it cannot serve.
:func:`which` tells what a call would use. An implementation that is declared but missing on this machine (no compiler,
no Triton) is reported once, never skipped in silence.

The ops themselves are registered with ``torch.library`` under ``bernini::``, so ``torch.compile`` and FakeTensor see
one opaque op per call with a known output shape.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ORDER = ("quack", "triton", "native", "tiled", "reference")
SELDOM = ("quack", "tiled")
"""Other people's kernels, and ours made of them: they serve an op here and there."""

ROUNDINGS = ("fp32", "eager")
FAMILIES = ("rms_norm", "qk_rope", "modulate", "guidance", "attention", "scatter")

_LIBRARY = torch.library.Library("bernini", "FRAGMENT")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. ``None`` in ``devices`` or ``dtypes`` means all of them."""

    name: str
    run: Callable[..., Any]
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    roundings: tuple[str, ...] = ROUNDINGS
    widths: tuple[int, int] | None = None
    """The least and the most elements of a row; a call that does not tell its width is not served."""
    missing: Callable[[], str | None] = lambda: None
    """Returns why it cannot run on this machine, or ``None`` if it can. Asked at every choice: keep it cheap."""

    def limits(self, device: str, dtype: torch.dtype, rounding: str, width: int | None = None) -> str | None:
        """Why this implementation is not made for such a call, or ``None``."""
        if self.devices is not None and device not in self.devices:
            return f"is for {'/'.join(self.devices)} tensors, not {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"does not take {dtype}"
        if rounding not in self.roundings:
            return f"has no rounding={rounding!r}"
        if self.widths is not None and (width is None or not self.widths[0] <= width <= self.widths[1]):
            return f"is for rows of {self.widths[0]} to {self.widths[1]} elements"
        return None


_TABLE: dict[str, dict[str, Implementation]] = {}
_SAID: set[tuple[str, str]] = set()


def provide(op: str, implementation: Implementation) -> None:
    """Adds one implementation to an op's row of the table."""
    if implementation.name not in ORDER:
        raise ValueError(f"{op}: unknown implementation {implementation.name!r}; there are {', '.join(ORDER)}")
    _TABLE.setdefault(op, {})[implementation.name] = implementation


def forced() -> str | None:
    """The implementation that ``BERNINI_KERNELS`` asks for, or ``None``."""
    name = os.environ.get("BERNINI_KERNELS") or None
    if name is not None and name not in ORDER:
        raise ValueError(f"BERNINI_KERNELS={name!r}: expected one of {', '.join(ORDER)}")
    return name


def pick(
    op: str, device: torch.device | str, dtype: torch.dtype, rounding: str = "fp32", width: int | None = None
) -> Implementation:
    """The implementation a call with these properties uses; ``width``: elements of a row, where ops tell.

    Raises:
        ValueError: the forced implementation cannot serve the call; the message says why.
    """
    row, kind, want = _TABLE[op], torch.device(device).type, forced()
    if want is not None:
        chosen = row.get(want)
        why = (
            "does not exist for this op"
            if chosen is None
            else chosen.limits(kind, dtype, rounding, width) or chosen.missing()
        )
        if chosen is None or why is not None:
            raise ValueError(f"{op}: BERNINI_KERNELS={want}, but the {want} implementation {why}")
        return chosen
    for name in ORDER:
        candidate = row.get(name)
        if candidate is None or candidate.limits(kind, dtype, rounding, width) is not None:
            continue
        why = candidate.missing()
        if why is None:
            return candidate
        if (op, name) not in _SAID:
            _SAID.add((op, name))
            warnings.warn(f"{op}: the {name} implementation {why}; using a slower one", RuntimeWarning, stacklevel=4)
    raise ValueError(f"{op}: no implementation for {kind} tensors of {dtype} with rounding={rounding!r}")


def run(op: str, device: torch.device, dtype: torch.dtype, rounding: str, *args: Any, width: int | None = None) -> Any:
    """Runs ``op`` through :func:`pick`."""
    return pick(op, device, dtype, rounding, width).run(*args)


def which(
    op: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounding: str = "fp32",
    width: int | None = None,
) -> Any:
    """Name of the implementation that such a call would use; without ``op``, a dict of all ops.

    ``width`` (elements of a row) matters to ops for which a library takes some of them: ``rms_norm``.

    Names are those of the public functions (``rms_norm``) and of the registered ops (``rms_norm_backward``).
    """
    for family in FAMILIES:
        importlib.import_module(f"{__package__}.{family}.op")
    if op is not None:
        if op not in _TABLE:
            raise ValueError(f"unknown op {op!r}; there are {', '.join(sorted(_TABLE))}")
        return pick(op, device, dtype, rounding, width).name
    return {name: pick(name, device, dtype, rounding, width).name for name in sorted(_TABLE)}


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Registers ``bernini::<schema>`` with its fake (shape) function and, if given, its gradient.

    ``kernel`` serves every backend: it chooses by the tensors' device itself, through :func:`run`.
    """
    name = f"bernini::{schema.split('(', 1)[0]}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)


# --- checks shared by the public functions: what was wrong, with the shapes -----------------------------------------


def check_rounding(op: str, rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op}: rounding={rounding!r}; expected one of {', '.join(map(repr, ROUNDINGS))}")


def check_float(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype} {list(tensor.shape)}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"{op}: tensors on different devices: {', '.join(f'{n} on {d}' for n, d in given.items())}")


def check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """``None`` in ``expected`` matches any size; ``meaning`` names the axes, e.g. ``"[tokens, heads, head_dim]"``."""
    actual = tensor.shape
    ok = len(actual) == len(expected) and all(e is None or a == e for a, e in zip(actual, expected, strict=True))
    if not ok:
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} must be {meaning} = [{wanted}], got {list(actual)}")
