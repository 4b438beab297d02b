"""Interval attention on the CPU: the same numbers as the dense form, from pieces that torch's own kernel computes.

Sources: the merge of pieces by their log-sum-exps, Dao et al. 2022 (arXiv 2205.14135), sec. 3.1 and app. B.
Shapes: T queries, S keys, H query heads, G key heads (query head h reads key head h // (H / G)), R = H / G, D head dim,
Dv head dim of the values; B batches of N heads, which is how the pieces are handed over: (1, H) or (G, R).

The rows are cut into groups, and the keys of a group into pieces that its rows see whole, up to a diagonal (both
without any mask) or in part, where a mask of some 256 x 8192 values says what. torch's kernel goes through a piece in
tiles, so memory grows with T + S only. Groups run one after the other and sum in fixed order: the same bits every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..dispatch import Implementation
from .reference import compute_dtype

FULL, CAUSAL, MASKED = 0, 1, 2
ROWS = 256
"""Most rows that share a mask, and fewest that are worth two calls and a merge instead of a mask."""
KEYS = 8192
"""Most keys of a mask."""
SHORT = 32
"""Runs with fewer rows are put together under one mask: calls of their own would cost more."""
APART = 128
"""So many keys that no row of a group sees, or that all see, are worth a piece of their own."""

Ints = NDArray[np.int64]


class Piece(NamedTuple):
    """Keys ``[low, high)`` of a group's rows. CAUSAL: as many keys as rows; row i of the group sees the first i + 1."""

    low: int
    high: int
    kind: int


class Group(NamedTuple):
    """Rows ``[begin, end)`` and what they see, piece by piece."""

    begin: int
    end: int
    pieces: tuple[Piece, ...]


# --- what is computed -----------------------------------------------------------------------------------------------


def plan(pairs: list[tuple[Ints, Ints]]) -> list[Group]:
    """The groups of all rows, in order. ``pairs``: starts and ends ``[T]``, and second ones where there are any."""
    groups: list[Group] = []
    waiting: list[tuple[int, int]] = []  # short runs, one after the other

    def flush() -> None:
        if waiting:
            begin, end = waiting[0][0], waiting[-1][1]
            groups.append(Group(begin, end, tuple(_under_mask(pairs, begin, end))))
            waiting.clear()

    for begin, end in _runs(pairs):
        if end - begin >= SHORT:
            flush()
            groups.append(Group(begin, end, tuple(_of_run(pairs, begin, end))))
            continue
        if waiting and end - waiting[0][0] > ROWS:
            flush()
        waiting.append((begin, end))
    flush()
    return groups


def _runs(pairs: list[tuple[Ints, Ints]]) -> Iterator[tuple[int, int]]:
    """Rows ``[begin, end)`` whose intervals all stay as they are, or grow by one key at their end from row to row."""
    rows = len(pairs[0][0])
    if rows == 0:
        return
    code, regular = np.zeros(rows - 1, np.int64), np.ones(rows - 1, bool)
    for place, (low, high) in enumerate(pairs):
        step, empty = np.diff(high), low == high
        gone = empty[1:] & empty[:-1]
        regular &= gone | ((low[1:] == low[:-1]) & ((step == 0) | (step == 1)) & (empty[1:] == empty[:-1]))
        code += np.where(gone, 0, step) << place
    code[~regular] = -1
    changes = [0, *(np.flatnonzero(np.diff(code)) + 1).tolist(), rows - 1]
    begin = 0
    for first, last in pairwise(changes):  # steps [first, last) are alike
        if last <= begin:
            continue
        if code[first] == -1:
            yield from ((row, row + 1) for row in range(begin, last))
            begin = last
        else:
            yield begin, last + 1
            begin = last + 1
    if begin < rows:
        yield begin, rows


def _of_run(pairs: list[tuple[Ints, Ints]], begin: int, end: int) -> Iterator[Piece]:
    for low, high in pairs:
        first, last, start = int(high[begin]), int(high[end - 1]), int(low[begin])
        if start == first:
            continue
        if first == last:
            yield Piece(start, first, FULL)
        elif start == first - 1:
            yield Piece(start, last, CAUSAL)
        elif end - begin < ROWS and last - start <= KEYS:
            yield Piece(start, last, MASKED)
        else:
            yield Piece(start, first - 1, FULL)
            yield Piece(first - 1, last, CAUSAL)


