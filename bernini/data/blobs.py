"""Tensors as bytes in a table's cell. Safetensors are written; the release's ``torch.save`` is read, too.

Nothing that is read can run code: safetensors hold none, and ``torch.load(weights_only=True)`` unpickles tensors and
nothing else.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .skips import Bad

HALF_MOST = float(torch.finfo(torch.float16).max)


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Safetensors."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpack(blob: Any) -> dict[str, Tensor]:
    """What :func:`pack` wrote, by name; a tensor that was saved alone is called ``""``.

    Raises:
        Bad: ``unreadable features``.
    """
    if not isinstance(blob, bytes) or not blob:
        raise Bad("unreadable features", f"expected bytes, found {'none' if not blob else type(blob).__name__}")
    if blob[8:9] == b"{":  # behind the eight bytes of the header's length
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(blob)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise Bad("unreadable features", f"damaged safetensors ({error})") from None
    try:
        value = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except Exception as error:  # it raises what its many formats raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise Bad(
            "unreadable features", f"no tensor that can be read ({type(error).__name__}: {first[:120]})"
        ) from None
    if not isinstance(value, Tensor):
        raise Bad("unreadable features", f"a {type(value).__name__} where a tensor should be")
    return {"": value}


def halved(values: Tensor, otherwise: torch.dtype) -> Tensor:
    """As float16 where all values fit, else as ``otherwise``."""
    fits = not values.numel() or bool(values.abs().max() <= HALF_MOST)
    return values.to(torch.float16 if fits else otherwise)


def finite(name: str, values: Tensor) -> Tensor:
    """
    Raises:
        Bad: ``not finite``.
    """
    # One sum is several times faster than looking at every value; it is not finite if one of them is not.
    if not math.isfinite(values.sum(dtype=torch.float32).item()) and not bool(torch.isfinite(values).all()):
        raise Bad("not finite", f"{name}: {int((~torch.isfinite(values)).sum())} of its values")
    return values
