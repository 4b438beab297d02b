"""What a person sees while a command works: a progress bar, our warnings, nothing of the libraries' chatter."""

from __future__ import annotations

import sys
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
