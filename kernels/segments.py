"""One packed token sequence made of segments: the vocabulary every floor shares.

A batch is a list of :class:`Segment` (a text run, a source video or image, the target), sample after sample.
:class:`SegmentLayout` derives from it, on the host and once, everything that layers need to know about the batch:
sequence borders, rotary rows, the hybrid mask as key intervals, scatter indices, the timestep row of each token.
Layers only read it, so no layer exchanges sizes or waits for a device.

Shapes: T tokens of the packed sequence, S segments, B samples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["text", "source", "target"]
KINDS: tuple[Kind, ...] = ("text", "source", "target")
MAX_TRAINED_SOURCES = 5

IntArray = NDArray[np.int32]


def segment_phases(n: int, *, max_trained: int = MAX_TRAINED_SOURCES, interpolate: bool = True) -> tuple[float, ...]:
    """Segment ids of ``n`` sources in order: 1..n, or evenly spaced over [1, max_trained] when there are more.

    The model was trained with at most five sources; the released code squeezes more of them into the same range,
    computed (and rounded) in float32. The target's id is always 0.
    """
    if n < 0:
        raise ValueError(f"segment_phases: the number of sources must not be negative, got {n}")
    if not interpolate or n <= max_trained:
        return tuple(float(i + 1) for i in range(n))
    import torch  # its float32 linspace defines the rounding; imported late, so that layouts need no torch

    return tuple(torch.linspace(1, max_trained, n, dtype=torch.float32).tolist())


@dataclass(frozen=True)
class Segment:
    """A run of tokens that belong together.

    Args:
        kind: ``"text"``, ``"source"`` or ``"target"``.
        grid: (t, h, w) size in tokens; token order is t, then h, then w. A text run of n tokens is (n, 1, 1).
        phase: segment id of SA-3D RoPE (paper eq. 2): 0 for the target, 1..n for sources, fractions allowed.
        sample: number of the sample in the batch.
    """

    kind: Kind
    grid: tuple[int, int, int]
    phase: float = 0.0
    sample: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Segment: kind={self.kind!r}; expected one of {', '.join(KINDS)}")
        if len(self.grid) != 3 or any(int(size) != size or size < 1 for size in self.grid):
            raise ValueError(f"Segment: grid must be three positive whole numbers (t, h, w), got {self.grid}")
        if self.kind == "text" and self.grid[1:] != (1, 1):
            raise ValueError(f"Segment: a text run of n tokens has the grid (n, 1, 1), got {self.grid}")
        if not math.isfinite(self.phase) or self.phase < 0:
            raise ValueError(f"Segment: phase must be finite and not negative, got {self.phase}")
        if self.sample < 0:
            raise ValueError(f"Segment: sample must not be negative, got {self.sample}")

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class Intervals(NamedTuple):
    """Keys each token may attend to: ``[starts, ends)`` and, for the rows that need it, ``[starts2, ends2)``.

    int32 ``[T]`` each. ``second`` is ``None`` when no row needs it; a row without a second interval has 0, 0 there.
    """

    starts: IntArray
    ends: IntArray
    second: tuple[IntArray, IntArray] | None


@dataclass(frozen=True)
class SegmentLayout:
    """An immutable list of segments with everything derived from it. Two layouts are equal if their segments are.

    Raises:
        ValueError: no segments, or samples that are not numbered 0, 1, 2, ... in order.
    """

    segments: tuple[Segment, ...]

    def __init__(self, segments: Sequence[Segment]) -> None:
        object.__setattr__(self, "segments", tuple(segments))
        if not self.segments:
            raise ValueError("SegmentLayout: needs at least one segment")
        previous = 0
        for number, segment in enumerate(self.segments):
            if segment.sample not in (previous, previous + 1) or (number == 0 and segment.sample != 0):
                raise ValueError(
                    f"SegmentLayout: samples must be numbered 0, 1, 2, ... in order; segment {number} has sample "
                    f"{segment.sample} after {previous}"
                )
            previous = segment.sample

    # --- sizes and borders ------------------------------------------------------------------------------------------

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each segment in the packed sequence."""
        stops = np.cumsum([segment.tokens for segment in self.segments]).tolist()
        return tuple(zip([0, *stops[:-1]], stops, strict=True))

    @property
    def tokens(self) -> int:
        """Length T of the packed sequence."""
        return self.ranges[-1][1]

    @property
    def num_samples(self) -> int:
        return self.segments[-1].sample + 1

    @cached_property
    def cu_seqlens(self) -> tuple[int, ...]:
        """B+1 sample borders, on the host: attention never asks a device for them."""
        starts = [
            self.ranges[number][0]
            for number, segment in enumerate(self.segments)
            if number == 0 or segment.sample != self.segments[number - 1].sample
        ]
        return (*starts, self.tokens)

    @property
    def max_seqlen(self) -> int:
        """Longest sample in tokens."""
        return max(np.diff(self.cu_seqlens).tolist())

    # --- rotary rows ------------------------------------------------------------------------------------------------

    @cached_property
    def phases(self) -> tuple[float, ...]:
        """The distinct segment phases, in order of first appearance: rows of the segment table."""
        return tuple(dict.fromkeys(segment.phase for segment in self.segments))

    @cached_property
    def grid_sizes(self) -> tuple[int, int, int]:
        """Longest (t, h, w) of any visual segment: lengths of the three position tables."""
        visual = [segment.grid for segment in self.segments if segment.kind != "text"] or [(1, 1, 1)]
        return max(g[0] for g in visual), max(g[1] for g in visual), max(g[2] for g in visual)

    @cached_property
    def rows(self) -> IntArray:
        """int32 ``[T, 4]``: row numbers of each token in the t, h, w and segment tables.

        Positions start again at 0 in every segment. Text runs have no place in the grid: they keep position 0.
        """
        rows = np.zeros((self.tokens, 4), dtype=np.int32)
        for segment, (start, stop) in zip(self.segments, self.ranges, strict=True):
            if segment.kind != "text":
                rows[start:stop, :3] = np.indices(segment.grid, dtype=np.int32).reshape(3, -1).T
            rows[start:stop, 3] = self.phases.index(segment.phase)
        return rows

    # --- indices ----------------------------------------------------------------------------------------------------

    def numbers(self, *kinds: Kind) -> tuple[int, ...]:
        """Numbers of the segments of these kinds."""
        return tuple(number for number, segment in enumerate(self.segments) if segment.kind in kinds)

    def indices(self, numbers: Collection[int]) -> NDArray[np.int64]:
        """int64: places of these segments' tokens in the packed sequence, in packed order (for scatter, gather)."""
        unknown = [number for number in numbers if not 0 <= number < len(self.segments)]
        if unknown:
            raise ValueError(f"SegmentLayout: no segment {unknown[0]}; there are {len(self.segments)}")
        pieces = [np.arange(*self.ranges[number], dtype=np.int64) for number in sorted(set(numbers))]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    @cached_property
    def target_index(self) -> NDArray[np.int64]:
        """int64: places of the target tokens."""
        return self.indices(self.numbers("target"))

    @cached_property
    def timestep_rows(self) -> IntArray:
        """int32 ``[T]``: row of each token in per-sample tables. All tokens of a sample, clean sources too, share the
        target's timestep (facts of the released model: the sources' latents are clean, their modulation is not)."""
        return np.repeat(np.arange(self.num_samples, dtype=np.int32), np.diff(self.cu_seqlens))

    # --- the planner's hybrid mask ----------------------------------------------------------------------------------

    @cached_property
    def intervals(self) -> Intervals:
        """The hybrid mask (paper fig. 3 D) as key intervals.

        Text and source tokens attend causally to the text and sources of their sample and never see a target. Target
        tokens see all text and sources before them and their whole own segment.

        Raises:
            ValueError: a token would need three intervals (text or a target after two targets that are apart).
        """
        starts, ends, starts2, ends2 = (np.zeros(self.tokens, dtype=np.int32) for _ in range(4))
        seen: list[tuple[int, int]] = []  # text and source ranges of this sample so far, merged
        sample = 0
        for number, (segment, (start, stop)) in enumerate(zip(self.segments, self.ranges, strict=True)):
            if segment.sample != sample:
                seen, sample = [], segment.sample
            own_end = stop if segment.kind == "target" else np.arange(start + 1, stop + 1, dtype=np.int32)
            joined = bool(seen) and seen[-1][1] == start
            pieces = [*seen[:-1], (seen[-1][0], own_end)] if joined else [*seen, (start, own_end)]
            if len(pieces) > 2:
                raise ValueError(
                    f"SegmentLayout: segment {number} ({segment.kind}, sample {sample}) would need {len(pieces)} key "
                    "intervals per token; at most two are supported (one gap left by targets before it)"
                )
            starts[start:stop], ends[start:stop] = pieces[0]
            if len(pieces) == 2:
                starts2[start:stop], ends2[start:stop] = pieces[1]
            if segment.kind != "target":
                seen = [*seen[:-1], (seen[-1][0], stop)] if joined else [*seen, (start, stop)]
        return Intervals(starts, ends, (starts2, ends2) if ends2.any() else None)

    # --- guidance branches ------------------------------------------------------------------------------------------

    def branch(self, keep: Collection[int], ids: Literal["keep", "restart"] = "keep") -> SegmentLayout:
        """The layout with only some of its sources; text and targets always stay.

        Args:
            keep: numbers of the source segments to keep: ``()`` leaves the target alone.
            ids: ``"keep"`` leaves every phase as it is; ``"restart"`` counts the kept sources of each sample from 1
                again (and interpolates again, by how many are left).

        Raises:
            ValueError: ``keep`` names something that is not a source.
        """
        if ids not in ("keep", "restart"):
            raise ValueError(f"SegmentLayout.branch: ids={ids!r}; expected 'keep' or 'restart'")
        wrong = set(keep) - set(self.numbers("source"))
        if wrong:
            raise ValueError(f"SegmentLayout.branch: segment {min(wrong)} is not a source of this layout")
        kept = [s for number, s in enumerate(self.segments) if s.kind != "source" or number in keep]
        if ids == "restart":
            counts = [sum(s.kind == "source" and s.sample == b for s in kept) for b in range(self.num_samples)]
            fresh = [iter(segment_phases(count)) for count in counts]
            kept = [replace(s, phase=next(fresh[s.sample])) if s.kind == "source" else s for s in kept]
        return SegmentLayout(kept)

    # --- device copies ----------------------------------------------------------------------------------------------

    @cached_property
    def _copies(self) -> dict[str, DeviceLayout]:
        return {}

    def on(self, device: torch.device | str) -> DeviceLayout:
        """Tensors of this layout on a device, made once and cached."""
        return self._copies.setdefault(str(device), DeviceLayout(self, device))


