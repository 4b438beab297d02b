"""A renderer of 4 GB whose blocks are streamed, in a process that may have 1.5 GB of data: the same bits as resident.

Blocks of the 1.3B checkpoint's shape, 22 of them, float32, with random weights in a temporary file. Each case is a
process of its own with the C library's own malloc settings. ``RLIMIT_DATA`` holds from its start on: it counts heap,
stacks and private writable mappings, the interpreter's and the libraries' included. This process samples the other's
anonymous memory (RssAnon + RssShmem) every 10 ms. Two forwards; their outputs are compared byte by byte. That the limit
bites is shown by the resident case under it, which must run out of memory. Nothing here depends on who else uses the
processor, so it is judged on a busy machine, too; seconds are only told.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bernini.checkpoint import WEIGHTS, expected_shapes, open_experts, write_json
from bernini.kernels import Segment, SegmentLayout
from bernini.memory.streaming import stream_expert
from bernini.renderer.config import RendererConfig
from bernini.renderer.model import Renderer

from .harness import Row, judged
from .watched import peak, start

CONFIG = RendererConfig(num_attention_heads=12, ffn_dim=8960, num_layers=22)
LIMIT = 1_500_000_000  # bytes
GRID = (1, 8, 8)
OUT = 3  # exit code of a process that ran out of memory


@dataclass(frozen=True)
class Measured:
    """What one case took; ``digest`` is empty where it ran out of memory."""

    anonymous: int
    """Peak of RssAnon + RssShmem, in bytes, of the whole process."""
    mapped: int
    """Peak of RssFile."""
    digest: str
    seconds: float


def write_random(root: Path, config: RendererConfig) -> int:
    """A checkpoint of one expert; returns the bytes of its weights."""
    shapes, header, end = expected_shapes(config), dict[str, object](), 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (root / "transformer").mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    with open(root / "transformer" / WEIGHTS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        drawn: dict[tuple[int, ...], torch.Tensor] = {}
        for number, shape in enumerate(shapes.values()):
            if shape not in drawn:
                bound = 1 / math.sqrt(shape[-1])
                drawn[shape] = torch.empty(shape).uniform_(-bound, bound, generator=random)
            # Blocks differ, so that one in the place of another would be seen; drawing each anew would take long.
            file.write(drawn[shape].view(-1).roll(number).numpy())
    write_json(root / "transformer" / "config.json", config.to_dict())
    write_json(root / "config.json", {"model_type": "bernini_renderer", "skip_transformer_2": True})
    return end


# --- the cases, run in a process of their own -------------------------------------------------------------------------


@torch.no_grad()
def forwards(model: Renderer) -> str:
    """SHA-256 of the outputs of two timesteps."""
    random = torch.Generator().manual_seed(1)
    layout = SegmentLayout([Segment("target", GRID)])
    tokens = torch.randn((layout.tokens, model.config.patch_values), generator=random)
    context = model.text_context(torch.randn((32, model.config.text_dim), generator=random))
    said = hashlib.sha256()
    for timestep in (900.0, 400.0):
        out = model(tokens, layout, torch.tensor([timestep]), context)
        if not bool(torch.isfinite(out).all()):
            raise RuntimeError("the outputs are not finite: they would compare equal for no reason")
        said.update(out.numpy().tobytes())
    return said.hexdigest()


def child(case: str, root: str) -> None:
    """Prints the digest and the seconds; exits with :data:`OUT` when memory runs out."""
    start = time.perf_counter()
    try:
        source = open_experts(Path(root)).experts["high"]
        if case == "streamed":
            model, stream = stream_expert(source, torch.float32, "cpu")
            digest = forwards(model)
            stream.close()
        else:
            digest = forwards(source.load())
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        sys.exit(OUT)
    print(digest, time.perf_counter() - start, flush=True)


def measure(case: str, root: Path, limit: int | None) -> Measured:
    """Runs a case in a new process and watches its memory.

    Raises:
        RuntimeError: it failed, but not for want of memory.
    """
    set_limit = None if limit is None else partial(resource.setrlimit, resource.RLIMIT_DATA, (limit, limit))
    with start(__name__, case, root, stderr=subprocess.PIPE, preexec_fn=set_limit) as process:
        assert process.stdout is not None and process.stderr is not None
        most = peak(process)
        answer, errors = process.stdout.read().split(), process.stderr.read()
    if process.returncode == OUT:
        return Measured(*most, "", 0.0)
    if process.returncode != 0 or len(answer) != 2:
        raise RuntimeError(f"the process that measures {case!r} failed: {errors[-2000:]}")
    return Measured(*most, answer[0], float(answer[1]))


def run() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="bernini-memory-") as folder:
        root = Path(folder) / "checkpoint"
        size = write_random(root, CONFIG)
        streamed, whole = measure("streamed", root, LIMIT), measure("resident", root, None)
        if measure("resident", root, LIMIT).digest:
            raise RuntimeError("the limit does not bite: all weights were resident under it")
    if not streamed.digest or streamed.digest != whole.digest:
        raise RuntimeError("streamed weights gave other bits than resident ones, or ran out of memory")

    def row(name: str, it: Measured, bar: float | None, note: str) -> Row:
        told = f"{it.seconds:.1f} s; mapped files {it.mapped / 1e6:.0f} MB; {note}"
        shape = f"{size / 1e9:.1f} GB, {CONFIG.num_layers} blocks of {CONFIG.width}"
        return judged(
            name, it.anonymous / 1e6, unit="MB", shape=shape, dtype="float32", bar=bar, note=told
        )  # fmt: skip

    limit = f"RLIMIT_DATA {LIMIT / 1e9:.1f} GB"
    return [
        row(f"weights streamed under {limit}", streamed, LIMIT / 1e6, "the bits of the resident run"),
        row("weights resident, no limit", whole, None, f"under {limit} it runs out of memory"),
    ]
