"""Reads Triton's first IR (TTIR) of a compiled kernel: what is loaded and stored, and how addresses are computed.

TTIR is the kernel after inlining and before anything is laid out on threads, one line per operation. Parsed here as
text: the form is stable, and a line that is not understood is an error wherever it could change an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_RESULTS = re.compile(r"^(%[\w.$-]+(?::\d+)?(?:, *%[\w.$-]+)*) = ")
_NAME = re.compile(r'^"?([a-z_]+\.[\w.]+|[a-z_]+)"?')
_VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
_ARGUMENT = re.compile(r"(%[\w.$-]+): (!tt\.ptr<\w+>|[if]\d+|!tt\.tensordesc<[^>]*>)")
_POINTER = re.compile(r"(?:tensor<((?:\d+x)+))?!tt\.ptr<(\w+)>>?")


@dataclass
class Op:
    """One operation: ``results = name operands {regions}``; ``line`` is its text without locations."""

    name: str
    results: list[str]
    operands: list[str]
    line: str
    location: str
    regions: list[list[Op]] = field(default_factory=list)

    @property
    def type(self) -> str:
        """The text behind the last ``:``."""
        return self.line.rpartition(" : ")[2]


@dataclass
class Function:
    """A kernel: its arguments with their types, its operations, and where each ``#loc`` is in the source."""

    arguments: dict[str, str]
    body: list[Op]
    locations: dict[str, str]

    def walk(self) -> Iterator[Op]:
        """Every operation, outer ones first."""
        return _walk(self.body)

    def source(self, op: Op) -> str:
        """The line of the kernel's source that an operation comes from."""
        where, seen = op.location, set()
        while where and where not in seen:
            seen.add(where)
            at = re.search(r'"([^"]+\.py)":(\d+):\d+', where)
            if at:
                lines = Path(at[1]).read_text("utf-8").splitlines()
                return lines[int(at[2]) - 1].strip()
            following = re.search(r"#loc\d*", where)
            where = self.locations.get(following[0], "") if following else ""
        return ""


def parse(text: str) -> Function:
    """Parses the one kernel of a TTIR module."""
    locations = dict(re.findall(r"^(#loc\d*) = (.*)$", text, re.MULTILINE))
    lines = [line.strip() for line in text.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("tt.func public"))
    arguments = dict(_ARGUMENT.findall(lines[start]))
    body, rest = _region(lines, start + 1)
    if any(line.startswith("tt.func") for line in lines[rest:]):
        raise ValueError("TTIR with more than one function: a call was not inlined")
    return Function(arguments, body, locations)


def _region(lines: list[str], number: int) -> tuple[list[Op], int]:
    """Operations up to the closing brace, and the number of the line of that brace."""
    ops: list[Op] = []
    while number < len(lines):
        line = lines[number]
        if line.startswith("}"):
            return ops, number
        number += 1
        if not line or line.startswith(("#", "^bb", "//")):
            continue
        op = _operation(line)
        ops.append(op)
        while line.endswith(("{", "({")):
            region, number = _region(lines, number)
            op.regions.append(region)
            line = lines[number]  # "}", "} else {", "}) : (...) -> ..." or "} loc(...)"
            number += 1
            op.line += " " + _without_location(line)
            op.location = op.location or _location(line)
    raise ValueError("TTIR ends inside a region")


def _without_location(line: str) -> str:
    at = line.rfind(" loc(")
    return line if at < 0 else line[:at]


def _location(line: str) -> str:
    at = line.rfind(" loc(")
    return "" if at < 0 else line[at + 5 :]


def _operation(line: str) -> Op:
    text = _without_location(line)
    found = _RESULTS.match(text)
    results: list[str] = []
    rest = text
    if found:
        rest = text[found.end() :]
        for result in found[1].split(", "):
            name, _, count = result.partition(":")
            results += [f"{name}#{i}" for i in range(int(count))] if count else [name]
    name = _NAME.match(rest)
    if name is None:
        raise ValueError(f"TTIR line not understood: {line}")
    operands = _VALUE.findall(rest[: rest.rfind(" : ")] if " : " in rest else rest)
    return Op(name[1], results, operands, text, _location(line))


def _walk(ops: list[Op]) -> Iterator[Op]:
    for op in ops:
        yield op
        for region in op.regions:
            yield from _walk(region)


# --- loads and stores ------------------------------------------------------------------------------------------------

