"""``interval_attention`` and ``attention``: checks, registration and the public functions.

Shapes: T queries, S keys, H query heads, G key heads (G divides H), D head dim, Dv head dim of the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, launch
from . import backends, cpu, reference
from .backends import available_backends as available_backends

dispatch.provide("interval_attention", dispatch.Implementation("reference", reference.interval_attention))
dispatch.provide(
    "interval_attention_backward", dispatch.Implementation("reference", reference.interval_attention_backward)
)
dispatch.provide("interval_attention", launch.triton_implementation(__package__, "interval_attention"))
dispatch.provide(
    "interval_attention_backward",
    launch.triton_implementation(__package__, "interval_attention_backward", module="kernel_bwd"),
)
dispatch.provide("interval_attention", cpu.implementation(cpu.interval_attention))
dispatch.provide("interval_attention_backward", cpu.implementation(cpu.interval_attention_backward))


def _check_intervals(starts: Tensor, ends: Tensor, starts2: Tensor | None, ends2: Tensor | None, keys: int) -> None:
    """On the CPU only: elsewhere reading the values would wait for the device."""
    if starts.device.type != "cpu":
        return
    pairs = [("", starts, ends)] + ([("second ", starts2, ends2)] if starts2 is not None and ends2 is not None else [])
    for name, low, high in pairs:
        wrong = (low < 0) | (low > high) | (high > keys)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"interval_attention: the {name}interval of row {row} is [{int(low[row])}, {int(high[row])}); expected "
                f"0 <= start <= end <= {keys} keys"
            )
    if starts2 is not None and ends2 is not None:
        wrong = torch.maximum(starts, starts2) < torch.minimum(ends, ends2)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"interval_attention: the intervals of row {row} overlap: [{int(starts[row])}, {int(ends[row])}) and "
                f"[{int(starts2[row])}, {int(ends2[row])})"
            )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    starts2: Tensor | None,
    ends2: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_intervals(starts, ends, starts2, ends2, k.shape[0])
    return dispatch.run("interval_attention", q.device, q.dtype, "fp32", q, k, v, starts, ends, starts2, ends2, scale)


def _backward(dout: Tensor, q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.run("interval_attention_backward", q.device, q.dtype, "fp32", dout, q, *args)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    lse = q.new_empty((heads, tokens), dtype=reference.compute_dtype(q))
    return q.new_empty((tokens, heads, v.shape[2])), lse


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _grad(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, starts, ends, starts2, ends2, out, lse = ctx.saved_tensors
    dq, dk, dv = torch.ops.bernini.interval_attention_backward(
        dout, q, k, v, out, lse, starts, ends, starts2, ends2, ctx.scale
    )
    return dq, dk, dv, None, None, None, None, None


_INTERVALS = "Tensor starts, Tensor ends, Tensor? starts2, Tensor? ends2, float scale"
dispatch.define(
    f"interval_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_INTERVALS}) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
dispatch.define(
    f"interval_attention(Tensor q, Tensor k, Tensor v, {_INTERVALS}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_save,
    backward=_grad,
)


def interval_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    starts_T: Tensor,
    ends_T: Tensor,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention in which row t sees the keys ``[starts[t], ends[t])`` and, with ``second``, also a second interval.

    ``out[t] = softmax(scale * q[t] . k) v`` over those keys; consecutive query heads share a key head (head h reads
    ``h // (H / G)``). The mask of a packed causal and bidirectional sequence takes 8 bytes per token this way, 16 with
    second intervals. A row without keys gives zeros, and takes and gives no gradient.

    Bound by compute, 2 * D + 2 * Dv operations per visible pair and head (backward 2.5 times that); moves q, k, v and
    out once each and 4 bytes of log-sum-exp per row and head, plus what tiling reads again of k and v. Deterministic.

    Args:
        q_THD: ``[T, H, D]``, floating point.
        k_SGD: ``[S, G, D]``, same dtype; H must be a multiple of G.
        v_SGD: ``[S, G, Dv]``, same dtype.
        starts_T, ends_T: ``[T]`` int32 or int64 with ``0 <= start <= end <= S`` (checked on the CPU only).
        second: ``(starts2, ends2)`` likewise; a row's second interval may be empty and must not overlap its first.
        scale: of the scores; ``D ** -0.5`` by default.

    Returns:
        A contiguous ``[T, H, Dv]`` tensor in q's dtype, computed in float32 (float64 for float64) and rounded once.
        Differentiable in q, k and v.

    Raises:
        ValueError: wrong shape, dtype or device mix; on the CPU also wrong intervals, with the first offending row.

    Source: arXiv 1706.03762, eq. 1; backward: arXiv 2205.14135, app. B.
    """
    op = "interval_attention"
    _check_qkv(op, q_THD, k_SGD, v_SGD)
    starts2_T, ends2_T = (None, None) if second is None else second
    intervals = {"starts": starts_T, "ends": ends_T, "second[0]": starts2_T, "second[1]": ends2_T}
    for name, tensor in intervals.items():
        if tensor is not None:
            dispatch.check_shape(op, name, tensor, (q_THD.shape[0],), "[queries]")
            if tensor.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{op}: {name} must be int32 or int64, got {tensor.dtype} {list(tensor.shape)}")
    dispatch.check_same_device(op, q=q_THD, k=k_SGD, v=v_SGD, **intervals)
    scale = q_THD.shape[2] ** -0.5 if scale is None else float(scale)
    return torch.ops.bernini.interval_attention(q_THD, k_SGD, v_SGD, starts_T, ends_T, starts2_T, ends2_T, scale)[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Sequence[int] | Tensor | None = None,
    cu_seqlens_k: Sequence[int] | Tensor | None = None,
    backend: str = "auto",
    scale: float | None = None,
) -> Tensor:
    """Dense attention within each sequence of a packed batch: ``out = softmax(scale * q . k) v``.

    Query i belongs to the sequence b with ``cu_seqlens_q[b] <= i < cu_seqlens_q[b + 1]`` and sees the keys of the same
    b. Bound by compute; moves q, k, v and out once each. One sequence costs no copy beside the backend's own work.

    Args:
        q: ``[T, H, D]``, floating point.
        k: ``[S, G, D]``, same dtype; H must be a multiple of G, consecutive query heads share a key head.
        v: ``[S, G, Dv]``, same dtype.
        cu_seqlens_q, cu_seqlens_k: borders, from 0 to T (or S), on the host: integers or a CPU tensor (inside
            ``torch.compile``: integers). ``None`` means one sequence. Empty sequences are fine; queries without keys
            give zeros.
        backend: a name from :func:`available_backends`, or ``"auto"`` for the first that can serve the tensors. With
            ``BERNINI_KERNELS=reference`` that is ``"reference"``.
        scale: of the scores; ``D ** -0.5`` by default.

    Returns:
        ``[T, H, Dv]`` in q's dtype, in the layout that the backend gives it. Differentiable in q, k and v.

    Raises:
        ValueError: wrong shape, dtype or device mix; borders that are on a device, decrease or do not cover the tokens;
            an unknown backend or one that cannot serve the tensors, with the reason of each.

    Source: arXiv 1706.03762, eq. 1.
    """
    _check_qkv("attention", q, k, v)
    dispatch.check_same_device("attention", q=q, k=k, v=v)
    borders_q = _borders("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    borders_k = _borders("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if len(borders_q) != len(borders_k):
        raise ValueError(
            f"attention: cu_seqlens_q has {len(borders_q) - 1} sequences, cu_seqlens_k has {len(borders_k) - 1}"
        )
    if backend == "auto" and dispatch.forced() == "reference":
        backend = "reference"
    chosen = backends.pick(backend, q.device, q.dtype, (q.shape[2], v.shape[2]))
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    return chosen.run(q, k, v, borders_q, borders_k, scale)


def _check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    dispatch.check_float(op, q=q, k=k, v=v)
    dispatch.check_shape(op, "q", q, (None, None, None), "[queries, heads, head_dim]")
    dispatch.check_shape(op, "k", k, (None, None, q.shape[2]), "[keys, key heads, head_dim of q]")
    dispatch.check_shape(op, "v", v, (k.shape[0], k.shape[1], None), "[keys, key heads, value dim]")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: the {q.shape[1]} heads of q {list(q.shape)} must be a multiple of the {k.shape[1]} of k "
            f"{list(k.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def _borders(name: str, cu_seqlens: Sequence[int] | Tensor | None, tokens: int) -> tuple[int, ...]:
    if cu_seqlens is None:
        return (0, tokens)
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.device.type != "cpu":
            raise ValueError(
                f"attention: {name} {list(cu_seqlens.shape)} is on {cu_seqlens.device}; it must be on the host, "
                "because reading it would wait for the device"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"attention: {name} must be a 1-D int32 or int64 tensor, got {cu_seqlens.dtype} "
                f"{list(cu_seqlens.shape)}"
            )
        cu_seqlens = cu_seqlens.tolist()
    borders = tuple(cu_seqlens)
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != tokens:
        raise ValueError(f"attention: {name} must run from 0 to the {tokens} tokens, got {list(borders)}")
    if any(a > b for a, b in pairwise(borders)):
        raise ValueError(f"attention: {name} must not decrease, got {list(borders)}")
    return borders
