"""Measuring two sides fairly, and the row that says what came out.

The rules, and why:

* Both sides are interleaved in one process, in alternating order: drifts of clock and temperature hit both.
* A call under 10 ms is repeated to at least 50 ms, so that a timer tick or a late thread does not count.
* The median judges; minimum and p80 (on a GPU p20 and p80) are kept in the note and show the spread.
* The measured function allocates its outputs itself, as a user's call does.
* Nothing is judged on a busy machine: one other process on two cores can turn 0.05 ms into 8 ms.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

LONG_ENOUGH = 0.010  # seconds: a call at least this long is timed by itself
SAMPLE = 0.050  # seconds: shorter calls are repeated to this length
BUDGET = 3.0  # seconds of measuring for both sides together, within the limits on rounds
ROUNDS = (5, 40)
BUSY = 0.05  # cores: more than this used by others, and nothing is judged
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}  # of time, per second
COUNTED = ("TFLOP", "GB")  # units of what is worked out and not measured: the same on every machine

Sample = Callable[[Callable[[], Any], int], float]


@dataclass(frozen=True)
class Row:
    """One measured fact.

    Args:
        name: what was measured.
        shape: sizes of the case, for people.
        dtype: of the case; ``"-"`` where there is none.
        ours, peer: medians in ``unit``; ``peer`` is ``None`` where there is nobody to compare with.
        ratio: how many times better ours is than the peer; above 1 is better.
        bar: the least ratio that was promised, or without a peer the most that ``ours`` may be. ``None``: no promise.
        holds: whether the bar is met; ``None`` if there is none, or if the measurement cannot judge (see ``note``).
        note: spread of the samples, who the peer is, why something was not judged.
    """

    name: str
    shape: str
    dtype: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None
    bar: float | None
    holds: bool | None
    note: str


COLUMNS = tuple(field.name for field in fields(Row))


def judged(
    name: str,
    ours: float,
    peer: float | None = None,
    *,
    unit: str,
    shape: str = "-",
    dtype: str = "-",
    bar: float | None = None,
    higher_is_better: bool = False,
    unfit: str | None = None,
    note: str = "",
) -> Row:
    """A row from two figures.

    Args:
        higher_is_better: for rates (GB/s, tokens/s); times and bytes are better when lower.
        unfit: why this measurement must not be judged; goes into the note.
    """
    ratio = None
    if peer is not None:
        better, worse = (ours, peer) if higher_is_better else (peer, ours)
        ratio = better / worse if worse else math.inf
    holds = None
    if bar is not None and unfit is None:
        holds = (ours >= bar if higher_is_better else ours <= bar) if ratio is None else ratio >= bar
    text = "; ".join(part for part in (f"not judged: {unfit}" if unfit else "", note) if part)
    return Row(name, shape, dtype, ours, peer, unit, ratio, bar, holds, text)


# --- is anybody else working here? ----------------------------------------------------------------------------------


def cpu_seconds() -> tuple[float, float] | None:
    """CPU seconds since some fixed time: (of the whole machine, of this process and its finished children).

    ``None`` where the system does not tell (no ``/proc/stat``).
    """
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(text) for text in file.readline().split()[1:9]]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks  # guest time is part of user time
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = time.process_time() + children.ru_utime + children.ru_stime
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own


class Watch:
    """``with Watch() as watch: ...`` tells afterwards how many cores other processes used meanwhile."""

    def __init__(self, read: Callable[[], tuple[float, float] | None] = cpu_seconds) -> None:
        self._read = read
        self.others: float | None = None

    def __enter__(self) -> Watch:
        self._before, self._start = self._read(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        after, seconds = self._read(), time.perf_counter() - self._start
        if self._before is not None and after is not None and seconds > 0:
            total, own = after[0] - self._before[0], after[1] - self._before[1]
            slack = (os.cpu_count() or 1) / os.sysconf("SC_CLK_TCK")  # the machine's time comes in whole ticks
            self.others = max(0.0, (total - own - slack) / seconds)

    @property
    def unfit(self) -> str | None:
        """Why nothing measured meanwhile may be judged, or ``None``."""
        if self.others is None:
            return "this system does not tell whether other processes were busy"
        if self.others > BUSY:
            return f"other processes used {self.others:.0%} of a core (limit {BUSY:.0%})"
        return None


# --- time -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds per call over all samples."""

    minimum: float
    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        ranked = sorted(samples)
        p20, p80 = (ranked[math.ceil(share * len(ranked)) - 1] for share in (0.2, 0.8))
        return cls(ranked[0], p20, statistics.median(ranked), p80)

    def per(self, calls: int) -> Timing:
        """Of one call, where each sample was so many."""
        return Timing(self.minimum / calls, self.p20 / calls, self.median / calls, self.p80 / calls)

    def spread(self, unit: str, low: str = "minimum") -> str:
        """From the minimum, or from p20, to p80."""
        return f"{getattr(self, low) * UNITS[unit]:.3g}..{self.p80 * UNITS[unit]:.3g}"


