"""Who is measured: for each kernel benchmark the table of providers, and the check before anybody is timed.

A provider computes a benchmark's :class:`Case` in its own way: our op (``"bernini"``), the chain that users have today
(``"eager"``), the same from diffusers' own functions, ``torch.compile`` of a well-written form, and other libraries
where they are installed. It is a function that takes a case, does what a user does only once, and returns a call
without arguments that allocates and returns the outputs::

    @provider("rms_norm", "eager")
    def eager(case: RmsNorm) -> Call:
        return partial(F.rms_norm, case.x, case.x.shape[-1:], case.weight, EPS)

Outputs are compared with the float64 reference: nobody is timed computing something else. Whoever cannot take part is
named, with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

OURS = "bernini"
TOLERANCE = {torch.float32: 3e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}

Call = Callable[[], Any]
Prepare = Callable[[Any], Call]
Function = TypeVar("Function", bound=Callable[..., Any])
AnyCase = TypeVar("AnyCase", bound="Case")


class Unable(Exception):
    """A provider cannot take part; the message says why, to follow its name."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. Fields that are tensors, or tuples of them, are copied and widened with it."""

    gradients: tuple[Tensor, ...]
    """Of the outputs, in their shapes and dtype: what the backward starts from."""

    @property
    def shape(self) -> str:
        """For people."""
        raise NotImplementedError

    @property
    def moved(self) -> int:
        """Bytes that the forward cannot avoid to read and write."""
        raise NotImplementedError

    @property
    def moved_backward(self) -> int:
        """Bytes that the backward cannot avoid to read and write."""
        raise NotImplementedError

    def leaves(self) -> list[Tensor]:
        """The inputs that are differentiated."""
        raise NotImplementedError

    def reference(self) -> Any:
        """The outputs by the definition of right, in the precision of the inputs."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients[0].dtype

    @property
    def device(self) -> torch.device:
        return self.gradients[0].device

    def copy(self: AnyCase, change: Callable[[Tensor], Tensor] = torch.clone) -> AnyCase:
        """The same case on tensors of its own."""

        def changed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(changed, value))
            return change(value.detach()) if isinstance(value, Tensor) else value

        return replace(self, **{field.name: changed(getattr(self, field.name)) for field in fields(self)})

    def double(self: AnyCase) -> AnyCase:
        return self.copy(lambda x: x.double() if x.is_floating_point() else x)


# --- the table ------------------------------------------------------------------------------------------------------

_TABLE: dict[str, dict[str, Prepare]] = {}


def provider(benchmark: str, name: str) -> Callable[[Function], Function]:
    """Registers a function as the provider ``name`` of ``benchmark``."""

    def register(prepare: Function) -> Function:
        _TABLE.setdefault(benchmark, {})[name] = prepare
        return prepare

    return register


def provided(benchmark: str) -> dict[str, Prepare]:
    """Who is registered, ours first."""
    return {OURS: _TABLE[benchmark][OURS], **_TABLE[benchmark]}


def optional(module: str, case: Case) -> ModuleType:
    """A module of a GPU library that need not be there.

    Raises:
        Unable: it is not, or there is no GPU for it.
    """
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise Unable("not installed")
    if case.device.type != "cuda":
        raise Unable("needs a GPU")
    return importlib.import_module(module)


def compiled(function: Callable[..., Any], *args: Any) -> Call:
    """``torch.compile`` of a function for exactly these arguments."""
    return partial(torch.compile(function, fullgraph=True, dynamic=False), *args)


def backward(prepare: Prepare, case: Case) -> Call:
    """A call for the gradients of all leaves. The forward is run here, once: only the backward is timed."""
    leaves = case.leaves()
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        results = outputs(prepare(case)())
    return partial(torch.autograd.grad, results, leaves, case.gradients, retain_graph=True)


# --- right before fast ----------------------------------------------------------------------------------------------


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest error of any element, as a part of its own size plus the usual size in its tensor."""
    if [x.shape for x in got] != [x.shape for x in want]:
        raise Unable(f"returns {[list(x.shape) for x in got]} instead of {[list(x.shape) for x in want]}")
    errors = [
        x.double().sub(right).abs_().div_(right.abs().add_(right.square().mean().sqrt())).max()
        for x, right in zip(got, want, strict=True)
    ]
    return float(torch.stack(errors).max())


def check(got: Any, want: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raises :class:`Unable` for outputs that are not those of the reference."""
    wrong, limit = error(outputs(got), want), TOLERANCE[dtype]
    if not wrong <= limit:  # so that NaN is wrong
        raise Unable(f"computes something else: error {wrong:.2g}, {limit:.2g} is tolerated")
