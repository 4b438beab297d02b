"""A few ranks that work together, behind the few things that are asked of them.

``Processes`` are torchrun's, over torch.distributed; ``Alone`` is one process, the same code with nothing to do; and
:mod:`bernini.parallel.simulated` runs any number of ranks as threads of one process, for tests. What a rank does does
not depend on which.

Sums are taken in the order of the ranks, whatever the backend: the same bits every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor


class Message(NamedTuple):
    """A contiguous tensor, and the rank that it goes to or comes from."""

    rank: int
    tensor: Tensor


class Pending(Protocol):
    """Messages on their way."""

    def wait(self) -> None:
        """Returns when they are there; more than once does no harm. On a GPU it is the stream that waits."""


class Group(Protocol):
    """Some ranks. ``rank`` counts from 0 within the group."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Messages between ranks, all at once; none is to oneself. Sizes are known on both sides and not told.

        Messages from one rank to another arrive in the order of the sender's list; what is empty is not sent.
        """

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """An exchange that is on its way when this returns.

        Until its ``wait`` has returned, what is sent must not change and what is received must not be read. Any number
        may be on their way; messages between two ranks are told apart by the order in which both begin them. They are
        waited for in any order, but each of them is.
        """

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all ranks, in order: ``[sum of sizes, ...]``. ``sizes`` are known to everyone."""

    def tell(self, thing: Any) -> list[Any]:
        """What every rank has to say (a small object), in order. For beginnings and ends, not for layers."""

    def parts(self, ranges: Sequence[range]) -> list[Group | None]:
        """A group of each range of ranks, ``None`` where this one is not in it. All ask for the same, in one order."""


class Arrived:
    """Nothing is on its way."""

    def wait(self) -> None:
        """Nothing to wait for."""


class Alone:
    """One rank."""

    rank, size = 0, 1

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Nobody to talk to."""

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        return Arrived()

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        return rows

    def tell(self, thing: Any) -> list[Any]:
        return [thing]

    def parts(self, ranges: Sequence[range]) -> list[Group | None]:
        return [self for _ in ranges]


TAGS = 1 << 16
"""Different tags of messages. More than are ever on their way at once; NCCL goes by the order alone."""

_NUMBERS: WeakKeyDictionary[Any, Counter[tuple[int, bool]]] = WeakKeyDictionary()
"""For each process group the next tag, by (rank, whether it is sent): both sides count alike, whoever uses it."""


@dataclass
class _Requests:
    """Messages of torch.distributed on their way, with the tensors that they need until then."""

    requests: list[Any]
    messages: list[Any]

    def wait(self) -> None:
        for request in self.requests:
            request.wait()
        self.requests, self.messages = [], []


@dataclass
class Processes:
    """Ranks of a process group of torch.distributed.

    Args:
        handle: the process group; ``None`` is the one of all processes.
    """

    handle: Any = None
    rank: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(self.handle), dist.get_world_size(self.handle)
        handle = self.handle or dist.group.WORLD
        self._global = dist.get_process_group_ranks(handle)
        self._numbers = _NUMBERS.setdefault(handle, Counter())
        self._parts: dict[range, Processes | None] = {}  # made once: they cost connections

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.start(sends, receives).wait()

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        import torch.distributed as dist

        work = []
        for kind, messages in ((dist.irecv, receives), (dist.isend, sends)):
            for rank, tensor in messages:
                if tensor.numel():
                    number = self._numbers[rank, kind is dist.isend]
                    self._numbers[rank, kind is dist.isend] = (number + 1) % TAGS
                    work.append(dist.P2POp(kind, tensor, self._global[rank], self.handle, number))
        return _Requests(dist.batch_isend_irecv(work), work) if work else Arrived()

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        whole = rows.new_empty((sum(sizes), *rows.shape[1:]))
        parts = list(whole.split(list(sizes)))
        parts[self.rank].copy_(rows)
        others = [rank for rank in range(self.size) if rank != self.rank]
        self.exchange(
            [Message(rank, parts[self.rank]) for rank in others], [Message(rank, parts[rank]) for rank in others]
        )
        return whole

    def tell(self, thing: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing, group=self.handle)
        return found

    def parts(self, ranges: Sequence[range]) -> list[Group | None]:
        """
        Raises:
            ValueError: this is not the group of all processes, which torch needs for making others.
        """
        import torch.distributed as dist

        from .mesh import PATIENCE

        if self.size != dist.get_world_size():
            raise ValueError(f"parts: {self.size} of {dist.get_world_size()} processes cannot make groups")
        for ranks in ranges:
            if ranks not in self._parts:
                handle = dist.new_group(list(ranks), timeout=PATIENCE)
                self._parts[ranks] = Processes(handle) if self.rank in ranks else None
        return [self._parts[ranks] for ranks in ranges]
