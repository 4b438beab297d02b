"""``bernini export RUN OUTPUT``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .cli_screen import quiet_libraries, say
from .errors import UserError


def add(commands: Any) -> None:
    """The command's options."""
    export = commands.add_parser(
        "export", help="write the model of a run's last checkpoint",
        description="Writes the averaged weights of a run's last checkpoint as a whole model, in the layout of the one "
        "that the run started from. The run may go on meanwhile.",
    )  # fmt: skip
    export.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    export.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder")
    export.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    quiet_libraries()
    if args.output.exists():
        raise UserError(f"{args.output} exists already; choose a new folder")
    from .training.export import export_run

    step = export_run(args.folder, args.output)
    say(f"the model after step {step}")
    print(args.output)
    return 0
