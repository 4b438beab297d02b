"""A packed batch cut for a group of ranks: decided once per batch on the host, then only read.

Tokens are cut into consecutive ranges, one per rank; a segment may cross a border. For attention, P ranks are P / U
rows of U: within a row (the ranks of one *gather group*) queries are swapped for heads, so that a rank has its row's
queries of one band of heads; keys and values of that band, as far as these queries see them, come from all ranks.

    (28, 4) heads on 8 ranks: U = 4, two rows; a rank has 7 query heads and 1 key head, half of the queries, their keys

Every rank then has the same number of heads and, up to one token per rank, of queries. What it receives is what it
reads: nothing is sent twice to one receiver.

Shapes: T tokens of the whole sequence, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast, overload

import numpy as np
from numpy.typing import NDArray

from bernini.kernels import SegmentLayout
from bernini.kernels.segments import DeviceLayout, Intervals

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Range = tuple[int, int]


@dataclass(frozen=True)
class Heads:
    """How the heads of attention are shared by P ranks.

    Args:
        heads, kv_heads: of queries; of keys and values.
        ulysses: U, into how many bands the heads are cut.
        gather: how many ranks have the same band, and share the queries among them; ``ulysses * gather == P``.
    """

    heads: int
    kv_heads: int
    ulysses: int
    gather: int

    @classmethod
    def shared(cls, heads: int, kv_heads: int, ranks: int) -> Heads:
        """The most bands that give every rank as many heads, whole groups of them or a part of one group.

        More bands mean fewer bytes: queries stay at 1/P of the tokens either way, and keys go to P / U ranks.

        Raises:
            ValueError: heads that are no multiple of the key heads, or numbers below 1.
        """
        if min(heads, kv_heads, ranks) < 1 or heads % kv_heads:
            raise ValueError(f"Heads: {heads} heads with {kv_heads} key heads on {ranks} ranks cannot be")
        fitting = [
            bands
            for bands in range(1, ranks + 1)
            if ranks % bands == 0 and heads % bands == 0 and (kv_heads % bands == 0 or bands % kv_heads == 0)
        ]
        return cls(heads, kv_heads, max(fitting), ranks // max(fitting))

    @property
    def ranks(self) -> int:
        return self.ulysses * self.gather

    @property
    def band(self) -> int:
        """Query heads of a rank."""
        return self.heads // self.ulysses

    @property
    def kv_bands(self) -> int:
        """Different bands of key heads; several ranks may have one."""
        return min(self.ulysses, self.kv_heads)

    @property
    def kv_band(self) -> int:
        """Key heads of a rank."""
        return self.kv_heads // self.kv_bands

    def kv_band_of(self, rank: int) -> int:
        """Number of the rank's band of key heads."""
        return rank % self.ulysses * self.kv_bands // self.ulysses

    def row(self, rank: int) -> range:
        """The ranks whose queries this rank attends for, itself among them, in order of their tokens and bands."""
        first = rank // self.ulysses * self.ulysses
        return range(first, first + self.ulysses)


