"""A few ranks that work together, behind the four things that are asked of them.

``Processes`` are torchrun's, over torch.distributed; ``Alone`` is one process, the same code with nothing to do; and
``simulate`` runs any number of ranks as threads of one process, for tests: what a rank does does not depend on which.

Sums are taken in the order of the ranks, whatever the backend: the same bits every time.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Message(NamedTuple):
    """A contiguous tensor, and the rank that it goes to or comes from."""

    rank: int
    tensor: Tensor


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

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all ranks, in order: ``[sum of sizes, ...]``. ``sizes`` are known to everyone."""

    def tell(self, thing: Any) -> list[Any]:
        """What every rank has to say (a small object), in order. For beginnings and ends, not for layers."""


class Alone:
    """One rank."""

    rank, size = 0, 1

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Nobody to talk to."""

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        return rows

    def tell(self, thing: Any) -> list[Any]:
        return [thing]


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
        self._global = dist.get_process_group_ranks(self.handle or dist.group.WORLD)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        import torch.distributed as dist

        work = []
        for kind, messages in ((dist.irecv, receives), (dist.isend, sends)):
            numbers: Counter[int] = Counter()
            for rank, tensor in messages:
                if tensor.numel():  # the tag keeps two messages between the same ranks apart
                    work.append(dist.P2POp(kind, tensor, self._global[rank], self.handle, numbers[rank]))
                    numbers[rank] += 1
        for request in dist.batch_isend_irecv(work) if work else ():
            request.wait()

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


class _Table:
    """Where simulated ranks leave things for each other."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.places: list[Any] = [None] * size


@dataclass
class Simulated:
    """A rank that is a thread; see :func:`simulate`."""

    rank: int
    size: int
    table: _Table

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        offered = self.tell(list(sends))
        for rank in range(self.size):
            theirs = [tensor for to, tensor in offered[rank] if to == self.rank and tensor.numel()]
            mine = [tensor for source, tensor in receives if source == rank and tensor.numel()]
            shapes = [list(map(list, (tensor.shape for tensor in tensors))) for tensors in (theirs, mine)]
            if [tensor.numel() for tensor in theirs] != [tensor.numel() for tensor in mine]:
                raise RuntimeError(f"rank {rank} sends {shapes[0]} to rank {self.rank}, which expects {shapes[1]}")
            for message, place in zip(theirs, mine, strict=True):
                if not (place.is_contiguous() and message.is_contiguous()):
                    raise RuntimeError("messages must be contiguous")
                place.copy_(message.view(place.shape))
        self.table.barrier.wait()  # nobody goes on to change what others still read

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        whole = torch.cat(self.tell(rows))
        self.table.barrier.wait()
        return whole

    def tell(self, thing: Any) -> list[Any]:
        self.table.places[self.rank] = thing
        self.table.barrier.wait()
        found = list(self.table.places)
        self.table.barrier.wait()
        return found


def simulate(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """Runs ``work(group)`` once for every rank, as threads that take turns at will; what each returned, in order.

    Raises:
        Exception: the first that a rank raised; the others are let go.
    """
    table = _Table(size)

    def run(rank: int) -> Any:
        try:
            return work(Simulated(rank, size, table))
        except threading.BrokenBarrierError:
            return None
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(size)]]
