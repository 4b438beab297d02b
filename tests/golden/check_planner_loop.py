"""Golden set ``planner_loop``: masked generation with the released loop's quirks, cached and in full forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bernini.planner.decode import Prefix, Whole, contexts, generate
from bernini.planner.heads import DecoderConfig
from bernini.planner.settings import PlanSettings

from . import compare
from .check_planner_forward import planner
from .planner_cases import conversation

ATOL, REL = 2e-4, 2e-5
VARIANTS = {"conditional": "cond", "text only": "textonly", "unconditional": "uncond"}


class _Recorded:
    """The draws of a golden run."""

    def __init__(self, cases: dict[str, Tensor], run: str) -> None:
        prefix = f"in.{run}.noise.step"
        steps = sorted(int(key.removeprefix(prefix)) for key in cases if key.startswith(prefix))
        self._order, self._noise = cases[f"in.{run}.order"], iter(cases[f"{prefix}{step}"] for step in steps)

    def order(self, tokens: int) -> Tensor:
        return self._order

    def noise(self, revealed: Tensor, width: int) -> Tensor:
        return next(self._noise)


@torch.no_grad()
def check(files: dict[str, Path]) -> int:
    weights, about = compare.load(files["weights"])
    cases, meta = compare.load(files["cases"])
    config = about["config"]
    decoder = DecoderConfig(config["hidden_size"], about["decoder"]["width"], about["decoder"]["depth"],
                            about["decoder"]["shift"])  # fmt: skip
    model = planner(weights, config, about["connector"]["out_dim_for_gen"], decoder)
    talks, embeds = {}, {}
    for variant, name in VARIANTS.items():
        stored = [cases[f"in.{name}.{key}"] for key in ("ids", "types", "segs", "video_grid", "image_grid")]
        talks[variant] = conversation(*stored, config["image_token_id"])
        embeds[variant] = model.embed(talks[variant], cases["in.source_embeds"])
        key = f"in.{name}.inputs_embeds"
        if key in cases:
            compare.close(key, embeds[variant], cases[key][0], atol=0.0)
    done = 0
    for run, case in meta["runs"].items():
        if f"in.{run}.order" not in cases:
            continue
        for kind in (Prefix, Whole):
            done += _run(f"{run} {kind.__name__}", run, case, kind, model, talks, embeds, cases)
    return done


def _run(
    label: str, run: str, case: dict[str, Any], kind: Any, model: Any, talks: dict[str, Any], embeds: dict[str, Tensor],
    cases: dict[str, Tensor],
) -> int:  # fmt: skip
    settings = PlanSettings(
        case["planning_step"], case["decoder_steps"], case["vit_txt_cfg"], case["vit_img_cfg"], parity=True
    )
    weights = settings.weights(has_sources=True)
    names = [*weights, *(["unconditional"] if "unconditional" not in weights else [])]
    engine = kind(model, [talks[n] for n in names], [embeds[n] for n in names], active=len(weights))
    counts: list[int] = []

    def watch(step: int, revealed: Tensor, filled: Tensor) -> None:
        counts.append(len(revealed))
        if f"out.{run}.revealed.step{step}" in cases:
            compare.same(f"{label} revealed {step}", revealed, cases[f"out.{run}.revealed.step{step}"].sort().values)
        if f"out.{run}.embeds.step{step}" in cases:
            compare.close(f"{label} step {step}", filled, cases[f"out.{run}.embeds.step{step}"], atol=ATOL, rel_l2=REL)

    filled = generate(model, engine, list(weights.values()), settings, _Recorded(cases, run), watch=watch)
    compare.same(f"{label} counts", counts, case["revealed_counts"])
    compare.close(f"{label} plan", filled, cases[f"out.{run}.target_embeds"][0], atol=ATOL, rel_l2=REL)
    compare.same(f"{label} token 0", bool((filled[0] == model.mask_embedding).all()), case["token0_stays_masked"])
    found = contexts(
        model, talks["conditional"], engine.hidden[0], engine.hidden[names.index("unconditional")],
        engine.step(filled, 1)[0],
    )  # fmt: skip
    for name, states in (("wtxt_wvit", found.planned), ("wtxt_wovit", found.positive), ("wotxt_wovit", found.negative)):
        if f"out.{run}.ctx_{name}" in cases:
            compare.close(f"{label} {name}", states, cases[f"out.{run}.ctx_{name}"][0], atol=ATOL, rel_l2=REL)
    return len(counts) + 3
