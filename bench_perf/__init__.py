"""Benchmarks: how fast, how much memory, against whom. Run with ``python -m bench_perf``; see README.md."""

from __future__ import annotations

# Name on the command line -> module with a function ``run() -> list[Row]``. Imported only when it is run.
BENCHMARKS: dict[str, str] = {
    "import": "bench_perf.import_",
    "load": "bench_perf.load",
    "memory": "bench_perf.memory",
    "renderer": "bench_perf.renderer",
    "planner": "bench_perf.planner",
    "packing": "bench_perf.packing",
    "guided_step": "bench_perf.guided_step",
    "guidance": "bench_perf.guidance",
    "rms_norm": "bench_perf.rms_norm",
    "qk_rope": "bench_perf.qk_rope",
    "modulate": "bench_perf.modulate",
    "scatter": "bench_perf.scatter",
    "packer": "bench_perf.packer",
    "ulysses": "bench_perf.ulysses",
    "vae": "bench_perf.vae",
    "overlap": "bench_perf.overlap",
    "balance": "bench_perf.balance",
    "arena": "bench_perf.arena",
    "offload_sim": "bench_perf.offload_sim",
    "offload_real": "bench_perf.offload_real",
}

# Names that run several of them.
GROUPS: dict[str, tuple[str, ...]] = {
    "kernels": ("rms_norm", "qk_rope", "modulate", "scatter", "guidance"),
    "all": tuple(BENCHMARKS),
}