def _under_mask(pairs: list[tuple[Ints, Ints]], begin: int, end: int) -> Iterator[Piece]:
    """Counts how many rows see the keys between any two borders; intervals of a row do not overlap."""
    part = slice(begin, end)
    low, high = (np.concatenate([pair[side][part] for pair in pairs]) for side in (0, 1))
    low, high = low[low < high], high[low < high]
    points = np.unique(np.concatenate([low, high]))
    change = np.zeros(len(points), np.int64)
    np.add.at(change, np.searchsorted(points, low), 1)
    np.add.at(change, np.searchsorted(points, high), -1)
    seen = np.cumsum(change)
    masked: list[int] = []  # [first, last) of what is still to come under a mask
    for number in range(len(points) - 1):
        first, last = int(points[number]), int(points[number + 1])
        alone = last - first >= APART or end - begin == 1
        if seen[number] in (0, end - begin) and alone:
            yield from _masked(masked)
            masked = []
            if seen[number]:
                yield Piece(first, last, FULL)
        elif seen[number] or masked:
            masked = [masked[0] if masked else first, last]
    yield from _masked(masked)


def _masked(keys: list[int]) -> Iterator[Piece]:
    if keys:
        for low in range(keys[0], keys[1], KEYS):
            yield Piece(low, min(low + KEYS, keys[1]), MASKED)


# --- how ------------------------------------------------------------------------------------------------------------


class _Call:
    """One call's tensors in the compute dtype, cut up for torch's kernel."""

    def __init__(
        self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, intervals: tuple[Tensor | None, ...], scale: float
    ) -> None:
        self.wide, self.scale = compute_dtype(q_THD), scale
        self.precision = np.float64 if self.wide == torch.float64 else np.float32
        self.heads, groups = q_THD.shape[1], k_SGD.shape[1]
        self.repeats = self.heads // groups
        # What one batch holds comes back as [t, heads, D], the layout of the result.
        self.batch, self.per_batch = (1, self.heads) if 1 in (groups, self.repeats) else (groups, self.repeats)
        self.width = max(q_THD.shape[2], v_SGD.shape[2])  # the kernel knows only one; columns of zeros add nothing
        self.q = q_THD
        self.k, self.v = (self._keys(x) for x in (k_SGD, v_SGD))
        arrays = [x.numpy().astype(np.int64, copy=False) for x in intervals if x is not None]
        self.pairs = list(zip(arrays[0::2], arrays[1::2], strict=True))
        self.groups = plan(self.pairs)

    def rows(self, x_THD: Tensor, group: Group) -> Tensor:
        """``[B, N, t, D]``, a view where it can be."""
        x = self._wide(x_THD[group.begin : group.end])
        return x.unflatten(1, (self.batch, self.per_batch)).permute(1, 2, 0, 3)

    def stats(self, x_HT: Tensor, group: Group) -> Tensor:
        """``[B, N, t]``."""
        return x_HT[:, group.begin : group.end].unflatten(0, (self.batch, self.per_batch))

    def _keys(self, x_SGD: Tensor) -> Tensor:
        """``[B, N, S, D]``; the heads of a group share their keys' memory."""
        x_GSD = self._wide(x_SGD).transpose(0, 1)
        x = x_GSD[:, None] if self.batch > 1 else x_GSD[None]
        return x.expand(self.batch, self.per_batch, -1, -1)

    def _wide(self, x: Tensor) -> Tensor:
        x = x.to(self.wide)
        x = x if x.shape[2] == self.width else F.pad(x, (0, self.width - x.shape[2]))
        return x if x.stride(2) == 1 else x.contiguous()

    def mask(self, group: Group, piece: Piece) -> tuple[Tensor | None, Tensor | None]:
        """0 or -inf, ``[t, keys]``, and which rows see nothing of the piece."""
        if piece.kind != MASKED:
            return None, None
        added = np.full((group.end - group.begin, piece.high - piece.low), -np.inf, self.precision)
        blind = np.ones(len(added), bool)
        for low, high in self.pairs:
            low, high = (np.clip(x[group.begin : group.end] - piece.low, 0, added.shape[1]) for x in (low, high))
            blind &= low >= high
            for line, first, last in zip(added, low.tolist(), high.tolist(), strict=True):
                line[first:last] = 0.0  # a few times as fast as comparing all keys
        return torch.from_numpy(added), torch.from_numpy(blind)

    def forward(self, group: Group) -> tuple[Tensor, Tensor]:
        """``[B, N, t, D]`` and the log-sum-exp ``[B, N, t]`` of a group that sees something."""
        q = self.rows(self.q, group)
        outs, stats = [], []
        for piece in group.pieces:
            added, blind = self.mask(group, piece)
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, self.k[:, :, piece.low : piece.high], self.v[:, :, piece.low : piece.high], 0.0,
                piece.kind == CAUSAL, attn_mask=added, scale=self.scale,
            )  # fmt: skip
            if blind is not None and bool(blind.any()):  # what the kernel writes there depends on torch's version
                out, lse = out.masked_fill(blind[:, None], 0.0), lse.masked_fill(blind, -torch.inf)
            outs.append(out)
            stats.append(lse)
        if len(outs) == 1:
            return outs[0], stats[0]
        lse = torch.logsumexp(torch.stack(stats), 0)
        finite = torch.where(lse == -torch.inf, 0.0, lse)
        total = outs[0].mul_((stats[0] - finite).exp_()[..., None])
        for out, stat in zip(outs[1:], stats[1:], strict=True):
            total.addcmul_(out, (stat - finite).exp_()[..., None])
        return total, lse

    def backward(
        self, group: Group, dout_THD: Tensor, out_THD: Tensor, lse_HT: Tensor
    ) -> Iterator[tuple[Piece, Tensor, Tensor, Tensor]]:
        """Gradients for the group's q and, summed over the heads that share them, for a piece's k and v.

        They are what the piece adds, as out and lse are those of all pieces together.
        """
        q, dout, out = (self.rows(x, group) for x in (self.q, dout_THD, out_THD))
        lse = self.stats(lse_HT, group)
        lse = torch.where(lse == -torch.inf, 0.0, lse)  # rows without any keys: exp(-inf - 0), nothing
        for piece in group.pieces:
            added, _ = self.mask(group, piece)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, q, self.k[:, :, piece.low : piece.high], self.v[:, :, piece.low : piece.high], out, lse, 0.0,
                piece.kind == CAUSAL, attn_mask=added, scale=self.scale,
            )  # fmt: skip
            yield piece, dq, self._shared(dk), self._shared(dv)

    def _shared(self, x: Tensor) -> Tensor:
        """``[s, G, D]`` from ``[B, N, s, D]``."""
        return (x[0] if self.repeats == 1 else x.sum(1)).transpose(0, 1)


