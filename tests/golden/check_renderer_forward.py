"""Golden set ``renderer_forward``: the released transformer's outputs on tiny weights, case by case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout
from bernini.renderer.config import RendererConfig
from bernini.renderer.latents import patch_grid, patchify
from bernini.renderer.model import KEEP_IN_FP32, Renderer, Stream

from . import compare

FP32 = {"atol": 1e-4, "rel_l2": 2e-5}


def build(
    weights: dict[str, Tensor], config: dict[str, Any], prefix: str, dtype: torch.dtype = torch.float32
) -> Renderer:
    """A renderer with the tensors under ``prefix``, loaded as a checkpoint would be."""
    model = Renderer(RendererConfig.from_dict(config))
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    model.load_state_dict(state, strict=True)
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in KEEP_IN_FP32):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def inputs(
    cases: dict[str, Tensor], streams: list[list[str]], patch: tuple[int, int, int], prefix: str = "in."
) -> tuple[Tensor, SegmentLayout]:
    """Tokens and layout of samples given as lists of ``"video.0:1"`` (tensor name, source id), target last."""
    tokens, segments = [], []
    for sample, stream in enumerate(streams):
        for entry in [*stream, "target:0"]:
            name, phase = entry.split(":")
            latent = cases[prefix + name][0]
            kind = "target" if name == "target" else "source"
            segments.append(Segment(kind, patch_grid(tuple(latent.shape), patch), float(phase), sample))
            tokens.append(patchify(latent, patch))
    return torch.cat(tokens), SegmentLayout(segments)


@torch.no_grad()
def check(files: dict[str, Path]) -> int:
    weights, _ = compare.load(files["weights"])
    cases, meta = compare.load(files["cases"])
    model = build(weights, meta["config"], "transformer.")
    patch = model.config.patch_size
    streams = meta["segments_in_stream_order"]
    done = 0
    for name, want in cases.items():
        kind, _, rest = name.partition(".")
        if kind not in ("out", "out_all_tokens", "out_bf16") or rest == "packed2":
            continue
        case, *middle, time = rest.split(".")
        text, timestep = _text_and_time(middle, time, rest, cases)
        this = build(weights, meta["config"], "transformer.", torch.bfloat16) if kind == "out_bf16" else model
        tokens, layout = inputs(cases, [streams[case]], patch)
        context = this.text_context(text[0])
        got = this(tokens, layout, timestep, context, targets_only=kind != "out_all_tokens")
        limits = {"rel_l2": 0.015} if kind == "out_bf16" else FP32
        compare.close(name, got.float(), want[0].float(), **limits)
        done += 1
    if "out_all_tokens.packed2" in cases:
        tokens, layout = inputs(cases, [streams["one_video"], []], patch)
        text = cases["in.text_packed2"][0]
        context = model.text_context(text, (0, len(text) // 2, len(text)))
        times = cases["in.timesteps"][[0, 2]]
        got = model(tokens, layout, times, context, targets_only=False)
        compare.close("out_all_tokens.packed2", got, cases["out_all_tokens.packed2"][0], **FP32)
        done += 1
    return done + _check_middle(cases, model, streams, patch)


def _text_and_time(middle: list[str], time: str, rest: str, cases: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``one_video.tfloat_833.3333`` holds a dot inside its number; the other names end in ``t<number>``."""
    if "tfloat_" in rest:
        return cases["in.text_padded512"], torch.tensor([float(rest.split("tfloat_")[1])])
    texts = {"text_long600": "in.text_long600", "text_real_only": "in.text_real"}
    text = texts[middle[0]] if middle else "in.text_padded512"
    return cases[text], torch.tensor([float(time[1:])])


def _check_middle(
    cases: dict[str, Tensor], model: Renderer, streams: dict[str, list[str]], patch: tuple[int, int, int]
) -> int:
    """Values inside the model, so that a failure says where it starts."""
    done = 0
    for name in cases:
        if not name.startswith("mid.") or not name.endswith(".temb"):
            continue
        _, case, time, _ = name.split(".")
        found: dict[str, Tensor] = {}

        def note(number: int, stream: Stream, found: dict[str, Tensor] = found) -> None:
            assert stream.branch is not None and stream.gate is not None
            found[f"block{number}"] = stream.residual + stream.gate * stream.branch

        hooks = [
            block.register_forward_hook(lambda _m, _i, stream, n=n: note(n, stream))
            for n, block in enumerate(model.blocks)
        ]
        timestep = torch.tensor([float(time[1:])])
        tokens, layout = inputs(cases, [streams[case]], patch)
        text = cases["in.text_padded512"][0]
        model(tokens, layout, timestep, model.text_context(text))
        for hook in hooks:
            hook.remove()
        temb, tproj = model.condition_embedder.time(timestep)
        found |= {"temb": temb[0], "tproj": tproj.flatten(), "text": model.condition_embedder.text(text)}
        for part, got in found.items():
            key = f"mid.{case}.{time}.{part}"
            if key in cases:
                expected = cases[key][0]
                compare.close(key, got[: len(expected)] if got.dim() == 2 else got, expected, **FP32)
                done += 1
    return done
