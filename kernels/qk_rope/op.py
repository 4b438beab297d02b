"""``qk_rope``: checks, registration and the public function. Shapes: T tokens, H heads, D head dim."""

from __future__ import annotations

from collections.abc import Sequence
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
dispatch.provide("qk_rope", dispatch.Implementation("native", native.qk_rope, **_NATIVE))
dispatch.provide("qk_rope_out", dispatch.Implementation("native", native.qk_rope_out, **_NATIVE))
dispatch.provide("qk_rope_backward", dispatch.Implementation("native", native.qk_rope_backward, **_NATIVE))
dispatch.provide("qk_rope", launch.triton_implementation(__package__, "qk_rope"))
dispatch.provide("qk_rope_out", launch.triton_implementation(__package__, "qk_rope_out"))
dispatch.provide("qk_rope_backward", launch.triton_implementation(__package__, "qk_rope_backward", module="kernel_bwd"))
dispatch.provide("qk_rope", dispatch.Implementation("reference", reference.qk_rope))
dispatch.provide("qk_rope_out", dispatch.Implementation("reference", reference.qk_rope_out))
dispatch.provide("qk_rope_backward", dispatch.Implementation("reference", reference.qk_rope_backward))


def _forward(
    q: Tensor,
    k: Tensor,
    tables: list[Tensor],
    rows: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    args = (q, k, tables, rows, q_weight, k_weight, norm, eps, rounding)
    return dispatch.run("qk_rope", q.device, q.dtype, rounding, *args)


def _fake_forward(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _forward_out(
    q: Tensor,
    k: Tensor,
    tables: list[Tensor],
    rows: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    args = (q, k, tables, rows, q_weight, k_weight, norm, eps, rounding, q_out, k_out)
    dispatch.run("qk_rope_out", q.device, q.dtype, rounding, *args)


def _fake_forward_out(*args: Any) -> None:
    return None


def _backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    tables: list[Tensor],
    rows: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (dq, dk, q, k, tables, rows, q_weight, k_weight, norm, eps)
    return dispatch.run("qk_rope_backward", q.device, q.dtype, "fp32", *args)


def _fake_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    tables: list[Tensor],
    rows: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq_weight, dk_weight = (
        x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), dq_weight, dk_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, tables, rows, q_weight, k_weight, ctx.norm, ctx.eps, _ = inputs
    ctx.save_for_backward(q, k, rows, q_weight, k_weight, *tables)


def _grad(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    q, k, rows, q_weight, k_weight, *tables = ctx.saved_tensors
    grads = torch.ops.bernini.qk_rope_backward(dq, dk, q, k, tables, rows, q_weight, k_weight, ctx.norm, ctx.eps)
    dq, dk, dq_weight, dk_weight = grads
    if q_weight is None:
        dq_weight = dk_weight = None
    return dq, dk, [None] * len(tables), None, dq_weight, dk_weight, None, None, None


_INPUTS = "Tensor q, Tensor k, Tensor[] tables, Tensor rows, Tensor? q_weight, Tensor? k_weight, str norm, float eps"

dispatch.define(
    f"qk_rope_backward(Tensor dq, Tensor dk, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", _backward, _fake_backward
)
dispatch.define(
    f"qk_rope({_INPUTS}, str rounding) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_save,
    backward=_grad,
)
dispatch.define(
    f"qk_rope_out({_INPUTS}, str rounding, Tensor(a!) q_out, Tensor(b!) k_out) -> ()", _forward_out, _fake_forward_out
)


def _check_inputs(q: Tensor, k: Tensor, tables: Sequence[Tensor], rows: Tensor) -> None:
    dispatch.check_float("qk_rope", q=q, k=k)
    dispatch.check_shape("qk_rope", "q", q, (None, None, None), "[tokens, heads, head_dim]")
    tokens, _, head_dim = q.shape
    dispatch.check_shape("qk_rope", "k", k, (tokens, None, head_dim), "[tokens, heads, head_dim]")
    if q.dtype != k.dtype:
        raise ValueError(f"qk_rope: q and k must have one dtype, got {q.dtype} and {k.dtype}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"qk_rope: head_dim must be even and positive, got {head_dim} in q {list(q.shape)}")
    if len(tables) != 4:
        raise ValueError(f"qk_rope: tables must be the four (t, h, w, segment), got {len(tables)}")
    shapes = ", ".join(str(list(table.shape)) for table in tables)
    dtypes = {table.dtype for table in tables}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        raise ValueError(f"qk_rope: tables must be all float32 or all float64, got {[table.dtype for table in tables]}")
    if any(table.dim() != 3 or table.shape[2] != 2 for table in tables):
        raise ValueError(f"qk_rope: each table must be [rows, pairs, 2], got {shapes}")
    pairs = [table.shape[1] for table in tables]
    if not sum(pairs[:3]) == pairs[3] == head_dim // 2:
        raise ValueError(
            f"qk_rope: pairs of the t, h, w tables must sum to head_dim / 2 = {head_dim // 2}, "
            f"as the segment table has, got {shapes}"
        )
    dispatch.check_shape("qk_rope", "rows", rows, (tokens, 4), "[tokens, (t, h, w, segment)]")
    if rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"qk_rope: rows must be int32 or int64, got {rows.dtype} {list(rows.shape)}")


def _check_weights(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, norm: str) -> None:
    if norm not in reference.NORMS:
        raise ValueError(f"qk_rope: norm={norm!r}; expected one of {', '.join(map(repr, reference.NORMS))}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("qk_rope: give both q_weight and k_weight, or neither for RoPE alone")
    dispatch.check_float("qk_rope", q_weight=q_weight, k_weight=k_weight)
    for name, x, weight in (("q_weight", q, q_weight), ("k_weight", k, k_weight)):
        if weight is not None and norm == "across_heads":
            dispatch.check_shape("qk_rope", name, weight, (x.shape[1] * x.shape[2],), "[heads * head_dim]")
        elif weight is not None:
            dispatch.check_shape("qk_rope", name, weight, (x.shape[2],), "[head_dim]")


def _check_out(out: tuple[Tensor, Tensor], q: Tensor, k: Tensor, weights: Sequence[Tensor | None]) -> None:
    if len(out) != 2:
        raise ValueError(f"qk_rope: out must be the pair (q_out, k_out), got {len(out)}")
    for name, x, destination in (("q_out", q, out[0]), ("k_out", k, out[1])):
        tokens, heads, head_dim = x.shape
        shape = list(destination.shape)
        plain = shape == [tokens, heads, head_dim]
        by_rank = len(shape) == 4 and shape[1] == tokens and shape[3] == head_dim and shape[0] * shape[2] == heads
        if not (plain or by_rank):
            raise ValueError(
                f"qk_rope: {name} must be [tokens, heads, head_dim] = {list(x.shape)} "
                f"or [ranks, tokens, heads / ranks, head_dim], got {shape}"
            )
        if destination.dtype != x.dtype:
            raise ValueError(f"qk_rope: {name} must be {x.dtype}, got {destination.dtype} {shape}")
        if destination.stride(-1) != 1:
            raise ValueError(
                f"qk_rope: {name} {shape} needs a contiguous last axis, got strides {destination.stride()}"
            )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, *weights, *out)):
        raise ValueError(
            "qk_rope: out= cannot be differentiated: the results go into a buffer that autograd does not see as an "
            "output of the op; call without out=, or under torch.no_grad()"
        )


def qk_rope(
    q_THD: Tensor,
    k_THD: Tensor,
    tables: Sequence[Tensor],
    rows_T4: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm: str = "across_heads",
    eps: float = 1e-6,
    out: tuple[Tensor, Tensor] | None = None,
    rounding: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and k, then SA-3D RoPE: ``y = R * (x / sqrt(mean(x^2) + eps) * weight)``.

    Head dims (2k, 2k+1) are one complex number, and each token is turned by ``R = [t | h | w] * segment``, slot by
    slot: the parts of the first three tables side by side, times the segment's own factor over all D/2 slots.

    Forward moves 4 bytes per bf16 element (read x, write y), backward 6 (read x and dy, write dx): the tables are a
    few KB, and a token brings only its 4 row numbers. ``out`` saves the 4 bytes of a later packing copy.

    Args:
        q_THD: ``[T, H, D]`` floating point, D even, any strides.
        k_THD: ``[T, Hk, D]`` in the dtype of q; Hk may differ from H.
        tables: ``(t, h, w, segment)`` of :func:`bernini.kernels.rope_tables`, each ``[rows, pairs, 2]`` with (cos, sin)
            last, all float32 or all float64. Pairs of t, h, w sum to D/2; segment has D/2. Not differentiated.
        rows_T4: ``[T, 4]`` int32 or int64, each token's row in the four tables. Values are not checked beforehand
            (that would wait for the device).
        q_weight: with k_weight, turns the norm on; any floating dtype; ``[H * D]`` or, per head, ``[D]``.
        k_weight: the same for k, ``[Hk * D]`` or ``[D]``.
        norm: ``"across_heads"`` takes the mean over all H * D values of a token, ``"per_head"`` over D.
        eps: added to the mean square.
        out: destinations for q and k, each ``[T, H, D]`` or, destination-major as an all-to-all sends it,
            ``[ranks, T, H / ranks, D]``, any strides with a contiguous last axis. They must not overlap the inputs.
        rounding: ``"fp32"`` computes in float32 (float64 for float64 inputs) and rounds once; ``"eager"`` also rounds
            after the norm, as the unfused diffusers chain with float32 cos/sin does.

    Returns:
        ``(q, k)``, contiguous, in the shapes and dtype of the inputs, or the tensors of ``out``. Differentiable in q, k
        and the weights; the gradient is that of the ``"fp32"`` contract under both roundings.

    Raises:
        ValueError: wrong dtype, shape, device mix, norm or rounding; one weight without the other; ``out`` while
            autograd records (a buffer written in place is no output that a gradient could come back to).

    Sources: arXiv 1910.07467 eq. 4 (RMSNorm), arXiv 2104.09864 (RoPE), arXiv 2605.22344 (the segment factor).
    """
    dispatch.check_rounding("qk_rope", rounding)
    _check_inputs(q_THD, k_THD, tables, rows_T4)
    _check_weights(q_THD, k_THD, q_weight, k_weight, norm)
    named = dict(zip(("t", "h", "w", "segment"), tables, strict=True))
    q_out, k_out = (None, None) if out is None else out
    dispatch.check_same_device(
        "qk_rope",
        q=q_THD,
        k=k_THD,
        rows=rows_T4,
        q_weight=q_weight,
        k_weight=k_weight,
        q_out=q_out,
        k_out=k_out,
        **named,
    )
    args = (q_THD, k_THD, list(tables), rows_T4, q_weight, k_weight, norm, eps, rounding)
    if out is None:
        return torch.ops.bernini.qk_rope(*args)
    _check_out(out, q_THD, k_THD, (q_weight, k_weight))
    torch.ops.bernini.qk_rope_out(*args, *out)
    return out
