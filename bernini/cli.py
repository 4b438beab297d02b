"""The command line. Heavy libraries are imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, cli_convert, cli_data, cli_estimate, cli_eval, cli_export, cli_generate, cli_train
from .cli_options import Parser, add_generate, count, parse, seed
from .cli_screen import own_warnings, progress_bar, quiet_libraries
from .errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 1 where ``inspect`` or ``doctor`` found something broken, 2 for bad use or bad input, 130 when
        interrupted.
    """
    if "RANK" in os.environ:  # one of several processes: without the C++ stacks of those who lose each other
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    parser, commands = _parsers()
    args = parse(parser, commands, sys.argv[1:] if argv is None else argv)
    try:
        with own_warnings():
            return args.run(args)
    except UserError as error:
        print(f"bernini {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bernini {args.command}: interrupted", file=sys.stderr)
        return 130


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(prog="bernini", description="Generate and edit video.")
    parser.add_argument("--version", action="version", version=f"bernini {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make or edit a video or an image")
    add_generate(generate)
    generate.set_defaults(run=cli_generate.run)

    init = commands.add_parser("init", help="write a small checkpoint with random weights")
    init.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    init.add_argument("--size", choices=["toy", "toy-full", "toy-start"], default="toy",
                      help="toy: a renderer; toy-full: a bundle with a planner; toy-start: what the shipped toy was "
                      "trained from (default: toy)")  # fmt: skip
    init.add_argument("--seed", type=seed, default=0, help="seed of the weights (default: 0)")
    init.set_defaults(run=_init)

    inspect = commands.add_parser("inspect", help="tell what a checkpoint holds and what is wrong with it")
    inspect.add_argument("folder", type=Path, metavar="DIR", help="a checkpoint folder")
    inspect.set_defaults(run=_inspect)

    cli_data.add(commands)
    cli_train.add(commands)
    cli_convert.add(commands)
    cli_export.add(commands)
    cli_eval.add(commands)
    cli_estimate.add(commands)

    doctor = commands.add_parser("doctor", help="tell what this machine can run, and why not more")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="send drawn scenes through every task of the shipped toy")
    demo.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="folder (default: demo)")
    demo.add_argument("--steps", type=count, help="sampling steps (default: the preset's)")
    demo.set_defaults(run=_demo)
    return parser, commands.choices


def _init(args: argparse.Namespace) -> int:
    from .toy import write_toy
    from .toy_full import write_toy_full
    from .toy_start import write_toy_start

    quiet_libraries()
    write = {"toy": write_toy, "toy-full": write_toy_full, "toy-start": write_toy_start}[args.size]
    try:
        folder = write(args.folder, seed=args.seed)
    except OSError as error:
        raise UserError(str(error)) from error
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: a {args.size} checkpoint with random weights, {size / 2**20:.1f} MiB")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from .inspect import inspect, render
    from .layouts import resolve

    report = inspect(resolve(args.folder))
    print(render(report))
    return 1 if report.problems else 0


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine, render

    findings = examine()
    print(render(findings))
    return 1 if any(finding.broken for finding in findings) else 0


def _demo(args: argparse.Namespace) -> int:
    from .demo import CAPTION, run

    quiet_libraries()
    with progress_bar() as progress:
        paths = run(args.output, steps=args.steps, progress=progress)
    print(CAPTION)
    for name, path in paths.items():
        print(f"{name:>8}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
