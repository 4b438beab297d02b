"""Replays a log of transfers and names every rule that it breaks.

The rules are about what *may* happen, not what did: two actions on the same bytes, one of which changes them, must be
ordered by the log's happens-before edges (vector clocks; Lamport 1978, Fidge 1988). What a backend happened to do in
order is no excuse. That finds on a CPU, in any run, the races that a GPU shows once in a while.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .log import Action

READ_EARLY = "read before it is written"
OTHER_STREAM = "read after a wait for another stream than the one that wrote it"
STALE_WAIT = "the wait is for an event from before the copy"
WRITE_EARLY = "written while it may still be read or written"
NOT_THERE = "used before its memory is free for it"
FREED_EARLY = "freed while it may still be in use"
GONE = "used after it was freed"
WANTED = "freed while a saved tensor needs it"
WRONG_BYTES = "other bytes given back than were saved"
TWICE = "freed twice"


@dataclass(frozen=True)
class Violation:
    """A rule that is broken.

    Args:
        rule: one of this module's texts.
        first, second: the actions that lack an order, or the one that is wrong with the one that makes it so.
    """

    rule: str
    first: Action
    second: Action

    def __str__(self) -> str:
        return f"{self.rule}: {self.first}, then {self.second}"


@dataclass
class _Buffer:
    begun: Action
    writes: list[Action] = field(default_factory=list)
    reads: list[Action] = field(default_factory=list)
    freed: Action | None = None
    holds: tuple[tuple[int, ...], int, int] | None = None  # (storage, start, stop) of the bytes in it


def check(log: Iterable[Action]) -> list[Violation]:
    """Every broken rule, in the order of the log. Buffers whose beginning the log no longer has are left out."""
    return _Replay().run(log)


class _Replay:
    def __init__(self) -> None:
        self.clocks: dict[int, dict[str, int]] = {}
        self.buffers: dict[int, _Buffer] = {}
        self.alive: dict[int, _Buffer] = {}
        self.saves: dict[int, Action] = {}
        self.waits: dict[str, list[Action]] = {}
        self.found: list[Violation] = []

    def run(self, log: Iterable[Action]) -> list[Violation]:
        for action in log:
            clock: dict[str, int] = {}
            for before in action.after:
                for stream, tick in self.clocks.get(before, {}).items():
                    clock[stream] = max(clock.get(stream, -1), tick)
            clock[action.stream] = action.number
            self.clocks[action.number] = clock
            getattr(self, f"_{action.kind}", self._nothing)(action)
        return self.found

    def ordered(self, first: Action, second: Action) -> bool:
        return self.clocks[second.number].get(first.stream, -1) >= first.number

    def say(self, rule: str, first: Action, second: Action) -> None:
        self.found.append(Violation(rule, first, second))

    def _nothing(self, action: Action) -> None:
        pass

    def _wait(self, action: Action) -> None:
        self.waits.setdefault(action.stream, []).append(action)

    def _adopt(self, action: Action) -> None:
        buffer = _Buffer(action, writes=[action])
        buffer.holds = (action.storage, *action.span)
        self.buffers[action.buffers[0]] = self.alive[action.buffers[0]] = buffer

    def _new(self, action: Action) -> None:
        self.buffers[action.buffers[0]] = self.alive[action.buffers[0]] = _Buffer(action)

    def _copy(self, action: Action) -> None:
        out, source = (self.buffers.get(number) for number in action.buffers)
        if source is not None:
            self._reads(source, action)
        if out is not None:
            self._alive(out, action)
            for earlier in (*out.writes, *out.reads):
                if not self.ordered(earlier, action):
                    self.say(WRITE_EARLY, earlier, action)
            out.writes.append(action)
            out.holds = None if source is None else source.holds

    def _reads(self, buffer: _Buffer, action: Action) -> None:
        self._alive(buffer, action)
        for write in buffer.writes:
            if not self.ordered(write, action):
                self.say(self._why(buffer, write, action), write, action)
        buffer.reads.append(action)

    def _why(self, buffer: _Buffer, write: Action, read: Action) -> str:
        """Nobody waited; or somebody waited for what was recorded too soon, or on another stream."""
        for wait in self.waits.get(read.stream, []):
            event = -1 if wait.event is None else wait.event
            if event not in self.clocks or event <= buffer.begun.number:
                continue
            if self.clocks[event].get(write.stream) == event:
                if event < write.number:
                    return STALE_WAIT
            elif write.kind == "adopt" and wait.number < read.number:
                return OTHER_STREAM
        return READ_EARLY

    def _alive(self, buffer: _Buffer, action: Action) -> None:
        if buffer.freed is not None:
            self.say(GONE, buffer.freed, action)
        if not self.ordered(buffer.begun, action) and not buffer.writes:
            self.say(NOT_THERE, buffer.begun, action)

    def _free(self, action: Action) -> None:
        buffer = self.buffers.get(action.buffers[0])
        if buffer is None:
            return
        if buffer.freed is not None:
            self.say(TWICE, buffer.freed, action)
        for earlier in (*buffer.writes, *buffer.reads):
            if not self.ordered(earlier, action):
                self.say(FREED_EARLY, earlier, action)
        buffer.freed = action
        self.alive.pop(action.buffers[0], None)
        for save in self.saves.values():
            if _has(buffer, save) and not any(_has(other, save) for other in self.alive.values()):
                self.say(WANTED, save, action)

    def _save(self, action: Action) -> None:
        if action.saved is not None:
            self.saves[action.saved] = action

    def _forget(self, action: Action) -> None:
        if action.saved is not None:
            self.saves.pop(action.saved, None)

    def _give(self, action: Action) -> None:
        buffer = self.buffers.get(action.buffers[0])
        if buffer is None:
            return
        self._reads(buffer, action)
        save = None if action.saved is None else self.saves.get(action.saved)
        if save is None or buffer.holds is None:
            return
        storage, start, _ = buffer.holds
        if (storage, start + action.span[0], start + action.span[1]) != (save.storage, *save.span):
            self.say(WRONG_BYTES, save, action)


def _has(buffer: _Buffer, save: Action) -> bool:
    """Whether a saved tensor's bytes are in the buffer."""
    if buffer.holds is None:
        return False
    storage, start, stop = buffer.holds
    return storage == save.storage and start <= save.span[0] and save.span[1] <= stop
