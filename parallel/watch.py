"""A thread of every rank that looks at the others while the main thread works; see :mod:`bernini.parallel.launch`.

What it reads and writes is in the store where the processes met:

    person/R    the process of rank R: machine, number, when it was born
    sign/R      its sign of life: [ticks, moves]; moves grow with every beginning and end of a call
    trace/R     [moves, notes of its calls], whenever it has not moved between two ticks
    call/R      the calls that it has begun last, before each call, where a call that does not fit may kill a process
    failed      what ended the run: {rank that speaks, text, code}; the first to write it settles it
    done/R      it has finished; left/R: it knows that all have, and that all have asked the same
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .calls import View, circle, compare
from .group import Group
from .mesh import address
from .trace import Checked, Trace

TICK = 0.5
"""Seconds between looks at the store."""
SILENCE = 30.0
"""Seconds without a sign of life after which a rank on another machine is taken for dead."""
GRACE = 3.0
"""Seconds for a rank to end by itself once the run is over."""
OVERLAP = 3
"""Calls that are published with each. Ranks that talk to each other are not farther apart."""


class Over(BaseException):
    """The run has failed, here or elsewhere. No ``Exception``: nothing can be done about it but to end."""


def ranks_(ranks: Sequence[int]) -> str:
    """In words."""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks))}"


# --- who is alive -----------------------------------------------------------------------------------------------------


def theirs() -> bool:
    """Whether the store is torchrun's own. Else it is rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _machine() -> str:
    """Processes that see each other's numbers have this in common."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _born(pid: int) -> str | None:
    """When a process of this machine was started; ``None`` if it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]


# --- the thread that watches ------------------------------------------------------------------------------------------


