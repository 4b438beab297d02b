"""The table of backends for dense and packed attention: one row each, in the order of preference.

| name | what it is | for |
| --- | --- | --- |
| ``fa3`` | FlashAttention-3, ``flash_attn_interface`` | compute capability 9.x, fp16 and bf16 |
| ``fa4`` | FlashAttention-4, package flash-attn-4 | compute capability 9.x to 11.x, fp16 and bf16 |
| ``fa2`` | FlashAttention-2, package flash-attn | compute capability 8.0 and above and ROCm, fp16 and bf16 |
| ``cudnn`` | cuDNN, through ``scaled_dot_product_attention`` | compute capability 8.0 and above, fp16 and bf16 |
| ``sdpa`` | torch's ``scaled_dot_product_attention``, by its own choice of kernel | everything, CPUs too |
| ``flex`` | torch's FlexAttention | GPUs; on the CPU its dense form, without gradients |
| ``reference`` | plain PyTorch | everything |

A backend says whether it serves a device, a dtype and head dims, and runs on the packed tensors with the borders of the
sequences on the host. Libraries are looked for, and not imported before they are used. To add a backend, call
:func:`add`; nothing else needs to know it. The rows of the FlashAttention libraries are written to their published
interfaces and tested with stand-ins: no GPU has run them here.
Shapes: T queries, S keys, H query heads, G key heads, D head dim, Dv head dim of the values.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

Run = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], tuple[int, ...], float], Tensor]
"""``(q_THD, k_SGD, v_SGD, cu_seqlens_q, cu_seqlens_k, scale) -> out_THD``"""


Alike = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""``(q_BTHD, k_BSGD, v_BSGD, scale) -> out_BTHD``: sequences of the same lengths."""

SHORT = 1024
"""Rows and keys up to which sequences of the same lengths are stacked: where a call costs more than a copy."""


@dataclass(frozen=True)
class Backend:
    """``limits(device, dtype)`` returns why the backend cannot serve them, or ``None``; it must not be costly.

    ``widths(device, D, Dv)`` likewise, asked where the first had no objection.
    """

    name: str
    limits: Callable[[torch.device, torch.dtype], str | None]
    run: Run
    widths: Callable[[torch.device, int, int], str | None] = lambda device, d, dv: None


BACKENDS: dict[str, Backend] = {}


def add(backend: Backend, *, before: str | None = None) -> None:
    """Puts a backend into the table, in front of the one called ``before`` or at the end."""
    rows = [row for row in BACKENDS.values() if row.name != backend.name]
    at = len(rows) if before is None else [row.name for row in rows].index(before)
    rows.insert(at, backend)
    BACKENDS.clear()
    BACKENDS.update({row.name: row for row in rows})


def available_backends(
    device: torch.device | str, dtype: torch.dtype, widths: tuple[int, int] | None = None
) -> dict[str, str | None]:
    """For every backend in order of preference: why it cannot serve such tensors, or ``None`` if it can.

    Args:
        widths: (D, Dv), to ask about head dims as well.
    """
    where = torch.device(device)
    reasons = {}
    for name, backend in BACKENDS.items():
        reasons[name] = backend.limits(where, dtype)
        if reasons[name] is None and widths is not None:
            reasons[name] = backend.widths(where, *widths)
    return reasons


def pick(name: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, int] | None = None) -> Backend:
    """The backend of that name, or for ``"auto"`` the first that can serve the tensors.

    Raises:
        ValueError: there is none; the message lists every backend with its reason.
    """
    reasons = available_backends(device, dtype, widths)
    if name == "auto":
        for candidate, reason in reasons.items():
            if reason is None:
                return BACKENDS[candidate]
    elif name in reasons and reasons[name] is None:
        return BACKENDS[name]
    listed = "; ".join(f"{candidate}: {reason or 'available'}" for candidate, reason in reasons.items())
    heads = "" if widths is None else f" with head dims {widths[0]} and {widths[1]}"
    what = f"cannot serve {dtype} tensors{heads} on {device}" if name == "auto" or name in reasons else "is unknown"
    raise ValueError(f"attention: backend={name!r} {what} ({listed})")


