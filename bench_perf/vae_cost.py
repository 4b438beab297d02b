"""What a Wan VAE on several ranks would take: the code's own steps, with times measured in one process.

Every rank's part is run on ``meta`` tensors at the size in question, and it is written down what it computes, sends and
waits for, in its order. One process with real tensors, at a smaller size, tells the seconds per frame of every layer,
which are taken to grow with the area (attention in the middle, which is small, grows with its square). The two make a
timetable: a message leaves when it is started, takes the link's latency and its bytes over the link's rate (one after
the other per sender), and a rank goes on when what it waits for is there.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bernini.parallel.group import Group, Message, Pending
from bernini.parallel.vae import TemporalVAE
from bernini.parallel.vae_layers import At, Packed

from .moves import Absent

Key = tuple[str, str]
"""(what is done, the module's name)."""


class Work(NamedTuple):
    key: Key
    frames: int


class Start(NamedTuple):
    flight: int
    sends: tuple[tuple[int, int], ...]
    """(to rank, bytes)."""
    receives: tuple[int, ...]
    """From rank."""


class Wait(NamedTuple):
    flight: int


Event = Work | Start | Wait


@dataclass(frozen=True)
class Link:
    rate: float = 200e9
    """Bytes per second."""
    latency: float = 10e-6
    """Seconds."""


@dataclass
class Written(Packed):
    """Layers that write down what they do; with ``clock`` also how long it takes."""

    names: dict[int, str]
    events: list[Event]
    clock: bool = False
    seconds: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        super().__init__()

    def _do(self, what: str, name: str, work: Callable[[], Tensor]) -> Tensor:
        before = time.perf_counter()
        y = work()
        frames = y.shape[2]
        if frames:
            self.events.append(Work((what, name), frames))
            if self.clock:
                self.seconds[what, name].append((time.perf_counter() - before) / frames)
        return y

    def activated(self, norm: Any, act: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._do("activated", self.names[id(norm)], lambda: Packed.activated(self, norm, act, x, out))

    def causal(self, name: str, conv: Any, x: Tensor) -> Tensor:
        return self._do("causal", name, lambda: Packed.causal(self, name, conv, x))

    def first(self, name: str, conv: Any, x: Tensor) -> Tensor:
        return self._do("first", name, lambda: Packed.first(self, name, conv, x))

    def point(self, name: str, conv: Any, x: Tensor) -> Tensor:
        return self._do("point", name, lambda: Packed.point(self, name, conv, x))

    def attend(self, name: str, block: Any, x: Tensor, at: At) -> Tensor:
        return self._do("attend", name, lambda: Packed.attend(self, name, block, x, at))

    def resample(self, name: str, layers: Any, x: Tensor, at: At) -> Tensor:
        return self._do("resample", name, lambda: Packed.resample(self, name, layers, x, at))


class _Flight:
    def __init__(self, number: int, events: list[Event]) -> None:
        self.number, self.events = number, events

    def wait(self) -> None:
        self.events.append(Wait(self.number))


class Recorded(Absent):
    """A rank that writes down what it sends."""

    def __init__(self, rank: int, size: int, events: list[Event]) -> None:
        super().__init__(rank, size)
        self.events, self._flights = events, 0

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        self.exchange(sends, receives)
        self._flights += 1
        there = tuple((rank, x.numel() * x.itemsize) for rank, x in sends if x.numel())
        self.events.append(Start(self._flights, there, tuple(rank for rank, x in receives if x.numel())))
        return _Flight(self._flights, self.events)


class _Writing(TemporalVAE):
    def __init__(self, model: Any, group: Group | None, layers: Written, most: int) -> None:
        super().__init__(model, group, most=most)
        self.written = layers

    def _layers(self, x: Tensor) -> Packed:
        return self.written


@torch.no_grad()
def calibrate(model: Any, job: str, inputs: Tensor, most: int) -> dict[Key, float]:
    """Seconds per frame of every layer: the median over the windows of one run; those of a first frame, the least.

    Args:
        job: ``"encode"`` or ``"decode"``.
        inputs: ``[1, C, frames, ...]``, pixels or a latent.
    """
    written = Written({id(m): name for name, m in model.named_modules()}, [], clock=True)
    for _ in range(2):  # weights are packed in the first
        for _ in _run(_Writing(model, None, written, most), job, inputs):
            pass
    return {key: sorted(found)[(len(found) - 1) // 2] for key, found in written.seconds.items()}


def _run(vae: TemporalVAE, job: str, inputs: Tensor) -> Any:
    if job == "decode":
        return vae.decode(inputs)
    return vae.encode(lambda start, stop: inputs[:, :, start:stop], inputs.shape[2])


@torch.no_grad()
def timetable(model: Any, job: str, inputs: Tensor, ranks: int, most: int) -> list[list[Event]]:
    """Of every rank, what it does. All on ``meta``."""
    found = []
    names = {id(m): name for name, m in model.named_modules()}
    for rank in range(ranks):
        events: list[Event] = []
        for _ in _run(_Writing(model, Recorded(rank, ranks, events), Written(names, events), most), job, inputs):
            pass
        found.append(events)
    return found


def seconds(events: Sequence[Event], cost: dict[Key, float]) -> float:
    """Of computing alone."""
    return sum(cost[event.key] * event.frames for event in events if isinstance(event, Work))


def makespan(tables: Sequence[Sequence[Event]], cost: dict[Key, float], link: Link) -> float:
    """Seconds until the last rank is done.

    Raises:
        RuntimeError: ranks wait for each other for ever.
    """
    clocks, places = [0.0] * len(tables), [0] * len(tables)
    free = [0.0] * len(tables)  # when each sender's link is
    coming: dict[tuple[int, int], deque[float]] = defaultdict(deque)
    wanted: dict[tuple[int, int], tuple[int, ...]] = {}
    while any(place < len(table) for place, table in zip(places, tables, strict=True)):
        before = list(places)
        for rank, table in enumerate(tables):
            while places[rank] < len(table):
                event = table[places[rank]]
                if isinstance(event, Work):
                    clocks[rank] += cost[event.key] * event.frames
                elif isinstance(event, Start):
                    wanted[rank, event.flight] = event.receives
                    for other, size in event.sends:
                        free[rank] = max(free[rank], clocks[rank]) + size / link.rate
                        coming[rank, other].append(free[rank] + link.latency)
                else:
                    sources = wanted[rank, event.flight]
                    if any(not coming[source, rank] for source in sources):
                        break
                    arrived = [coming[source, rank].popleft() for source in sources]
                    clocks[rank] = max([clocks[rank], *arrived])
                places[rank] += 1
        if places == before:
            raise RuntimeError("ranks wait for each other for ever")
    return max(clocks)


def in_step(tables: Sequence[Sequence[Event]], cost: dict[Key, float]) -> float:
    """Seconds if every layer's frames were dealt out as evenly as whole frames can be and nothing were ever sent, but
    all ranks ended each layer together. Ranks that do not wait can be faster: who has more in one layer has less in
    another.
    """
    frames: dict[Key, int] = defaultdict(int)
    for event in (event for table in tables for event in table):
        if isinstance(event, Work):
            frames[event.key] += event.frames
    alone = {name for what, name in frames if what == "first"}  # cheaper, but a frame of the same layer
    return sum(
        cost[what, name] * -(-(count + (name in alone)) // len(tables))
        for (what, name), count in frames.items()
        if what != "first"
    )