def interval_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    starts_T: Tensor,
    ends_T: Tensor,
    starts2_T: Tensor | None,
    ends2_T: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The op ``bernini::interval_attention``, see :func:`.reference.interval_attention`."""
    call = _Call(q_THD, k_SGD, v_SGD, (starts_T, ends_T, starts2_T, ends2_T), scale)
    tokens, width = q_THD.shape[0], v_SGD.shape[2]
    if len(call.groups) == 1 and call.groups[0].pieces:  # the kernel's result is the result
        out, lse = call.forward(call.groups[0])
        return _rows(out, width).to(q_THD.dtype).contiguous(), lse.flatten(0, 1).contiguous()
    out_THD = q_THD.new_empty((tokens, call.heads, width))
    lse_HT = torch.empty((call.heads, tokens), dtype=call.wide)
    for group in call.groups:
        part = slice(group.begin, group.end)
        if group.pieces:
            out, lse = call.forward(group)
            out_THD[part], lse_HT[:, part] = _rows(out, width), lse.flatten(0, 1)
        else:
            out_THD[part], lse_HT[:, part] = 0.0, -torch.inf
    return out_THD, lse_HT


def _rows(x: Tensor, width: int) -> Tensor:
    """``[t, H, width]`` from ``[B, N, t, D]``."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)[..., :width]


def interval_attention_backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    starts_T: Tensor,
    ends_T: Tensor,
    starts2_T: Tensor | None,
    ends2_T: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``bernini::interval_attention_backward``, see :func:`.reference.interval_attention_backward`."""
    call = _Call(q_THD, k_SGD, v_SGD, (starts_T, ends_T, starts2_T, ends2_T), scale)
    dq_THD = q_THD.new_empty(q_THD.shape)
    dk, dv = (torch.zeros(x.shape, dtype=call.wide) for x in (k_SGD, v_SGD))
    for group in call.groups:
        total: Tensor | None = None
        for piece, dq, more_dk, more_dv in call.backward(group, dout_THD, out_THD, lse_HT):
            total = dq if total is None else total.add_(dq)
            dk[piece.low : piece.high] += more_dk[..., : dk.shape[2]]
            dv[piece.low : piece.high] += more_dv[..., : dv.shape[2]]
        dq_THD[group.begin : group.end] = 0.0 if total is None else _rows(total, q_THD.shape[2])
    return dq_THD, dk.to(k_SGD.dtype), dv.to(v_SGD.dtype)


def implementation(run: Callable[..., Any]) -> Implementation:
    """The row of the dispatch table."""
    return Implementation(
        "tiled", run, devices=("cpu",), dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        missing=_missing,
    )  # fmt: skip


OPERATORS = tuple(f"_scaled_dot_product_flash_attention_for_cpu{name}" for name in ("", "_backward"))
"""torch's, those inside ``scaled_dot_product_attention``; not public, but public ones keep the log-sum-exp."""


def _missing() -> str | None:
    for name in OPERATORS:
        if not hasattr(torch.ops.aten, name):
            return f"needs a torch with aten::{name}; this is {torch.__version__}"
    return None
