"""Golden set ``port_renderer``: forwards and sampling runs of an independent port of the renderer."""

from __future__ import annotations

from pathlib import Path

import torch

from bernini.renderer.sampler import Experts

from . import compare
from .check_renderer_forward import FP32, build, inputs
from .check_sampler import run


@torch.no_grad()
def check(files: dict[str, Path]) -> int:
    weights, _ = compare.load(files["weights"])
    cases, meta = compare.load(files["cases"])
    high = build(weights, meta["config"], "transformer.")
    names = [sorted(name for name in cases if name.startswith(f"{kind}.")) for kind in ("video", "image")]
    sources = [f"{name}:{number}" for number, name in enumerate((*names[0], *names[1]), start=1)]
    context = high.text_context(cases["text_pos"][0])
    done = 0
    for name, want in cases.items():
        if name.startswith("forward."):
            _, case, time = name.split(".")
            stream = sources if case == "all_streams" else []
            tokens, layout = inputs(cases, [stream], high.config.patch_size, prefix="")
            got = high(tokens, layout, torch.tensor([float(time[1:])]), context)
            compare.close(name, got, want[0], **FP32)
            done += 1
    sampling = meta["sampling"]
    runs = [name for name in cases if name.startswith("sample.")]
    if not runs:
        return done
    low = build(weights, meta["config"], "transformer_2.")
    experts = Experts(high, low, sampling["boundary"] * 1000)
    texts = {"positive": cases["text_pos"][0], "negative": cases["text_neg"][0]}
    for name in runs:
        mode, momentum = name.removeprefix("sample.").split(".m")
        settings = {
            "mode": mode, "omega_vid": sampling["omega_V"], "omega_img": sampling["omega_I"],
            "omega_txt": sampling["omega_TI"], "omega_scale": sampling["omega_scale"], "eta": sampling["eta"],
            "norm_threshold": sampling["norm_threshold"], "momentum": float(momentum), "steps": sampling["steps"],
            "shift": float(sampling["scheduler"].split("flow_shift=")[1]), "solver": "unipc",
        }  # fmt: skip
        videos, images = ([cases[name][0] for name in group] for group in names)  # the same for every mode
        final, *_ = run(experts, videos, images, cases["noise"][0], texts, settings, "diffusers-0.42")
        compare.close(name, final, cases[name][0], **FP32)
        done += 1
    return done
