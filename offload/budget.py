"""What becomes of each tensor that the forward saves for the backward: it stays, goes to host memory, or is made again.

One step is recorded, then :func:`plan` decides, before the next step, under limits on device bytes, host bytes and the
link. If everything fits, everything stays. Else tensors go to the host, those first that lie idle longest, as many as
needed: the link works beside the compute, so this costs no time as long as it can carry them. Only what it cannot
carry, or host memory cannot take, is made again, the cheapest per byte first (facts, systems, section 2.3).

The model of time: one queue out and one queue back, in the order of saving and of use. A tensor leaves the device when
its copy is done; it is fetched so late that the queue back is just in time; one that would be wanted back before it is
out stays. So no plan stalls: what a link is too slow for shows as bytes on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Choice = Literal["keep", "offload", "recompute"]
PATIENCE = 16  # tensors that cannot be changed, one after the other, before a search gives up


@dataclass(frozen=True)
class Saved:
    """A tensor between the forward and the backward of one step.

    Args:
        name: for people.
        nbytes: of its storage.
        saved: seconds from the beginning of the step until it is there.
        used: until the backward first wants it.
        done: until the backward no longer needs it; by default when it is used.
        seconds: to make it from the one saved before it; None if it cannot be made again.
    """

    name: str
    nbytes: int
    saved: float
    used: float
    done: float | None = None
    seconds: float | None = None

    @property
    def end(self) -> float:
        return self.used if self.done is None else self.done


@dataclass(frozen=True)
class Limits:
    """Args:
    device_bytes: for all saved tensors together.
    host_bytes: of the arena.
    out_rate, back_rate: bytes per second to the host and back, at the same time; 0 for no link.
    """

    device_bytes: int
    host_bytes: int = 0
    out_rate: float = 0.0
    back_rate: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What was decided, and what it comes to.

    Args:
        choices: of each tensor, in their order.
        device_bytes, host_bytes: most at any time.
        seconds: that making tensors again adds to the step.
        moved: bytes that go to the host and come back.
    """

    choices: tuple[Choice, ...]
    device_bytes: int
    host_bytes: int
    seconds: float
    moved: int

    def fits(self, limits: Limits) -> bool:
        return self.device_bytes <= limits.device_bytes and self.host_bytes <= limits.host_bytes

    def table(self, saved: Sequence[Saved]) -> str:
        """A line for each choice: tensors and bytes."""
        lines = []
        for choice in ("keep", "offload", "recompute"):
            mine = [tensor.nbytes for tensor, chosen in zip(saved, self.choices, strict=True) if chosen == choice]
            lines.append(f"{choice:<9} {len(mine):5d} tensors {sum(mine) / 1e9:10.3f} GB")
        return "\n".join([*lines, f"at most {self.device_bytes / 1e9:.3f} GB on the device, {self.seconds:.4g} s more"])


def predict(saved: Sequence[Saved], choices: Sequence[Choice], limits: Limits) -> Plan:
    """What the choices come to, whether they fit or not. O(n log n)."""
    device: list[tuple[float, int]] = []  # (time, bytes more)
    host: list[tuple[float, int]] = []
    out = _queue_out(saved, choices, limits)
    back = _queue_back(saved, out, limits)
    moved = 0
    for number, (tensor, choice) in enumerate(zip(saved, choices, strict=True)):
        if choice == "recompute":
            continue
        if number in back and back[number] > out[number]:
            moved += tensor.nbytes
            device += _interval(tensor.saved, out[number], tensor.nbytes)
            device += _interval(back[number], tensor.end, tensor.nbytes)
        else:  # kept, or never out in time
            device += _interval(tensor.saved, tensor.end, tensor.nbytes)
        if choice == "offload":
            host += _interval(tensor.saved, tensor.used, tensor.nbytes)
    seconds = 0.0
    for run in _runs(choices):
        again = sum(saved[number].seconds or 0.0 for number in run)
        start = min(saved[number].used for number in run) - again
        seconds += again
        for number in run:
            device += _interval(start, saved[number].end, saved[number].nbytes)
    return Plan(tuple(choices), most_at_once(device), most_at_once(host), seconds, moved)


def plan(saved: Sequence[Saved], limits: Limits) -> Plan:
    """Choices that fit, with the least time and then the fewest bytes moved that a short search finds.

    Tried are sets of tensors to make again (the cheapest per byte, and all but every k-th), each with nothing offloaded
    and with as much as the host has room for, those first that lie idle longest; then single tensors are changed.

    Args:
        saved: in the order of saving.

    Raises:
        ValueError: nothing fits; says how much would.
    """
    idle = sorted(range(len(saved)), key=lambda number: saved[number].saved - saved[number].used)
    able = [number for number in idle if saved[number].seconds is not None]
    cheap = sorted(able, key=lambda number: (saved[number].seconds or 0.0) / max(saved[number].nbytes, 1))
    linked = min(limits.out_rate, limits.back_rate) > 0

    def choose(offloaded: int, again: Sequence[int]) -> Plan:
        choices: list[Choice] = ["keep"] * len(saved)
        for number in idle[:offloaded]:
            choices[number] = "offload"
        for number in again:
            choices[number] = "recompute"
        return predict(saved, choices, limits)

    def most(again: Sequence[int]) -> list[Plan]:
        found = [choose(0, again)]
        if linked:
            room = _first(len(saved) + 1, lambda n: choose(n, again).host_bytes > limits.host_bytes) - 1
            found.append(choose(room, again))
        return found

    few = _first(len(cheap) + 1, lambda n: any(found.fits(limits) for found in most(cheap[:n])))
    tried = most(cheap[:few])
    if few:
        steps = [step for step in (2, 3, 4, 6, 8, 12, 16, 24, 32) if step < len(saved)]
        tried += [found for step in steps for found in most([number for number in able if number % step])]
    fit = [found for found in tried if found.fits(limits)]
    if fit:
        return min((_relaxed(saved, found, limits) for found in sorted(fit, key=_worse)[:3]), key=_worse)
    within = [found for found in tried if found.host_bytes <= limits.host_bytes]
    least = _repaired(saved, min(within, key=lambda found: found.device_bytes), limits)
    if least.fits(limits):
        return _relaxed(saved, least, limits)
    raise ValueError(
        f"budget: the saved tensors do not fit in {limits.device_bytes} bytes on the device and {limits.host_bytes} on "
        f"the host; the device needs {least.device_bytes}: raise the budget, or shorten the sequence"
    )


