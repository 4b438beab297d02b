"""What was done with memory, in order, and what each action surely comes after: the log that ``checker.py`` replays.

An action comes after the one before it on its stream, after the recording of an event that its stream waited for, and
after what the host had seen finished when it asked for the action. It does *not* come after everything that was asked
for earlier: a GPU's streams run beside each other, and so this log says the same on every backend, whatever order the
backend happened to work in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock

HOST = "host"
"""The stream of what the host itself sees: events that it waited for, and host memory that it gives back."""


@dataclass(frozen=True, slots=True)
class Action:
    """One line of the log.

    Args:
        number: place in the log, from 0.
        kind: ``adopt`` (device memory that the stream has written), ``new`` (memory, its bytes unknown), ``copy`` (into
            the first buffer from the second), ``free``, ``record``, ``wait``, ``synchronize``; and of tensors
            that autograd saved: ``save``, ``give`` (one of them back), ``forget`` (autograd no longer wants it).
        stream: name of the stream that it runs on.
        after: numbers of the actions that it comes directly after.
        buffers: numbers of the buffers.
        saved: number of the saved tensor.
        span: for ``adopt``, where the buffer begins and ends in its storage; for ``save``, where the tensor does; for
            ``give``, where it was taken from in the buffer. In bytes.
        storage: for ``adopt`` and ``save``: an identity of the storage at its version.
        event: for ``record``, ``wait`` and ``synchronize``: number of the recording.
    """

    number: int
    kind: str
    stream: str
    after: tuple[int, ...] = ()
    buffers: tuple[int, ...] = ()
    saved: int | None = None
    span: tuple[int, int] = (0, 0)
    storage: tuple[int, ...] = ()
    event: int | None = None

    def __str__(self) -> str:
        what = {"copy": "copy into buffer {} from buffer {}"}.get(self.kind, f"{self.kind} of buffer {{}}")
        text = what.format(*self.buffers) if self.buffers else self.kind
        return f"action {self.number} ({text} on {self.stream})"


class Log:
    """The latest actions, at most ``limit`` of them (None: all). Safe to write from any thread."""

    def __init__(self, limit: int | None = 10_000) -> None:
        self._actions: deque[Action] = deque(maxlen=limit)
        self._last: dict[str, int] = {}
        self._count = 0
        self._lock = Lock()

    def add(
        self, kind: str, stream: str, *buffers: int, event: int | None = None, saved: int | None = None,
        span: tuple[int, int] = (0, 0), storage: tuple[int, ...] = (),
    ) -> int:  # fmt: skip
        """Appends an action and returns its number."""
        with self._lock:
            after = {self._last.get(stream), self._last.get(HOST), event} - {None}
            number, self._count = self._count, self._count + 1
            known = tuple(sorted(one for one in after if one is not None))
            self._actions.append(Action(number, kind, stream, known, buffers, saved, span, storage, event))
            self._last[stream] = number
            return number

    def __iter__(self) -> Iterator[Action]:
        with self._lock:
            return iter(list(self._actions))

    def __len__(self) -> int:
        return len(self._actions)
