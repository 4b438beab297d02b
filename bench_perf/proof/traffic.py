"""Bytes that a launch moves, counted from its TTIR: loads and stores, times how often they run.

Scalars (bounds, conditions, addresses of small integer tables) are computed program by program, so loops count as often
as they run. Masked lanes count as moved, so sizes that leave lanes idle look worse than they are.

Arguments of at most :data:`RESIDENT` bytes (phase tables, weights, row tables, partial sums) stay in the L2 cache; each
counts once at most. What they cost there is told apart, as ``cached``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from . import ttir
from .stub import Launch
from .ttir import Op

RESIDENT = 8 * 2**20
"""Bytes that are taken to stay in L2 (40 MB on the smallest of the targets, 4 MB per die on gfx942, and 256 beyond)."""

FEW_PROGRAMS = 2048
"""Up to this many programs are all evaluated; of more, a sample, which must agree."""

Scalar = int | bool | tuple[str, int] | None
"""A number, a pointer as (argument, element), or not known."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch: to and from memory, and to and from tensors that stay in cache."""

    memory: int
    cached: int


def traffic(launch: Launch, values: Mapping[str, np.ndarray[Any, Any]] | None = None) -> Traffic:
    """Counts a launch.

    Args:
        values: contents of integer arguments that decide how often something runs.

    Raises:
        ValueError: something decides that is not known, or sampled programs differ.
    """
    function = ttir.parse(launch.compiled.asm["ttir"])
    roots = ttir.Roots(function)
    counts: Counter[str] = Counter()
    programs = math.prod(launch.grid)
    if programs <= FEW_PROGRAMS:
        for number in range(programs):
            counts += _Program(launch, function, roots, values or {}, _place(number, launch.grid)).run()
    else:
        x, y, z = launch.grid
        for other in range(y * z):
            sample = [
                _Program(launch, function, roots, values or {}, (at, other % y, other // y)).run()
                for at in sorted({0, 1, x // 2, x - 2, x - 1})
            ]
            if any(one != sample[0] for one in sample):
                raise ValueError(f"{launch.kernel}: programs differ in what they move, and there are {programs}")
            counts += Counter({name: count * x for name, count in sample[0].items()})
    memory = cached = 0
    for name, count in counts.items():
        size = sum(map(launch.bytes_of, name.split("|")))
        if size <= RESIDENT:
            memory += min(count, size)
            cached += count
        else:
            memory += count
    return Traffic(memory, cached)


def _place(number: int, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    return number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1])


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": lambda a, b: int(a / b) if abs(a) < 2**52 else a // b,
    "arith.divui": lambda a, b: a // b,
    "arith.remsi": lambda a, b: int(math.fmod(a, b)),
    "arith.remui": lambda a, b: a % b,
    "arith.ceildivsi": lambda a, b: -(-a // b),
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.minui": min,
    "arith.maxui": max,
    "arith.andi": lambda a, b: a & b,
    "arith.ori": lambda a, b: a | b,
    "arith.xori": lambda a, b: a ^ b,
    "arith.shli": lambda a, b: a << b,
    "arith.shrsi": lambda a, b: a >> b,
    "arith.shrui": lambda a, b: a >> b,
}

_SAME = ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast", "arith.index_castui", "tt.bitcast")


class _Program:
    """One program of the grid: its scalars and what it loads and stores."""

    def __init__(
        self, launch: Launch, function: ttir.Function, roots: ttir.Roots,
        values: Mapping[str, np.ndarray[Any, Any]], place: tuple[int, int, int],
    ) -> None:  # fmt: skip
        self._launch, self._function, self._values, self._place = launch, function, values, place
        self._roots = roots
        self._known: dict[str, Scalar] = {}
        for name, kind in function.arguments.items():
            value = launch.argument(name.removeprefix("%"))
            if kind.startswith("!tt.ptr"):
                self._known[name] = (name.removeprefix("%"), 0)
            elif isinstance(value, int) and not isinstance(value, Tensor):
                self._known[name] = value
        self._counts: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        self._region(self._function.body, 1)
        return self._counts

    def _get(self, name: str) -> Scalar:
        return self._known.get(name)

    def _number(self, name: str) -> int | None:
        value = self._get(name)
        return None if isinstance(value, tuple) else value

    def _region(self, ops: list[Op], times: int) -> list[Scalar]:
        """Runs operations, each counted ``times``; returns what the region yields."""
        for op in ops:
            if op.name == "scf.yield":
                return [self._get(name) for name in op.operands]
            if op.name == "scf.for":
                self._loop(op, times)
            elif op.name == "scf.if":
                self._branch(op, times)
            elif any(ttir.has_memory(region) for region in op.regions):
                raise ValueError(f"{self._launch.kernel}: cannot count what {op.name} moves: {op.line}")
            else:
                self._operation(op, times)
        return []

    def _operation(self, op: Op, times: int) -> None:
        if ttir.touches_memory(op):
            self._counts[self._roots.of(op)] += ttir.access_bytes(op) * times
        if len(op.results) == 1:
            self._known[op.results[0]] = self._scalar(op)

    def _scalar(self, op: Op) -> Scalar:
        if op.name == "arith.constant":
            found = re.search(r"arith\.constant (true|false|-?\d+)(?: :|$)", op.line)
            words = {"true": True, "false": False}
            return None if found is None else words[found[1]] if found[1] in words else int(found[1])
        if op.name in ("tt.get_program_id", "tt.get_num_programs"):
            axis = "xyz".index(re.search(r"tt\.get_\w+ (\w)", op.line)[1])  # type: ignore[index]
            return self._place[axis] if op.name == "tt.get_program_id" else self._launch.grid[axis]
        if op.name in _SAME:
            return self._get(op.operands[0])
        if op.name == "tt.addptr":
            pointer, offset = self._get(op.operands[0]), self._number(op.operands[1])
            return (pointer[0], pointer[1] + offset) if isinstance(pointer, tuple) and offset is not None else None
        if op.name == "tt.load":
            pointer = self._get(op.operands[0])
            if isinstance(pointer, tuple) and pointer[0] in self._values:
                return int(self._values[pointer[0]][pointer[1]])
            return None
        if op.name == "arith.select":
            condition = self._number(op.operands[0])
            return None if condition is None else self._get(op.operands[1 if condition else 2])
        if op.name == "arith.cmpi":
            kind = re.search(r"arith\.cmpi (\w+),", op.line)
            a, b = map(self._number, op.operands[:2])
            return None if kind is None or a is None or b is None else _COMPARE[kind[1].lstrip("su")](a, b)
        if op.name in _ARITHMETIC:
            a, b = map(self._number, op.operands[:2])
            return None if a is None or b is None else _ARITHMETIC[op.name](a, b)
        return None

    def _branch(self, op: Op, times: int) -> None:
        condition = self._number(op.operands[0])
        if condition is None:
            if any(ttir.has_memory(region) for region in op.regions):
                where = self._function.source(op)
                raise ValueError(f"{self._launch.kernel}: a condition that is not known decides what moves: {where}")
            return
        taken = op.regions[0] if condition else op.regions[1] if len(op.regions) > 1 else []
        for name, value in zip(op.results, self._region(taken, times), strict=False):
            self._known[name] = value

    def _loop(self, op: Op, times: int) -> None:
        body = op.regions[0]
        if not ttir.has_memory(body):
            return
        bounds = [self._number(name) for name in op.operands[1:4]]
        if any(bound is None for bound in bounds):
            raise ValueError(
                f"{self._launch.kernel}: the bounds of a loop are not known (give the contents in the case's values): "
                f"{self._function.source(op)}"
            )
        steps = range(*bounds)  # type: ignore[arg-type]
        flows = list(ttir.flows(op))
        induction, carried = flows[-1][0], flows[:-1:2]
        for name, sources in carried:
            self._known[name] = self._get(sources[0])
        plain = not any(ttir.has_memory(region) for inner in body for region in inner.regions)
        if plain:  # every turn moves the same
            for name, _ in carried:
                self._known[name] = None
            self._known[induction] = None
            if len(steps):
                self._region(body, times * len(steps))
            return
        for step in steps:
            self._known[induction] = step
            for (name, _), value in zip(carried, self._region(body, times), strict=True):
                self._known[name] = value
        for result, (name, _) in zip(op.results, carried, strict=True):
            self._known[result] = self._known[name]