def _sample(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call, over ``repeats`` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _repeats(call: Callable[[], Any], sample: Sample) -> int:
    """How often to call for one sample. The calls made to find out also warm up caches, threads and compilers."""
    call()
    seconds = sample(call, 1)
    if seconds < LONG_ENOUGH:
        seconds = min(seconds, *(sample(call, 1) for _ in range(3)))
    return 1 if seconds >= LONG_ENOUGH else math.ceil(SAMPLE / max(seconds, 1e-9))


def interleave(*sides: Callable[[], Any], budget: float = BUDGET, sample: Sample = _sample) -> list[Timing]:
    """Times the sides in turns, beginning with another one in every round.

    ``sample`` takes a side and a number of repeats and tells the seconds per call: by this process's clock, or a GPU's.
    """
    repeats = [_repeats(side, sample) for side in sides]
    return take_turns([partial(sample, *pair) for pair in zip(sides, repeats, strict=True)], ROUNDS, budget)


def take_turns(sides: Sequence[Callable[[], float]], rounds: tuple[int, int], budget: float) -> list[Timing]:
    """Rounds in which every side runs once and tells its seconds, beginning with another one each time.

    Args:
        rounds: at least and at most so many.
        budget: seconds after which none is begun that need not be.
    """
    samples: list[list[float]] = [[] for _ in sides]
    start = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - start > budget:
            break
        for turn in range(len(sides)):
            number = (turn + done) % len(sides)
            samples[number].append(sides[number]())
    return [Timing.of(values) for values in samples]


def once(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def compare(
    name: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any] | None = None,
    *,
    shape: str = "-",
    dtype: str = "-",
    unit: str = "ms",
    bar: float | None = None,
    peer_name: str = "",
    note: str = "",
    budget: float = BUDGET,
    watch: Watch | None = None,
) -> Row:
    """Times ours against a peer and judges the medians.

    Args:
        ours, peer: functions without arguments that allocate and return their outputs.
        unit: ``"s"``, ``"ms"`` or ``"us"``.
        bar: how many times faster ours must be; without a peer, the most time it may take, in ``unit``.
        peer_name: who the peer is; goes into the note.
        watch: tells whether the machine was busy; tests pass their own.
    """
    with watch or Watch() as watching:
        timings = interleave(*([ours] if peer is None else [ours, peer]), budget=budget)
    scale = UNITS[unit]
    spread = f"min..p80 {timings[0].spread(unit)}" + (f" against {timings[1].spread(unit)}" if peer else "")
    return judged(
        name,
        timings[0].median * scale,
        timings[1].median * scale if peer else None,
        unit=unit,
        shape=shape,
        dtype=dtype,
        bar=bar,
        unfit=watching.unfit,
        note="; ".join(part for part in (f"peer: {peer_name}" if peer_name else "", note, f"{spread} {unit}") if part),
    )


# --- memory ---------------------------------------------------------------------------------------------------------


def _resident_peak() -> int:
    """The most bytes of this process that were in memory at one time, since :func:`extra_memory` last began."""
    with open("/proc/self/status", encoding="ascii") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))


def extra_memory(call: Callable[[], Any]) -> int:
    """Bytes of host memory that the call needs at its peak, its result included, beyond those in use before.

    The kernel keeps the peak, so nothing is missed between samples. Linux with glibc only: memory that was freed but
    kept is given back first, or a temporary could hide in it.
    """
    call()  # threads and workspaces that stay
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak becomes what is in use now
    before = _resident_peak()
    call()
    return _resident_peak() - before
