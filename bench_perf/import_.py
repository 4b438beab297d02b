"""How long ``import bernini`` takes, and that it loads nothing heavy. Fresh interpreters, warm file caches."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

from .harness import Row, Timing, Watch, judged

MODULES = ("bernini", "bernini.kernels")
HEAVY = ("torch", "triton", "numpy", "transformers", "diffusers", "av")
LIMIT = 0.3  # seconds
RUNS = 15

_TIMED = """
import json, sys, time
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
print(json.dumps([seconds, [name for name in {heavy!r} if name in sys.modules]]))
"""


def _import(module: str, folder: str) -> tuple[float, list[str]]:
    """Seconds of the import statement in a new process, and the heavy libraries it brought in."""
    code = _TIMED.format(module=module, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    seconds, heavy = json.loads(done.stdout)
    return seconds, heavy


def run() -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:  # an empty working directory, so that nothing there is imported
        for module in MODULES:
            _import(module, folder)  # compiles and fills the file cache
            with Watch() as watch:
                results = [_import(module, folder) for _ in range(RUNS)]
            timing = Timing.of([seconds for seconds, _ in results])
            note = f"min..p80 {timing.spread('ms')} ms, {RUNS} processes"
            rows.append(judged(f"import {module}", timing.median, unit="s", bar=LIMIT, unfit=watch.unfit, note=note))
            heavy = results[0][1]
            rows.append(
                judged(
                    f"heavy libraries that import {module} loads",
                    len(heavy),
                    unit="modules",
                    bar=0,
                    note=", ".join(heavy),
                )
            )
    return rows
