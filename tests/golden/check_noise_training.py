"""Golden set ``noise_training``: noise levels, mixing, and a training step of the released renderer.

Tables, draws and mixed latents are equal in every bit; float32 densities to the last bits, which are the machine's.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout, rope_tables
from bernini.kernels.qk_rope.reference import rope_factors
from bernini.kernels.segments import Kind
from bernini.renderer.latents import patch_grid, unpatchify
from bernini.renderer.model import Renderer
from bernini.training.flow import RendererBatch, RendererSample, pack_renderer, renderer_losses
from bernini.training.noise import Timesteps, Weighting, boundary_table, released_tables

from . import compare
from .check_renderer_forward import build

_WEIGHTINGS: dict[str, Weighting] = {"t2i": "logit_normal", "default": "logit_normal", "t2v": "mode"}
_DRAWN = re.compile(r"out\.draw\.(\w+)\.shift([\d.]+)\.(\w+)\.sigma")
_REJECTED = re.compile(r"out\.density_reject\.(\w+)\.([\d.]+)_([\d.]+)")

FP32 = {"atol": 1e-6}

Tensors = dict[str, Tensor]


def check(files: dict[str, Path]) -> int:
    cases, meta = compare.load(files["cases"])
    done = _check_levels(cases, meta)
    for name in sorted({key.split(".")[1] for key in cases if key.startswith("out.pack_")}):
        done += _check_mixed(name, cases)
    if "out.train.loss" in cases:
        weights, _ = compare.load(files["weights"])
        done += _check_step(cases, build(weights, meta["ranges"]["train"]["config"], "transformer."))
    return done


def _timesteps(
    weighting: Weighting, shift: float, meta: dict[str, Any], low: float = 0.0, high: float = 1.0
) -> Timesteps:
    mean, std, scale = meta["logit_mean"], meta["logit_std"], meta["mode_scale"]
    return Timesteps(weighting, shift, low, high, parity=True, mean=mean, std=std, scale=scale)


def _check_levels(cases: Tensors, meta: dict[str, Any]) -> int:
    done = 0
    trials = {
        "logit_normal": next(value for key, value in cases.items() if key.startswith("in.normals")),
        "mode": cases["in.uniforms"],
        "uniform": cases["in.uniforms"],
    }
    for name, want in cases.items():
        if name.startswith("out.density."):
            weighting: Weighting = name.split(".")[2]  # type: ignore[assignment]
            got = _timesteps(weighting, 1.0, meta).density(trials[weighting][: len(want)])
            compare.close(name, got, want, **FP32)
        elif found := _REJECTED.fullmatch(name):
            weighting, first, last = found[1], float(found[2]), float(found[3])  # type: ignore[assignment]
            # Limits of the position, in no table; at shift 1 a level is one minus its position.
            timesteps = replace(_timesteps(weighting, 1.0, meta, 1 - last, 1 - first), parity=False)
            got, used = timesteps.accept(trials[weighting], len(want))
            compare.close(name, got, want, **FP32)
            compare.same(f"{name} draws", used, int(cases[name.replace("reject", "reject_draws")]))
        elif name.startswith("out.table."):
            shift, _, part = name.removeprefix("out.table.shift").rpartition(".")
            if part == "boundary_sigmas_f32":
                compare.close(name, boundary_table(float(shift)), want, **FP32)
            else:
                tables = dict(zip(("sigmas_bf16", "timesteps_bf16"), released_tables(float(shift)), strict=True))
                compare.same(name, tables[part], want)
        elif found := _DRAWN.fullmatch(name):
            span = meta["ranges"][f"{found[1]}.shift{found[2]}"]
            weighting = _WEIGHTINGS[found[3]]
            timesteps = _timesteps(weighting, float(found[2]), meta, span["sigma_min"], span["sigma_max"])
            compare.same(f"{name} limits", timesteps.positions, (span["u_min"], span["u_max"]))
            u, used = timesteps.accept(trials[weighting], len(want))
            levels = timesteps.levels(u)
            compare.same(name, levels.sigma, want)
            compare.same(name.replace("sigma", "timestep"), levels.timestep, cases[name.replace("sigma", "timestep")])
            compare.same(f"{name} draws", used, int(cases[name.replace("sigma", "draws_used")]))
        else:
            continue
        done += 1
    return done


def _rows(patches: Tensor) -> Tensor:
    """The release's patch tensors ``[tokens, C, 1, 2, 2]`` -> ``[tokens, values]``, channels last."""
    return patches.movedim(1, -1).flatten(1)


def _factors(layout: SegmentLayout, pairs: int) -> Tensor:
    """float64 ``[tokens, pairs, 2]`` (cos, sin)."""
    tables = rope_tables(2 * pairs, layout.grid_sizes, layout.phases, dtype=torch.float64)
    return rope_factors(tables, torch.from_numpy(layout.rows))


