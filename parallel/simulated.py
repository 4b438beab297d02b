"""Ranks as threads of one process, for tests.

They are stricter than a network: what is received is no number until it was waited for, and who changes what is on its
way, or does not wait for it, is told so.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .group import Group, Message, Pending

SILENCE = 120.0
"""Seconds after which a simulated rank gives up another one that lives and sends it nothing."""

Key = tuple[int, int, int]
"""(sender, receiver, number) of a message."""


class _Table:
    """Where simulated ranks leave things for each other."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.places: list[Any] = [None] * size
        self.messages: dict[Key, Tensor] = {}
        self.ended: set[int] = set()
        self.over = False
        self.parts: list[tuple[range, _Table]] = []
        self._changed = threading.Condition()

    def put(self, key: Key, tensor: Tensor) -> None:
        with self._changed:
            self.messages[key] = tensor
            self._changed.notify_all()

    def take(self, key: Key) -> Tensor:
        sender, receiver, _ = key
        with self._changed:
            self._changed.wait_for(lambda: key in self.messages or self.over or sender in self.ended, SILENCE)
            if key in self.messages:
                return self.messages.pop(key)
            if self.over:
                raise threading.BrokenBarrierError
        why = "has ended" if sender in self.ended else "sends it nothing"
        raise RuntimeError(f"rank {receiver} waits for a message of rank {sender}, which {why}")

    def end(self, rank: int) -> None:
        with self._changed:
            self.ended.add(rank)
            self._changed.notify_all()
        for ranks, part in self.parts:
            if rank in ranks:
                part.end(ranks.index(rank))

    def let_go(self) -> None:
        """Nobody waits any longer."""
        self.barrier.abort()
        with self._changed:
            self.over = True
            self._changed.notify_all()
        for _, part in self.parts:
            part.let_go()


@dataclass
class _Flight:
    """Messages of a simulated rank on their way: those it sent, with copies of them, and where the others go."""

    table: _Table
    sent: list[tuple[Key, Tensor, Tensor]]
    places: list[tuple[Key, Tensor]]
    waited: bool = False

    def wait(self) -> None:
        if self.waited:
            return
        self.waited = True
        for key, place in self.places:
            message = self.table.take(key)
            if message.numel() != place.numel():
                shapes = list(message.shape), list(place.shape)
                raise RuntimeError(f"rank {key[0]} sends {shapes[0]} to rank {key[1]}, which expects {shapes[1]}")
            place.copy_(message.view(place.shape))
        for key, tensor, copy in self.sent:
            if not torch.equal(*(x.view(-1).view(torch.uint8) for x in (tensor, copy))):
                raise RuntimeError(f"rank {key[0]} changed what was on its way to rank {key[1]}")


@dataclass
class Simulated:
    """A rank that is a thread; see :func:`simulate`."""

    rank: int
    size: int
    table: _Table
    flights: list[_Flight] = field(default_factory=list, repr=False)
    made: list[Simulated] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._numbers: Counter[tuple[int, int]] = Counter()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.start(sends, receives).wait()

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if not all(tensor.is_contiguous() for _, tensor in (*sends, *receives)):
            raise RuntimeError("messages must be contiguous")
        flight = _Flight(self.table, [], [])
        for rank, tensor in sends:
            if tensor.numel():
                key, copy = self._key(self.rank, rank), tensor.detach().clone()
                flight.sent.append((key, tensor.detach(), copy))
                self.table.put(key, copy)
        for rank, place in receives:
            if place.numel():
                flight.places.append((self._key(rank, self.rank), place))
                if place.is_floating_point():
                    place.fill_(torch.nan)
        self.flights = [other for other in self.flights if not other.waited] + [flight]
        return flight

    def _key(self, sender: int, receiver: int) -> Key:
        self._numbers[sender, receiver] += 1
        return sender, receiver, self._numbers[sender, receiver]

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

    def parts(self, ranges: Sequence[range]) -> list[Group | None]:
        tables = [(ranks, _Table(len(ranks))) for ranks in ranges]
        if self.rank == 0:
            self.table.parts += tables
        tables = self.tell(tables)[0]
        found = [
            Simulated(ranks.index(self.rank), len(ranks), table) if self.rank in ranks else None
            for ranks, table in tables
        ]
        self.made += [part for part in found if part is not None]
        return list(found)


def simulate(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """Runs ``work(group)`` once for every rank, as threads that take turns at will; what each returned, in order.

    Raises:
        Exception: the first that a rank raised; the others are let go.
        RuntimeError: a message that nobody took, or that nobody waited for.
    """
    table = _Table(size)

    def run(rank: int) -> Any:
        group = Simulated(rank, size, table)
        try:
            result = work(group)
            if not all(flight.waited for part in (group, *group.made) for flight in part.flights):
                raise RuntimeError(f"rank {rank} did not wait for what was on its way")
            table.end(rank)
            return result
        except threading.BrokenBarrierError:
            return None
        except BaseException:
            table.let_go()
            raise

    with ThreadPoolExecutor(size) as pool:
        found = [future.result() for future in [pool.submit(run, rank) for rank in range(size)]]
    for ranks, each in ((range(size), table), *table.parts):
        for sender, receiver, _ in each.messages:
            raise RuntimeError(f"rank {ranks[sender]} sent a message that rank {ranks[receiver]} did not take")
    return found
