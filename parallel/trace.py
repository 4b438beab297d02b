"""Groups whose calls are noted and compared: ranks that disagree end with a sentence instead of waiting forever.

:mod:`bernini.parallel.calls` says what is noted, and how two ranks' notes are compared.

In one process (:func:`simulate`) ranks look at each other before each call. Between processes nobody waits for it:
:mod:`bernini.parallel.watch` publishes the notes of a rank that has not moved for half a second, and looks at the
others'.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from types import CodeType
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from . import simulated
from .calls import Call, Mismatch, Note, View, compare
from .group import Group, Message, Pending

KEPT = 32
"""How many of the last calls are kept in words. Checksums remember all."""


class Trace:
    """A rank's notes of its calls with others.

    Args:
        members: ranks that work together, as numbered in the world.
        rank: the own one, among the members.
    """

    def __init__(self, members: Sequence[int], rank: int) -> None:
        self.members, self.rank = tuple(members), rank
        self.moves = 0
        """Grows with every beginning and end of a call."""
        self.ended = False
        self._lock = threading.Lock()
        self._calls: deque[Call] = deque(maxlen=KEPT)
        self._inside: Call | None = None
        self._number, self._common = 0, 0
        self._sent, self._received = [0] * len(members), [0] * len(members)

    def begin(self, kind: str, sends: Sequence[Note], receives: Sequence[Note], everyone: bool) -> Call:
        """Notes a call.

        Args:
            sends, receives: messages; those without elements are left out, as nobody sends them.
            everyone: whether all ranks have to make the call before it ends, or only those that messages come from.
        """
        compared, what = _caller(kind)
        sends, receives = (tuple(note for note in notes if note.elements) for notes in (sends, receives))
        with self._lock:
            self._number += 1
            self.moves += 1
            self._common = hash((self._common, compared))
            for sums, notes in ((self._sent, sends), (self._received, receives)):
                for rank, dtype, _, elements in notes:
                    sums[rank] = hash((sums[rank], self._number, _KINDS[dtype], elements))
            needs = dict.fromkeys(range(len(self.members)) if everyone else [note.rank for note in receives])
            needs.pop(self.rank, None)
            sums_now = tuple(self._sent), tuple(self._received)
            call = Call(self._number, what, self._common, *sums_now, sends, receives, tuple(needs))
            self._calls.append(call)
            self._inside = call
            return call

    def resume(self, call: Call) -> None:
        """A call that was begun is waited for."""
        with self._lock:
            self.moves += 1
            self._inside = call

    def end(self) -> None:
        """The call that was begun has ended, or is on its way and nobody waits for it."""
        with self._lock:
            self.moves += 1
            self._inside = None

    def view(self, last: int = KEPT) -> View:
        """The notes as they are now, with so many of the last calls."""
        with self._lock:
            inside, first = self._inside, self._number - last + 1
            calls = [call for call in self._calls if call.number >= first]
            if inside is not None and inside.number < first:  # begun long ago
                calls.insert(0, inside)
            return View(self.members, self.rank, tuple(calls), inside.number if inside else 0, self.ended)


_HERE = __name__.rpartition(".")[0]
_CALLERS: dict[tuple[str | CodeType, ...], tuple[int, str]] = {}


def _caller(kind: str) -> tuple[int, str]:
    """(a number for what all ranks have in common, what people read) of who calls a group.

    Compared are the functions of this package on the way to the group. What called those may differ: a rank without
    samples gets there by another way.
    """
    frame = sys._getframe(3)  # behind this, begin and Checked
    codes, names = [frame.f_code], [frame.f_globals.get("__name__", "")]
    while frame.f_back is not None and names[-1].startswith(_HERE) and len(codes) < 4:
        frame = frame.f_back
        codes.append(frame.f_code)
        names.append(frame.f_globals.get("__name__", ""))
    key: tuple[str | CodeType, ...] = (kind, *codes)
    if key not in _CALLERS:
        labels = [f"{name.rpartition('.')[2]}.{code.co_qualname}" for name, code in zip(names, codes, strict=True)]
        inner = [label for name, label in zip(names, labels, strict=True) if name.startswith(_HERE)]
        told = f"{kind} by {' < '.join(labels)}".replace("<locals>.", "")
        _CALLERS[key] = crc32(f"{kind} {inner}".encode()), told
    return _CALLERS[key]


# Numbers, not texts, are hashed: texts hash differently in every process.
_DTYPES = {dtype: str(dtype)[6:] for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_KINDS = {name: crc32(name.encode()) for name in _DTYPES.values()}


def _noted(messages: Sequence[Message]) -> list[Note]:
    return [Note(rank, _DTYPES[tensor.dtype], tensor.shape, tensor.numel()) for rank, tensor in messages]


@dataclass(frozen=True)
class _Noted:
    """What is on its way by a call."""

    pending: Pending
    trace: Trace
    call: Call

    def wait(self) -> None:
        self.trace.resume(self.call)
        self.pending.wait()
        self.trace.end()


@dataclass(frozen=True)
class Checked:
    """A group whose calls are noted.

    Args:
        group: does what is asked.
        trace: where it is noted.
        look: called with every call noted and before it is done; raises if the run is over.
        name: of the group.
        wrap: makes of a group of some of the ranks, from its name and its ranks in the world, one that is noted too.
    """

    group: Group
    trace: Trace
    look: Callable[[], None]
    name: str = "group"
    wrap: Callable[[str, Group, list[int]], Group] = lambda name, group, ranks: group
    made: dict[range, Group | None] = field(default_factory=dict, repr=False)
    """Of :meth:`parts`: the same ranks get the same group again, as without notes."""

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def size(self) -> int:
        return self.group.size

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.trace.begin(f"{self.name}.exchange", _noted(sends), _noted(receives), everyone=False)
        self.look()
        self.group.exchange(sends, receives)
        self.trace.end()

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        call = self.trace.begin(f"{self.name}.start", _noted(sends), _noted(receives), everyone=False)
        self.look()
        pending = self.group.start(sends, receives)
        self.trace.end()
        return _Noted(pending, self.trace, call)

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        dtype, rest = _DTYPES[rows.dtype], tuple(rows.shape[1:])
        others = [rank for rank in range(self.size) if rank != self.rank]
        sends = [Note(rank, dtype, rows.shape, rows.numel()) for rank in others]
        receives = [Note(rank, dtype, (sizes[rank], *rest), sizes[rank] * prod(rest)) for rank in others]
        self.trace.begin(f"{self.name}.gather", sends, receives, everyone=False)
        self.look()
        whole = self.group.gather(rows, sizes)
        self.trace.end()
        return whole

    def tell(self, thing: Any) -> list[Any]:
        self.trace.begin(f"{self.name}.tell", (), (), everyone=True)
        self.look()
        found = self.group.tell(thing)
        self.trace.end()
        return found

    def parts(self, ranges: Sequence[range]) -> list[Group | None]:
        self.trace.begin(f"{self.name}.parts", (), (), everyone=True)
        self.look()
        made = self.group.parts(ranges)
        self.trace.end()
        for ranks, part in zip(ranges, made, strict=True):
            if ranks not in self.made:
                name, members = f"{self.name}[{ranks[0]}-{ranks[-1]}]", [self.trace.members[at] for at in ranks]
                self.made[ranks] = part and self.wrap(name, part, members)
        return [self.made[ranks] for ranks in ranges]


def simulate(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """:func:`bernini.parallel.simulated.simulate` with ranks that are compared before each call: nothing hangs.

    Raises:
        Mismatch: ranks do not ask the same of each other.
        Exception: the first that a rank raised.
    """
    traces: list[list[Trace]] = [[] for _ in range(size)]
    one_looks = threading.Lock()

    def look(rank: int, own: Trace) -> None:
        # Both of two ranks that disagree are noted before they look, so the later one sees it.
        with one_looks:
            for other in (trace for at, theirs in enumerate(traces) if at != rank for trace in theirs):
                if other.members == own.members and (said := compare(own.view(), other.view())):
                    raise Mismatch(said)

    def checked(world: Group) -> Any:
        rank = world.rank

        def wrap(name: str, group: Group, ranks: list[int]) -> Group:
            trace = Trace(ranks, group.rank)
            with one_looks:
                traces[rank].append(trace)
            return Checked(group, trace, lambda: look(rank, trace), name, wrap)

        result = work(wrap("group", world, list(range(size))))
        for trace in traces[rank]:
            trace.ended = True
            look(rank, trace)
        return result

    return simulated.simulate(size, checked)
