"""Proves a cell: one case, for one target and dtype. A cell is what the golden table keeps; a fault is a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch

from . import machine_code, stub, traffic, ttir
from .case import Case
from .stub import Launch

MOST_TRAFFIC = 1.02
"""Bytes over the minimum."""

CHECKS = ("launches", "spills", "widths", "fp64", "registers", "barriers", "traffic", "lint", "atomics")


@dataclass(frozen=True)
class Cell:
    """The facts of a cell, as they stand in ``codegen.json``."""

    launches: int
    bytes_over_minimum: float
    cached_over_minimum: float
    """The same for tensors that stay in L2: how much of the kernel's time its cache has to deliver besides."""
    kernels: list[dict[str, Any]]
    """One per launch: its name and the fields of :class:`bench_perf.proof.machine_code.Code`."""


def prove(case: Case, target: str, dtype: torch.dtype, module: ModuleType | None = None) -> tuple[Cell, dict[str, str]]:
    """Runs a case through its real launches and looks at what came out.

    Args:
        module: a variant of the case's module, for broken ones.

    Returns:
        The cell, and the faults by name of the check.
    """
    with stub.launches(target) as log:
        case.call(case.load() if module is None else module, dtype)
    minimum, faults = case.minimum(dtype), dict[str, list[str]]()
    try:
        moved = [traffic.traffic(launch, case.values) for launch in log]
    except ValueError as error:  # such as an atomic: other checks may say more about it
        moved, faults["traffic"] = [], [str(error)]
    codes = [machine_code.inspect(launch.compiled) for launch in log]
    cell = Cell(
        launches=len(log),
        bytes_over_minimum=round(sum(one.memory for one in moved) / minimum, 4),
        cached_over_minimum=round(sum(one.cached for one in moved) / minimum, 3),
        kernels=[_fields(launch, code) for launch, code in zip(log, codes, strict=True)],
    )
    if len(log) != case.launches:
        faults["launches"] = [f"{len(log)} launches, not {case.launches}"]
    if cell.bytes_over_minimum > MOST_TRAFFIC:
        faults["traffic"] = [f"{cell.bytes_over_minimum} times the bytes that must move (at most {MOST_TRAFFIC})"]
    for launch, code in zip(log, codes, strict=True):
        for check, fault in (*_code_faults(case, target, launch, code), *_address_faults(case, launch)):
            faults.setdefault(check, []).append(f"{launch.kernel}: {fault}")
    return cell, {check: "; ".join(dict.fromkeys(texts)) for check, texts in faults.items()}


def _fields(launch: Launch, code: machine_code.Code) -> dict[str, Any]:
    fields = asdict(code)
    for kind in ("loads", "stores"):  # JSON's keys are strings
        fields[kind] = {str(width): count for width, count in fields[kind].items()}
    return {"name": launch.kernel, **fields}


def _code_faults(case: Case, target: str, launch: Launch, code: machine_code.Code) -> Iterator[tuple[str, str]]:
    # A lane of AMD's has twice the registers.
    registers = case.registers if target.startswith("sm_") else case.registers * 3 // 2
    if code.spills:
        yield "spills", f"{code.spills} bytes and accesses of spilled registers"
    if code.registers > registers:
        yield "registers", f"{code.registers} registers (budget {registers})"
    if code.barriers > case.barriers:
        yield "barriers", f"{code.barriers} barriers (budget {case.barriers})"
    if code.fp64:
        yield "fp64", f"{code.fp64} float64 instructions"
    allowed, _ = case.narrow.get(launch.kernel, (0, ""))
    if code.narrow > allowed:
        yield "widths", f"{code.narrow} global accesses below 128 bits (allowed {allowed}): {code.loads} {code.stores}"
    if any(width < 32 for widths in (code.loads, code.stores) for width in widths):
        yield "widths", f"global accesses of single 8- or 16-bit elements: {code.loads} {code.stores}"


def _address_faults(case: Case, launch: Launch) -> Iterator[tuple[str, str]]:
    function = ttir.parse(launch.compiled.asm["ttir"])
    for line in ttir.narrow_products(function):
        if not any(fragment in line for fragment in case.bounded):
            yield "lint", f"a 32-bit product reaches an address: {line}"
    for line in ttir.float_atomics(function):
        yield "atomics", f"float atomics sum in no fixed order: {line}"
