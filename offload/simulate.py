"""Offload schedules on a virtual clock: how long a step's compute waits for copies, and the bytes it keeps meanwhile.

A step is a stack of layers: forward in order, then backward in reverse. What a layer saves goes out on one stream when
the layer is done, and comes back on another before its backward. Nothing is copied and no time passes; so a schedule
can be judged at sizes and link rates that are not here. Streams, events and their log are those of ``transfer.py`` on
its ``sim`` backend. The host is taken to be ahead of the device always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .budget import most_at_once
from .log import Log
from .transfer import Buffer, Event, Stream
from .transfer_sim import SimTransfers


@dataclass(frozen=True)
class Layer:
    """Args:
    forward, backward: seconds of compute; what is computed again belongs to the backward.
    nbytes: that it saves for the backward.
    """

    forward: float
    backward: float
    nbytes: int


@dataclass(frozen=True)
class Link:
    """Args:
    rate: bytes per second each way, at the same time.
    latency: seconds that a copy takes besides.
    """

    rate: float
    latency: float = 10e-6

    def seconds(self, nbytes: int) -> float:
        return self.latency + nbytes / self.rate


@dataclass(frozen=True)
class Schedule:
    """When tensors come back, and what stays.

    Args:
        fetch: ``"use"`` begins when the compute is there and wants it (torchtune without a host that is ahead);
            ``"next"`` when the backward of the layer above begins (Megatron's one group of lookahead); ``"deadline"``
            so early that all copies that are still to come will be in time, by the recorded times.
        kept: last layers that are not offloaded: the backward begins with them.
        flight: layers whose copies out may be unfinished before the forward waits.
        slots: layers that may be back on the device at once, the one in use included.
        slack: for ``"deadline"``: earlier by so many times the copy's own time.
    """

    name: str
    fetch: Literal["use", "next", "deadline"]
    kept: int = 1
    flight: int = 2
    slots: int = 3
    slack: float = 1.0


AT_USE = Schedule("wait at use", "use")
LOOKAHEAD = Schedule("one group ahead", "next")
DEADLINE = Schedule("deadline", "deadline")


@dataclass(frozen=True)
class Result:
    """Args:
    seconds: of the step.
    stall: of them, those in which the compute waited.
    device_bytes: most that saved tensors had on the device at once.
    """

    seconds: float
    stall: float
    device_bytes: int

    @property
    def share(self) -> float:
        return self.stall / self.seconds


def simulate(
    layers: Sequence[Layer],
    link: Link,
    schedule: Schedule,
    actual: Sequence[Layer] | None = None,
    log: Log | None = None,
) -> Result:
    """One step.

    Args:
        layers: as recorded: what the schedule is made from.
        actual: what they really take, with the same bytes; by default the same.
        log: gets every action, for ``checker.py``.
    """
    real, count, clock = actual or layers, len(layers), SimTransfers(link.rate, log=log)
    compute, out, back = (clock.stream(name) for name in ("compute", "out", "back"))
    offloaded = range(max(0, count - schedule.kept))
    spans: list[tuple[float, int]] = []
    device: dict[int, Buffer] = {}  # as saved
    host: dict[int, Buffer] = {}
    landed: dict[int, Buffer] = {}
    out_event: dict[int, Event] = {}
    back_event: dict[int, Event] = {}

    def copy(stream: Stream, target: Buffer, source: Buffer) -> tuple[float, Event]:
        begin = clock.now(stream)
        clock.work(stream, link.latency)
        clock.copy(stream, target, source)
        return begin, clock.record(stream)

    for number, layer in enumerate(real):
        if (before := number - schedule.flight) in out_event:
            clock.wait(compute, out_event[before])
            clock.free(compute, device.pop(before))
        clock.work(compute, layer.forward)
        device[number] = clock.adopt(None, (0, layer.nbytes), (number,))
        spans.append((clock.now(compute), layer.nbytes))
        if number in offloaded:
            host[number] = clock.host(None, layer.nbytes)
            clock.wait(out, clock.record(compute))
            _, out_event[number] = copy(out, host[number], device[number])
            spans.append((clock.now(out), -layer.nbytes))
    triggers = _triggers(layers, link, schedule)
    for number in reversed(range(count)):
        for other in triggers.get(number, ()):  # behind what the compute was given so far, and the copy out
            landed[other] = clock.new(compute, real[other].nbytes)
            clock.wait(back, clock.record(compute))
            clock.wait(back, out_event[other])
            begin, back_event[other] = copy(back, landed[other], host[other])
            spans.append((begin, real[other].nbytes))
        if number in landed:
            clock.wait(compute, back_event[number])
            clock.free(compute, landed[number])
        if number in device:
            clock.free(compute, device[number])
        clock.work(compute, real[number].backward)
        spans.append((clock.now(compute), -real[number].nbytes))
    seconds = clock.now(compute)
    busy = sum(layer.forward + layer.backward for layer in real)
    return Result(seconds, max(0.0, seconds - busy), most_at_once(spans))


def _triggers(layers: Sequence[Layer], link: Link, schedule: Schedule) -> dict[int, list[int]]:
    """Of each layer, whose copies are begun before its backward."""
    count = len(layers)
    offloaded = range(max(0, count - schedule.kept))
    if schedule.fetch != "deadline":
        above = 0 if schedule.fetch == "use" else 1
        return {min(number + above, count - 1): [number] for number in offloaded}
    begins: dict[int, float] = {}
    now = 0.0
    for number in reversed(range(count)):
        begins[number], now = now, now + layers[number].backward
    triggers: dict[int, list[int]] = {}
    free = float("inf")
    for number in offloaded:  # the last to be wanted first: each must be done before the next begins
        took = link.seconds(layers[number].nbytes)
        free = min(begins[number], free) - took
        early = free - schedule.slack * took
        at = max((n for n in range(number, count) if begins[n] <= early), default=count - 1, key=begins.__getitem__)
        at = min(max(at, number + 1), number + schedule.slots - 1, count - 1)  # no slot is free before
        triggers.setdefault(at, []).insert(0, number)
    return triggers
