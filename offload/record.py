"""What one training step saves for its backward, when, and how long it took to make: what a plan is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .budget import Saved

if TYPE_CHECKING:
    from torch import Tensor


class Recorder:
    """Records one step: ``with recorder: loss = model(x)``, then backward, then :attr:`saved`. Changes no value.

    A storage that is saved several times counts once; parameters and what already lies in other memory do not.

    Args:
        clock: seconds; by default the host's, after the device has finished, which makes this one step slow.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        import torch

        self._clock = clock or _after_device
        self._tensors: dict[int, Saved] = {}  # by number
        self._numbers: dict[tuple[str, int], tuple[int, Any]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> Recorder:
        self._start = self._last = self._clock()
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    @property
    def saved(self) -> list[Saved]:
        """What was saved and used, in the order of saving. Empty before the backward."""
        return [tensor for tensor in self._tensors.values() if tensor.used >= tensor.saved]

    def _pack(self, tensor: Tensor) -> tuple[int | None, Tensor]:
        import weakref

        kept = tensor.detach()  # not the tensor: it would keep its own graph
        if tensor.is_leaf and tensor.requires_grad:
            return None, kept
        storage = tensor.untyped_storage()
        key = str(tensor.device), storage.data_ptr()
        number, alive = self._numbers.get(key, (None, None))
        if number is None or alive is None or alive() is None:  # an address may be another's next
            now, number = self._clock(), len(self._tensors)
            name = f"{number}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            made = None if tensor.is_leaf else now - self._last
            self._tensors[number] = Saved(name, storage.nbytes(), now - self._start, -1.0, None, made)
            self._numbers[key] = number, weakref.ref(storage)
            self._last = now
        return number, kept

    def _unpack(self, packed: tuple[int | None, Tensor]) -> Tensor:
        number, tensor = packed
        if number is not None:
            now, known = self._clock() - self._start, self._tensors[number]
            used = now if known.used < known.saved else known.used
            self._tensors[number] = replace(known, used=used, done=now)
        return tensor


def _after_device() -> float:
    import time

    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
