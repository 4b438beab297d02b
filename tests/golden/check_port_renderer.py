"""Golden set ``port_renderer``: forwards of an independent port (its sampling runs wait for the UniPC schedule)."""

from __future__ import annotations

from pathlib import Path

import torch

from . import compare
from .check_renderer_forward import FP32, build, inputs

STREAMS = {"target_only": [], "all_streams": ["video.0:1", "image.0:2", "image.1:3"]}


@torch.no_grad()
def check(files: dict[str, Path]) -> int:
    weights, _ = compare.load(files["weights"])
    cases, meta = compare.load(files["cases"])
    model = build(weights, meta["config"], "transformer.")
    context = model.text_context(cases["text_pos"][0])
    done = 0
    for name, want in cases.items():
        if name.startswith("forward."):
            _, case, time = name.split(".")
            tokens, layout = inputs(cases, [STREAMS[case]], model.config.patch_size, prefix="")
            got = model(tokens, layout, torch.tensor([float(time[1:])]), context)
            compare.close(name, got, want[0], **FP32)
            done += 1
    return done
