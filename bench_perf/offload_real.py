"""Anonymous memory of a training step that keeps its activations in a file, against the same step without offload.

Eight renderer blocks of width 1536 on 8192 tokens in float32: forward, backward, no optimizer. Each side runs in a
process of its own with the C library's own malloc settings; this process samples the other's RssAnon + RssShmem every
10 ms over the level just before the step, so the weights are not in the figure and their gradients are. The arena lies
in a file of the temporary folder, which must be on a disk: pages of a tmpfs are no file's. Both sides tell a checksum
of all gradients, and a difference is an error. Memory does not depend on who else uses the processor, so it is judged
on a busy machine, too.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout
from bernini.renderer.config import RendererConfig
from bernini.renderer.model import Block, How, Stream

from .harness import Row, judged
from .watched import peak, resident, start

if TYPE_CHECKING:
    from bernini.offload.activations import ActivationOffload

BAR = 2.0  # times lower
LIMIT = 64 << 30  # bytes of the file: addresses only, until they are used
IN_FLIGHT = 256 << 20


@dataclass(frozen=True)
class Case:
    """What is trained.

    Args:
        grid: of the target's tokens.
        policy: of the offload; none without one.
    """

    layers: int = 8
    heads: int = 12
    ffn: int = 8960
    grid: tuple[int, int, int] = (8, 32, 32)
    text: int = 512
    policy: str = ""


@dataclass(frozen=True)
class Measured:
    """Of one side, in bytes over the level before the step, but for the weights."""

    anonymous: int
    file: int
    weights: int
    seconds: float
    gradients: str


# --- one side, in a process of its own ------------------------------------------------------------------------------


class Step:
    """A stack of blocks with everything that they are called with."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        config = RendererConfig(num_attention_heads=case.heads, num_layers=case.layers, ffn_dim=case.ffn)
        self.blocks = [Block(config) for _ in range(case.layers)]
        self.layout = SegmentLayout([Segment("target", case.grid)])
        width = config.width
        self.x = torch.randn(self.layout.tokens, width)
        self.time = torch.randn(1, 6, width) / width**0.5
        text = torch.randn(2, case.text, case.heads, config.attention_head_dim)
        self.text, self.borders = (text[0].contiguous(), text[1].contiguous()), (0, case.text)

    def loss(self) -> Tensor:
        stream, how = Stream(self.x), How("fp32", "auto")
        for block in self.blocks:
            stream = block(stream, self.time, *self.text, self.layout, self.borders, how)
        assert stream.branch is not None and stream.gate is not None
        return (stream.residual + stream.branch * stream.gate).square().mean()

    def weights(self) -> int:
        return sum(p.nbytes for block in self.blocks for p in block.parameters())

    def digest(self) -> str:
        found = hashlib.sha256()
        for block in self.blocks:
            for parameter in block.parameters():
                if parameter.grad is not None:
                    found.update(parameter.grad.contiguous().numpy())
        return found.hexdigest()


def offload_of(step: Step, policy: str, folder: str) -> ActivationOffload:
    from bernini.offload.activations import ActivationOffload
    from bernini.offload.arena import Arena

    arena = Arena(LIMIT, file=folder)
    return ActivationOffload(step.blocks, policy=policy, arena=arena, in_flight=IN_FLIGHT, landing=2)  # type: ignore[arg-type]


def child(text: str, folder: str) -> None:
    """Builds, says that it is ready, waits for a line, runs the step, prints the seconds, then what came out."""
    fields = json.loads(text)
    case = Case(**{**fields, "grid": tuple(fields["grid"])})
    step = Step(case)
    offload = offload_of(step, case.policy, folder) if case.policy else None
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    if offload is None:
        step.loss().backward()
    else:
        with offload:
            loss = step.loss()
        loss.backward()
    print(time.perf_counter() - start, flush=True)
    sys.stdin.readline()
    print(json.dumps({"weights": step.weights(), "gradients": step.digest()}), flush=True)


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(case: Case, folder: Path) -> Measured:
    """Runs a side in a new process and watches its memory.

    Raises:
        RuntimeError: it failed.
    """
    with start(__name__, json.dumps(asdict(case)), folder, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the process that runs the step did not start")
        before = resident(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        most = peak(process)
        seconds = process.stdout.readline()
        if not seconds:
            raise RuntimeError("the process that runs the step failed")
        told = json.loads(process.communicate("on\n")[0])
    return Measured(most[0] - before[0], most[1] - before[1], told["weights"], float(seconds), told["gradients"])


def run(case: Case | None = None) -> list[Row]:
    case = case or Case()
    with tempfile.TemporaryDirectory(prefix="bernini-offload-") as name:
        folder = Path(name)
        plain = measure(case, folder)
        ours = measure(Case(**{**asdict(case), "policy": "all"}), folder)
    if plain.gradients != ours.gradients:
        raise RuntimeError("offload_real: the gradients with offload differ from those without")
    tokens = case.grid[0] * case.grid[1] * case.grid[2]
    note = (
        f"{ours.anonymous / 1e6:.0f} MB against {plain.anonymous / 1e6:.0f} MB, "
        f"{plain.anonymous / ours.anonymous:.2f} times lower; with the weights of {ours.weights / 1e6:.0f} MB "
        f"{(plain.anonymous + plain.weights) / (ours.anonymous + ours.weights):.2f} times; same bits of the gradients; "
        f"mapped file {ours.file / 1e6:.0f} MB; {ours.seconds:.0f} s against {plain.seconds:.0f} s"
    )
    # A part and not a ratio to a peer: the command would run all of it again with other malloc settings, which the
    # processes that are measured do not take over.
    return [
        judged(
            f"anonymous memory of a step, {case.layers} blocks, policy all", ours.anonymous / plain.anonymous,
            unit="of that without offload", shape=f"{tokens} x {case.heads * 128}", dtype="float32", bar=1 / BAR,
            note=note,
        )
    ]  # fmt: skip
