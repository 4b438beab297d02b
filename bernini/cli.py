"""The command line. Heavy libraries are imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .errors import UserError

if TYPE_CHECKING:
    from rich.progress import TaskID


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for bad use or bad input, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"bernini {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bernini {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bernini", description="Generate and edit video.")
    parser.add_argument("--version", action="version", version=f"bernini {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="edit a video by a prompt")
    generate.add_argument("--model", required=True, type=Path, metavar="DIR", help="checkpoint folder")
    generate.add_argument("--prompt", required=True, help="what to do")
    generate.add_argument("--video", required=True, type=Path, metavar="IN.mp4", help="source video")
    generate.add_argument("--output", required=True, type=Path, metavar="OUT.mp4", help="where to write the result")
    generate.add_argument("--steps", type=_positive, help="sampling steps (default: the task's preset)")
    generate.add_argument("--seed", type=int, default=42, help="seed of the noise (default: 42)")
    generate.add_argument("--size", type=_size, metavar="HxW", help="pixels, multiples of 16 (default: the source's)")
    generate.add_argument("--num-frames", type=_positive, default=81, help="at most so many frames (default: 81)")
    generate.set_defaults(run=_generate)

    init = commands.add_parser("init", help="write a small checkpoint with random weights")
    init.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    init.add_argument("--size", choices=["toy"], default="toy", help="which model (default: toy)")
    init.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    init.set_defaults(run=_init)

    demo = commands.add_parser("demo", help="send a small clip through the whole renderer")
    demo.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="folder (default: demo)")
    demo.add_argument("--steps", type=_positive, default=6, help="sampling steps (default: 6)")
    demo.set_defaults(run=_demo)
    return parser


# --- commands -------------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> None:
    from .media import check_output, write_video

    check_output(args.output)
    from .pipeline import Bernini

    _quiet_libraries()
    model = Bernini.from_pretrained(args.model)
    with _progress() as progress:
        clip = model(
            args.prompt, videos=[args.video], steps=args.steps, seed=args.seed, size=args.size,
            num_frames=args.num_frames, progress=progress,
        )  # fmt: skip
    write_video(args.output, clip.frames, clip.fps)
    frames, height, width, _ = clip.frames.shape
    print(f"{args.output}: {frames} frames of {height}x{width}")


def _init(args: argparse.Namespace) -> None:
    from .toy import write_toy

    _quiet_libraries()
    try:
        folder = write_toy(args.folder, seed=args.seed)
    except OSError as error:
        raise UserError(str(error)) from error
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: a {args.size} checkpoint with random weights, {size / 2**20:.1f} MiB")


def _demo(args: argparse.Namespace) -> None:
    from .demo import CAPTION, run

    _quiet_libraries()
    with _progress() as progress:
        paths = run(args.output, steps=args.steps, progress=progress)
    print(CAPTION)
    for name, path in paths.items():
        print(f"{name:>8}: {path}")


# --- options and output ---------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HxW, e.g. 480x848")
    height, width = (int(part) for part in parts)
    if min(height, width) < 16 or height % 16 or width % 16:
        nearest = "x".join(str(max(16, round(value / 16) * 16)) for value in (height, width))
        raise argparse.ArgumentTypeError(f"{text}: both sides must be multiples of 16; the nearest is {nearest}")
    return height, width


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
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
                for task in tasks.values():  # the stage before is over
                    bar.update(task, completed=bar.tasks[task].total)
                    bar.stop_task(task)
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


def _quiet_libraries() -> None:
    """Keeps the libraries' own bars and notices off the screen."""
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
