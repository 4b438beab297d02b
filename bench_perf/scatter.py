"""Four sources written into their rows of one buffer that is there already, as the packer does for every batch.

Peers do it in two ways: ``torch.cat`` and a reordering, which is what users write, and ``index_copy_`` per source. A
row says how much memory ours needs beyond the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bernini.kernels import scatter_rows
from bernini.kernels.scatter import reference

from . import gpu
from .harness import Row, extra_memory, judged
from .kernels import BANDWIDTH, DTYPES, both_ways, device
from .providers import Call, Case, compiled, provider

BARS = {"eager": 1.5}
MEMORY = 1.0  # MB
SIZES = (512, 1024, 1024, 1536)  # rows of each source: text, two images, a video


@dataclass(frozen=True, kw_only=True)
class Scatter(Case):
    """Shapes: T rows of the buffer, N width, n rows of a source."""

    sources_nN: tuple[Tensor, ...]
    indices_n: tuple[Tensor, ...]

    @property
    def shape(self) -> str:
        rows, width = self.gradients[0].shape
        return f"{len(self.sources_nN)} into {rows} x {width}"

    @property
    def moved(self) -> int:
        rows = sum(source.nbytes for source in self.sources_nN)
        return 2 * rows + sum(index.nbytes for index in self.indices_n)

    @property
    def moved_backward(self) -> int:
        return self.moved

    def leaves(self) -> list[Tensor]:
        return list(self.sources_nN)

    def reference(self) -> Tensor:
        out = self.buffer()
        reference.scatter_rows(out, self.sources_nN, self.indices_n)
        return out

    def buffer(self) -> Tensor:
        return torch.zeros_like(self.gradients[0])

    def order(self) -> Tensor:
        """``cat(sources)[order]`` is the result."""
        return torch.cat(self.indices_n).argsort()


def make_case(sizes: tuple[int, ...], width: int, dtype: torch.dtype) -> Scatter:
    torch.manual_seed(0)
    sources = tuple(torch.randn(size, width, device=device()).to(dtype) for size in sizes)
    dy = torch.randn(sum(sizes), width, device=device()).to(dtype)
    return Scatter(gradients=(dy,), sources_nN=sources, indices_n=torch.randperm(len(dy), device=device()).split(sizes))


@provider("scatter", "bernini")
def bernini(case: Scatter) -> Call:
    return partial(scatter_rows, case.buffer(), case.sources_nN, case.indices_n)


@provider("scatter", "eager")
def eager(case: Scatter) -> Call:
    order = case.order()
    return lambda: torch.cat(case.sources_nN).index_select(0, order)


@provider("scatter", "index_copy_")
def index_copy(case: Scatter) -> Call:
    """torch's own way without a temporary."""
    out = case.buffer()

    def call() -> Tensor:
        result = out
        for source, index in zip(case.sources_nN, case.indices_n, strict=True):
            result = result.index_copy_(0, index, source)
        return result

    return call


@provider("scatter", "torch.compile")
def torch_compile(case: Scatter) -> Call:
    return compiled(lambda sources, order: torch.cat(sources).index_select(0, order), case.sources_nN, case.order())


def memory(case: Scatter) -> Row:
    """What ours needs while it runs, beyond the result; the note tells the eager chain's."""
    extra = gpu.extra_memory if case.device.type == "cuda" else extra_memory
    ours, theirs, unfit = 0, 0, None
    try:
        ours, theirs = extra(bernini(case)), extra(eager(case)) - case.gradients[0].nbytes
    except (OSError, AttributeError) as error:
        unfit = f"this system does not tell the peak of memory ({error})"
    return judged(
        "scatter memory beyond the result", ours / 1e6, unit="MB", bar=MEMORY, shape=case.shape, unfit=unfit,
        dtype=str(case.dtype).removeprefix("torch."), note=f"eager: {theirs / 1e6:.0f} MB",
    )  # fmt: skip


def run() -> list[Row]:
    rows = []
    for dtype in DTYPES:
        case = make_case(SIZES, 5120, dtype)
        with torch.no_grad():
            rows.append(memory(case))
        rows += both_ways("scatter", case, ("scatter_rows", "gather_rows"), bars=BARS, bandwidth=BANDWIDTH)
    return rows
