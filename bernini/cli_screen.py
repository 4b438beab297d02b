"""What a person sees while a command works: a progress bar, our warnings, nothing of the libraries' chatter."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import TaskID


def say(text: str) -> None:
    """A line on standard error, so that standard output is only what was made."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error: the stage, steps, seconds per step and time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class SecondsPerStep(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{(task.elapsed or 0.0) / task.completed:.1f} s/step" if task.completed else "")

    columns = (
        TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), SecondsPerStep(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for before in list(tasks.values())[-1:]:
                    if bar.tasks[before].stop_time is None:  # over, without having said so
                        bar.update(before, completed=bar.tasks[before].total)
                        bar.stop_task(before)
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)
            if done >= total:
                bar.stop_task(tasks[stage])

        yield report


class Stopwatch:
    """Passes progress on, and keeps how long each stage took; what lies between stages is ``"rest"``."""

    PLANNER = ("seeing", "planning")

    def __init__(self, report: Callable[[str, int, int], None]) -> None:
        self._report, self._stage, self._since = report, "rest", time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        # A stage that has done something ran before it said so.
        self._add(stage if self._stage == "rest" and done else self._stage)
        self._stage = "rest" if done >= total else stage
        self._report(stage, done, total)

    def _add(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now

    def summary(self) -> str:
        """Seconds of each stage, of all, the planner's share if there was one, and the process's peak of memory."""
        self._add(self._stage)
        total = sum(self.seconds.values())
        order = [*(name for name in self.seconds if name != "rest"), "rest"]
        parts = ", ".join(f"{name} {self.seconds[name]:.1f} s" for name in order if name in self.seconds)
        planner = sum(self.seconds.get(name, 0.0) for name in self.PLANNER)
        share = f", {planner / total:.0%} of it the planner's" if planner else ""
        return f"{parts}; {total:.1f} s in all{share}; peak memory {peak_memory()}"


def peak_memory() -> str:
    """The most that this process has had in memory, and on a GPU if it used one."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", on the GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    return text


@contextmanager
def own_warnings() -> Iterator[None]:
    """Shows our warnings as one line each, and none of the libraries'.

    Whose a warning is tells the code that gave it: the file a warning names is its caller's, perhaps torch's.
    """
    if sys.warnoptions:  # somebody who asks Python for warnings gets Python's
        yield
        return

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
            frame = frame.f_back
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "bernini":
            say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def quiet_libraries() -> None:
    """Keeps the libraries' own bars and notices off the screen."""
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
