"""What the kernel benchmarks share: measuring one case, our op against all its peers and against a plain copy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bernini.kernels import which

from .gpu import Cuda, Device
from .harness import UNITS, Row, Timing, Watch, interleave, judged
from .providers import OURS, Call, Case, Unable, backward, check, outputs, provided

BUDGET = 3.0  # seconds for all sides of a case together, beyond the least number of rounds
BANDWIDTH = 0.70  # of a copy's: what the kernels promise on a CPU
COPY = "copy"
DTYPES = (torch.float32, torch.bfloat16)


def device() -> torch.device:
    """Where the kernel benchmarks run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def both_ways(
    benchmark: str,
    case: Case,
    ops: tuple[str, str],
    *,
    bars: Mapping[str, float] | None = None,
    bandwidth: float | None = None,
) -> list[Row]:
    """The forward with its bars, and the backward, for which nothing is promised.

    The second run of a benchmark, with the C library's own malloc settings, is only told, not judged: to keep it short
    it leaves the backward out.
    """
    rows = measure(benchmark, case, op=ops[0], bars=bars, bandwidth=bandwidth)
    return rows + (measure(benchmark, case, op=ops[1], back=True) if "MALLOC_MMAP_MAX_" in os.environ else [])


def measure(
    benchmark: str,
    case: Case,
    *,
    op: str,
    back: bool = False,
    bars: Mapping[str, float] | None = None,
    bandwidth: float | None = None,
    gpu: Device | None = None,
    budget: float = BUDGET,
    watch: Watch | None = None,
) -> list[Row]:
    """Times our op, all its peers and a copy that moves as many bytes, in turns.

    Args:
        benchmark: whose providers; also the name of the rows.
        op: what :func:`bernini.kernels.which` calls ours; the note tells which implementation ran.
        back: the backward in place of the forward.
        bars: how many times faster than a peer ours must be. Promised for CPUs: nothing is promised on a GPU.
        bandwidth: how much of the copy's bandwidth ours must reach, likewise.
        gpu: times there; by default where the case lies. Tests pass a fake.
        watch: tells whether the machine was busy; tests pass their own.

    Returns:
        A row for each peer, then one for the bandwidth. The first note names the providers that were not measured.

    Raises:
        RuntimeError: ours does not compute what the reference does.
    """
    if gpu is None and case.device.type == "cuda":
        gpu = Cuda()
    torch.compiler.reset()
    with torch.no_grad(), gpu.use() if gpu else nullcontext():
        count = gpu.copies(_moved(case, back)) if gpu else 1
        calls, absent = _prepare(benchmark, case, back, count)
        sides: dict[str, Call] = {}
        for name, copies in calls.items():
            try:
                sides[name] = gpu.capture(copies) if gpu else copies[0]
            except Exception as error:
                if name == OURS:
                    raise
                absent[name] = f"cannot be captured in a graph: {_first_line(error)}"
        with watch or Watch() as watching:
            samples = interleave(*sides.values(), budget=budget, **({"sample": gpu.sample} if gpu else {}))
        times = {name: timing.per(count) for name, timing in zip(sides, samples, strict=True)}
        remark = f"ours: {which(op, case.device, case.dtype)}"
        if gpu:
            remark += f"; on {gpu.state()}; {count} copies in turn; the bars are promised for CPUs only"
            bars = bandwidth = None
    low = "p20" if gpu else "minimum"
    rows = _rows(benchmark, case, back, times, bars or {}, bandwidth, low, remark, watching.unfit)
    if absent:
        reasons = dict.fromkeys(absent.values())
        who = [f"{', '.join(peer for peer in absent if absent[peer] == why)} ({why})" for why in reasons]
        rows[0] = replace(rows[0], note=f"{rows[0].note}; not measured: {', '.join(who)}")
    return rows


def _moved(case: Case, back: bool) -> int:
    return case.moved_backward if back else case.moved


def _prepare(benchmark: str, case: Case, back: bool, count: int) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """(calls on ``count`` copies of the inputs by whom they are, why the others are not there)."""
    wide = case.double()
    want = outputs(backward(lambda _: wide.reference, wide)() if back else wide.reference())
    # One set of inputs for all: where a tensor lies in memory can change its time by a tenth.
    copies = [case, *(case.copy() for _ in range(count - 1))]
    calls: dict[str, list[Call]] = {}
    absent: dict[str, str] = {}
    for name, prepare in provided(benchmark).items():
        try:
            ready = [backward(prepare, copy) if back else prepare(copy) for copy in copies]
            check(ready[0](), want, case.dtype)
            calls[name] = ready
        except Unable as error:
            absent[name] = str(error)
        except Exception as error:  # of somebody else's code: told, and the others are measured
            absent[name] = f"fails: {_first_line(error)}"
        if name == OURS and name in absent:
            raise RuntimeError(f"{benchmark}: ours {absent[name]}")
    calls[COPY] = [_copy(case, back) for _ in range(count)]
    return calls, absent


def _copy(case: Case, back: bool) -> Call:
    """Half of the bytes read, half of them written, into memory that is there already."""
    x = torch.ones(_moved(case, back) // (2 * case.dtype.itemsize), dtype=case.dtype, device=case.device)
    return partial(torch.ones_like(x).copy_, x)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _rows(
    benchmark: str,
    case: Case,
    back: bool,
    times: dict[str, Timing],
    bars: Mapping[str, float],
    bandwidth: float | None,
    low: str,
    remark: str,
    unfit: str | None,
) -> list[Row]:
    name = f"{benchmark} backward" if back else benchmark
    unit, ours, copy = "us" if case.device.type == "cuda" else "ms", times[OURS], times[COPY]
    spread = partial(Timing.spread, unit=unit, low=low)
    common: dict[str, Any] = {"shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."), "unfit": unfit}
    rows = [
        judged(
            f"{name} against {peer}", ours.median * UNITS[unit], time.median * UNITS[unit], unit=unit,
            bar=bars.get(peer), **common,
            note=f"{remark}; {low.replace('imum', '')}..p80 {spread(ours)} against {spread(time)} {unit}",
        )
        for peer, time in times.items()
        if peer not in (OURS, COPY)
    ]  # fmt: skip
    moved = _moved(case, back)
    note = f"{remark}; peer: a copy that moves the same {moved / 1e6:.0f} MB"
    rows.append(
        judged(
            f"{name} bandwidth", moved / ours.median / 1e9, moved / copy.median / 1e9, unit="GB/s", bar=bandwidth,
            higher_is_better=True, note=note, **common,
        )
    )  # fmt: skip
    return rows
