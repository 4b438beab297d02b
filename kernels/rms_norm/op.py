"""``rms_norm``: checks, registration and the public function. Shapes: T tokens, N width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, launch
from ..native import loader
from . import native, quack, reference

_TWIN = (torch.float32, torch.bfloat16)


def _on_cpu(x: Tensor, weight: Tensor | None, eps: float, rounding: str) -> Tensor:
    """The C++ twin, or torch's own kernel where its bits are asked for (eager) or the twin cannot serve."""
    plain = weight is None or weight.dtype == x.dtype
    if x.dtype in _TWIN and not (plain and rounding == "eager") and not loader.missing():
        return native.rms_norm(x, weight, eps, rounding)
    if plain:
        return F.rms_norm(x, x.shape[-1:], weight, eps).contiguous()
    return reference.rms_norm(x, weight, eps, rounding)


dispatch.provide("rms_norm", quack.implementation(quack.rms_norm))
dispatch.provide("rms_norm_backward", quack.implementation(quack.rms_norm_backward))
for _op in ("rms_norm", "rms_norm_backward"):
    dispatch.provide(_op, launch.triton_implementation(__package__, _op))
dispatch.provide("rms_norm", dispatch.Implementation("native", _on_cpu, devices=("cpu",)))
dispatch.provide(
    "rms_norm_backward",
    dispatch.Implementation("native", native.rms_norm_backward, devices=("cpu",), dtypes=_TWIN, missing=loader.missing),
)
dispatch.provide("rms_norm", dispatch.Implementation("reference", reference.rms_norm))
dispatch.provide("rms_norm_backward", dispatch.Implementation("reference", reference.rms_norm_backward))


def _forward(x: Tensor, weight: Tensor | None, eps: float, rounding: str) -> Tensor:
    return dispatch.run("rms_norm", x.device, x.dtype, rounding, x, weight, eps, rounding, width=x.shape[-1])


def _backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return dispatch.run("rms_norm_backward", x.device, x.dtype, "fp32", dy, x, weight, eps, width=x.shape[-1])


def _fake_forward(x: Tensor, weight: Tensor | None, eps: float, rounding: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = torch.ops.bernini.rms_norm_backward(dy, x, weight, ctx.eps)
    return dx, None if weight is None else dweight, None, None


dispatch.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)", _backward, _fake_backward
)
dispatch.define(
    "rms_norm(Tensor x, Tensor? weight, float eps, str rounding) -> Tensor",
    _forward,
    _fake_forward,
    setup_context=_save,
    backward=_grad,
)


def rms_norm(x_TN: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, rounding: str = "fp32") -> Tensor:
    """RMSNorm over the last axis: ``x / sqrt(mean(x^2) + eps) * weight``.

    Forward moves 4 bytes per bf16 element (read x, write y), backward 6 (read x and dy, write dx).

    Args:
        x_TN: ``[..., N]`` floating point; leading axes are tokens.
        weight: ``[N]`` in any floating dtype, or ``None``.
        eps: added to the mean square.
        rounding: ``"fp32"`` computes in float32 and rounds once; ``"eager"`` is ``torch.nn.RMSNorm``'s chain,
            which does the same.

    Returns:
        A contiguous tensor with the shape and dtype of ``x_TN``. Differentiable in ``x_TN`` and ``weight``.

    Raises:
        ValueError: wrong dtype, shape, device mix or rounding.

    Source: arXiv 1910.07467, eq. 4.
    """
    dispatch.check_rounding("rms_norm", rounding)
    dispatch.check_float("rms_norm", x=x_TN, weight=weight)
    dispatch.check_same_device("rms_norm", x=x_TN, weight=weight)
    if x_TN.dim() == 0:
        raise ValueError("rms_norm: x must have at least one axis, got a scalar")
    if weight is not None:
        dispatch.check_shape("rms_norm", "weight", weight, (x_TN.shape[-1],), "[width]")
    return torch.ops.bernini.rms_norm(x_TN, weight, eps, rounding)
