"""What ranks asked of each other, and whether it was the same.

Every call with the same ranks has a number, and running checksums of what it was: of its kind and caller, which all
ranks have in common, and of the messages to and from each other rank, which two of them have in common. Checksums
include all calls before, so one look at the last call that two ranks both made tells whether they ever disagreed, and
a look at any time is right: ranks may be far apart, and what one reads of another may be old.

Source: facts on systems, section 4.3 (a collective-trace checker that compares ranks and fails fast).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Note(NamedTuple):
    """A message without its content."""

    rank: int
    dtype: str
    shape: tuple[int, ...]
    elements: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Mismatch(RuntimeError):
    """Ranks do not ask the same of each other. The message says which rank did what, at which call."""


class Call(NamedTuple):
    """
    Args:
        number: from 1, among the calls with the same ranks.
        what: kind and caller.
        common: checksum of kinds and callers up to here.
        sent, received: checksums of messages up to here, for each member.
        sends, receives: this call's messages.
        needs: members that have to make this call before it can end.
    """

    number: int
    what: str
    common: int
    sent: tuple[int, ...]
    received: tuple[int, ...]
    sends: tuple[Note, ...]
    receives: tuple[Note, ...]
    needs: tuple[int, ...]

    def told(self, peer: int) -> str:
        """In words, as far as it concerns one other rank."""
        words = [self.what]
        for way, notes in (("sends it", self.sends), ("expects from it", self.receives)):
            if found := [str(note) for note in notes if note.rank == peer]:
                words.append(f"{way} {' and '.join(found)}")
        return ", ".join(words)

    @classmethod
    def read(cls, plain: list[Any]) -> Call:
        """From JSON."""
        call = cls(*map(_frozen, plain))
        return call._replace(sends=_notes(call.sends), receives=_notes(call.receives))


@dataclass(frozen=True)
class View:
    """What a rank's notes were at some time.

    Args:
        members: ranks that work together, as numbered in the world.
        rank: the one whose notes these are, among the members.
        calls: the last ones.
        inside: number of the call that has not ended; 0 if there is none. Behind it others may have been begun that are
            on their way.
        ended: whether there will be no more.
    """

    members: tuple[int, ...]
    rank: int
    calls: tuple[Call, ...] = ()
    inside: int = 0
    ended: bool = False

    @property
    def number(self) -> int:
        """Of the last call."""
        return self.calls[-1].number if self.calls else 0

    @property
    def who(self) -> str:
        return f"rank {self.members[self.rank]}"

    def call(self, number: int) -> Call | None:
        """The call of that number, if it is among the last."""
        return next((call for call in self.calls if call.number == number), None)

    @property
    def where(self) -> str:
        """In words the call that has not ended, or else the last one."""
        call = self.call(self.inside or self.number)
        return f"call {call.number}, {call.what}" if call else ""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.__dict__, "calls": [list(call) for call in self.calls]}

    @classmethod
    def read(cls, plain: dict[str, Any]) -> View:
        calls = tuple(map(Call.read, plain["calls"]))
        return cls(**{**plain, "members": tuple(plain["members"]), "calls": calls})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _notes(plain: Iterable[Any]) -> tuple[Note, ...]:
    return tuple(Note(*note) for note in plain)


def compare(one: View, other: View) -> str | None:
    """What two ranks that work together disagree in, in words; ``None`` as long as they do not.

    One may be behind the other. That is a difference only if it has ended.
    """
    if one.ended and (not other.ended or one.number < other.number):
        one, other = other, one
    if other.ended and one.number > other.number:
        return (
            f"{one.who} is in {one.where}, while {other.who} has ended after {other.number} "
            f"call{'' if other.number == 1 else 's'}"
        )
    mine, theirs = ({call.number: call for call in view.calls} for view in (one, other))
    both = sorted(mine.keys() & theirs.keys())
    differ = [number for number in both[-1:] if _differ(mine[number], theirs[number], one.rank, other.rank)]
    if not differ:
        return None
    first = next(number for number in both if _differ(mine[number], theirs[number], one.rank, other.rank))
    before = " or before it" if first == both[0] and first > 1 else ""
    return (
        f"ranks disagree in call {first}{before}: "
        f"{one.who} is in {mine[first].told(other.rank)}; {other.who} is in {theirs[first].told(one.rank)}"
    )


def _differ(call: Call, other: Call, rank: int, peer: int) -> bool:
    return (
        call.common != other.common
        or call.sent[peer] != other.received[rank]
        or call.received[peer] != other.sent[rank]
    )


def circle(views: Mapping[int, Sequence[View]], start: int) -> list[View]:
    """Ranks that wait for each other in different groups, each for the next and the last for the first.

    Args:
        views: by rank in the world, of one and the same moment.
        start: whence to look.

    Returns:
        the call that each is in; empty if there is no such circle.
    """

    def walk(rank: int, path: list[tuple[int, View]]) -> list[View]:
        seen = [at for at, _ in path]
        if rank in seen:
            return [view for _, view in path[seen.index(rank) :]]
        inside = next((view for view in views.get(rank, ()) if view.inside), None)
        if inside is None:
            return []
        call = inside.call(inside.inside)
        for need in call.needs if call else ():
            other = inside.members[need]
            if _behind(views.get(other, ()), inside) and (found := walk(other, [*path, (rank, inside)])):
                return found
        return []

    return walk(start, [])


def _behind(views: Iterable[View], call: View) -> bool:
    return any(view.members == call.members and view.number < call.inside for view in views)
