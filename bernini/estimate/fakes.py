"""Models, processes and a device that are not there: shapes without values, ranks without messages.

The device is faked as torch's ``cpu``; a fake tensor on ``cuda`` aborts a torch that was built without it. What really
is on the host (token ids, masks, row numbers: integers and booleans) stays real, since the code reads it back. So a
tensor of floats that is made here is on the device, and one of integers is real, and counted as if it were there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from bernini.kernels import interval_attention
from bernini.kernels.attention import backends

from ..parallel.group import Arrived, Group, Message, Pending
from ..parallel.mesh import Mesh

_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SERIES = (torch.ops.aten.arange, torch.ops.aten.linspace)
_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class Device(FakeTensorMode):
    """Floats are fake, integers real; what mixes the two is fake."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs one operation, for real where all that it reads is."""
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors:
            real = not any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)
        else:
            real = kwargs.get("dtype") in _WHOLE or func.overloadpacket in _SERIES
        if real:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in _INDEXED:  # rows that a mask chooses: how many is known, the mask is real
            args = (args[0], [_rows(index) for index in args[1]], *args[2:])
        return super().dispatch(func, types, args, kwargs)


def _rows(index: Tensor | None) -> Tensor | None:
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool or index.dim() != 1:
        return index
    with unset_fake_temporarily():
        return index.nonzero().flatten()


class Phantom:
    """A rank whose others are not there: it sends into the void, and what it receives has a size and no values."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size, self.rank = size, rank

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Nothing arrives."""

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        return Arrived()

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The room for the rows of all ranks. Sums of float64, which are read back, are zeros on the host."""
        if rows.dtype == torch.float64:
            with unset_fake_temporarily():
                return torch.zeros((sum(sizes), *rows.shape[1:]), dtype=rows.dtype)
        return rows.new_empty((sum(sizes), *rows.shape[1:]))

    def tell(self, thing: Any) -> list[Any]:
        return [thing] * self.size

    def parts(self, ranges: Sequence[range]) -> list[Group | None]:
        return [Phantom(len(ranks), ranks.index(self.rank)) if self.rank in ranks else None for ranks in ranges]


@contextmanager
def ranks(world: int, sequence: int) -> Iterator[Mesh]:
    """The mesh of one rank of ``world``, of which ``sequence`` share each packed sequence, over torch's fake group."""
    if world == 1:
        yield Mesh(Phantom(1), Phantom(1), Phantom(1), torch.device("cpu"))
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Mesh(Phantom(world), Phantom(world // sequence), Phantom(sequence), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def faked(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Puts parameters and buffers, which are on the meta device, on the fake one; those that are one stay one.

    Args:
        dtype: of floats; that which they have by default.
    """
    known: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            own = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            found: Tensor = torch.empty(tensor.shape, dtype=own)
            if isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, requires_grad=tensor.requires_grad)
            known[id(tensor)] = found
        return known[id(tensor)]

    keep = list(module.modules())
    for part in keep:
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def fused(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> Tensor:
    """Attention with the inputs, outputs and saved tensors of a fused kernel."""
    first, last = torch.empty((2, len(q_THD)), dtype=torch.int32, device=q_THD.device)
    return interval_attention(q_THD, k_SGD, v_SGD, first, last, scale=scale)


@contextmanager
def attention(name: str, attend: Attend = fused) -> Iterator[None]:
    """A backend of that name for as long as this lasts."""

    def run(q: Tensor, k: Tensor, v: Tensor, borders_q: Any, borders_k: Any, scale: float) -> Tensor:
        return attend(q, k, v, scale)

    backends.add(backends.Backend(name, lambda device, dtype: None, run))
    try:
        yield
    finally:
        del backends.BACKENDS[name]
