"""Host memory of loading a 3.7 GB float32 checkpoint as bfloat16, and of two experts that take turns.

Two layers at the 14B widths, in sparse files: zeros that take no disk, but are read like any others. Each case runs in
a process of its own with the C library's own malloc settings; this process samples the other's anonymous memory every
10 ms over the level just before. The promise is about what is there beside the weights in bfloat16; what the few parts
that stay float32 need more counts as beside. The usual way, the library's ``load_file`` and a cast, maps the whole
file: that is no anonymous memory, and the note tells how much it is. Memory does not depend on who else is using the
processor, so it is judged on a busy machine, too; the seconds are only told.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bernini.checkpoint import WEIGHTS, expected_shapes, load_renderer, open_experts, write_json
from bernini.kernels import Segment, SegmentLayout
from bernini.renderer.config import RendererConfig
from bernini.renderer.guidance import PLANS
from bernini.renderer.model import Renderer
from bernini.renderer.sampler import Guidance, OneAtATime, Which, sample
from bernini.renderer.schedule import make_solver
from bernini.weights import BUFFER

from .harness import Row, judged
from .watched import peak, resident, start

CONFIG = RendererConfig(num_layers=2)
BAR = 300  # MB


@dataclass(frozen=True)
class Measured:
    """What one case needed beyond the level before it, in bytes."""

    anonymous: int
    """Peak of RssAnon + RssShmem."""
    file: int
    """Peak of RssFile: pages of mapped files, which the system can drop."""
    seconds: float


# --- the checkpoint -------------------------------------------------------------------------------------------------


def write_zeros(root: Path, config: RendererConfig) -> None:
    """A two-expert checkpoint of float32 zeros, as sparse files."""
    for name in ("transformer", "transformer_2"):
        header: dict[str, object] = {}
        end = 0
        for key, shape in expected_shapes(config).items():
            size = 4 * torch.Size(shape).numel()
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        (root / name).mkdir(parents=True)
        with open(root / name / WEIGHTS, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        write_json(root / name / "config.json", config.to_dict())
    write_json(root / "config.json", {"model_type": "bernini_renderer", "switch_dit_boundary": 0.875})


def parameters(config: RendererConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())


# --- the cases, run in a process of their own -----------------------------------------------------------------------


def load_one(root: Path) -> Renderer:
    return load_renderer(root / "transformer", dtype=torch.bfloat16)


def load_whole_file(root: Path) -> object:
    from safetensors.torch import load_file

    weights = load_file(root / "transformer" / WEIGHTS)
    return {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}


def take_turns(root: Path) -> object:
    """Two steps of sampling, one of each expert, on a handful of tokens."""
    files = open_experts(root, dtype=torch.bfloat16)
    loads: list[str] = []

    def load(which: Which) -> Renderer:
        loads.append(which)
        return files.load(which)

    experts = OneAtATime(load, files.config, has_low=files.has_low, boundary=files.boundary)
    layout = SegmentLayout([Segment("target", (1, 4, 4))])
    texts = {name: torch.zeros(8, files.config.text_dim) for name in ("positive", "negative")}
    noise = torch.zeros(layout.tokens, files.config.patch_values)
    solver = make_solver("unipc", "release", 2, 5.0)
    result = sample(experts, layout, 0, [], noise, texts, PLANS["t2v"], Guidance({"txt": 4.0}), solver)
    if loads != ["high", "low"]:
        raise RuntimeError(f"this case must load each expert once, and loaded {loads}")
    return result


CASES: dict[str, Callable[[Path], object]] = {"one": load_one, "whole": load_whole_file, "turns": take_turns}


def child(case: str, root: str) -> None:
    """Says that it is ready, waits for a line, runs the case, prints the seconds."""
    expected_shapes(RendererConfig(num_layers=1))  # torch's meta tensors load modules when first used
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    kept = CASES[case](Path(root))
    print(time.perf_counter() - start, flush=True)
    sys.stdin.readline()  # `kept` stays until the other side has looked
    del kept


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(case: str, root: Path) -> Measured:
    """Runs a case in a new process and watches its memory.

    Raises:
        RuntimeError: the case failed.
    """
    with start(__name__, case, root, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the process that measures {case!r} did not start")
        before = resident(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        most = peak(process)
        seconds = process.stdout.readline()
    if process.returncode != 0 or not seconds:
        raise RuntimeError(f"the process that measures {case!r} failed")
    return Measured(most[0] - before[0], most[1] - before[1], float(seconds))


def run() -> list[Row]:
    size = 2 * parameters(CONFIG)  # of one expert in bfloat16
    with tempfile.TemporaryDirectory(prefix="bernini-load-") as folder:
        root = Path(folder) / "checkpoint"
        write_zeros(root, CONFIG)
        for file in root.rglob("*.safetensors"):  # into the file cache, so that no case pays for being the first
            with open(file, "rb") as handle:
                while handle.read(BUFFER):
                    pass
        found = {case: measure(case, root) for case in CASES}

    def row(case: str, name: str, bar: float | None) -> Row:
        it = found[case]
        note = f"{it.seconds:.1f} s; mapped files {it.file / 1e6:.0f} MB"
        return judged(
            name, (it.anonymous - size) / 1e6, unit="MB over the weights", shape=f"{2 * size / 1e9:.1f} GB float32",
            dtype="bfloat16", bar=bar, note=note,
        )  # fmt: skip

    return [
        row("one", "load an expert", BAR),
        row("turns", "two experts in turn, over one's weights", BAR),
        row("whole", "load_file(...), then .to(bfloat16)", None),
    ]
