"""The golden table ``bench_perf/codegen.json``: what was proved about every kernel, and of which source.

Cells of sm_90 and gfx942 in the first dtype of a case are proved every time. The others are proved again only where the
source or Triton's version is no longer the recorded one, or when all are asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from . import case as case_module
from .case import Case
from .checks import Cell
from .stub import TARGETS

PATH = Path(__file__).resolve().parents[1] / "codegen.json"
ALWAYS = ("sm_90", "gfx942")

Key = tuple[Case, str, torch.dtype]


def keys(cases: Sequence[Case]) -> list[Key]:
    """Every cell that there is."""
    return [(case, target, dtype) for case in cases for target in TARGETS for dtype in case.dtypes]


def name(key: Key) -> str:
    case, target, dtype = key
    return f"{case.name} | {target} | {str(dtype).removeprefix('torch.')}"


def digest(case: Case) -> str:
    """Of everything a cell depends on: the family's kernels, what they share, and its cases."""
    family = case.module.partition(".")[0]
    package = importlib.import_module(f"bernini.kernels.{family}.reference").__file__
    launch = importlib.import_module("bernini.kernels.launch").__file__
    cases = importlib.import_module(f"{case_module.__package__}.cases.{family}").__file__
    assert package is not None and launch is not None and cases is not None
    files = [*sorted(Path(package).parent.glob("kernel*.py")), Path(launch), Path(cases)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def read() -> dict[str, Any]:
    """``{"triton": version, "cells": {name: {"source": digest, ...}}}``; empty before it was first written."""
    return json.loads(PATH.read_text("utf-8")) if PATH.exists() else {"triton": None, "cells": {}}


def write(cells: dict[str, dict[str, Any]]) -> None:
    body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(cells[key])}" for key in sorted(cells))  # a cell, a line
    PATH.write_text(f'{{\n "triton": {json.dumps(triton.__version__)},\n "cells": {{\n{body}\n }}\n}}\n', "utf-8")


def entry(case: Case, cell: Cell) -> dict[str, Any]:
    return {"source": digest(case), **asdict(cell)}


def due(key: Key, recorded: dict[str, Any], everything: bool) -> bool:
    """Whether a cell has to be proved (again)."""
    case, target, dtype = key
    known = recorded["cells"].get(name(key))
    fresh = known is not None and known["source"] == digest(case) and recorded["triton"] == triton.__version__
    return everything or not fresh or (target in ALWAYS and dtype == case.dtypes[0])


WAVERS = {"registers": 0.02, "instructions": 0.01}
"""Share by which a figure may differ from the recorded one. LLVM breaks some ties by addresses in memory, which are
others in every process: one AMD kernel has 262 registers in half of all runs and 266 in the others. The budgets of
:mod:`.checks` hold for whatever was compiled."""


def differences(key: Key, cell: Cell, recorded: dict[str, Any]) -> list[str]:
    """How a cell differs from the recorded one; nothing where Triton's version is another, whose code may differ."""
    if recorded["triton"] != triton.__version__:
        return []
    known = recorded["cells"].get(name(key))
    if known is None:
        return ["not in the table"]
    now = json.loads(json.dumps(asdict(cell)))
    texts = [f"{field}: {known[field]} -> {now[field]}" for field in now if field != "kernels"
             and known[field] != now[field]]  # fmt: skip
    for before, after in zip(known["kernels"], now["kernels"], strict=False):
        texts += [f"{after['name']} {field}: {before.get(field)} -> {after[field]}" for field in after
                  if not _same(field, before.get(field), after[field])]  # fmt: skip
    return texts


def _same(field: str, before: Any, after: Any) -> bool:
    if field in WAVERS and before is not None:
        return bool(abs(after - before) <= WAVERS[field] * before)
    return bool(before == after)


# --- the table for people --------------------------------------------------------------------------------------------

BEGIN, END = "<!-- proof table: begin -->", "<!-- proof table: end -->"
README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"


def markdown(cells: dict[str, dict[str, Any]]) -> str:
    """A row for each kernel of each case; the columns are the targets, in the case's first dtype."""
    targets = list(TARGETS)
    lines = [
        "| case, bytes / minimum | kernel | " + " | ".join(targets) + " |",
        "| --- | --- | " + " | ".join("---" for _ in targets) + " |",
    ]
    for case in case_module.cases():
        row = [cells[name((case, target, case.dtypes[0]))] for target in targets]
        kernels = [kernel["name"] for kernel in row[0]["kernels"]]
        for number, kernel in enumerate(kernels):
            facts = [_facts(one["kernels"][number]) for one in row]
            worst = max(one["bytes_over_minimum"] for one in row)
            lines.append(f"| {case.name}, {worst:.3f} | `{kernel}` | " + " | ".join(facts) + " |")
    return "\n".join(lines)


def _facts(kernel: dict[str, Any]) -> str:
    def widths(kind: str) -> str:
        return " ".join(f"{count}x{width}" for width, count in sorted(kernel[kind].items(), key=lambda x: -int(x[0])))

    return f"{kernel['registers']} / {kernel['spills']} / {widths('loads')} / {widths('stores')} / {kernel['barriers']}"


def readme_with(table: str) -> str:
    """The kernels' README with the table between its two marks."""
    text = README.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
