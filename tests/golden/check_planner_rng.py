"""Golden set ``planner_rng``: reveal order and decoder noise that follow from a request's seed. All exact."""

from __future__ import annotations

from pathlib import Path

import torch

from bernini.planner.decode import ReleasedSeeded

from . import compare


def check(files: dict[str, Path]) -> int:
    cases, meta = compare.load(files["cases"])
    done = 0
    for name, case in meta["cases"].items():
        draws = ReleasedSeeded(int(name.rpartition("seed")[2]), case["patches"])
        compare.same(f"{name} order", draws.order(case["N"]), cases[f"{name}.order"])
        for key in ("decoder_noise_rows3x32", "decoder_noise_next_rows2x32"):
            want = cases[f"{name}.{key}"]
            compare.same(f"{name} {key}", draws.noise(torch.arange(len(want)), want.shape[1]), want)
        done += 3
    return done