def even_borders(tokens: int, ranks: int) -> tuple[int, ...]:
    """P+1 borders of ranges that differ by one token at most; some are empty where there are fewer tokens."""
    return tuple(tokens * rank // ranks for rank in range(ranks + 1))


@dataclass(frozen=True)
class Cut:
    """Rows of a packed sequence over ranks.

    Args:
        borders: P+1, from 0 to the number of rows.
    """

    borders: tuple[int, ...]

    @classmethod
    def even(cls, rows: int, ranks: int) -> Cut:
        return cls(even_borders(rows, ranks))

    @classmethod
    def chosen(cls, rows: Sequence[int] | NDArray[np.integer], of: Cut) -> Cut:
        """The cut of some of the rows (ascending) that leaves each with the rank that has it."""
        places = np.searchsorted(np.asarray(rows), of.borders)
        return cls(tuple(int(place) for place in places))

    def __post_init__(self) -> None:
        if len(self.borders) < 2 or self.borders[0] != 0 or any(np.diff(self.borders) < 0):
            raise ValueError(f"Cut: borders must begin with 0 and not decrease, got {self.borders}")

    @property
    def rows(self) -> int:
        return self.borders[-1]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Of each rank."""
        return tuple(np.diff(self.borders).tolist())

    def part(self, rank: int) -> Range:
        """Rows of a rank."""
        return self.borders[rank], self.borders[rank + 1]

    def of_row(self, row: range) -> Range:
        """Of all ranks of a row together."""
        return self.borders[row[0]], self.borders[row[-1] + 1]


@dataclass(frozen=True)
class SPPlan:
    """A layout cut for a group.

    Args:
        layout: of the whole batch.
        heads: of the attention that it is cut for.
        cut: of its tokens.
    """

    layout: SegmentLayout
    heads: Heads
    cut: Cut

    @classmethod
    def make(cls, layout: SegmentLayout, heads: int, kv_heads: int, ranks: int) -> SPPlan:
        """
        Raises:
            ValueError: heads that cannot be.
        """
        return cls(layout, Heads.shared(heads, kv_heads, ranks), Cut.even(layout.tokens, ranks))

    def local(self, rank: int) -> LocalLayout:
        """What the rank's part of the model reads."""
        return LocalLayout(self.layout, self.cut.part(rank))

    @cached_property
    def targets(self) -> Cut:
        """Which ranks have which target tokens."""
        return Cut.chosen(self.layout.target_index, self.cut)

    def reads(self, rank: int) -> Range:
        """Keys of the attention that this rank computes: all tokens of the samples that its row has queries of."""
        start, stop = self.cut.of_row(self.heads.row(rank))
        borders = np.asarray(self.layout.cu_seqlens)
        if start == stop:
            return 0, 0
        first, last = np.searchsorted(borders, start, "right") - 1, np.searchsorted(borders, stop)
        return int(borders[first]), int(borders[last])

    def borders(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(``cu_seqlens_q``, ``cu_seqlens_k``) of the attention that this rank computes: its row's queries, their keys.

        A sample without queries here is empty in both.
        """
        borders = self.layout.cu_seqlens
        return clipped(borders, self.cut.of_row(self.heads.row(rank))), clipped(borders, self.reads(rank))

    def intervals(self, rank: int) -> Intervals:
        """The hybrid mask of this rank's queries; keys are numbered as in the whole sequence."""
        start, stop = self.cut.of_row(self.heads.row(rank))
        starts, ends, second = self.layout.intervals
        pair = None if second is None else (second[0][start:stop], second[1][start:stop])
        return Intervals(starts[start:stop], ends[start:stop], pair if pair and pair[1].any() else None)


@overload
def clipped(borders: Range, part: Range) -> Range: ...
@overload
def clipped(borders: Sequence[int], part: Range) -> tuple[int, ...]: ...
def clipped(borders: Sequence[int], part: Range) -> tuple[int, ...]:
    """Borders of the same sequences within a part of the rows, counted from its start."""
    start, stop = part
    return tuple(min(max(border, start), stop) - start for border in borders)


class LocalLayout:
    """A range of a layout's tokens, with all that a model's layers ask a layout for. Samples keep their numbers."""

    def __init__(self, layout: SegmentLayout, part: Range) -> None:
        self.whole, self.part = layout, part
        self.num_samples, self.grid_sizes = layout.num_samples, layout.grid_sizes
        self._copies: dict[str, LocalDeviceLayout] = {}

    @property
    def tokens(self) -> int:
        return self.part[1] - self.part[0]

    @cached_property
    def cu_seqlens(self) -> tuple[int, ...]:
        """B+1 borders; a sample that has no tokens here is empty."""
        return clipped(self.whole.cu_seqlens, self.part)

    @cached_property
    def target_index(self) -> NDArray[np.int64]:
        """int64: places of the target tokens among those here."""
        index = self.whole.target_index
        return index[slice(*np.searchsorted(index, self.part))] - self.part[0]

    @property
    def pieces(self) -> list[tuple[int, slice, slice]]:
        """(number of a segment, its tokens that are here, their places here), for every segment that reaches here."""
        found = []
        for number, (start, stop) in enumerate(self.whole.ranges):
            first, last = max(start, self.part[0]), min(stop, self.part[1])
            if first < last:
                here = slice(first - self.part[0], last - self.part[0])
                found.append((number, slice(first - start, last - start), here))
        return found

    @cached_property
    def rows(self) -> NDArray[np.int32]:
        return self.whole.rows[slice(*self.part)]

    @cached_property
    def timestep_rows(self) -> NDArray[np.int32]:
        return self.whole.timestep_rows[slice(*self.part)]

    def on(self, device: torch.device | str) -> LocalDeviceLayout:
        """Tensors of it on a device, made once and cached."""
        return self._copies.setdefault(str(device), LocalDeviceLayout(self, device))


class LocalDeviceLayout(DeviceLayout):
    """The same of a part of a layout; its rows point into the whole layout's tables."""

    def __init__(self, layout: LocalLayout, device: torch.device | str) -> None:
        super().__init__(cast(SegmentLayout, layout), device)  # it has the arrays that layers read
        self._whole = layout.whole

    def tables(self, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._whole.on(self.device).tables(head_dim, theta)
