"""``bernini convert SOURCE OUTPUT``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .cli_options import DTYPES
from .cli_screen import progress_bar, quiet_libraries, say


def add(commands: Any) -> None:
    """The command's options."""
    convert = commands.add_parser(
        "convert", help="write a checkpoint once more, to be mapped into memory",
        description="Writes a released checkpoint in the type that it will run in, one file per part, without what is "
        "not used. The folder is a checkpoint like any other; with generate --memory its blocks stream without a cast. "
        "Interrupted, the same command goes on; when all is done, it checks every file.",
    )  # fmt: skip
    convert.add_argument("source", metavar="SOURCE", help="checkpoint folder, or owner/name on the hub")
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder, or one that was begun")
    convert.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: bfloat16)")
    convert.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    quiet_libraries()
    import torch

    from .convert import convert
    from .layouts import resolve

    with progress_bar() as progress:
        counts = convert(resolve(args.source), args.output, getattr(torch, args.dtype), progress)
    parts = (f"{counts[what]} file{'' if counts[what] == 1 else 's'} {what}" for what in ("written", "checked"))
    say(f"{', '.join(parts)}; {counts['bytes'] / 1e9:.2f} GB")
    print(args.output)
    return 0