def per_sequence(one: Callable[[Tensor, Tensor, Tensor, float], Tensor], alike: Alike | None = None) -> Run:
    """Runs a dense attention on each sequence by itself; with ``alike``, short ones of the same lengths together."""

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
        queries, keys = ([b - a for a, b in pairwise(borders)] for borders in (cu_seqlens_q, cu_seqlens_k))
        # One node for all pieces: the gradient of a slice would be as long as the batch, once for every sequence.
        q, k, v = q_THD.split(queries), k_SGD.split(keys), v_SGD.split(keys)
        together: dict[tuple[int, int], list[int]] = {}
        for number, lengths in enumerate(zip(queries, keys, strict=True)):
            together.setdefault(lengths, []).append(number)
        grads = torch.is_grad_enabled() and any(x.requires_grad for x in (q_THD, k_SGD, v_SGD))
        out_THD = None if grads else q_THD.new_empty((*q_THD.shape[:2], v_SGD.shape[2]))
        places = list(q) if out_THD is None else list(out_THD.split(queries))
        for (rows, columns), numbers in together.items():
            if alike is None or len(numbers) == 1 or not 0 < rows <= SHORT or not 0 < columns <= SHORT:
                results: Iterable[Tensor] = (_one(one, q[n], k[n], v[n], scale) for n in numbers)
            else:
                stacked_q, stacked_k, stacked_v = (torch.stack([x[n] for n in numbers]) for x in (q, k, v))
                results = alike(stacked_q, stacked_k, stacked_v, scale).unbind()
            for number, result in zip(numbers, results, strict=True):
                places[number] = result if out_THD is None else places[number].copy_(result)
        # Autograd keeps the pieces anyway, and a chain of writes into one buffer would copy its gradient each time.
        return torch.cat(places) if out_THD is None else out_THD

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
    # No index: its gradient is a copy.
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped).squeeze(0).transpose(0, 1)


def _sdpa_alike(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, scale: float) -> Tensor:
    dtype = q_BTHD.dtype
    # On CPUs the backward takes bfloat16 apart row by row: 5.4 ms where float32 needs 1.8.
    wide = torch.float32 if dtype == torch.bfloat16 and q_BTHD.device.type == "cpu" else dtype
    q, k, v = (x.to(wide).transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped).transpose(1, 2).to(dtype)


def _sdpa_limits(device: torch.device, dtype: torch.dtype) -> str | None:
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return None if dtype in known else f"does not take {dtype}"


def _cudnn(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q_THD, k_SGD, v_SGD, scale)


def _cudnn_limits(device: torch.device, dtype: torch.dtype) -> str | None:
    why = _gpu_limits(None, (8, ANY))(device, dtype)
    return why or (None if torch.backends.cudnn.is_available() else "needs cuDNN, which this PyTorch is built without")


# --- libraries for NVIDIA's GPUs ------------------------------------------------------------------------------------


