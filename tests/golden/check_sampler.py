"""Golden set ``sampler``: whole runs of the released renderer, step by step, on two tiny experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout, segment_phases
from bernini.renderer.guidance import PLANS
from bernini.renderer.latents import patch_grid, patchify, unpatchify
from bernini.renderer.sampler import Experts, Guidance, sample
from bernini.renderer.schedule import make_solver

from . import compare
from .check_renderer_forward import build

FP32 = {"atol": 1e-4, "rel_l2": 2e-5}


def run(
    experts: Experts,
    videos: list[Tensor],
    images: list[Tensor],
    noise: Tensor,
    texts: dict[str, Tensor],
    case: dict[str, Any],
    sigma_schedule: str,
    phases: Sequence[float] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], Any]:
    """(final latent ``[C, T, H, W]``, guided velocity per step, state per step, levels) of one run.

    Sources and noise are latents ``[C, T, H, W]``; ``case`` has the scalars under the names of the golden metadata;
    ``phases`` are the sources' ids where they are not counted from 1.
    """
    patch = experts.config.patch_size
    sources = [*videos, *images]
    layout = SegmentLayout(
        [
            *(
                Segment("source", patch_grid(tuple(x.shape), patch), phase)
                for x, phase in zip(sources, phases or segment_phases(len(sources)), strict=True)
            ),
            Segment("target", patch_grid(tuple(noise.shape), patch)),
        ]
    )
    plan = PLANS[case["mode"]]
    scales = {name: case.get(f"omega_{name}", 0.0) for name in ("vid", "img", "txt", "tgt")}
    options = (case["omega_scale"], case["eta"], case["norm_threshold"], case["momentum"])
    velocities: list[Tensor] = []
    states: list[Tensor] = []
    solver = make_solver(case["solver"], sigma_schedule, case["steps"], case["shift"])
    tokens = sample(
        experts, layout, len(videos), [patchify(x, patch) for x in sources], patchify(noise, patch), texts, plan,
        Guidance(scales, *options), solver,
        watch=lambda step, velocity, state: (velocities.append(velocity), states.append(state)),  # type: ignore[func-returns-value]
    )  # fmt: skip
    return unpatchify(tokens, layout.segments[-1].grid, patch), velocities, states, solver.schedule


def _case(
    name: str, settings: dict[str, Any], cases: dict[str, Tensor]
) -> tuple[dict[str, Any], list[Tensor], list[Tensor], dict[str, Tensor], Sequence[float] | None]:
    """(scalars, videos, images, contexts, ids) of a run of the renderer or of the full pipeline."""
    if not name.startswith("full."):
        case = {**settings, "solver": "unipc" if settings["scheduler"] == "UniPC" else "euler"}
        videos = [cases[f"in.video.{i}"][0] for i in range(case["videos"])]
        images = [cases[f"in.{case['image_list']}.{i}"][0] for i in range(case["images"])]
        return case, videos, images, {"positive": cases["in.text"][0], "negative": cases["in.text_neg"][0]}, None
    mode = "v2v_apg_planned" if settings["mode"] == "v2v_apg" else settings["mode"]
    fixed = {"solver": "unipc", "single_expert": False, "boundary": 0.875, "eta": 0.5, "norm_threshold": (50.0,) * 3,
             "momentum": 0.0}  # fmt: skip
    texts = {"positive": "wtxt_wovit", "negative": "wotxt_wovit", "planned": "wtxt_wvit"}
    ids = settings["sources"]
    return (
        {**settings, **fixed, "mode": mode},
        [cases[f"in.video.{i}"][0] for i in range(len(ids["videos"]))],
        [cases[f"in.image.{i}"][0] for i in range(len(ids["images"]))],
        {ours: cases[f"in.full.ctx_{theirs}"][0] for ours, theirs in texts.items()},
        [*ids["videos"], *ids["images"]],
    )


@torch.no_grad()
def check(files: dict[str, Path]) -> int:
    weights, _ = compare.load(files["weights"])
    cases, meta = compare.load(files["cases"])
    done = 0
    for name, settings in meta["cases"].items():
        if name.startswith("full.") and "in.full.ctx_wtxt_wvit" not in cases:
            continue
        case, videos, images, texts, phases = _case(name, settings, cases)
        for prefix, dtype in (("out", torch.float32), ("out_bf16", torch.bfloat16)):
            if f"{prefix}.{name}.final" not in cases:
                continue
            high = build(weights, meta["config"], "transformer.", dtype)
            low = None if case["single_expert"] else build(weights, meta["config"], "transformer_2.", dtype)
            experts = Experts(high, low, case["boundary"] * 1000)
            final, velocities, states, levels = run(
                experts, videos, images, cases["in.noise"][0], texts, case, "release", phases
            )
            if dtype == torch.bfloat16:
                compare.close(f"{prefix}.{name}.final", final, cases[f"{prefix}.{name}.final"][0], rel_l2=0.03)
                done += 1
                continue
            key = f"{prefix}.{name}"
            compare.same(f"{key}.timesteps", list(levels.timesteps), cases[f"{key}.timesteps"].tolist())
            sigmas = cases[f"{key}.sigmas"].double()
            got = torch.tensor(levels.sigmas[: len(sigmas)], dtype=torch.float64)
            compare.close(f"{key}.sigmas", got, sigmas, atol=1e-6)
            compare.close(f"{key}.final", final, cases[f"{key}.final"][0], **FP32)
            done += 3
            for step, (velocity, state) in enumerate(zip(velocities, states, strict=True)):
                for part, value in (("pred", velocity), ("latent", state)):
                    want = cases.get(f"{key}.step{step}.{part}")
                    if want is not None:
                        compare.close(f"{key}.step{step}.{part}", value, want[0], **FP32)
                        done += 1
    return done
