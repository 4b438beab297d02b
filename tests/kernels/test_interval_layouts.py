"""interval_attention over a thousand random layouts: the float64 reference against torch's dense masked attention, and
what CPUs run, in float32, against the reference; outputs and gradients.

Errors are relative to the largest value of a tensor, or to 1, the size of the inputs, where all of it is smaller; those
of float32 dq and dk to the largest sum of the absolute values of their terms, which cancel: a row that sees one key has
the gradient 0, as the difference of two products that are rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bernini.kernels import Segment, SegmentLayout, interval_attention, which
from bernini.kernels.attention import cpu, reference

LAYOUTS, PARTS = 1000, 4
RATIOS = (1, 2, 3, 4, 5, 6, 7)


def planned(rng: np.random.Generator) -> tuple[int, tuple[np.ndarray, ...]]:
    """Packed samples of text, sources and targets as the planner has them; every third segment is a single token."""
    segments = []
    for sample in range(int(rng.integers(1, 5))):
        gaps = 0  # a token has room for one gap that a target leaves
        for _ in range(int(rng.integers(1, 6))):
            kind = str(rng.choice(["text", "source", "target"], p=[0.4, 0.3, 0.3]))
            gaps += kind == "target"
            if gaps > 1 and kind == "target":
                continue
            size = 1 if rng.random() < 0.3 else int(rng.integers(2, 14))
            segments.append(Segment(kind, (size, 1, 1), 0.0, sample))  # type: ignore[arg-type]
    layout = SegmentLayout(segments)
    starts, ends, second = layout.intervals
    assert sum(x.nbytes for x in (starts, ends, *(second or ()))) == (8 if second is None else 16) * layout.tokens
    return layout.tokens, (starts, ends, *(second or ()))


def arbitrary(rng: np.random.Generator) -> tuple[int, tuple[np.ndarray, ...]]:
    """Any intervals, in runs of equal rows, of growing ones and of unlike ones; some rows have no keys."""
    rows, keys = int(rng.integers(1, 40)), int(rng.integers(1, 50))
    borders = np.sort(rng.integers(0, keys + 1, (rows, 4)), axis=1)
    run = int(rng.integers(1, 12))
    borders = np.repeat(borders[::run], run, axis=0)[:rows].copy()
    if rng.random() < 0.5:
        borders[:, 3] = np.minimum(borders[:, 3] + np.arange(rows) % run, keys)
    borders[rng.random(rows) < 0.1] = 0
    order = (2, 3, 0, 1) if rng.random() < 0.5 else (0, 1, 2, 3)
    columns = [borders[:, number].astype(rng.choice([np.int32, np.int64])) for number in order]
    return keys, tuple(columns if rng.random() < 0.6 else columns[:2])


def dense(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor, scale: float) -> list[Tensor]:
    """Output and gradients by torch, from products of whole matrices."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    heads = [q.transpose(0, 1), *(x.repeat_interleave(repeats, 1).transpose(0, 1) for x in (k, v))]
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).transpose(0, 1)
    # It gives nothing to rows without keys, but its gradients there are not defined.
    out = torch.where(mask.any(1)[:, None, None], out, 0.0)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def terms(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, mask: Tensor, scale: float
) -> tuple[float, float]:
    """The largest sums of absolute values in dq and dk."""
    repeats = q.shape[1] // k.shape[1]
    k_HSD, v_HSD = (x.repeat_interleave(repeats, 1).transpose(0, 1) for x in (k, v))
    q_HTD, dout_HTD = q.transpose(0, 1), dout.transpose(0, 1)
    scores = (scale * q_HTD @ k_HSD.mT).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num_(0.0)
    delta_HT1 = (dout * out).sum(-1).T[..., None]
    sums = scale * weights * ((dout_HTD @ v_HSD.mT).abs() + delta_HT1.abs())
    dk = (sums.mT @ q_HTD.abs()).unflatten(0, (-1, repeats)).sum(1)
    return float((sums @ k_HSD.abs()).max()), float(dk.max())


def assert_near(got: Any, want: Any, limit: float, what: str, sizes: tuple[float, float] = (0.0, 0.0)) -> None:
    for name, a, b, size in zip(("out", "dq", "dk", "dv"), got, want, (0.0, *sizes, 0.0), strict=True):
        error = (a.double() - b).abs().max() / max(float(b.abs().max()), size, 1.0)
        assert error <= limit, f"{name} of {what} is {error:.2g} off"


@pytest.mark.parametrize("part", range(PARTS))
def test_a_thousand_layouts(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BERNINI_KERNELS", raising=False)
    assert which("interval_attention") == which("interval_attention_backward") == "tiled"
    for seed in range(part, LAYOUTS, PARTS):
        rng = np.random.default_rng(seed)
        keys, arrays = planned(rng) if seed % 2 else arbitrary(rng)
        # Small limits bring every kind of piece and every merge into small layouts.
        small = {"SHORT": 3, "ROWS": 5, "APART": 2, "KEYS": 7} if rng.random() < 0.6 else {}
        for name, value in small.items():
            monkeypatch.setattr(cpu, name, value)
        groups, width, of_values = int(rng.integers(1, 4)), int(rng.integers(1, 17)), int(rng.integers(1, 17))
        heads, rows = groups * int(rng.choice(RATIOS)), len(arrays[0])
        columns = [torch.from_numpy(x) for x in arrays]
        generator = torch.Generator().manual_seed(seed)
        q, k, v, dout = (
            torch.randn(shape, generator=generator)
            for shape in (
                (rows, heads, width),
                (keys, groups, width),
                (keys, groups, of_values),
                (rows, heads, of_values),
            )
        )
        scale = width**-0.5

        exact = [x.double() for x in (q, k, v)]
        intervals = (*columns, *[None] * (4 - len(columns)))
        out, lse = reference.interval_attention(*exact, *intervals, scale)
        grads = reference.interval_attention_backward(dout.double(), *exact, out, lse, *intervals, scale)
        mask = reference.interval_mask(*intervals, keys)
        assert_near((out, *grads), dense(*exact, dout.double(), mask, scale), 1e-12, f"the reference, seed {seed}")

        inputs = [x.requires_grad_() for x in (q, k, v)]
        found = interval_attention(*inputs, *columns[:2], second=tuple(columns[2:]) or None)  # type: ignore[arg-type]
        tiled = (found.detach(), *torch.autograd.grad(found, inputs, dout))
        sizes = terms(*exact, dout.double(), out, mask, scale)
        assert_near(tiled, (out, *grads), 2e-6, f"the tiled form, seed {seed}", sizes)
        monkeypatch.undo()
        monkeypatch.delenv("BERNINI_KERNELS", raising=False)
