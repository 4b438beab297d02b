"""Golden set ``contexts``: how text states and projected planner states become one context."""

from __future__ import annotations

from pathlib import Path

import torch

from bernini.planner.heads import Connector
from bernini.renderer.text import assemble_context

from . import compare


@torch.no_grad()
def check(files: dict[str, Path]) -> int:
    cases, meta = compare.load(files["cases"])
    connector = Connector(meta["hidden"], meta["text_dim"], meta["hidden"])
    prefix = "weights.connector."
    connector.load_state_dict({k.removeprefix(prefix): v for k, v in cases.items() if k.startswith(prefix)})
    done = 0
    for name, want in cases.items():
        if not name.startswith("out."):
            continue
        _, case, variant = name.split(".")
        positive, with_target = variant.startswith("wtxt"), variant.endswith("_wvit")
        text = cases[f"in.{case}.{'t5' if positive else 't5_neg'}"][0]
        branch = "cond" if positive else "uncond"
        is_target = cases[f"in.{case}.target_mask_{branch}"].bool()
        if not positive and with_target:
            continue  # target states of the positive branch behind the negative text; no guidance mode uses it
        hidden = cases[f"in.{case}.hidden_{branch}"][0]
        states = connector.for_gen(hidden if with_target else hidden[~is_target])
        context = assemble_context(text, states)
        compare.close(name, context, want[0], atol=2e-5)
        compare.same(f"{name} pads", context[len(text) + len(states) :], want[0, len(text) + len(states) :])
        done += 2
    return done