class DeviceLayout:
    """A layout's arrays as tensors on one device; each is copied when first asked for, and only once."""

    def __init__(self, layout: SegmentLayout, device: torch.device | str) -> None:
        self.layout, self.device = layout, device
        self._tables: dict[tuple[int, float], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def _copy(self, array: NDArray[np.integer]) -> Tensor:
        import torch

        return torch.from_numpy(array).to(self.device)

    @cached_property
    def rows(self) -> Tensor:
        """int32 ``[T, 4]``, see :attr:`SegmentLayout.rows`."""
        return self._copy(self.layout.rows)

    @cached_property
    def timestep_rows(self) -> Tensor:
        """int32 ``[T]``, see :attr:`SegmentLayout.timestep_rows`."""
        return self._copy(self.layout.timestep_rows)

    @cached_property
    def target_index(self) -> Tensor:
        """int64, see :attr:`SegmentLayout.target_index`."""
        return self._copy(self.layout.target_index)

    def index(self, *numbers: int) -> Tensor:
        """int64: places of these segments' tokens, see :meth:`SegmentLayout.indices`. Copied once per choice."""
        if numbers not in self._indices:
            self._indices[numbers] = self._copy(self.layout.indices(numbers))
        return self._indices[numbers]

    @cached_property
    def intervals(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """int32 ``[T]`` each, see :attr:`SegmentLayout.intervals`."""
        starts, ends, second = self.layout.intervals
        pair = None if second is None else (self._copy(second[0]), self._copy(second[1]))
        return self._copy(starts), self._copy(ends), pair

    def tables(self, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four rotary tables that :attr:`rows` points into, fp32 (see ``bernini.kernels.rope_tables``)."""
        key = (head_dim, theta)
        if key not in self._tables:
            from .qk_rope.tables import rope_tables

            layout = self.layout
            self._tables[key] = rope_tables(head_dim, layout.grid_sizes, layout.phases, theta=theta, device=self.device)
        return self._tables[key]
