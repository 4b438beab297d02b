"""The exchanges around attention: rows of a sequence for bands of heads, and back.

Sizes come from the plan, so nobody asks for them. A rank is sent the queries that it attends for and the keys that
these see, once each. What is sent is copied once at most, and received where it is read; gradients of keys that several
ranks read are added in the order of the ranks.

Shapes: t own tokens, T queries of a row of ranks, S all keys, H query heads, G key heads, D head dim; U bands of h
query heads, K bands of g key heads (see :class:`bernini.parallel.plan.Heads`).

Source: arXiv 2309.14509 (Ulysses); paper section 5; facts on systems, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .group import Group, Message, Pending
from .plan import Cut, Heads, Range, clipped

Parts = list[tuple[int, Tensor]]
"""(rank, what it sends or is sent)."""


class Coming(NamedTuple):
    """Tensors on their way."""

    pending: Pending
    finish: Callable[[], tuple[Tensor, ...]]

    def wait(self) -> tuple[Tensor, ...]:
        self.pending.wait()
        return self.finish()


@dataclass(frozen=True)
class Swap:
    """The exchanges of one attention.

    Args:
        q, kv: which rows each rank has, of the queries and of the keys.
        reads: which keys the queries see that a rank attends for; all by default.
    """

    group: Group
    heads: Heads
    q: Cut
    kv: Cut
    reads: tuple[Range, ...] | None = None

    @property
    def row(self) -> range:
        return self.heads.row(self.group.rank)

    @property
    def rows(self) -> Range:
        """The queries that this rank attends for, as rows of all."""
        return self.q.of_row(self.row)

    def _row_slices(self, x_T: Tensor) -> Parts:
        """(rank, its rows) of the queries of this rank's row of ranks."""
        return list(zip(self.row, x_T.split([self.q.sizes[rank] for rank in self.row]), strict=True))

    @cached_property
    def given(self) -> list[Range]:
        """Which of its own keys this rank gives to each, numbered among them."""
        reads = self.reads or [(0, self.kv.rows)] * self.group.size
        return [clipped(read, self.kv.part(self.group.rank)) for read in reads]

    @cached_property
    def read(self) -> list[int]:
        """How many keys this rank reads of each."""
        reads = (0, self.kv.rows) if self.reads is None else self.reads[self.group.rank]
        return np.diff(clipped(self.kv.borders, reads)).tolist()

    def out(self, q_UthD: Tensor, *kv_KtgD: Tensor) -> tuple[Tensor, ...]:
        """Bands of the own tokens -> ``q_ThD`` and, where they are given, ``k_SgD`` and ``v_SgD`` of the own band.

        Views will do. Those that are not contiguous are copied once: to what is sent, or straight to their place.
        """
        sends, receives, found = self._outward(q_UthD, *kv_KtgD)
        self.group.exchange(*self._messages(sends, receives))
        return found

    def start_out(self, q_UthD: Tensor | None, *kv_KtgD: Tensor) -> Coming:
        """The same, on its way; without queries the first is left out."""
        sends, receives, found = self._outward(q_UthD, *kv_KtgD)
        return Coming(self.group.start(*self._messages(sends, receives)), lambda: found)

    def _outward(self, q_UthD: Tensor | None, *kv_KtgD: Tensor) -> tuple[Parts, Parts, tuple[Tensor, ...]]:
        own, heads, size = self.group.rank, self.heads, self.group.size
        kept, found = list[Tensor](), list[Tensor]()
        sends, receives = Parts(), Parts()
        if q_UthD is not None:
            found.append(q_UthD.new_empty((self.rows[1] - self.rows[0], *q_UthD.shape[2:])))
            band = own % heads.ulysses
            kept.append(q_UthD[band])
            sends += zip(self.row, _each(q_UthD, band), strict=True)
            receives += self._row_slices(found[0])
        for x_KtgD in kv_KtgD:
            found.append(x_KtgD.new_empty((sum(self.read), *x_KtgD.shape[2:])))
            band = heads.kv_band_of(own)
            kept.append(x_KtgD[band, slice(*self.given[own])])
            bands = _each(x_KtgD, band if heads.kv_bands == size else None)
            sends += [(rank, bands[heads.kv_band_of(rank)][slice(*self.given[rank])]) for rank in range(size)]
            receives += enumerate(found[-1].split(self.read))
        for source, place in zip(kept, [place for rank, place in receives if rank == own], strict=True):
            place.copy_(source)
        return sends, receives, tuple(found)

    def back(self, q_ThD: Tensor, *kv_SgD: Tensor) -> tuple[Tensor, ...]:
        """The way back: ``[t, H, D]`` of the own tokens and, of keys and values, ``[t, G, D]``, sums over readers."""
        sends, receives, finish = self._homeward(q_ThD, *kv_SgD)
        self.group.exchange(*self._messages(sends, receives))
        return finish()

    def start_back(self, q_ThD: Tensor | None, *kv_SgD: Tensor) -> Coming:
        """The same, on its way; without queries the first is left out."""
        sends, receives, finish = self._homeward(q_ThD, *kv_SgD)
        return Coming(self.group.start(*self._messages(sends, receives)), finish)

    def _homeward(self, q_ThD: Tensor | None, *kv_SgD: Tensor) -> tuple[Parts, Parts, Callable[[], tuple[Tensor, ...]]]:
        own, q_parts, kv_parts = self.group.rank, list[Tensor](), list[list[Tensor]]()
        sends, receives = Parts(), Parts()
        if q_ThD is not None:
            sends += self._row_slices(q_ThD.contiguous())
            q_parts = [part if rank == own else _room(part, self.q.sizes[own]) for rank, part in sends]
            receives += zip(self.row, q_parts, strict=True)
        for x_SgD in kv_SgD:
            slices = x_SgD.contiguous().split(self.read)
            places = enumerate(self.given)
            kv_parts.append([slices[own] if rank == own else _room(x_SgD, b - a) for rank, (a, b) in places])
            sends += enumerate(slices)
            receives += enumerate(kv_parts[-1])

        def finish() -> tuple[Tensor, ...]:
            q = [] if q_ThD is None else [torch.cat(q_parts, dim=1)]
            return *q, *(self._summed(parts) for parts in kv_parts)

        return sends, receives, finish

    def _messages(self, *ways: Parts) -> list[list[Message]]:
        return [[Message(*pair) for pair in pairs if pair[0] != self.group.rank] for pairs in ways]

    def _summed(self, parts_tgD: list[Tensor]) -> Tensor:
        """The parts of all ranks -> ``[t, G, D]``; sums in float32 at least, in the order of the ranks."""
        first, heads, tokens = parts_tgD[0], self.heads, self.kv.sizes[self.group.rank]
        if heads.kv_bands == self.group.size and all(len(part) == tokens for part in parts_tgD):
            return torch.cat(parts_tgD, dim=1)
        wide = torch.promote_types(first.dtype, torch.float32)
        sums_tKgD = first.new_zeros((tokens, heads.kv_bands, *first.shape[1:]), dtype=wide)
        for rank, part in enumerate(parts_tgD):
            sums_tKgD[slice(*self.given[rank]), heads.kv_band_of(rank)].add_(part)
        return sums_tKgD.flatten(1, 2).to(first.dtype)


# --- shapes: bands first, as they are sent ----------------------------------------------------------------------------


def banded(x_tHD: Tensor, bands: int) -> Tensor:
    """A view ``[bands, t, H / bands, D]``."""
    return x_tHD.unflatten(1, (bands, -1)).transpose(0, 1)


def _each(x_UthD: Tensor, but: int | None) -> list[Tensor]:
    """The bands, contiguous but for one that nobody is sent."""
    if all(band.is_contiguous() for number, band in enumerate(x_UthD) if number != but):
        return list(x_UthD)
    if but is None:
        return list(x_UthD.contiguous())
    return [*x_UthD[:but].contiguous(), x_UthD[but], *x_UthD[but + 1 :].contiguous()]


def _room(x_ThD: Tensor, tokens: int) -> Tensor:
    return x_ThD.new_empty((tokens, *x_ThD.shape[1:]))
