"""``bernini eval toy``: a model on the held-out part of the synthetic world -> tables and a picture.

``bernini eval ablations``: arms of the paper's ablations, trained, and measured in the same way.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .cli_options import count, positive, seed
from .cli_screen import progress_bar, quiet_libraries, say
from .errors import UserError
from .shipped import shipped


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    about = "measure small models on the held-out part of the synthetic world of 32x32 pixels"
    subjects = commands.add_parser("eval", help=about).add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    parser = subjects.add_parser("toy", help="one model: tables and a picture")
    _add_common(parser, "eval")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="t2v, v2v, v2v:recolor, ... (default: all)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N",
                        help="seed of the noise; the samples are always the same (default: 0)")  # fmt: skip
    parser.set_defaults(run=run)
    parser = subjects.add_parser("ablations", help="the paper's ablations: trains the arms and compares them")
    _add_common(parser, "runs/ablations")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe toy/ablation, as in train")
    parser.add_argument("--only", choices=["rope", "planner", "apg"], help="one comparison (default: all three)")
    parser.add_argument("--data", type=Path, default=Path("runs/toy/features"), metavar="DIR",
                        help="features made with the model (default: runs/toy/features)")  # fmt: skip
    parser.add_argument("--minutes", type=positive, default=15, metavar="N",
                        help="of training, for each arm in all (default: 15)")  # fmt: skip
    parser.add_argument("--seeds", type=count, default=2, metavar="N", help="runs of each arm (default: 2)")
    parser.set_defaults(run=run_ablations)


def _add_common(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: the shipped toy)")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="DIR",
                        help=f"folder; a run that was interrupted goes on there (default: {output})")  # fmt: skip
    parser.add_argument("--count", type=count, default=40, metavar="N", help="samples of each row (default: 40)")
    parser.add_argument("--steps", type=count, metavar="N", help="sampling steps (default: the preset's)")


def run(args: argparse.Namespace) -> int:
    """Writes ``results.jsonl``, ``report.md`` and ``grid.png``, and prints the tables.

    Raises:
        UserError: no such model or task, no scikit-learn, or an output folder that holds other results.
    """
    folder = _model(args)
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


def run_ablations(args: argparse.Namespace) -> int:
    """Writes ``ablations.md`` and ``ablations.json``, after every arm again, and a run's folder for each.

    Raises:
        UserError: as :func:`run`; a recipe or data that cannot be used.
    """
    folder = _model(args)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UserError("training writes TensorBoard logs: pip install 'bernini[train]'") from None
    quiet_libraries()
    from .evaluation import ablation_report
    from .evaluation.ablations import Ablations, Options

    chosen: dict[str, Any] = {} if args.only is None else {"only": (args.only,)}
    options = Options(
        folder, fingerprint(folder), args.data, args.output, minutes=args.minutes, seeds=args.seeds, count=args.count,
        steps=args.steps, overrides=tuple(args.overrides), **chosen,
    )  # fmt: skip
    settings = {"model": options.model_id, "count": args.count, "steps": args.steps, "overrides": args.overrides}
    lines: list[ablation_report.Line] = []
    with progress_bar() as progress:
        for outcome in Ablations(options, note=say, progress=progress).run():
            lines.append(ablation_report.line(outcome, settings))
            ablation_report.write(args.output, lines, "Ablations on the synthetic world")
    table = args.output / "ablations.md"
    print(table.read_text("utf-8"))
    say(f"{table}, {table.with_suffix('.json')}")
    return 0


def _model(args: argparse.Namespace) -> Path:
    """The folder that was asked for, once it is sure that it can be measured at all."""
    folder: Path = shipped() if args.model is None else args.model
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError("eval needs scikit-learn, whose digits are drawn: pip install 'bernini[train]'") from None
    return folder


def fingerprint(folder: Path) -> str:
    """Tells a checkpoint from any other by what its files hold, so that results of two are never mixed."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")):
        digest.update(f"{file.relative_to(folder)}\n".encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
