"""The most bytes that are alive at once in tensors made while something runs.

Works on real tensors and on those of the device ``meta``, which have sizes and no memory: so a stage can be measured
at any size before anything is loaded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Peak(TorchDispatchMode):
    """``with Peak() as peak: ...``: counts the storages of all tensors that operations return, once each.

    What a kernel allocates and frees inside of itself is not seen, nor what other threads make.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                if value.is_mkldnn:  # weights in a layout of oneDNN's own, whose storage is hidden
                    holder: Any = value
                    key, size = id(value), value.numel() * value.itemsize
                else:
                    holder = storage = value.untyped_storage()
                    key, size = storage._cdata, storage.nbytes()
                if key not in self._sizes:
                    self._sizes[key] = size
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(holder, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _FusedAttention(TorchFunctionMode):
    """On ``meta``, torch would take attention for its unfused form, with all scores in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return torch.empty_like(query)[..., :1].expand(*query.shape[:-1], value.shape[-1]).contiguous()
        return func(*args, **(kwargs or {}))


def peak_bytes(run: Callable[[], object]) -> int:
    """Of what ``run`` makes on ``meta`` (or anywhere), its result included; without autograd."""
    with torch.no_grad(), Peak() as peak, _FusedAttention():
        kept = run()
    del kept
    return peak.most
