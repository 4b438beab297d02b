"""Bytes that a rank allocates for its part of the packed sequence: ours against concatenating first, then cutting.

Forward and backward, at the paper's size on ``meta`` tensors, which have shapes and no memory: 440 000 tokens of width
5120 on 8 ranks; and the planner's embeddings on 4. A dispatch mode sees every storage that is allocated and when it is
let go of, so the figures are the same on every machine. A small real case is traced the same way and then measured by
the process's resident peak. The paper reports 17 GB saved; it does not say of which peer, or in what dtype.

Peers: ``concatenated`` embeds every segment, concatenates and keeps the rank's rows; ``one product`` concatenates the
patches, which are narrow, embeds all of them at once and then cuts; ``index_copy`` is a planner's usual chain: embed
all ids, copy the sources' features in, copy the target in, cut.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bernini.kernels import Segment, SegmentLayout
from bernini.kernels.segments import KINDS, Kind
from bernini.parallel.packer import Modality, Packer, Producer, from_boxes
from bernini.parallel.plan import SPPlan
from bernini.renderer.latents import patchify

from .harness import Row, extra_memory, judged

GB, MB = 1e9, 1e6
PATCH, CHANNELS = (1, 2, 2), 16
VALUES = CHANNELS * math.prod(PATCH)


class Allocations(TorchDispatchMode):
    """Every storage that an operation allocates while this lasts, with its size and lifetime.

    Views and operations in place allocate nothing; what was there before is not counted. What an operation needs inside
    and lets go of before it returns is not seen.

    ``shapes`` are those of the tensors that brought a new storage, with the operation's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, counted=False)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            if self._meet(tensor, counted=True):
                self.shapes.append((str(func), tuple(tensor.shape)))
        return out

    def _meet(self, tensor: Tensor, counted: bool) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = storage.nbytes() if counted else 0
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)  # its address may be another's next
        return True

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def as_long_as(self, size: int, besides: Sequence[Tensor] = ()) -> list[tuple[str, tuple[int, ...]]]:
        """Those with a dimension of so much or more.

        Args:
            besides: parameters; what has one's shape is taken for its gradient.
        """
        known = {tuple(tensor.shape) for tensor in besides}
        return [(op, shape) for op, shape in self.shapes if max(shape, default=0) >= size and shape not in known]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# --- the two sides --------------------------------------------------------------------------------------------------

Side = Callable[[], Tensor]
"""Makes the embeddings ``[own tokens, width]`` of one rank."""


def patches(segment: Segment, latent: Tensor) -> Producer:
    return from_boxes(segment.grid, lambda box: patchify(box.crop(latent, PATCH), PATCH))


@dataclass(frozen=True)
class Latents:
    """The renderer's patch embedding of one rank.

    Args:
        layout: sources and target.
        ranks, rank: who shares it, and who this is.
    """

    layout: SegmentLayout
    ranks: int
    rank: int
    latents: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor

    @classmethod
    def make(
        cls, grids: Sequence[tuple[int, int, int]], width: int, ranks: int, rank: int, dtype: torch.dtype, device: str
    ) -> Latents:
        """``grids``: of the sources in order, then the target."""
        *sources, target = grids
        segments = [Segment("source", grid, phase=float(n + 1)) for n, grid in enumerate(sources)]
        layout = SegmentLayout([*segments, Segment("target", target)])
        generator = None if device == "meta" else torch.Generator().manual_seed(0)
        random: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
        sizes = [(CHANNELS, *(n * p for n, p in zip(grid, PATCH, strict=True))) for grid in grids]
        latents = tuple(torch.randn(size, **random) for size in sizes)
        weight, bias = (torch.randn(size, **random).requires_grad_() for size in ((width, VALUES), (width,)))
        return cls(layout, ranks, rank, latents, weight, bias)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.weight, self.bias

    @property
    def packer(self) -> Packer:
        return Packer.of(SPPlan.make(self.layout, 8, 8, self.ranks).local(self.rank))

    def bernini(self) -> Tensor:
        pieces = [patches(*pair) for pair in zip(self.layout.segments, self.latents, strict=True)]
        first = self.latents[0]
        tokens = self.packer.pack(
            {"source": pieces[:-1], "target": pieces[-1:]}, VALUES, dtype=first.dtype, device=first.device
        )
        return F.linear(tokens, self.weight, self.bias)

    def concatenated(self) -> Tensor:
        embedded = [F.linear(patchify(latent, PATCH), self.weight, self.bias) for latent in self.latents]
        return torch.cat(embedded)[slice(*self.packer.part)].clone()

    def one_product(self) -> Tensor:
        tokens = torch.cat([patchify(latent, PATCH) for latent in self.latents])
        return F.linear(tokens, self.weight, self.bias)[slice(*self.packer.part)].clone()


