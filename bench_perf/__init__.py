"""Benchmarks: how fast, how much memory, against whom. Run with ``python -m bench_perf``; see README.md."""

from __future__ import annotations

# Name on the command line -> module with a function ``run() -> list[Row]``. Imported only when it is run.
BENCHMARKS: dict[str, str] = {
    "import": "bench_perf.import_",
    "load": "bench_perf.load",
    "renderer": "bench_perf.renderer",
    "guided_step": "bench_perf.guided_step",
}
