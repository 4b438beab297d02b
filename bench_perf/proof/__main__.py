"""``python -m bench_perf.proof [--all] [--update] [--case TEXT]``: proves generated code and compares the golden table.

``--update`` writes what was found into ``bench_perf/codegen.json`` and the table of ``kernels/README.md``, for review.
Exits with 0, 1 when something is not as it should be, 2 for bad use.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]  # see bench_perf/__main__.py

import argparse  # noqa: E402
from collections.abc import Sequence  # noqa: E402


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench_perf.proof", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every cell, not only what is always proved or has changed")
    parser.add_argument("--update", action="store_true", help="record what is found, for review")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases with this in their names")
    args = parser.parse_args(argv)
    from rich.progress import track

    from . import case, checks, table

    recorded = table.read()
    cases = [one for one in case.cases() if args.case in one.name]
    if not cases:
        parser.exit(2, f"proof: no case has {args.case!r} in its name\n")
    due = [key for key in table.keys(cases) if table.due(key, recorded, args.all)]
    known = {table.name(key) for key in table.keys(case.cases())}
    cells = {name: cell for name, cell in recorded["cells"].items() if name in known}
    bad = 0
    for key in track(due, "proving", disable=not sys.stderr.isatty()):
        cell, faults = checks.prove(*key)
        for check, text in faults.items():
            print(f"{table.name(key)}: {check}: {text}")
        changes = [] if args.update else table.differences(key, cell, recorded)
        for text in changes:
            print(f"{table.name(key)}: differs from the table: {text}")
        bad += bool(faults) or bool(changes)
        cells[table.name(key)] = table.entry(key[0], cell)
    if args.update:
        table.write(cells)
        if known <= cells.keys():
            table.README.write_text(table.readme_with(table.markdown(cells)), "utf-8")
    print(f"{len(due)} of {len(known)} cells proved, {bad} with faults")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
