"""Every modality written straight into the rows that this rank has of a packed sequence: nothing is made to be sent.

    text ids ---------> embedding --+
    ViT features -------------------+--> scatter_rows --> one buffer [own tokens, N] --> layers
    latents --> own patches --------+

The usual way embeds everything, concatenates it and keeps one part in P. Here a modality is asked for the rows that lie
on this rank, and for no others: a segment that crosses a border is cut, one that lies elsewhere is never asked. Rows
go to their places by index, and their gradients come back by the same index. One process has all rows, and the result
is the concatenation, bit for bit.

Source: paper section 5 (index-scatter). Shapes: T tokens of the whole sequence, t of them here, N width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import starmap
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bernini.kernels import SegmentLayout, scatter_rows
from bernini.kernels.segments import KINDS, Kind

from .plan import LocalLayout, Range

Producer = Callable[[int, int], Tensor]
"""``(start, stop) -> [stop - start, N]``: makes these rows of a segment or of a modality, and no others."""

Piece = Tensor | Producer | None
"""Rows that are there, a function that makes them, or ``None`` for a segment that lies elsewhere."""

Modality = Tensor | Producer | Sequence[Piece]
"""All rows of a kind as one (its segments in a row), or a piece for each of its segments, in the layout's order."""


class Packer:
    """The rows of a layout that are here, by kind: text, sources, target.

    Made once per layout and rank; reading it costs no copy and no look at a device.

    Args:
        layout: of the whole batch.
        part: the tokens that this rank has; all by default.
    """

    def __init__(self, layout: SegmentLayout, part: Range | None = None) -> None:
        self.layout, self.part = layout, (0, layout.tokens) if part is None else part
        self._pieces = LocalLayout(layout, self.part).pieces
        self._indices: dict[tuple[Kind, str], Tensor] = {}

    @classmethod
    def of(cls, layout: SegmentLayout | LocalLayout) -> Packer:
        """For what a model's layers read: a whole layout or a rank's part of it."""
        return cls(layout.whole, layout.part) if isinstance(layout, LocalLayout) else cls(layout)

    @property
    def tokens(self) -> int:
        """t, how many rows are here."""
        return self.part[1] - self.part[0]

    @cached_property
    def _rows(self) -> dict[Kind, Range]:
        found: dict[Kind, Range] = {}
        for kind in KINDS:
            borders = [self.layout.ranges[number] for number in self.layout.numbers(kind)]
            start, stop = (sum(min(max(at - a, 0), b - a) for a, b in borders) for at in self.part)
            found[kind] = start, stop
        return found

    def rows(self, kind: Kind) -> Range:
        """Which of the kind's rows are here, counted over all its segments in order: always one range."""
        return self._rows[kind]

    def places(self, kind: Kind) -> NDArray[np.int64]:
        """int64: where those rows are among the t here. With ``part[0]`` added, where in the whole sequence."""
        ranges = [here for number, _, here in self._pieces if self.layout.segments[number].kind == kind]
        pieces = [np.arange(here.start, here.stop, dtype=np.int64) for here in ranges]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def index(self, kind: Kind, device: torch.device | str) -> Tensor:
        """:meth:`places` as a tensor on a device, copied once."""
        key = kind, str(device)
        if key not in self._indices:
            self._indices[key] = torch.from_numpy(self.places(kind)).to(device)
        return self._indices[key]

    def pack(
        self,
        modalities: Mapping[Kind, Modality],
        width: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        touch: Collection[Kind] = (),
    ) -> Tensor:
        """The rows of this rank, ``[t, width]``, in the one buffer that is allocated for them; differentiable.

        Beyond the buffer it takes what the producers return. What has no gradient is written and let go of piece by
        piece; the rest is held until it is written, and is at most another t rows.

        Args:
            modalities: for every kind that has rows here. Other dtypes than ``dtype`` are converted on the way.
            touch: kinds whose producer is asked for no rows, ``(0, 0)``, where none are here. Parameters that it uses
                then have a gradient of zeros on every rank, as FSDP wants them: a rank without one would wait.

        Raises:
            ValueError: a kind that has rows here and no modality, or pieces that do not fit the layout.
        """
        missing = [kind for kind in KINDS if kind not in modalities and len(range(*self.rows(kind)))]
        if missing:
            raise ValueError(f"pack: {missing[0]} has {len(range(*self.rows(missing[0])))} rows here and no modality")
        out = torch.empty((self.tokens, width), dtype=dtype, device=device)
        return self.write(out, modalities, touch=touch)

    def write(self, out_tN: Tensor, modalities: Mapping[Kind, Modality], *, touch: Collection[Kind] = ()) -> Tensor:
        """Writes some kinds into a buffer that is there; rows of the other kinds stay as they are.

        Args:
            out_tN: ``[t, N]``; it must not require grad.
            modalities, touch: as in :meth:`pack`.

        Returns:
            ``out_tN`` itself, which is part of the graph if something that was written requires grad.

        Raises:
            ValueError: a buffer of another length, or pieces that do not fit the layout.
        """
        if len(out_tN) != self.tokens:
            raise ValueError(f"write: the buffer has {len(out_tN)} rows, and {self.tokens} are here")
        for kind, modality in modalities.items():
            self._check(kind, modality)
        return _written(
            out_tN,
            (
                (piece, self.index(kind, out_tN.device)[slice(*here)])
                for kind, modality in modalities.items()
                for piece, here in self._asked(kind, modality, kind in touch)
            ),
        )

    def take(
        self, kind: Kind, modality: Modality, width: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        """The rows of one kind that are here, alone and in order, ``[rows, width]``: what the targets are to become."""
        self._check(kind, modality)
        start, stop = self.rows(kind)
        out = torch.empty((stop - start, width), dtype=dtype, device=device)
        order = torch.arange(stop - start, device=device)
        return _written(out, ((piece, order[slice(*at)]) for piece, at in self._asked(kind, modality, touch=False)))

    def _check(self, kind: Kind, modality: Modality) -> None:
        if kind not in KINDS:
            raise ValueError(f"packer: no kind {kind!r}; expected one of {', '.join(KINDS)}")
        numbers = self.layout.numbers(kind)
        if isinstance(modality, Sequence) and len(modality) != len(numbers):
            raise ValueError(f"packer: {len(modality)} pieces for the {len(numbers)} {kind} segments of the layout")

    def _asked(self, kind: Kind, modality: Modality, touch: bool) -> Iterator[tuple[Tensor, Range]]:
        """Pieces with their range among the kind's rows here."""
        start, stop = self.rows(kind)
        numbers = self.layout.numbers(kind)
        if start == stop:
            made = [piece for piece in (modality if isinstance(modality, Sequence) else [modality]) if callable(piece)]
            if touch and made:
                yield _cut(kind, made[0], 0, (0, 0)), (0, 0)
        elif not isinstance(modality, Sequence):
            total = sum(self.layout.segments[number].tokens for number in numbers)
            yield _cut(f"all {kind} segments", modality, total, (start, stop)), (0, stop - start)
        else:
            at = 0
            for number, rows, _ in self._pieces:
                if number in numbers:
                    piece, total = modality[numbers.index(number)], self.layout.segments[number].tokens
                    count = rows.stop - rows.start
                    yield _cut(f"segment {number} ({kind})", piece, total, (rows.start, rows.stop)), (at, at + count)
                    at += count


def _cut(where: str, piece: Piece, total: int, rows: Range) -> Tensor:
    """These rows of a piece that has ``total`` of them."""
    start, stop = rows
    if piece is None:
        raise ValueError(f"packer: {where} has rows {start} to {stop} here and was given None")
    if isinstance(piece, Tensor):
        if len(piece) != total:
            raise ValueError(f"packer: {where} has {total} rows and was given {list(piece.shape)}")
        return piece[start:stop]
    made = piece(start, stop)
    if len(made) != stop - start:
        raise ValueError(f"packer: {where} was asked for rows {start} to {stop} and returned {list(made.shape)}")
    return made


def _written(out: Tensor, pieces: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Scatters pieces to their rows. Those with a gradient go last and in one call: a graph takes the buffer once."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for piece, index in pieces:
        if torch.is_grad_enabled() and piece.requires_grad:
            waiting.append((piece, index))
        else:
            scatter_rows(out, [piece], [index])
    if not waiting:
        return out
    sources, indices = zip(*waiting, strict=True)
    return scatter_rows(out, sources, indices)


# --- rows of a grid ---------------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """A box of a (t, h, w) grid of tokens."""

    t: Range
    h: Range
    w: Range

    def crop(self, x_CTHW: Tensor, patch_size: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
        """What it covers of a latent, a view: ``patch_size`` values to a token along each axis."""
        t, h, w = (slice(start * size, stop * size) for (start, stop), size in zip(self, patch_size, strict=True))
        return x_CTHW[..., t, h, w]


def boxes(grid: tuple[int, int, int], start: int, stop: int) -> list[Box]:
    """Tokens ``start`` to ``stop`` of a grid, counted over t, then h, then w, as boxes in order; five at most."""
    return list(starmap(Box, _boxes(grid, start, stop)))


def _boxes(sizes: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Range, ...]]:
    if start >= stop:
        return
    if len(sizes) == 1:
        yield ((start, stop),)
        return
    inner = math.prod(sizes[1:])
    first, last = -(-start // inner), stop // inner  # whole slabs
    if first > last:  # all within one
        for box in _boxes(sizes[1:], start - last * inner, stop - last * inner):
            yield (last, first), *box
        return
    for box in _boxes(sizes[1:], start - (first - 1) * inner, inner if start < first * inner else 0):
        yield (first - 1, first), *box
    if first < last:
        yield (first, last), *((0, size) for size in sizes[1:])
    for box in _boxes(sizes[1:], 0, stop - last * inner):
        yield (last, last + 1), *box


def from_boxes(grid: tuple[int, int, int], make: Callable[[Box], Tensor]) -> Producer:
    """A producer for a segment whose tokens are cut out of something larger, such as the patches of a latent.

        from_boxes(grid, lambda box: patchify(box.crop(latent_CTHW, patch_size), patch_size))

    Args:
        make: the tokens of a box in order, ``[tokens, N]``. It is called for the boxes of the wanted rows alone.
    """

    def produce(start: int, stop: int) -> Tensor:
        made = [make(box) for box in boxes(grid, start, stop) or [Box((0, 0), (0, 0), (0, 0))]]
        return made[0] if len(made) == 1 else torch.cat(made)

    return produce
