"""``modulate``: checks, registration and the public function. Shapes: T tokens, N width, R rows of the tables.

Two registered ops stand behind it, since an op may not return one of its inputs: ``bernini::modulate`` adds a branch
and returns the new residual, ``bernini::modulate_norm`` leaves the residual alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch, launch
from ..native import loader
from . import native, reference

_NATIVE: dict[str, Any] = {
    "devices": ("cpu",),
    "dtypes": (torch.float32, torch.bfloat16),
    "roundings": ("fp32",),
    "missing": loader.missing,
}
dispatch.provide("modulate", dispatch.Implementation("native", native.modulate, **_NATIVE))
dispatch.provide("modulate_norm", dispatch.Implementation("native", native.modulate_norm, **_NATIVE))
dispatch.provide("modulate_backward", dispatch.Implementation("native", native.modulate_backward, **_NATIVE))
dispatch.provide("modulate_norm_backward", dispatch.Implementation("native", native.modulate_norm_backward, **_NATIVE))
for _op in ("modulate", "modulate_norm"):
    dispatch.provide(_op, launch.triton_implementation(__package__, _op))
for _op in ("modulate_backward", "modulate_norm_backward"):
    dispatch.provide(_op, launch.triton_implementation(__package__, _op, module="kernel_bwd"))
dispatch.provide("modulate", dispatch.Implementation("reference", reference.modulate))
dispatch.provide("modulate_norm", dispatch.Implementation("reference", reference.modulate_norm))
dispatch.provide("modulate_backward", dispatch.Implementation("reference", reference.modulate_backward))
dispatch.provide("modulate_norm_backward", dispatch.Implementation("reference", reference.modulate_norm_backward))


def _like(x: Tensor, *parts: Tensor | None) -> tuple[Tensor, ...]:
    """Shapes of the gradients: those of the parts, empty where a part is absent."""
    return tuple(x.new_empty(0) if part is None else part.new_empty(part.shape) for part in parts)


def _given(gradients: tuple[Tensor, ...], *parts: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if part is None else grad for grad, part in zip(gradients, parts, strict=True))


# --- with a branch ---------------------------------------------------------------------------------------------------


def _forward(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    args = (residual, branch, gate, scale, shift, index, weight, bias, eps, rounding)
    return dispatch.run("modulate", residual.device, residual.dtype, rounding, *args)


def _fake_forward(residual: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def _backward(
    dresidual: Tensor,
    dnormed: Tensor,
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    args = (dresidual, dnormed, residual, branch, gate, scale, shift, index, weight, bias, eps)
    return dispatch.run("modulate_backward", residual.device, residual.dtype, "fp32", *args)


def _fake_backward(
    dresidual: Tensor,
    dnormed: Tensor,
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    gated = None if gate is None else branch
    return residual.new_empty(residual.shape), *_like(residual, gated, gate, scale, shift, weight, bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dresidual: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    _, _, gate, scale, shift, _, weight, bias = saved
    grads = torch.ops.bernini.modulate_backward(dresidual, dnormed, *saved, ctx.eps)
    dresidual, dbranch, *others = grads
    dgate, dscale, dshift, dweight, dbias = _given(tuple(others), gate, scale, shift, weight, bias)
    return dresidual, dresidual if gate is None else dbranch, dgate, dscale, dshift, None, dweight, dbias, None, None


# --- without one -----------------------------------------------------------------------------------------------------


def _norm_forward(
    residual: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rounding: str,
) -> Tensor:
    args = (residual, scale, shift, index, weight, bias, eps, rounding)
    return dispatch.run("modulate_norm", residual.device, residual.dtype, rounding, *args)


def _fake_norm_forward(residual: Tensor, *args: Any) -> Tensor:
    return residual.new_empty(residual.shape)


def _norm_backward(
    dnormed: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    args = (dnormed, residual, scale, shift, index, weight, bias, eps)
    return dispatch.run("modulate_norm_backward", residual.device, residual.dtype, "fp32", *args)


def _fake_norm_backward(
    dnormed: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    return residual.new_empty(residual.shape), *_like(residual, scale, shift, weight, bias)


def _norm_grad(ctx: Any, dnormed: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    _, scale, shift, _, weight, bias = saved
    dresidual, *others = torch.ops.bernini.modulate_norm_backward(dnormed, *saved, ctx.eps)
    dscale, dshift, dweight, dbias = _given(tuple(others), scale, shift, weight, bias)
    return dresidual, dscale, dshift, None, dweight, dbias, None, None


_PARTS = "Tensor? scale, Tensor? shift, Tensor? index, Tensor? weight, Tensor? bias, float eps"
_INPUTS = f"Tensor residual, Tensor branch, Tensor? gate, {_PARTS}"
_TENSORS = ", ".join(["Tensor"] * 5)

dispatch.define(
    f"modulate_backward(Tensor dresidual, Tensor dnormed, {_INPUTS}) -> ({_TENSORS}, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
dispatch.define(
    f"modulate({_INPUTS}, str rounding) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_save,
    backward=_grad,
)
dispatch.define(
    f"modulate_norm_backward(Tensor dnormed, Tensor residual, {_PARTS}) -> ({_TENSORS})",
    _norm_backward,
    _fake_norm_backward,
)
dispatch.define(
    f"modulate_norm(Tensor residual, {_PARTS}, str rounding) -> Tensor",
    _norm_forward,
    _fake_norm_forward,
    setup_context=_save,
    backward=_norm_grad,
)


def _check(
    residual: Tensor,
    branch: Tensor | None,
    tables: dict[str, Tensor],
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    dispatch.check_float("modulate", residual=residual, branch=branch, weight=weight, bias=bias, **tables)
    dispatch.check_shape("modulate", "residual", residual, (None, None), "[tokens, width]")
    tokens, width = residual.shape
    if branch is not None:
        dispatch.check_shape("modulate", "branch", branch, (tokens, width), "[tokens, width]")
        if branch.dtype != residual.dtype:
            raise ValueError(
                f"modulate: branch must be {residual.dtype} as residual, got {branch.dtype} {list(branch.shape)}"
            )
    elif "gate" in tables:
        raise ValueError(f"modulate: gate {list(tables['gate'].shape)} needs a branch to multiply")
    rows = next((table.shape[0] for table in tables.values() if table.dim()), None)
    for name, table in tables.items():
        if index is None and (table.dim() != 2 or table.shape[0] != 1):
            raise ValueError(f"modulate: without index, {name} must be one row [1, {width}], got {list(table.shape)}")
        dispatch.check_shape("modulate", name, table, (rows, width), "[rows, width]")
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None:
            dispatch.check_shape("modulate", name, part, (width,), "[width]")
    if index is None:
        return
    if not tables:
        raise ValueError(f"modulate: index {list(index.shape)} picks rows of gate, scale or shift, but none is given")
    dispatch.check_shape("modulate", "index", index, (tokens,), "[tokens]")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"modulate: index must be int32 or int64, got {index.dtype} {list(index.shape)}")


def modulate(
    residual_TN: Tensor,
    branch_TN: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    index_T: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rounding: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Gated residual, LayerNorm, scale and shift in one pass; every part optional.

    ``residual' = residual + gate[index] * branch`` and
    ``normed = (LayerNorm(residual') * weight + bias) * (1 + scale[index]) + shift[index]``.

    Forward moves 8 bytes per bf16 element (read residual and branch, write both results), 4 without a branch. Backward
    moves 12 (read residual, branch and both gradients, write two) or, without a gate, 10; without a branch 6. The
    tables stay in cache.

    Args:
        residual_TN: ``[T, N]`` floating point, any strides.
        branch_TN: ``[T, N]`` in the dtype of residual; what is added to it. ``None`` adds nothing.
        gate: ``[R, N]`` factors of the branch; ``None`` adds it as it is.
        scale: ``[R, N]``; 1 is added to it here.
        shift: ``[R, N]``.
        index_T: ``[T]`` int32 or int64, each token's row in the tables (a timestep, a frame). Values are not checked
            beforehand (that would wait for the device). Not read where the tables have one row, which is also the
            only number of rows allowed without it.
        weight: ``[N]`` of the LayerNorm.
        bias: ``[N]`` of the LayerNorm.
        eps: added to the variance.
        rounding: ``"fp32"`` computes in float32 (float64 for float64 inputs), norms the unrounded residual' and rounds
            each result once. ``"eager"`` is the unfused diffusers chain with float32 tables: residual' is rounded
            first, the rounded value is normed, and every float32 op rounds by itself.

    The tables, weight and bias may have any floating dtype and are widened first; all tables have the same rows.

    Returns:
        ``(residual', normed)`` in the shape and dtype of residual, contiguous; without a branch residual' is
        ``residual_TN`` itself, the same tensor. Differentiable in every floating argument; a table's gradient is summed
        over the tokens of each row in float32 in a fixed order. The gradient is that of the ``"fp32"`` contract under
        both roundings.

    Raises:
        ValueError: wrong dtype, shape, device mix or rounding; a gate without a branch; several rows without an index;
            an index without tables.

    Sources: arXiv 1607.06450 eq. 3 (LayerNorm), arXiv 2212.09748 section 3.2 (adaLN), arXiv 2503.20314 (Wan's blocks).
    """
    dispatch.check_rounding("modulate", rounding)
    tables = {name: t for name, t in (("gate", gate), ("scale", scale), ("shift", shift)) if t is not None}
    _check(residual_TN, branch_TN, tables, index_T, weight, bias)
    dispatch.check_same_device(
        "modulate", residual=residual_TN, branch=branch_TN, index=index_T, weight=weight, bias=bias, **tables
    )
    parts = (scale, shift, index_T, weight, bias, eps, rounding)
    if branch_TN is None:
        return residual_TN, torch.ops.bernini.modulate_norm(residual_TN, *parts)
    return torch.ops.bernini.modulate(residual_TN, branch_TN, gate, *parts)
