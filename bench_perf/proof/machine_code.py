"""What the compilers made of a kernel: registers, spills, widths of global accesses, float64, barriers, shared memory.

From the disassembly of the cubin (NVIDIA) or the assembly (AMD), with the tools that Triton's wheel ships.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import triton
from triton.compiler import CompiledKernel


@dataclass(frozen=True)
class Code:
    """Per kernel and target.

    Args:
        registers: per thread (vector registers on AMD).
        spills: bytes per thread that did not fit into registers and live in local memory, and their accesses.
        loads, stores: instructions on global memory by width in bits.
        fp64: float64 instructions.
        barriers: of a whole program.
        shared: bytes of shared memory.
        instructions: all of them.
    """

    registers: int
    spills: int
    loads: dict[int, int]
    stores: dict[int, int]
    fp64: int
    barriers: int
    shared: int
    instructions: int

    @property
    def narrow(self) -> int:
        """Global accesses below 128 bits."""
        return sum(count for widths in (self.loads, self.stores) for width, count in widths.items() if width < 128)


def inspect(kernel: CompiledKernel) -> Code:
    """Disassembles a compiled kernel."""
    if "cubin" in kernel.asm:
        return _nvidia(kernel.asm["cubin"], kernel.metadata.shared)
    return _amd(kernel.asm["amdgcn"], kernel.metadata.shared)


# --- NVIDIA ----------------------------------------------------------------------------------------------------------

_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)")
_SASS_FP64 = re.compile(r"D(?:ADD|MUL|FMA|SETP|MNMX)\b|\w+\.F64\b|MUFU\.\w*64H")


def _nvidia(cubin: bytes, shared: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools = triton.knobs.nvidia
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _output(tools.nvdisasm.path, "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    if registers is None or stack is None:
        raise ValueError(f"cuobjdump tells no resource usage:\n{usage}")
    names = _SASS.findall(sass)
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    local = 0
    for name in names:
        kind, _, modifiers = name.partition(".")
        if kind in ("LDG", "LDGSTS", "STG"):  # LDGSTS goes to shared memory without waiting
            (stores if kind == "STG" else loads)[_sass_width(modifiers)] += 1
        local += kind in ("LDL", "STL")
    return Code(
        registers=int(registers[1]),
        spills=int(stack[1]) + local,
        loads=dict(sorted(loads.items())),
        stores=dict(sorted(stores.items())),
        fp64=sum(bool(_SASS_FP64.match(name)) for name in names),
        barriers=sum(name.startswith("BAR") for name in names),
        shared=shared,
        instructions=len(names),
    )


def _sass_width(modifiers: str) -> int:
    parts = modifiers.split(".")
    for text, width in (("256", 256), ("ENL2", 256), ("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("16", 16),
                        ("U8", 8), ("S8", 8), ("8", 8)):  # fmt: skip
        if text in parts:
            return width
    return 32


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# --- AMD -------------------------------------------------------------------------------------------------------------

_AMD_ACCESS = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)", re.MULTILINE)
_AMD_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "short": 16,
               "ubyte": 8, "sbyte": 8, "byte": 8, "short_d16": 16, "short_d16_hi": 16, "ubyte_d16": 8}  # fmt: skip


def _amd(assembly: str, shared: int) -> Code:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found[1])

    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for kind, name in _AMD_ACCESS.findall(assembly):
        width = 256 if name.startswith("lds") else _AMD_WIDTHS[name]
        (loads if kind == "load" else stores)[width] += 1
    code = re.findall(r"^\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+)", assembly, re.MULTILINE)
    return Code(
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size"),
        loads=dict(sorted(loads.items())),
        stores=dict(sorted(stores.items())),
        fp64=sum("_f64" in name for name in code),
        barriers=sum(name.startswith("s_barrier") for name in code),
        shared=shared,
        instructions=len(code),
    )
