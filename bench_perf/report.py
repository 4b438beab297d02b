"""Rows as a table for the terminal, as JSON and as a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .harness import COLUMNS, Row

_VERDICTS = {True: "[green]yes[/]", False: "[red]no[/]", None: "-"}
_COLOURS = {True: "tab:green", False: "tab:red", None: "tab:gray"}


def _figure(value: float | None, suffix: str = "") -> str:
    return "-" if value is None else f"{value:.3g}{suffix}"


def machine() -> str:
    """The processor, in words if the system has them."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} logical cores, Python {platform.python_version()}"


def print_table(rows: Sequence[Row], title: str, console: Console | None = None) -> None:
    """A numbered line for each row, and beneath the table the notes, by number."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a log has no edge to wrap at
    table = Table("#", title=title, title_justify="left", caption=machine(), caption_justify="left", box=SIMPLE)
    table.add_column("name", overflow="fold")
    for column in ("shape", "dtype", "ours", "peer", "unit", "ratio", "bar", "holds"):
        table.add_column(
            column, justify="right" if column in ("ours", "peer", "ratio", "bar") else "left", no_wrap=True
        )
    for number, row in enumerate(rows, 1):
        suffix = "x" if row.ratio is not None else ""
        table.add_row(
            str(number), row.name, row.shape, row.dtype, _figure(row.ours), _figure(row.peer), row.unit,
            _figure(row.ratio, "x"), _figure(row.bar, suffix), _VERDICTS[row.holds],
        )  # fmt: skip
    console.print(table)
    for number, row in enumerate(rows, 1):
        if row.note:
            console.print(f"  {number}  {row.note}", style="dim", highlight=False, markup=False)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """A list of objects with the row's fields."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> list[Row]:
    """What :func:`write_json` wrote."""
    return [Row(**{column: entry[column] for column in COLUMNS}) for entry in json.loads(path.read_text("utf-8"))]


def write_chart(rows: Sequence[Row], path: Path) -> None:
    """A PNG with a bar for each row: how many times better than its peer, or for rows without one than its limit.

    A tick marks the promised bar; green holds, red does not, grey was not judged.
    """
    from matplotlib.figure import Figure  # late: a table needs no matplotlib

    lines = []
    for row in rows:
        if row.ratio is not None:
            lines.append((row, row.ratio, row.bar, f"{row.ratio:.2f}x"))
        elif row.bar and row.ours:
            lines.append((row, row.bar / row.ours, 1.0, f"{row.ours:.3g} {row.unit}, limit {row.bar:.3g}"))
        else:
            continue
    figure = Figure(figsize=(10, 1.4 + 0.42 * max(1, len(lines))), layout="constrained")
    axes = figure.subplots()
    for place, (row, value, bar, label) in enumerate(lines):
        axes.barh(place, value, color=_COLOURS[row.holds], height=0.7)
        axes.annotate(f" {label}", (value, place), va="center", fontsize=8)
        if bar is not None:
            axes.vlines(bar, place - 0.42, place + 0.42, color="black", linewidth=2)
    names = [" ".join(part for part in (row.name, row.shape, row.dtype) if part != "-") for row, *_ in lines]
    axes.set_yticks(range(len(lines)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.6, linestyle=":")
    axes.margins(x=0.25)
    axes.set_xlabel("times better than the peer (or than the limit); black tick: the bar; grey: not judged")
    figure.savefig(path, dpi=120)
