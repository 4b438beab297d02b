"""The table of backends for dense and packed attention: one row each, in the order of preference.

A backend says whether it serves a device and dtype, and runs on the packed tensors with the borders of the sequences
on the host. To add one, call :func:`add`; nothing else needs to know it.
Shapes: T queries, S keys, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

Run = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], tuple[int, ...], float], Tensor]
"""``(q_THD, k_SGD, v_SGD, cu_seqlens_q, cu_seqlens_k, scale) -> out_THD``"""


@dataclass(frozen=True)
class Backend:
    """``limits(device, dtype)`` returns why the backend cannot serve them, or ``None``; it must not be costly."""

    name: str
    limits: Callable[[torch.device, torch.dtype], str | None]
    run: Run


BACKENDS: dict[str, Backend] = {}


def add(backend: Backend, *, before: str | None = None) -> None:
    """Puts a backend into the table, in front of the one called ``before`` or at the end."""
    rows = [row for row in BACKENDS.values() if row.name != backend.name]
    at = len(rows) if before is None else [row.name for row in rows].index(before)
    rows.insert(at, backend)
    BACKENDS.clear()
    BACKENDS.update({row.name: row for row in rows})


def available_backends(device: torch.device | str, dtype: torch.dtype) -> dict[str, str | None]:
    """For every backend in order of preference: why it cannot serve such tensors, or ``None`` if it can."""
    where = torch.device(device)
    return {name: backend.limits(where, dtype) for name, backend in BACKENDS.items()}


def pick(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of that name, or for ``"auto"`` the first that can serve the tensors.

    Raises:
        ValueError: there is none; the message lists every backend with its reason.
    """
    reasons = available_backends(device, dtype)
    if name == "auto":
        for candidate, reason in reasons.items():
            if reason is None:
                return BACKENDS[candidate]
    elif name in reasons and reasons[name] is None:
        return BACKENDS[name]
    listed = "; ".join(f"{candidate}: {reason or 'available'}" for candidate, reason in reasons.items())
    what = f"cannot serve {dtype} tensors on {device}" if name == "auto" or name in reasons else "is unknown"
    raise ValueError(f"attention: backend={name!r} {what} ({listed})")


def per_sequence(one: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Run:
    """Runs a dense attention on each sequence by itself."""

    def run(
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGD: Tensor,
        cu_seqlens_q: tuple[int, ...],
        cu_seqlens_k: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        if len(cu_seqlens_q) == 2:  # one sequence: its result is the result, without a copy
            return _one(one, q_THD, k_SGD, v_SGD, scale)
        queries = list(pairwise(cu_seqlens_q))
        keys = list(pairwise(cu_seqlens_k))
        pieces = (
            _one(one, q_THD[a:b], k_SGD[c:d], v_SGD[c:d], scale) for (a, b), (c, d) in zip(queries, keys, strict=True)
        )
        if torch.is_grad_enabled() and (q_THD.requires_grad or k_SGD.requires_grad or v_SGD.requires_grad):
            # Autograd keeps the pieces anyway, and a chain of writes into one buffer would copy its gradient each time.
            return torch.cat(list(pieces))
        out_THD = q_THD.new_empty((q_THD.shape[0], q_THD.shape[1], v_SGD.shape[2]))
        for (a, b), piece in zip(queries, pieces, strict=True):
            out_THD[a:b] = piece
        return out_THD

    return run


def _one(
    one: Callable[[Tensor, Tensor, Tensor, float], Tensor], q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float
) -> Tensor:
    if q_THD.shape[0] == 0 or k_SGD.shape[0] == 0:  # the dense form gives zeros, with gradients
        return reference.attention(q_THD, k_SGD, v_SGD, scale)
    return one(q_THD, k_SGD, v_SGD, scale)


def _sdpa(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> Tensor:
    """torch's own, on transposed views."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_SGD, v_SGD))
    grouped = q_THD.shape[1] != k_SGD.shape[1]
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)[0].transpose(0, 1)


def _sdpa_limits(device: torch.device, dtype: torch.dtype) -> str | None:
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return None if dtype in known else f"does not take {dtype}"


add(Backend("sdpa", _sdpa_limits, per_sequence(_sdpa)))
add(Backend("reference", lambda device, dtype: None, per_sequence(reference.attention)))