@dataclass(frozen=True)
class Talk:
    """The planner's embeddings of one rank: text, ViT features of the sources, a target partly masked."""

    layout: SegmentLayout
    ranks: int
    rank: int
    ids: Tensor
    sources: Tensor
    targets: Tensor
    masked: Tensor
    table: Tensor
    mask: Tensor

    @classmethod
    def make(
        cls, segments: Sequence[Segment], vocabulary: int, width: int, ranks: int, rank: int, dtype: torch.dtype,
        device: str,
    ) -> Talk:  # fmt: skip
        layout = SegmentLayout(segments)
        rows = {kind: Packer(layout).rows(kind)[1] for kind in KINDS}
        generator = None if device == "meta" else torch.Generator().manual_seed(0)
        random: dict[str, Any] = {"device": device, "generator": generator}
        ids = torch.randint(vocabulary, (layout.tokens,), **random)
        masked = torch.rand(rows["target"], **random) < 0.7
        sizes = ((vocabulary, width), (width,))
        table, mask = (torch.randn(size, dtype=dtype, **random).requires_grad_() for size in sizes)
        sources, targets = (torch.randn(rows[kind], width, dtype=dtype, **random) for kind in ("source", "target"))
        return cls(layout, ranks, rank, ids, sources, targets, masked, table, mask)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.table, self.mask

    @property
    def packer(self) -> Packer:
        return Packer.of(SPPlan.make(self.layout, 28, 4, self.ranks).local(self.rank))

    def bernini(self) -> Tensor:
        packer = self.packer
        own = self.ids[slice(*packer.part)]
        text = own[packer.index("text", own.device)]

        def target(start: int, stop: int) -> Tensor:
            return torch.where(self.masked[start:stop, None], self.mask, self.targets[start:stop])

        modalities: dict[Kind, Modality] = {
            "text": lambda start, stop: F.embedding(text, self.table), "source": self.sources, "target": target,
        }  # fmt: skip
        return packer.pack(modalities, self.table.shape[1], dtype=self.table.dtype, device=own.device)

    def index_copy(self) -> Tensor:
        layout, here = self.layout, self.layout.on(self.ids.device)
        embeds = F.embedding(self.ids, self.table)
        embeds = embeds.index_copy(0, here.index(*layout.numbers("source")), self.sources)
        targets = torch.where(self.masked[:, None], self.mask, self.targets)
        return embeds.index_copy(0, here.target_index, targets)[slice(*self.packer.part)].clone()


def trace(side: Side, leaves: Sequence[Tensor] = ()) -> Allocations:
    """Forward and backward of a side; the gradients of the leaves belong to it. Without leaves, inference."""
    with torch.set_grad_enabled(bool(leaves)), Allocations() as seen:
        out = side()
        if leaves:
            torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
    return seen


# --- the rows -------------------------------------------------------------------------------------------------------