class Watch(threading.Thread):
    """A rank's look at the others.

    Args:
        store: of torch.distributed; nobody else waits at this connection.
        rank, size: in the world.
        mortal: whether to publish every call before it is done. gloo ends a process that is sent more than it expects;
            then the others know what it was about to do.
    """

    def __init__(self, store: Any, rank: int, size: int, mortal: bool = False) -> None:
        # No daemon: Python ends those in the middle of a call to the store, which ends the process with an abort.
        super().__init__(name="bernini-watch")
        self.store, self.rank, self.size, self.mortal = store, rank, size, mortal
        self.traces: list[Trace] = []
        self.met = False
        self.over: dict[str, Any] | None = None
        """What ended the run: ``rank`` that speaks, ``text``, ``code`` to exit with."""
        self.unwinding = False
        self._since = 0.0
        self._ticks, self._moves, self._shown = 0, -1, -1
        self._signs: dict[int, tuple[bytes, float]] = {}
        self._persons: dict[int, dict[str, Any]] = {}
        self._circle: tuple[object, list[int]] | None = None
        self._ended = threading.Event()
        self._wake, self.awake = os.pipe()
        os.set_blocking(self.awake, False)
        self.show()
        store.set(f"person/{rank}", json.dumps({"machine": _machine(), "pid": os.getpid(), "born": _born(os.getpid())}))

    # --- what the rank itself does

    def wrap(self, name: str, group: Group, ranks: list[int]) -> Group:
        """A group whose calls are watched."""
        if group.size == 1:
            return group
        # Groups of the same ranks have their calls in common: torch may make one of them.
        trace = next((trace for trace in self.traces if trace.members == tuple(ranks)), None)
        if trace is None:
            trace = Trace(ranks, group.rank)
            self.traces.append(trace)
        return Checked(group, trace, partial(self.begins, trace), name, self.wrap)

    def begins(self, trace: Trace) -> None:
        """A call is about to be done.

        Raises:
            Over: the run is over.
        """
        self.check()
        if self.mortal:
            with suppress(RuntimeError):  # no store: the thread finds out
                self.store.set(f"call/{self.rank}", json.dumps(trace.view(OVERLAP).plain()))

    def check(self) -> None:
        """
        Raises:
            Over: the run is over.
        """
        if self.over is not None:
            raise Over(self.over["text"])

    def until(self, done: Callable[[], bool], seconds: float = float("inf")) -> bool:
        """Waits for something to become true; whether it did."""
        end = time.monotonic() + seconds
        while True:
            try:
                if done():
                    return True
            except RuntimeError:
                self._lost_store()
            self.check()
            if time.monotonic() > end:
                return False
            time.sleep(0.02)

    def fail(self, text: str, code: int = 2) -> None:
        """Ends the run for all ranks, unless it has been ended already: then that is what it ended of."""
        mine = json.dumps({"rank": self.rank, "text": text, "code": code})
        try:
            self.over = json.loads(self.store.compare_set("failed", "", mine))
        except (RuntimeError, ValueError):
            self._lost_store()
        self._since = time.monotonic()

    @property
    def where(self) -> str:
        """The call that this rank is in."""
        views = [trace.view(1) for trace in self.traces]
        return next((f" in {view.where}" for view in views if view.inside), "")

    def missing(self) -> list[int]:
        """Ranks that have died."""
        return [rank for rank in range(self.size) if rank != self.rank and self._dead(rank)]

    def all_have(self, key: str) -> bool:
        """Whether all ranks have set a key of theirs."""
        return bool(self.store.check([f"{key}/{rank}" for rank in range(self.size)]))

    def lost(self) -> bool:
        """Whether some rank has died; then the run is over."""
        if not self.met or not (dead := self.missing()) or self.all_have("left"):
            return False
        where = f"; rank {self.rank} was waiting{self.where}" if self.where else ""
        self.fail(self._autopsy(dead) or f"{ranks_(dead)} of {self.size} died{where}")
        return True

    def end(self) -> None:
        """No more looks."""
        self._ended.set()
        with suppress(OSError):
            os.write(self.awake, b"\\0")
        if threading.current_thread() is not self and self.is_alive():
            self.join(5.0)

    # --- what the thread does

    def run(self) -> None:
        while not self._ended.is_set():
            ready, _, _ = select.select([self._wake], [], [], TICK)
            signals = os.read(self._wake, 64) if ready else b""
            if self._ended.is_set() or not threading.main_thread().is_alive():
                return
            try:
                self.tick()
                if signal.SIGTERM in signals and self.over is None:
                    self._told_to_stop()
                if signal.SIGINT in signals and self.over is None and not self._ended.wait(GRACE):
                    self.fail("interrupted", 128 + signal.SIGINT)  # the main thread cannot heed it
            except (RuntimeError, ValueError):  # torch's errors of stores are RuntimeErrors
                self._lost_store()
            if self.over is not None and not self.unwinding and time.monotonic() > self._since + GRACE:
                leave_now(self.over, self.rank)

    def tick(self) -> None:
        """One sign of life and one look."""
        moves = sum(trace.moves for trace in self.traces)
        idle, self._moves = moves == self._moves, moves
        self._ticks += 1
        self.store.set(f"sign/{self.rank}", json.dumps([self._ticks, moves]))
        if self.over is None and self.store.check(["failed"]):
            self.over, self._since = json.loads(self.store.get("failed")), time.monotonic()
        if idle and self._shown != moves:
            self.show()
        if idle and self.met and self.over is None and not self.lost():
            self.look()

    def show(self) -> None:
        """Publishes the own notes."""
        moves = sum(trace.moves for trace in self.traces)
        views = [trace.view().plain() for trace in self.traces]
        self.store.set(f"trace/{self.rank}", json.dumps([moves, views]))
        self._shown = moves
        if not self._ticks:
            self.store.set(f"sign/{self.rank}", json.dumps([0, moves]))

    def look(self) -> None:
        """Compares the notes of all ranks with the own ones."""
        ranks = range(self.size)
        shown = [json.loads(text) for text in self.store.multi_get([f"trace/{rank}" for rank in ranks])]
        signs = [json.loads(text) for text in self.store.multi_get([f"sign/{rank}" for rank in ranks])]
        views = {rank: [View.read(view) for view in shown[rank][1]] for rank in ranks}
        views[self.rank] = [trace.view() for trace in self.traces]
        if said := disagreement(views, [self.rank]):
            return self.fail(said)
        # A circle counts if nobody in it has moved between two looks: then all were in it at the same time.
        now = {rank: views[rank] for rank in ranks if shown[rank][0] == signs[rank][1]}
        found = circle(now, self.rank)
        members = sorted({view.members[view.rank] for view in found})
        key, ticks = [(rank, signs[rank][1]) for rank in members], [signs[rank][0] for rank in members]
        if found and self._circle is not None and self._circle[0] == key:
            if all(tick > before for tick, before in zip(ticks, self._circle[1], strict=True)):
                self.fail("ranks wait for each other: " + "; ".join(f"{v.who} is in {v.where}" for v in found))
        else:
            self._circle = (key, ticks) if found else None

    def _autopsy(self, dead: Sequence[int]) -> str | None:
        """What a rank disagreed in with another one before it died."""
        views = {self.rank: [trace.view() for trace in self.traces]}
        for rank in range(self.size) if self.mortal else ():
            if rank != self.rank and self.store.check([f"call/{rank}"]):
                views[rank] = [View.read(json.loads(self.store.get(f"call/{rank}")))]
        return disagreement(views, dead)

    def _dead(self, rank: int) -> bool:
        if rank not in self._persons:
            self._persons[rank] = json.loads(self.store.get(f"person/{rank}"))
        person = self._persons[rank]
        if person["machine"] and person["machine"] == _machine():
            return _born(person["pid"]) != person["born"]
        sign, now = self.store.get(f"sign/{rank}"), time.monotonic()
        if rank not in self._signs or self._signs[rank][0] != sign:
            self._signs[rank] = sign, now
        return now - self._signs[rank][1] > SILENCE

    def _told_to_stop(self) -> None:
        """torchrun ends all ranks when one has ended: that is the news then."""
        end = time.monotonic() + 1.0
        while self.met and time.monotonic() < end and self.over is None:
            self.tick()
            if self.over is not None or self.lost():
                return
            time.sleep(0.05)
        if self.over is None:
            self.fail(f"rank {self.rank} of {self.size} was told to stop (SIGTERM){self.where}", 128 + signal.SIGTERM)

    def _lost_store(self) -> None:
        """Without a store nobody can settle who speaks: rank 0 does, or rank 1 if the store was rank 0's."""
        if self.over is None:
            speaks = 0 if theirs() or not self.met else 1
            gone = "torchrun" if speaks == 0 else "rank 0"
            text = (
                f"{gone} died, or cannot be reached any more at {address()}; rank {self.rank} was waiting{self.where}"
            )
            self.over, self._since = {"rank": speaks, "text": text, "code": 2}, time.monotonic()


def disagreement(views: Mapping[int, Sequence[View]], ranks: Iterable[int]) -> str | None:
    """What some ranks and any others do not agree in.

    Args:
        views: of each rank's groups.
        ranks: the ones that are compared with all others.
    """
    for rank in ranks:
        for one in views.get(rank, ()):
            for other in (view for peer in one.members if peer != rank for view in views.get(peer, ())):
                if one.members == other.members and (said := compare(one, other)):
                    return said
    return None


def leave_now(over: Mapping[str, Any], rank: int) -> NoReturn:
    """Ends this process without unwinding: its main thread is waiting for what will not come."""
    if over["rank"] == rank:
        restore = "\033[?25h" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
        print(f"{restore}bernini: {over['text']}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(over["code"])
