"""Golden set ``planner_forward``: embeddings, hidden states under the hybrid mask, the vision tower."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bernini.planner.heads import DecoderConfig
from bernini.planner.loading import PREFIXES
from bernini.planner.model import Planner, PlannerConfig, released_frequencies, under_mask

from . import compare
from .planner_cases import conversation

ATOL, REL = 1e-4, 1e-5


def planner(
    weights: dict[str, Tensor], config: dict, gen_dim: int = 8, decoder: DecoderConfig | None = None
) -> Planner:
    """A planner with a golden set's weights; parts that the set has no weights for stay random."""
    channels = config["hidden_size"]
    made = Planner(
        PlannerConfig(config, gen_dim, decoder or DecoderConfig(channels, 8, 1), weights["mask_tokens"].shape[1])
    )
    renamed = {}
    for name, value in weights.items():
        prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        renamed[PREFIXES[prefix] + name.removeprefix(prefix)] = value
    missing, unexpected = made.load_state_dict(renamed, strict=False)
    compare.same("unexpected tensors", list(unexpected), [])
    given = {name.split(".")[0] for name in renamed}
    compare.same("missing tensors", [name for name in missing if name.split(".")[0] in given], [])
    return made.eval()


@torch.no_grad()
def check(files: dict[str, Path]) -> int:
    weights, about = compare.load(files["weights"])
    cases, meta = compare.load(files["cases"])
    config = about["config"]
    done = 0
    model = planner(weights, config)
    for name in meta["layouts"]:
        if f"out.{name}.hidden_m2" not in cases:
            continue
        stored = {key: cases[f"in.{name}.{key}"] for key in ("ids", "types", "segs", "video_grid", "image_grid")}
        talk = conversation(*stored.values(), config["image_token_id"])
        compare.same(f"{name} positions", talk.positions, cases[f"in.{name}.pos"])
        embeds = model.embed(talk, cases[f"in.{name}.source_embeds"])
        if f"in.{name}.inputs_embeds" in cases:
            compare.close(f"{name} embeddings", embeds, cases[f"in.{name}.inputs_embeds"][0], atol=0.0)
        hidden = model(embeds, talk.positions, talk.layout)
        compare.close(f"{name} hidden", hidden, cases[f"out.{name}.hidden_m2"][0], atol=ATOL, rel_l2=REL)
        last = model._run(hidden, talk.positions, under_mask(talk.layout), model.text.layers[model._used :])
        compare.close(f"{name} last", model.text.norm(last), cases[f"out.{name}.last"][0], atol=ATOL, rel_l2=REL)
        done += 3
    for number in range(len(meta["vision_grids"])):
        if f"in.vis{number}.pixel_values" in cases:
            grids = [tuple(grid) for grid in cases[f"in.vis{number}.grid_thw"].tolist()]
            seen = model.see(cases[f"in.vis{number}.pixel_values"], grids)  # type: ignore[arg-type]
            compare.close(f"vision {number}", seen, cases[f"out.vis{number}"], atol=5e-5)
            done += 1
    for name in meta["layouts"]:
        key = f"out_bf16invfreq.{name}.hidden_m2"
        if key in cases:
            stored = {k: cases[f"in.{name}.{k}"] for k in ("ids", "types", "segs", "video_grid", "image_grid")}
            talk = conversation(*stored.values(), config["image_token_id"])
            embeds = model.embed(talk, cases[f"in.{name}.source_embeds"])
            with released_frequencies(model):
                compare.close(key, model(embeds, talk.positions, talk.layout), cases[key][0], atol=ATOL, rel_l2=REL)
                compare.same(
                    "rounded frequencies", model.text.rotary_emb.inv_freq, cases["inv_freq.llm_after_bf16_cast"].float()
                )
            done += 2
    halved = planner(weights, config).to(torch.bfloat16)
    for name in meta["layouts"]:
        key = f"out_bf16.{name}.hidden_m2"
        if key in cases:
            stored = {k: cases[f"in.{name}.{k}"] for k in ("ids", "types", "segs", "video_grid", "image_grid")}
            talk = conversation(*stored.values(), config["image_token_id"])
            embeds = halved.embed(talk, cases[f"in.{name}.source_embeds"])
            got = halved(embeds, talk.positions, talk.layout)
            compare.close(key, got.float(), cases[key][0].float(), rel_l2=0.03)
            done += 1
    return done
