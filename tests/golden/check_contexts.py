"""Golden set ``contexts``: how text states and planner states become one context. The renderer's part: order and pads.

What the planner's connector computes is taken from the golden tensors themselves until the planner is built.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bernini.renderer.text import assemble_context

from . import compare


def check(files: dict[str, Path]) -> int:
    cases, _ = compare.load(files["cases"])
    done = 0
    for name, want in cases.items():
        if not name.startswith("out."):
            continue
        _, case, variant = name.split(".")
        positive, with_target = variant.startswith("wtxt"), variant.endswith("_wvit")
        text = cases[f"in.{case}.{'t5' if positive else 't5_neg'}"][0]
        branch = "cond" if positive else "uncond"
        is_target = cases[f"in.{case}.target_mask_{branch}"]
        if not positive and with_target:
            continue  # target states of the positive branch behind the negative text; no guidance mode uses it
        planned = int(is_target.numel() if with_target else (~is_target).sum())
        states = want[0, len(text) : len(text) + planned]
        compare.same(name, assemble_context(text, states), want[0])
        compare.close(
            f"{name} pads", torch.zeros_like(want[0, len(text) + planned :]), want[0, len(text) + planned :], atol=0.0
        )
        done += 2
    return done
