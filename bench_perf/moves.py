"""What is counted of attention by several ranks: exchanges and bytes by a group that writes them down, copies and waits
by a dispatch mode that sees every operation. Used by :mod:`bench_perf.ulysses` and the tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from bernini.kernels.attention import backends
from bernini.parallel.group import Arrived, Group, Message, Pending


class Exchange(NamedTuple):
    """
    Args:
        messages: that this rank sent.
        sent, received: bytes.
    """

    messages: int
    sent: int
    received: int


class _Unseen(NamedTuple):
    """Messages on their way, by a wire that nobody counts."""

    pending: Pending

    def wait(self) -> None:
        with _disable_current_modes():
            self.pending.wait()


class Counted:
    """A group that writes down what it is asked for.

    ``exchanges`` has a line for each; ``others`` the names of what is not an exchange.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size
        self.exchanges: list[Exchange] = []
        self.others: list[str] = []

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.start(sends, receives).wait()

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        sent, received = ([tensor.nbytes for _, tensor in messages if tensor.numel()] for messages in (sends, receives))
        self.exchanges.append(Exchange(len(sent), sum(sent), sum(received)))
        with _disable_current_modes():  # what simulated ranks copy to each other is the wire
            return _Unseen(self._group.start(sends, receives))

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        self.others.append("gather")
        return self._group.gather(rows, sizes)

    def tell(self, thing: Any) -> list[Any]:
        self.others.append("tell")
        return self._group.tell(thing)


class Absent:
    """A rank whose others are not there: what it receives has a shape and no content. For ``meta`` tensors."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        for _, tensor in (*sends, *receives):
            if not tensor.is_contiguous():
                raise RuntimeError("messages must be contiguous")

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        self.exchange(sends, receives)
        return Arrived()

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        return rows.new_empty((sum(sizes), *rows.shape[1:]))

    def tell(self, thing: Any) -> list[Any]:
        raise RuntimeError("nobody is there to tell")


COPIES = (
    "clone", "copy_", "_to_copy", "cat", "stack", "repeat", "index", "index_select", "index_put_", "_index_put_impl_",
    "index_copy", "index_copy_", "index_add", "gather", "take", "constant_pad_nd", "slice_backward", "select_backward",
    "slice_scatter", "select_scatter", "as_strided_copy", "_unsafe_index", "masked_fill",
)  # fmt: skip
"""Operations of torch whose result is their input at another place. Sums are none; their result is something else."""

SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_consecutive")
"""Operations whose result the host has to wait for."""


class Moves(TorchDispatchMode):
    """``with Moves() as seen: ...`` tells which copies and waits there were. What a kernel does inside is not seen.

    ``copies`` has (operation, elements), ``syncs`` the operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, int]] = []
        self.syncs: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in COPIES:
            elements = sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
            self.copies.append((name, elements))
        if name in SYNCS:
            self.syncs.append(name)
        return out

    @property
    def copied(self) -> int:
        """Elements."""
        return sum(elements for _, elements in self.copies)


class Shapes(torch.autograd.Function):
    """Attention that gives results of the right shape, and computes and copies nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return q.new_zeros((*q.shape[:2], v.shape[2]))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_zeros(x.shape) for x in ctx.saved_tensors)


@contextmanager
def shapes_backend() -> Iterator[str]:
    """The name of an attention backend that computes nothing, for as long as this lasts."""
    name = "shapes"
    backends.add(backends.Backend(name, lambda device, dtype: None, lambda q, k, v, *_: Shapes.apply(q, k, v)))
    try:
        yield name
    finally:
        del backends.BACKENDS[name]