def _gpu_limits(
    package: str | None, capability: tuple[int, int], rocm: bool = False
) -> Callable[[torch.device, torch.dtype], str | None]:
    """``capability``: the least and the greatest major number of the compute capability."""

    def limits(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"needs a GPU, not {device.type} tensors"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"does not take {dtype}, only float16 and bfloat16"
        if package is not None and (why := _missing(package)) is not None:
            return why
        if not torch.cuda.is_available():
            return "needs a GPU, and none can be used"
        if torch.version.hip is not None:
            return None if rocm else "needs a GPU of NVIDIA's"
        major, minor = torch.cuda.get_device_capability(device)
        if not capability[0] <= major <= capability[1]:
            most = f" to {capability[1]}.x" if capability[1] < ANY else " or more"
            only = capability[0] == capability[1]
            return f"needs compute capability {capability[0]}.x{'' if only else most}; this is {major}.{minor}"
        return None

    return limits


ANY = 99


@functools.cache
def _missing(package: str) -> str | None:
    """Why a library cannot be used, found out without importing it: that takes seconds, and a parent package, too."""
    module, file, needs = PACKAGES[package]
    spec = importlib.util.find_spec(module.split(".")[0])
    if spec is not None and file is not None:
        # FlashAttention-2 and -4 share the folder flash_attn: which of them is there, its files tell.
        folders = spec.submodule_search_locations or ()
        spec = spec if any((Path(folder) / file).exists() for folder in folders) else None
    if spec is None:
        return f"needs the package {package}, which is not installed"
    for needed, called in needs:
        if importlib.util.find_spec(needed) is None:
            return f"needs the package {called}, which is not installed"
    return None


PACKAGES: dict[str, tuple[str, str | None, tuple[tuple[str, str], ...]]] = {
    "flash_attn_interface (FlashAttention-3)": ("flash_attn_interface", None, ()),
    "flash-attn-4": ("flash_attn.cute", "cute/interface.py", (("cutlass", "nvidia-cutlass-dsl"),)),
    "flash-attn": ("flash_attn", "flash_attn_interface.py", (("flash_attn_2_cuda", "flash_attn_2_cuda"),)),
}
"""Name -> the module that is called, a file of its own in the top package's folder, and what else it imports."""


def _flash(module: str) -> Run:
    """A library with ``flash_attn_func`` and ``flash_attn_varlen_func``. ``deterministic`` is about the backward pass;
    the forward pass always is."""

    def run(
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGD: Tensor,
        cu_seqlens_q: tuple[int, ...],
        cu_seqlens_k: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        if q_THD.shape[0] == 0 or k_SGD.shape[0] == 0:
            return reference.attention(q_THD, k_SGD, v_SGD, scale)
        library = importlib.import_module(module)
        options = {"softmax_scale": scale, "causal": False, "deterministic": True}
        if len(cu_seqlens_q) == 2:  # borders need not go to the device
            return _first(library.flash_attn_func(q_THD[None], k_SGD[None], v_SGD[None], **options))[0]
        return _first(
            library.flash_attn_varlen_func(
                q_THD,
                k_SGD,
                v_SGD,
                cu_seqlens_q=_on_device(cu_seqlens_q, q_THD.device),
                cu_seqlens_k=_on_device(cu_seqlens_k, q_THD.device),
                max_seqlen_q=_longest(cu_seqlens_q),
                max_seqlen_k=_longest(cu_seqlens_k),
                **options,
            )
        )

    return run


def _first(result: Any) -> Tensor:
    """Some releases return the log-sum-exp, too."""
    return result[0] if isinstance(result, tuple) else result


def _longest(cu_seqlens: tuple[int, ...]) -> int:
    return max(b - a for a, b in pairwise(cu_seqlens))


def _on_device(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """int32; from pinned memory, so that nobody waits for the device."""
    pinned = device.type == "cuda" and torch.cuda.is_available()
    return torch.tensor(cu_seqlens, dtype=torch.int32, pin_memory=pinned).to(device, non_blocking=True)


def _widths(most: Callable[[torch.device], int], same: bool = True) -> Callable[[torch.device, int, int], str | None]:
    """Head dims in multiples of 8, up to so many; ``same``: the values' must be that of the keys."""

    def widths(device: torch.device, d: int, dv: int) -> str | None:
        if same and d != dv:
            return f"takes one head dim, not {d} and {dv}"
        limit = most(device)
        if d % 8 or dv % 8 or max(d, dv) > limit:
            return f"takes head dims in multiples of 8 up to {limit}"
        return None

    return widths


def _fa4_most(device: torch.device) -> int:
    return 256 if torch.cuda.get_device_capability(device)[0] == 9 else 128


# --- FlexAttention --------------------------------------------------------------------------------------------------


def _flex(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    cu_seqlens_q: tuple[int, ...],
    cu_seqlens_k: tuple[int, ...],
    scale: float,
) -> Tensor:
    """One call for all sequences: key intervals say which keys are a row's own."""
    from torch.nn.attention.flex_attention import flex_attention

    from .block_lists import flex_mask

    if q_THD.shape[0] == 0 or k_SGD.shape[0] == 0:
        return reference.attention(q_THD, k_SGD, v_SGD, scale)
    mask = None
    if len(cu_seqlens_q) > 2:
        lengths = torch.tensor([b - a for a, b in pairwise(cu_seqlens_q)])
        borders = torch.tensor(cu_seqlens_k, dtype=torch.int32)
        starts, ends = borders[:-1].repeat_interleave(lengths), borders[1:].repeat_interleave(lengths)
        mask = flex_mask(starts, ends, keys=k_SGD.shape[0], device=q_THD.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_SGD, v_SGD))
    grouped = q_THD.shape[1] != k_SGD.shape[1]
    if q_THD.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q_THD, k_SGD, v_SGD)):
            raise ValueError("attention: backend='flex' computes no gradients on the CPU; use 'sdpa'")
        call: Callable[..., Any] = flex_attention
    else:
        call = _compiled_flex()
    return call(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)[0].transpose(0, 1)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex_limits(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"is for cpu and cuda tensors, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"does not take {dtype}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    return None


add(
    Backend(
        "fa3",
        _gpu_limits("flash_attn_interface (FlashAttention-3)", (9, 9)),
        _flash("flash_attn_interface"),
        _widths(lambda device: 256),
    )
)
add(Backend("fa4", _gpu_limits("flash-attn-4", (9, 11)), _flash("flash_attn.cute"), _widths(_fa4_most)))
add(Backend("fa2", _gpu_limits("flash-attn", (8, ANY), rocm=True), _flash("flash_attn"), _widths(lambda device: 256)))
add(Backend("cudnn", _cudnn_limits, per_sequence(_cudnn), _widths(lambda device: 128)))
add(Backend("sdpa", _sdpa_limits, per_sequence(_sdpa, _sdpa_alike)))
add(Backend("flex", _flex_limits, _flex))
add(Backend("reference", lambda device, dtype: None, per_sequence(reference.attention)))
