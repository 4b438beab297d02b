"""Offloaded activations where weights are gathered block by block (FSDP2 over gloo, two processes): the same bits as
without, lengths that change, and no gathered weight is ever taken for an activation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_fsdp(tmp_path: Path) -> None:
    script = Path(__file__).with_name("offload_worker.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert len(found) == 6
        for case, it in found.items():
            assert it["alike"] == [True] * 6, case
            assert it["broken"] == [] and it["left"] == [0, 0] and it["weights"] == 0, (case, it)
            assert it["offloaded"] >= 4 * 6, case