FRAME = (30, 53)  # tokens of a latent frame of 480 x 848
PAPER = [(137, *FRAME), *[(1, *FRAME)] * 3, (137, *FRAME)]
"""A video, three images and the target: 440 430 tokens."""
SMALL = [(12, *FRAME), (1, *FRAME), (12, *FRAME)]
"""39 750 tokens."""
TALK = [
    Segment("text", (40, 1, 1)), Segment("source", (60, 15, 27), phase=1.0), Segment("text", (200, 1, 1)),
    Segment("target", (140, 15, 27)), Segment("text", (1, 1, 1)),
]  # fmt: skip
"""A long conversation of the planner: 81 241 tokens, of which the second of four ranks has some of every kind."""


def counted(name: str, case: Latents | Talk, peers: Mapping[str, Side]) -> list[Row]:
    """What a rank allocates at most beyond its inputs, forward and backward, against each peer."""
    mine, tokens = trace(case.bernini, case.leaves), case.layout.tokens
    first = case.leaves[0]
    width = first.shape[1] if isinstance(case, Talk) else first.shape[0]
    own = case.packer.tokens * width * first.element_size() / GB
    grads = sum(leaf.nbytes for leaf in case.leaves) / GB
    shape, dtype = f"{tokens} x {width}, rank {case.rank} of {case.ranks}", str(first.dtype).removeprefix("torch.")
    case_is = {"shape": shape, "dtype": dtype}
    rows = []
    for peer, side in peers.items():
        theirs = trace(side, case.leaves)
        note = (
            f"peer: {peer}; saved {(theirs.peak - mine.peak) / GB:.3g} GB; the rank's rows are {own:.3g} GB, the "
            f"parameters' gradients {grads:.2g} GB; the peer has {len(theirs.as_long_as(tokens, case.leaves))} tensors "
            f"as long as the sequence; in inference {trace(case.bernini).peak / GB:.3g} against "
            f"{trace(side).peak / GB:.3g} GB"
        )
        rows.append(judged(f"{name} on a rank", mine.peak / GB, theirs.peak / GB, unit="GB", note=note, **case_is))
    whole = mine.as_long_as(tokens, case.leaves)
    found = "; ".join(f"{op} {list(size)}" for op, size in whole[:3])
    title = f"{name}: allocated as long as the sequence"
    return [*rows, judged(title, len(whole), unit="tensors", bar=0, note=found, **case_is)]


def measured(case: Latents) -> Row:
    """The same of the process's memory, where the allocator's own bookkeeping and an operation's insides count too."""

    def run(side: Side) -> Callable[[], Any]:
        def call() -> Any:
            out = side()
            return torch.autograd.grad(out, case.leaves, torch.ones_like(out))

        return call

    ours, theirs, unfit = 0, 0, None
    try:
        ours, theirs = extra_memory(run(case.bernini)), extra_memory(run(case.concatenated))
    except (OSError, AttributeError) as error:
        unfit = f"this system does not tell the peak of memory ({error})"
    return judged(
        "patch embedding on a rank, resident", ours / MB, theirs / MB, unit="MB", dtype="float32", unfit=unfit,
        shape=f"{case.layout.tokens} x {case.weight.shape[0]}, rank {case.rank} of {case.ranks}",
        note="peer: concatenated",
    )  # fmt: skip


def run() -> list[Row]:
    rows: list[Row] = []
    for dtype in (torch.bfloat16, torch.float32):
        paper = Latents.make(PAPER, 5120, 8, 3, dtype, "meta")
        rows += counted(
            "patch embedding", paper, {"concatenated": paper.concatenated, "one product": paper.one_product}
        )
    talk = Talk.make(TALK, 152064, 3584, 4, 1, torch.bfloat16, "meta")
    rows += counted("planner embeddings", talk, {"index_copy": talk.index_copy})
    small = Latents.make(SMALL, 512, 8, 3, torch.float32, "cpu")
    torch.testing.assert_close(small.bernini(), small.concatenated(), rtol=1e-5, atol=1e-5)
    rows += counted("patch embedding", small, {"concatenated": small.concatenated})
    return [*rows, measured(small)]
