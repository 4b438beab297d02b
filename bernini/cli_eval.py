"""``bernini eval toy``: a model on the held-out part of the synthetic world -> tables and a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .cli_options import count, seed
from .cli_screen import progress_bar, quiet_libraries, say
from .errors import UserError

SHIPPED = Path(__file__).parent / "assets/toy"


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser = commands.add_parser("eval", help="measure a small model on the held-out part of the synthetic world")
    parser.add_argument("world", choices=["toy"], help="what it is measured on: the synthetic world of 32x32 pixels")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: the shipped toy)")
    parser.add_argument("--output", type=Path, default=Path("eval"), metavar="DIR",
                        help="folder; a run that was interrupted goes on there (default: eval)")  # fmt: skip
    parser.add_argument("--count", type=count, default=40, metavar="N", help="samples of each row (default: 40)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="t2v, v2v, v2v:recolor, ... (default: all)")
    parser.add_argument("--steps", type=count, metavar="N", help="sampling steps (default: the preset's)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N",
                        help="seed of the noise; the samples are always the same (default: 0)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes ``results.jsonl``, ``report.md`` and ``grid.png``, and prints the tables.

    Raises:
        UserError: no such model or task, no scikit-learn, or an output folder that holds other results.
    """
    folder = SHIPPED if args.model is None else args.model
    if not folder.is_dir():
        raise UserError(
            "no model is shipped with this installation; give --model DIR" if args.model is None
            else f"{folder}: no such folder"
        )  # fmt: skip
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError("eval needs scikit-learn, whose digits are drawn: pip install 'bernini[train]'") from None
    from rich.console import Console

    from .evaluation import report
    from .evaluation.suite import TASKS, cells, evaluate, generator, reconstruction
    from .pipeline import Bernini

    tasks = args.tasks or TASKS
    cells(tasks)  # says what is wrong with them before anything is loaded
    quiet_libraries()
    model = Bernini.from_pretrained(folder)
    settings = {"model": fingerprint(folder), "steps": args.steps, "seed": args.seed}
    with progress_bar() as progress:
        results = evaluate(
            generator(model, steps=args.steps, seed=args.seed), tasks=tasks, count=args.count,
            reconstruct=reconstruction(model.vae), folder=args.output, settings=settings, progress=progress,
        )  # fmt: skip
    table, picture = args.output / "report.md", args.output / "grid.png"
    table.write_text(report.markdown(results, f"{folder.name}: {args.count} samples of each row"), "utf-8")
    if results.shown:
        report.grid(results.shown, picture)
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has no edge to wrap at
    for each in report.tables(results):
        console.print(each)
        console.print()
    say(f"{table}, {picture}")
    return 0


def fingerprint(folder: Path) -> str:
    """Tells a checkpoint from any other by what its files hold, so that results of two are never mixed."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")):
        digest.update(f"{file.relative_to(folder)}\n".encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
