"""``python -m bench_perf NAME|kernels|all [--json F] [--chart F.png] [--list]``, from the root of the repository.

Exits with 0, 1 when a bar does not hold, 2 for bad use.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# `python -m` puts the working directory first on the path. There our folder `kernels` would shadow Hugging Face's
# package of that name, which transformers and diffusers import. The modules of bench_perf are still found: a package
# keeps its own path.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

import argparse  # noqa: E402
import importlib  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import replace  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

from . import BENCHMARKS, GROUPS  # noqa: E402

if TYPE_CHECKING:
    from .harness import Row

# Above 32 MB glibc maps every allocation afresh, and its page faults bury the kernel (5 times a copy). With these the
# freed pages are reused, on both sides, as the caching allocator of a GPU does.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
THREADS = {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def environment(default_malloc: bool) -> dict[str, str]:
    """The environment to measure in. What the caller has set stays, but for the malloc settings if those must go."""
    kept = {name: value for name, value in os.environ.items() if not (default_malloc and name in MALLOC)}
    return {**THREADS, **({} if default_malloc else MALLOC), **kept}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench_perf", description="Runs a benchmark and judges it.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a benchmark, kernels or all; --list shows them")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file")
    parser.add_argument("--chart", type=Path, metavar="F.png", help="draw the rows into this file")
    parser.add_argument("--list", action="store_true", help="show the benchmarks and stop")
    parser.add_argument("--measure", choices=["reuse", "default"], help=argparse.SUPPRESS)  # in the child, see `fresh`
    args = parser.parse_args(argv)
    if args.list:
        for name, module in BENCHMARKS.items():
            print(f"{name:12} {module}")
        for name, members in GROUPS.items():
            print(f"{name:12} {', '.join(members)}")
        return 0
    *names, last = *BENCHMARKS, *GROUPS
    if args.name is None:
        parser.exit(2, f"bench_perf: name a benchmark: {', '.join(names)} or {last}\n")
    if args.name not in (*names, last):
        parser.exit(2, f"bench_perf: there is no benchmark {args.name!r}; there are {', '.join(names)} and {last}\n")
    for path in (args.json, args.chart):  # said now, not after minutes of measuring
        if path is not None and not path.resolve().parent.is_dir():
            parser.exit(2, f"bench_perf: {path}: the folder {path.parent} does not exist\n")
    return measure(args) if args.measure else run(args)


def run(args: argparse.Namespace) -> int:
    """Measures in child processes and shows what they found."""
    from . import report
    from .harness import COUNTED

    rows: list[Row] = []
    for name in GROUPS.get(args.name, [args.name]):
        measured = fresh(name, "reuse")
        if any(row.ratio is not None for row in measured) and not on_gpu(name):
            # once more as any program allocates: told, not judged
            again = fresh(name, "default")
            measured += [without_bar(row) for row in again if row.ratio is not None and row.unit not in COUNTED]
        report.print_table(measured, f"bench_perf {name}")
        rows += measured
    chart = args.chart
    if chart is None and args.name == "all":
        chart = ROOT / "build" / "bench.png"
        chart.parent.mkdir(exist_ok=True)
    if chart is not None:
        report.write_chart(rows, chart)
        print(f"chart: {chart}")
    if args.json is not None:
        report.write_json(rows, args.json)
    return int(any(row.holds is False for row in rows))


def on_gpu(name: str) -> bool:
    """Whether the benchmark measures a GPU, where malloc's settings mean nothing."""
    if name not in GROUPS["kernels"]:
        return False
    import torch  # late: nothing else here needs it

    return torch.cuda.is_available()


def fresh(name: str, malloc: str) -> list[Row]:
    """Runs one benchmark in a process of its own: malloc and OpenMP read their settings when a process starts, and
    the idle threads of an earlier benchmark would go on spinning beside the next."""
    from . import report

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        command = [sys.executable, "-m", "bench_perf", name, "--measure", malloc, "--json", str(path)]
        done = subprocess.run(command, env=environment(malloc == "default"), cwd=ROOT, check=False)
        if done.returncode != 0:
            raise SystemExit(f"bench_perf: {name} failed")
        return report.read_json(path)


def measure(args: argparse.Namespace) -> int:
    from . import report

    report.write_json(importlib.import_module(BENCHMARKS[args.name]).run(), args.json)
    return 0


def without_bar(row: Row) -> Row:
    return replace(row, name=f"{row.name} (default malloc)", bar=None, holds=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
