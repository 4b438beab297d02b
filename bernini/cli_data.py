"""``bernini data``: features of a data set made once, and what is wrong with a data set."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_options import DTYPES, Parser, count, place, rate, seed, size
from .cli_screen import progress_bar, quiet_libraries, say
from .errors import UserError

if TYPE_CHECKING:
    from .data.dataset import DataSet
    from .data.skips import SkipLog


def add(commands: Any) -> None:
    """The parser of ``bernini data``."""
    data = commands.add_parser("data", help="make features of a data set, or check one")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    source = "'world', a .jsonl manifest, or parquet: a file or a folder"

    prepare = actions.add_parser("prepare", help="encode all pictures of a data set once, for training")
    prepare.add_argument("source", metavar="SOURCE", help=source)
    prepare.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder, or owner/name on the hub")
    prepare.add_argument("--output", required=True, type=Path, metavar="DIR",
                         help="folder for the files; what is there already is not made again")  # fmt: skip
    prepare.add_argument("--parts", default="vae,vit", metavar="LIST",
                         help="vae (posterior), vit (by the planner's vision tower), or both (default)")  # fmt: skip
    prepare.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")
    prepare.add_argument("--dtype", choices=DTYPES,
                         help="of the vision tower (default: bfloat16 on a GPU, float32 on a CPU)")  # fmt: skip
    prepare.add_argument("--batch", type=count, default=16, metavar="N",
                         help="pictures of one shape encoded together (default: 16)")  # fmt: skip
    prepare.add_argument("--rows", type=count, default=1024, metavar="N", help="examples of a file (default: 1024)")

    check = actions.add_parser("check", help="read every example, count tasks and what is skipped")
    check.add_argument("source", metavar="SOURCE", help=source)
    check.add_argument("--model", metavar="DIR", help="checkpoint whose frame rate and sizes files are read at")
    for action in (prepare, check):
        action.add_argument("--limit", type=count, metavar="N", help="only the first N examples")
        group = action.add_argument_group("the synthetic world")
        group.add_argument("--tasks", metavar="LIST", help="with their shares, as in t2i=2,v2v=5 (default: all alike)")
        group.add_argument("--count", type=count, default=1000, metavar="N", help="examples in all (default: 1000)")
        group.add_argument("--seed", type=seed, default=0, metavar="S", help="of each task's first (default: 0)")
        group.add_argument("--split", default="train", help="train, test or unseen (default: train)")
        group = action.add_argument_group("files")
        group.add_argument("--name", metavar="TASK$NAME", help="of the data set, where rows do not name their tasks")
        group.add_argument("--fps", type=rate, metavar="F", help="of videos (default: the checkpoint's, or 16)")
        group.add_argument("--num-frames", type=count, metavar="N", help="at most (default: the checkpoint's, or 97)")
        group.add_argument("--max-size", type=count, metavar="N", help="longest side, pixels (default: 848)")
        group.add_argument("--min-size", type=count, metavar="N", help="shortest side, pixels (default: 240)")
        group.add_argument("--size", type=size, metavar="HxW",
                           help="exactly this size instead (default: the checkpoint's, if it has one)")  # fmt: skip
    data.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 where ``check`` found something bad."""
    return {"prepare": _prepare, "check": _check}[args.action](args)


def _open(args: argparse.Namespace) -> DataSet:
    from .data.opening import open_data
    from .data.pixels import Reading
    from .geometry import RELEASED, peek

    given = {key: getattr(args, key) for key in ("fps", "num_frames", "max_size", "min_size") if getattr(args, key)}
    if args.size:
        given["size"] = (args.size[1], args.size[0])
    _, geometry = peek(args.model) if args.model else (False, RELEASED)
    return open_data(
        args.source, tasks=_tasks(args.tasks), count=args.count, seed=args.seed, split=args.split, name=args.name,
        reading=Reading.of(geometry, **given),
    )  # fmt: skip


def _tasks(text: str | None) -> dict[str, float] | None:
    """``t2i=2,v2v`` -> shares; 1 where none is given."""
    if text is None:
        return None
    found: dict[str, float] = {}
    for entry in text.split(","):
        task, equals, share = entry.partition("=")
        try:
            found[task.strip()] = float(share) if equals else 1.0
        except ValueError:
            raise UserError(f"--tasks: {share!r} is no number; expected a list as in t2i=2,v2v=5") from None
    return found


def _prepare(args: argparse.Namespace) -> int:
    from .data.encoder import load_encoder
    from .data.prepare import prepare

    data = _open(args)
    where = place(args.device, args.dtype, "auto")
    quiet_libraries()
    parts = [part.strip() for part in args.parts.split(",")]
    encoder, fingerprints = load_encoder(
        args.model, parts=parts, device=where.device, dtype=where.dtype, batch=args.batch
    )
    with progress_bar() as progress:
        done = prepare(
            data, args.output, encoder, fingerprints, limit=args.limit, rows=args.rows, progress=progress
        )  # fmt: skip
    files = f"{len(done.files)} file{'s' if len(done.files) != 1 else ''}"
    there = len(done.files) - done.made
    print(f"{args.output}: {done.rows} examples in {files}" + (f", {there} of them made before" if there else ""))
    if done.skipped.total:
        say(f"warning: {done.skipped}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from .data.example import Skip
    from .data.skips import SkipLog

    data, log = _open(args), SkipLog(quiet=True)
    total = len(data) if args.limit is None else min(args.limit, len(data))
    tasks: Counter[str] = Counter()
    with progress_bar() as progress:
        for number in range(total):
            if number % 16 == 0:
                progress("reading", number, total)
            example = data[number]
            if isinstance(example, Skip):
                log.add(example)
            else:
                tasks[example.task] += 1
        progress("reading", total, total)
    print(table(tasks, log))
    before = getattr(data, "skipped", [])
    if before:
        reasons = Counter(skip.reason for skip in before)
        print("left out when prepared: " + ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()))
    return 1 if log.total else 0


def table(tasks: Counter[str], log: SkipLog) -> str:
    """Counts by task, then by reason of what cannot be used, with the first few of each."""
    rows = [*sorted(tasks.items()), ("usable", tasks.total())]
    rows += [*log.counts.most_common(), ("skipped", log.total)] if log.total else []
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {number:>8}" for name, number in rows]
    lines += [f"{skip.key}: {skip.reason}: {skip.detail}" for few in log.first.values() for skip in few]
    return "\n".join(lines)
