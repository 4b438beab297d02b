"""Golden set ``sa3d_rope``: segment ids, rotary factors, and q and k rotated on a packed sequence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout, qk_rope, rope_tables, segment_phases

from . import compare

_FACTORS = re.compile(r"rope\.d(\d+)\.g(\d+)x(\d+)x(\d+)\.(?:id(\d+)|n(\d+)\.i(\d+))")


def check(files: dict[str, Path]) -> int:
    cases, meta = compare.load(files["cases"])
    done = 0
    for count, want in meta["interpolated_ids"].items():
        compare.same(f"interpolated_ids {count}", list(segment_phases(int(count))), want)
        done += 1
    for name, tensor in cases.items():
        if name.startswith("ids.n"):
            compare.same(name, list(segment_phases(int(name.removeprefix("ids.n")))), tensor.tolist())
        elif name.startswith("rope."):
            _check_factors(name, tensor, meta)
        elif name.endswith(("_rot", "_rot_bf16", ".factor")):
            _check_packed(name, cases, meta)
        else:
            continue  # an input
        done += 1
    return done


def _grid(latent: list[int], meta: dict[str, Any]) -> tuple[int, int, int]:
    t, h, w = (size // patch for size, patch in zip(latent, meta["patch_size"], strict=True))
    return t, h, w


def _factors(layout: SegmentLayout, head_dim: int, meta: dict[str, Any]) -> Tensor:
    """float64 ``[tokens, head_dim / 2, 2]`` (cos, sin)."""
    from bernini.kernels.qk_rope.reference import rope_factors

    options = {"theta": meta["theta"], "dtype": torch.float64}
    tables = rope_tables(head_dim, layout.grid_sizes, layout.phases, **options)
    return rope_factors(tables, torch.from_numpy(layout.rows))


def _check_factors(name: str, want: Tensor, meta: dict[str, Any]) -> None:
    match = _FACTORS.fullmatch(name)
    if match is None:
        raise AssertionError(f"{name}: not a name of this set")
    head_dim, t, h, w = (int(text) for text in match.groups()[:4])
    whole, count, number = match.groups()[4:]
    phase = float(whole) if whole is not None else segment_phases(int(count))[int(number)]
    layout = SegmentLayout([Segment("source", _grid([t, h, w], meta), phase)])
    compare.close(name, _factors(layout, head_dim, meta), want, atol=1e-12)


def _check_packed(name: str, cases: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """One of ``qk.d<D>.factor``, ``qk.d<D>.{q,k}_rot`` and ``qk.d<D>.q_rot_bf16``."""
    prefix, _, kind = name.rpartition(".")
    head_dim = int(prefix.removeprefix("qk.d"))
    segments = [Segment("source" if phase else "target", _grid(g, meta), phase) for g, phase in meta["packed_segments"]]
    layout = SegmentLayout(segments)
    if kind == "factor":
        compare.close(name, _factors(layout, head_dim, meta), cases[name], atol=1e-12)
        return
    x = cases[f"{prefix}.{kind.replace('_rot', '')}"][0]
    tables = rope_tables(head_dim, layout.grid_sizes, layout.phases, theta=meta["theta"])
    for got in qk_rope(x, x, tables, torch.from_numpy(layout.rows)):  # as q and as k
        if kind.endswith("bf16"):
            compare.within_ulps(name, got, cases[name][0], ulps=1, atol=1e-6)
        else:
            compare.close(name, got, cases[name][0], atol=1e-5)