def _worse(found: Plan) -> tuple[float, int]:
    return found.seconds, found.moved


def _repaired(saved: Sequence[Saved], found: Plan, limits: Limits) -> Plan:
    """Changes single tensors as long as that needs less of the device and no more of the host than there is."""
    options: list[Choice] = ["keep", "recompute"]
    if min(limits.out_rate, limits.back_rate) > 0:
        options.insert(1, "offload")
    for _ in range(2):
        for number in sorted(range(len(saved)), key=lambda number: -saved[number].nbytes):
            for choice in options:
                if choice == found.choices[number] or (choice == "recompute" and saved[number].seconds is None):
                    continue
                other = predict(saved, (*found.choices[:number], choice, *found.choices[number + 1 :]), limits)
                if other.host_bytes <= limits.host_bytes and other.device_bytes < found.device_bytes:
                    found = other
            if found.fits(limits):
                return found
    return found


def _relaxed(saved: Sequence[Saved], found: Plan, limits: Limits) -> Plan:
    """Undoes what is not needed, many tensors at once: what takes most time first, then what lies idle shortest."""
    linked = min(limits.out_rate, limits.back_rate) > 0
    changes: list[tuple[Choice, Choice]] = [("recompute", "keep"), ("recompute", "offload"), ("offload", "keep")]
    for before, after in changes:
        if after == "offload" and not linked:
            continue
        numbers = [number for number, choice in enumerate(found.choices) if choice == before]
        numbers.sort(
            key=lambda n: (-(saved[n].seconds or 0.0) * (before == "recompute"), saved[n].used - saved[n].saved)
        )
        at, size, failed = 0, 1, 0
        while at < len(numbers) and failed < PATIENCE:
            choices = list(found.choices)
            for number in numbers[at : at + size]:
                choices[number] = after
            other = predict(saved, choices, limits)
            if other.fits(limits) and _worse(other) <= _worse(found):
                found, at, size, failed = other, at + size, 2 * size, 0
            elif size > 1:
                size //= 2
            else:
                at, failed = at + 1, failed + 1
    return found


def scaled(saved: Sequence[Saved], ratio: float) -> list[Saved]:
    """The same step with ``ratio`` times the tokens, for lengths that were not recorded.

    Bytes grow as the tokens. Times grow between that and its square (attention); the shorter is taken, with which the
    link carries less than it will.
    """
    pace = min(ratio, ratio * ratio)
    return [
        replace(
            tensor, nbytes=round(tensor.nbytes * ratio), saved=tensor.saved * pace, used=tensor.used * pace,
            done=None if tensor.done is None else tensor.done * pace,
            seconds=None if tensor.seconds is None else tensor.seconds * max(ratio, ratio * ratio),
        )
        for tensor in saved
    ]  # fmt: skip


def _queue_out(saved: Sequence[Saved], choices: Sequence[Choice], limits: Limits) -> dict[int, float]:
    """When each offloaded tensor is out."""
    free, out = 0.0, dict[int, float]()
    if min(limits.out_rate, limits.back_rate) <= 0:
        return out
    for number in sorted((n for n, choice in enumerate(choices) if choice == "offload"), key=lambda n: saved[n].saved):
        free = out[number] = max(saved[number].saved, free) + saved[number].nbytes / limits.out_rate
    return out


def _queue_back(saved: Sequence[Saved], out: dict[int, float], limits: Limits) -> dict[int, float]:
    """When to begin fetching each, so late that each is there in time. What would not be out by then is not fetched."""
    free, back = float("inf"), dict[int, float]()
    for number in sorted(out, key=lambda n: saved[n].used, reverse=True):
        start = min(saved[number].used, free) - saved[number].nbytes / limits.back_rate
        if start > out[number]:
            free = back[number] = start
    return back


def _runs(choices: Sequence[Choice]) -> list[list[int]]:
    """Tensors made again that follow each other: all are made together, from the one before the first."""
    runs: list[list[int]] = []
    for number, choice in enumerate(choices):
        if choice == "recompute":
            if number and choices[number - 1] == "recompute":
                runs[-1].append(number)
            else:
                runs.append([number])
    return runs


def _interval(start: float, stop: float, nbytes: int) -> list[tuple[float, int]]:
    return [(start, nbytes), (stop, -nbytes)] if stop > start else []


def most_at_once(changes: list[tuple[float, int]]) -> int:
    """Of ``(time, bytes more)`` in any order: at one time, what goes is gone before what comes."""
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first of ``range(count)`` from which on it holds, or ``count``."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