def _packed(name: str, cases: Tensors) -> RendererBatch:
    """The case's sources and target with its noise, as a batch of one sample."""
    inputs = {key.removeprefix(f"in.{name}."): value for key, value in cases.items() if key.startswith(f"in.{name}.")}
    target, noise = inputs["target"], inputs["noise_patches"]
    patch = (noise.shape[2], noise.shape[3], noise.shape[4])
    sources = tuple(inputs[key] for key in sorted(inputs) if key.startswith("source."))
    sample = RendererSample(
        sources, target, torch.zeros(1, 1), inputs["sigma"][0], 1000 * inputs["sigma"][0],
        unpatchify(_rows(noise), patch_grid(tuple(target.shape), patch), patch),
    )  # fmt: skip
    return pack_renderer([sample], patch)


def _check_mixed(name: str, cases: Tensors) -> int:
    batch = _packed(name, cases)
    compare.same(f"{name} tokens", batch.tokens, _rows(cases[f"out.{name}.input_vae_latents"]))
    compare.same(f"{name} velocity", batch.velocity, _rows(cases[f"out.{name}.target_velocity"]))
    mask = torch.zeros(batch.layout.tokens, dtype=torch.bool)
    mask[torch.from_numpy(batch.layout.target_index)] = True
    compare.same(f"{name} mask", mask, cases[f"out.{name}.vae_latents_mask"])
    if (want := cases.get(f"out.{name}.rope")) is not None:
        compare.close(f"{name} rope", _factors(batch.layout, want.shape[1]), want, atol=1e-12)
        return 4
    return 3


def _read_layout(rope: Tensor, lengths: Tensor, target: Tensor) -> SegmentLayout:
    """The segments that rotary factors ``[tokens, pairs, 2]`` were made for, found token by token among all places of
    an 8 x 8 x 8 grid and ids 0 to 5; a segment begins where the place is (0, 0, 0)."""
    places = SegmentLayout([Segment("source", (8, 8, 8), float(phase)) for phase in range(6)])
    distance = torch.cdist(rope.flatten(1), _factors(places, rope.shape[1]).flatten(1))
    rows = places.rows[distance.argmin(1).numpy()]
    owner = torch.arange(len(lengths)).repeat_interleave(lengths).tolist()
    starts = [number for number, row in enumerate(rows) if not row[:3].any()]
    segments = []
    for start, stop in pairwise([*starts, len(rows)]):
        t, h, w = (int(size) for size in rows[start:stop, :3].max(0) + 1)
        kind: Kind = "target" if target[start] else "source"
        segments.append(Segment(kind, (t, h, w), places.phases[rows[start, 3]], owner[start]))
    return SegmentLayout(segments)


def _check_step(cases: Tensors, model: Renderer) -> int:
    inputs = {key.removeprefix("in.train."): value for key, value in cases.items() if key.startswith("in.train.")}
    rope = inputs["input_vae_rope"]
    layout = _read_layout(rope, inputs["vae_seqlen"], inputs["vae_latents_mask"])
    compare.close("train rope", _factors(layout, rope.shape[1]), rope, atol=1e-12)
    compare.same("train lengths", list(layout.cu_seqlens), [0, *inputs["vae_seqlen"].cumsum(0).tolist()])
    text = inputs["text"][0]
    borders = (0, len(text) // 2, len(text))
    tokens, velocity = _rows(inputs["input_vae_latents"]), _rows(inputs["target_velocity"])
    batch = RendererBatch(tokens, layout, inputs["timesteps"], text, borders, velocity)
    compare.same("train targets", list(batch.target_tokens), inputs["target_lens"].tolist())

    losses = renderer_losses(model, batch)
    compare.close("out.train.per_sample_loss", losses, cases["out.train.per_sample_loss"], rel_l2=1e-5)
    compare.close("out.train.loss", losses.mean(), cases["out.train.loss"], rel_l2=1e-5)
    losses.mean().backward()
    done = 4
    parameters = dict(model.named_parameters())
    for name, want in cases.items():
        if name.startswith("out.train.grad."):
            gradient = parameters[name.removeprefix("out.train.grad.")].grad
            assert gradient is not None, name
            compare.close(name, gradient, want, rel_l2=1e-4)
            done += 1
    if (want := cases.get("out.train.squared_error")) is not None:
        with torch.no_grad():
            answer = model(tokens, layout, batch.timestep, model.text_context(text, borders))
        compare.close("out.train.squared_error", (answer - velocity).square(), want[0], rel_l2=1e-5)
        done += 1
    return done
