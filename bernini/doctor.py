"""``bernini doctor``: what this machine can run, and why not more. Looks only; nothing is changed or fetched."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and whether that is broken."""

    topic: str
    name: str
    text: str
    broken: bool = False


def examine() -> list[Finding]:
    """Looks at everything. A part that cannot be looked at is broken itself, and does not hide the others."""
    findings: list[Finding] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they would say stands in the tables
        # The libraries come first: which OpenMP runtimes there are is known once all are loaded.
        for topic, look in (
            ("versions", _versions),
            ("machine", _machine),
            ("native library", _native),
            ("kernels", _kernels),
            ("attention", _attention),
            ("media", _media),
        ):
            try:
                findings.extend(Finding(topic, *found) for found in look())
            except Exception as error:
                findings.append(Finding(topic, topic, f"cannot be examined ({type(error).__name__}: {error})", True))
    return findings


def render(findings: list[Finding]) -> str:
    """The findings for people, with a last line that says whether anything is broken."""
    lines: list[str] = []
    width = max(len(finding.name) for finding in findings)
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            lines += ["", topic] if lines else [topic]
        lines.append(f"  {finding.name.ljust(width)}  {'BROKEN: ' if finding.broken else ''}{finding.text}")
    broken = [finding.name for finding in findings if finding.broken]
    lines += ["", f"broken: {', '.join(broken)}" if broken else "nothing is broken"]
    return "\n".join(lines)


Found = Iterator[tuple[str, str] | tuple[str, str, bool]]


def _versions() -> Found:
    from . import __version__

    yield "bernini", __version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for name, needed in (
        ("torch", True),
        ("triton", False),
        ("diffusers", True),
        ("transformers", True),
        ("tokenizers", True),
        ("safetensors", True),
        ("av", True),
    ):
        try:
            yield name, str(importlib.import_module(name).__version__)
        except ImportError as error:
            why = f"cannot be imported ({error})" if needed else "not installed; kernels for GPUs need it"
            yield name, why, needed


def _machine() -> Found:
    import torch

    yield "processor", f"{_processor()}, {_cores()} cores for this process, {torch.get_num_threads()} threads in torch"
    yield "vectors", torch.backends.cpu.get_cpu_capability()
    if Path("/proc/meminfo").exists():
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(fields[name].split()[0]) / 2**20 for name in ("MemAvailable", "MemTotal"))
        yield "memory", f"{free:.1f} of {total:.1f} GiB free"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            arch = f"compute capability {gpu.major}.{gpu.minor}" if torch.version.cuda else gpu.gcnArchName
            yield f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, {arch}"
    else:
        built = torch.version.cuda or torch.version.hip
        yield "GPUs", "none was found" if built else "none can be used: this PyTorch is built for the CPU only"


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _native() -> Found:
    from bernini.kernels.native import loader

    why = loader.missing()
    # Not built is a slower machine; built and not usable is a fault.
    yield "library", why or f"loaded ({loader.LIBRARY.name})", why is not None and loader.LIBRARY.exists()
    runtimes = loader.openmp_runtimes()
    text = ", ".join(runtimes) or "none in this process"
    if len(runtimes) > 1:
        text = f"{len(runtimes)} in one process, whose threads fight for the cores: {text}"
    yield "OpenMP", text, len(runtimes) > 1


def _places() -> list[tuple[str, Any]]:
    import torch

    gpus = ["cuda"] if torch.cuda.is_available() else []
    return [(device, dtype) for device in ["cpu", *gpus] for dtype in (torch.float32, torch.bfloat16)]


def _called(device: str, dtype: Any) -> str:
    return f"{device} {str(dtype).removeprefix('torch.')}"


def _by_place(found: dict[str, list[str]]) -> str:
    """What is the same everywhere once, or what differs with where."""
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{what} ({', '.join(where)})" for what, where in found.items())


def _kernels() -> Found:
    """Per op: what runs in each place, and why nothing better does."""
    from bernini.kernels import dispatch

    forced = os.environ.get("BERNINI_KERNELS")
    if forced:
        yield "BERNINI_KERNELS", f"forces {forced} for every op"
    yield "looked at", ", ".join(_called(device, dtype) for device, dtype in _places())
    for family in dispatch.FAMILIES:
        importlib.import_module(f"bernini.kernels.{family}.op")
    for op, row in sorted(dispatch._TABLE.items()):
        chosen: dict[str, list[str]] = {}
        reasons: list[str] = []
        broken = False
        for device, dtype in _places():
            try:
                name = dispatch.pick(op, device, dtype).name
            except ValueError as error:
                broken, name = True, f"nothing ({error})"
            chosen.setdefault(name, []).append(_called(device, dtype))
            for better in dispatch.ORDER[: dispatch.ORDER.index(name) if name in dispatch.ORDER else 0]:
                there = row.get(better)
                if there is None and better in dispatch.SELDOM:
                    continue
                why = "is not written" if there is None else there.limits(device, dtype, "fp32") or there.missing()
                if f"{better} {why}" not in reasons:
                    reasons.append(f"{better} {why}")
        yield op, "; ".join([_by_place(chosen), *reasons]), broken


def _attention() -> Found:
    import torch

    from bernini.kernels.attention import backends

    rows: dict[str, dict[str, list[str]]] = {}
    chosen: dict[str, list[str]] = {}
    for device, dtype in _places():
        for name, why in backends.available_backends(device, dtype).items():
            rows.setdefault(name, {}).setdefault(why or "available", []).append(_called(device, dtype))
        picked = backends.pick("auto", torch.device(device), dtype).name
        chosen.setdefault(picked, []).append(_called(device, dtype))
    for name, texts in {**rows, "auto": chosen}.items():
        yield name, _by_place(texts)


def _media() -> Found:
    import av

    yield "ffmpeg", f"{getattr(av, 'ffmpeg_version_info', 'of unknown version')}, inside PyAV"
    for name, files in (("libx264", ".mp4, .mov and .mkv"), ("gif", ".gif")):
        try:
            av.codec.Codec(name, "w")
            yield name, f"writes {files}"
        except Exception:
            yield name, f"is missing from this PyAV, so {files} cannot be written", True
