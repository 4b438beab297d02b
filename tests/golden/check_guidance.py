"""Golden guidance: every combination rule of the released pipelines, against ``bernini.kernels.guide``.

Branches, links and projections are those of the plans that the pipeline runs.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from bernini.kernels import guide
from bernini.renderer.guidance import PLANS
from bernini.renderer.sampler import Guidance

FLOAT32_TOLERANCE = 2e-5

_SOURCES = {"none": "none", "first video": "V", "images": "I", "all": "VI"}
_TEXTS = {"negative": "neg", "positive": "txt"}

_FULL_SOURCES = {"none": "none", "videos": "V", "all": "VI"}
_FULL_TEXTS = {"negative": "wotxt_wovit", "positive": "wtxt_wovit", "planned": "wtxt_wvit"}
_FULL_NAMES = {"v2v_apg": "v2v_apg_planned"}
"""Modes of the full pipeline that are called otherwise here."""


def check(cases: dict[str, Tensor], meta: dict[str, Any]) -> int:
    """Compares every ``out`` key of the guidance set and returns the number of comparisons.

    Raises:
        AssertionError: naming the key and its error, or a key that nothing here computes.
    """
    frames = int(meta["latent_shape"][2])
    seen: set[str] = set()
    count = 0
    # In float32 the two roundings must agree with the release alike; bfloat16 inputs are for the eager one.
    for prefix, dtype, roundings in (
        ("out", torch.float32, ("fp32", "eager")),
        ("out_bf16preds", torch.bfloat16, ("eager",)),
    ):
        for rounding in roundings:
            results = {**_renderer(cases, meta, frames, prefix, dtype, rounding)}
            results |= _full(cases, meta, frames, prefix, dtype, rounding)
            if prefix == "out":
                results |= _helpers(cases, rounding)
            for key, actual in results.items():
                _compare(f"{key} (rounding={rounding!r})", actual, cases[key])
            seen |= set(results)
            count += len(results)
    missed = sorted(key for key in cases if key.startswith("out") and key not in seen)
    assert not missed, f"guidance: no rule computes {missed}"
    return count


def _renderer(
    cases: dict[str, Tensor], meta: dict[str, Any], frames: int, prefix: str, dtype: torch.dtype, rounding: str
) -> dict[str, Tensor]:
    """Renderer modes; momentum buffers live through the steps of a case. Runs with bfloat16 inputs carry the bare
    mode's name and were made with the first of its settings.
    """
    results: dict[str, Tensor] = {}
    bare: set[str] = set()
    for name, case in meta["cases"].items():
        if not name.startswith("R."):
            continue
        mode = name.split(".")[1]
        label = name if prefix == "out" else f"R.{mode}"
        if label in bare:
            continue
        bare.add(label)
        plan = PLANS[mode]
        branches = [f"{_SOURCES[branch.sources]}_{_TEXTS[branch.text]}" for branch in plan.branches]
        assert branches == case["branches"], f"{name}: branches {case['branches']}, the plan has {branches}"
        links = plan.scaled({scale: case[f"omega_{scale}"] for scale in ("vid", "img", "txt")})
        options: dict[str, Any] = {}
        buffer = None
        for step, sigma in enumerate(meta["sigmas_R"]):
            latent = cases[f"in.z.step{step}"].reshape(frames, -1)
            if plan.apg:
                buffer = torch.zeros(len(links), *latent.shape) if buffer is None else buffer
                options = {
                    "apg": plan.apg.form,
                    "space": "x0",
                    "latent": latent,
                    "sigma": sigma,
                    "eta": case["eta"],
                    "thresholds": case["norm_threshold"][: len(links)],
                    "momentum": (case["momentum"], buffer),
                }
            predictions = [cases[f"in.pred.{b}"][step].reshape(frames, -1).to(dtype) for b in branches]
            v = guide(predictions, links, **options, rounding=rounding)
            key = f"{prefix}.{label}.step{step}"
            if key in cases:
                results[key] = v.reshape(cases[key].shape)
    return results


def _full(
    cases: dict[str, Tensor], meta: dict[str, Any], frames: int, prefix: str, dtype: torch.dtype, rounding: str
) -> dict[str, Tensor]:
    """Modes of the full pipeline: no state, one call per scale setting."""
    results: dict[str, Tensor] = {}
    for name, case in meta["cases"].items():
        key = f"{prefix}.{name}"
        if not name.startswith("full.") or key not in cases:
            continue
        mode = name.split(".")[1]
        plan = PLANS[_FULL_NAMES.get(mode, mode)].evaluated(case["scales"])
        branches = [f"{_FULL_TEXTS[b.text]}_{_FULL_SOURCES[b.sources]}" for b in plan.branches]
        called = case["forwards_called"]
        assert set(branches) <= set(called), f"{name}: the plan has {branches}, the release evaluates {called}"
        numbers = Guidance(case["scales"])
        options: dict[str, Any] = {}
        if plan.apg is not None:
            options = {"apg": plan.apg.form, "space": plan.apg.space, "eta": numbers.eta_of(plan.apg),
                       "thresholds": numbers.thresholds_of(plan.apg, len(plan.links))}  # fmt: skip
            if plan.apg.space == "x0":
                options |= {"latent": cases["in.full.z"].reshape(frames, -1), "sigma": case["sigma"]}
        links = plan.scaled(case["scales"])
        predictions = [cases[f"in.full.{branch}"].reshape(frames, -1).to(dtype) for branch in branches]
        v = guide(predictions, links, **options, rounding=rounding)
        results[key] = v.reshape(cases[key].shape)
    return results


def _helpers(cases: dict[str, Tensor], rounding: str) -> dict[str, Tensor]:
    """The two projections alone: a zero prediction in front leaves ``A(cond - uncond)``."""
    results: dict[str, Tensor] = {}
    cond, uncond = (cases[f"in.apg.{name}"][0].transpose(0, 1) for name in ("cond", "uncond"))
    predictions = [torch.zeros_like(cond), uncond, cond]
    for key in cases:
        setting = re.fullmatch(r"out\.apg\.normalize_diff\.eta([-\d.]+)\.thr([-\d.]+)", key)
        if setting is not None:
            options: dict[str, Any] = {"apg": "frame", "eta": float(setting[1]), "thresholds": [float(setting[2])]}
        elif key == "out.apg.apg_delta":
            options = {"apg": "global", "eta": 0.2}
        else:
            continue
        v = guide(predictions, [(2, 1, 1.0)], **options, rounding=rounding)
        results[key] = v.transpose(0, 1)[None]
    return results


def _compare(key: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype, f"{key}: {actual.dtype}, the release returns {expected.dtype}"
    assert actual.shape == expected.shape, f"{key}: {list(actual.shape)}, expected {list(expected.shape)}"
    error = (actual.double() - expected.double()).abs()
    if expected.dtype == torch.bfloat16:  # two steps of bfloat16; of the tensor's typical size where terms cancel
        size = expected.double().abs()
        size = size.clamp_min(size.square().mean().sqrt().item())
        ulps = error / torch.exp2(torch.floor(torch.log2(size)) - 7)
        assert ulps.max().item() <= 2, f"{key}: {ulps.max().item():.2f} bfloat16 ulp, allowed 2"
    else:
        assert error.max().item() <= FLOAT32_TOLERANCE, f"{key}: {error.max().item():.2e} > {FLOAT32_TOLERANCE}"