_BITS = {"i1": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_MEMORY = ("tt.load", "tt.store")
_OTHER_MEMORY = re.compile(r"tt\.(descriptor_\w+|atomic_\w+|gather|experimental\w*)")


def touches_memory(op: Op) -> bool:
    """Whether this operation reads or writes global memory."""
    return op.name in _MEMORY or bool(_OTHER_MEMORY.fullmatch(op.name))


def has_memory(ops: list[Op]) -> bool:
    return any(touches_memory(op) for op in _walk(ops))


def access_bytes(op: Op) -> int:
    """Bytes that one execution of a load or store moves, masked lanes included."""
    if op.name not in _MEMORY:
        raise ValueError(f"bytes of {op.name} are not counted: {op.line}")
    pointer = _POINTER.search(op.type)
    if pointer is None:
        raise ValueError(f"TTIR access not understood: {op.line}")
    count = 1
    for size in (pointer[1] or "").split("x")[:-1]:
        count *= int(size)
    return count * _BITS[pointer[2]] // 8


def float_atomics(function: Function) -> list[str]:
    """Source lines with an atomic operation on floats: sums in no fixed order."""
    atomics = [op for op in function.walk() if op.name.startswith("tt.atomic")]
    return [function.source(op) for op in atomics if re.search(r"\bb?f(16|32|64)\b", op.type)]


class Roots:
    """From which arguments each pointer value comes."""

    def __init__(self, function: Function) -> None:
        self._from: dict[str, set[str]] = {
            name: {name.removeprefix("%")} for name, kind in function.arguments.items() if kind.startswith("!tt.ptr")
        }
        size = -1
        while size != sum(map(len, self._from.values())):  # loops hand pointers backwards: until nothing is added
            size = sum(map(len, self._from.values()))
            for op in function.walk():
                self._follow(op)

    def _follow(self, op: Op) -> None:
        for result, sources in flows(op):
            if result in self._from or any(source in self._from for source in sources):
                known = self._from.setdefault(result, set())
                known |= {root for source in sources for root in self._from.get(source, ())}

    def of(self, op: Op) -> str:
        """The argument that a load or store goes to; several, if control flow chooses, joined by ``|``."""
        roots = self._from.get(op.operands[0], set())
        if not roots:
            raise ValueError(f"no argument found behind {op.line}")
        return "|".join(sorted(roots))


def flows(op: Op) -> Iterator[tuple[str, list[str]]]:
    """(value, what it is computed from) for everything an operation defines, loops and branches included."""
    if op.name == "scf.for":
        carried = re.findall(
            r"(%[\w.$-]+) = (%[\w.$-]+(?:#\d+)?)", op.line.partition("iter_args(")[2].partition(")")[0]
        )
        yields = _yielded(op.regions[0])
        for number, (inside, initial) in enumerate(carried):
            yield inside, [initial, yields[number]]
            yield op.results[number], [initial, yields[number]]
        induction = re.search(r"scf\.for (?:unsigned )?(%[\w.$-]+) =", op.line)
        assert induction is not None
        yield induction[1], op.operands[1:4]
    elif op.name == "scf.if":
        branches = [_yielded(region) for region in op.regions]
        for number, result in enumerate(op.results):
            yield result, [branch[number] for branch in branches]
    elif op.name == "scf.while":
        for result in op.results:
            yield result, list(op.operands)
    else:
        for result in op.results:
            yield result, list(op.operands)


def _yielded(region: list[Op]) -> list[str]:
    last = region[-1] if region else None
    return last.operands if last is not None and last.name == "scf.yield" else []


# --- the address lint ------------------------------------------------------------------------------------------------

_NARROW = re.compile(r"(?:tensor<(?:\d+x)+)?i(?:8|16|32)>?")


def narrow_products(function: Function) -> list[str]:
    """Source lines that multiply in 32 bits and reach a pointer: they wrap, silently, beyond 2^31 elements.

    A product counts if a factor comes from a program's number, an integer argument (a stride, a length), a loaded
    number or a loop; factors that are all constants or lane numbers are bounded by the tile. Widening afterwards does
    not help.
    """
    grows: set[str] = {name for name, kind in function.arguments.items() if re.fullmatch(r"i\d+", kind)}
    wrapped: dict[str, Op] = {}
    size = -1
    while size != len(grows) + len(wrapped):
        size = len(grows) + len(wrapped)
        for op in function.walk():
            if op.name in ("tt.get_program_id", "tt.get_num_programs", "tt.load"):
                grows.update(op.results)
            if op.name == "scf.for":
                grows.add(next(value for value, _ in reversed(list(flows(op)))))
            for result, sources in flows(op):
                if any(source in grows for source in sources):
                    grows.add(result)
                for source in sources:
                    if source in wrapped and op.name != "tt.load":
                        wrapped.setdefault(result, wrapped[source])
            product = op.name in ("arith.muli", "arith.shli") and _NARROW.fullmatch(op.type)
            if product and any(operand in grows for operand in op.operands):
                wrapped.setdefault(op.results[0], op)
    guilty = [wrapped[op.operands[1]] for op in function.walk() if op.name == "tt.addptr" and op.operands[1] in wrapped]
    return sorted({function.source(op) for op in guilty})
