"""Activation checkpoints that keep the outputs of attention: at 440K tokens these are 94 % of a block's forward.

Torch's own selective checkpoints keep what they keep on the device. Here every kept tensor goes through an offload's
hooks, as what autograd saves does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


def is_attention(func: Any) -> bool:
    """Whether an op computes attention: by its name, which for every backend says so."""
    name = str(getattr(func, "_opname", func)).lower()
    return ("attention" in name or "flash_attn" in name) and "backward" not in name


def attention_kept(pack: Pack, unpack: Unpack) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The two contexts of a checkpoint: its forward, and its recomputation (``context_fn`` of torch's checkpoint).

    A recomputation may run several times (``retain_graph``); each begins with the first op again.
    """
    kept: list[tuple[Any, Any]] = []
    return _Keep(kept, pack), _Recall(kept, unpack)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: list[tuple[Any, Any]], pack: Pack) -> None:
        super().__init__()
        self._kept, self._pack = kept, pack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_attention(func):
            self._kept.append((func, tree_map(lambda x: _Packed(self._pack(x)) if isinstance(x, Tensor) else x, out)))
        return out


class _Recall(TorchDispatchMode):
    def __init__(self, kept: list[tuple[Any, Any]], unpack: Unpack) -> None:
        super().__init__()
        self._kept, self._unpack, self._next = kept, unpack, 0

    def __enter__(self) -> Any:
        self._next = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_attention(func):
            return func(*args, **(kwargs or {}))
        if self._next >= len(self._kept) or self._kept[self._next][0] is not func:
            raise RuntimeError(f"offload: {func} was not called at this point of the forward, and cannot be recalled")
        _, out = self._kept[self._next]
        self._next += 1
        with torch._C._DisableTorchDispatch():
            return tree_map(lambda x: self._unpack(x.value) if isinstance(x, _Packed) else x, out)


class _Packed:
    """What the hook made of a tensor; not to be looked into."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value
