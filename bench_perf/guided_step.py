"""What guidance costs beside the model: a guided step against its branches' forwards and the scheduler, timed alone.

rv2v, the mode with most branches (target; + video; + image; + text), and APG with the most arithmetic (r2v_apg), on a
small model, where everything that is not the model weighs most. Text keys and values are made once per run, so a step
is the difference between runs of five steps and of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bernini.kernels import Segment, SegmentLayout
from bernini.renderer.config import RendererConfig
from bernini.renderer.guidance import PLANS
from bernini.renderer.model import Renderer
from bernini.renderer.sampler import Experts, Guidance, sample
from bernini.renderer.schedule import make_solver

from .harness import Row, Watch, interleave, judged

CONFIG = RendererConfig(num_attention_heads=2, num_layers=4, ffn_dim=1024, text_dim=256)
VIDEO, IMAGE = Segment("source", (3, 8, 14), 1.0), Segment("source", (1, 8, 14), 2.0)
TARGET = Segment("target", (3, 8, 14))
STEPS = 5
BAR = 1 / 1.03


def solve(steps: int, velocity: Tensor) -> Tensor:
    """The scheduler by itself."""
    solver, state = make_solver("unipc", "release", steps, 5.0), torch.zeros_like(velocity)
    for step in range(steps):
        state = solver.step(step, velocity, state)
    return state


@torch.no_grad()
def row(mode: str, sources: list[Segment], videos: int) -> Row:
    torch.manual_seed(0)
    model, plan = Renderer(CONFIG).eval(), PLANS[mode]
    layout = SegmentLayout([*sources, TARGET])
    tokens = [torch.randn(segment.tokens, CONFIG.patch_values) for segment in sources]
    noise = torch.randn(TARGET.tokens, CONFIG.patch_values)
    texts = {name: torch.randn(512, CONFIG.text_dim) for name in ("positive", "negative")}
    scales = Guidance({"vid": 1.25, "img": 4.5, "txt": 4.0})

    def run(steps: int) -> Tensor:
        solver = make_solver("unipc", "release", steps, 5.0)
        return sample(Experts(model), layout, videos, tokens, noise, texts, plan, scales, solver)

    context, time = model.text_context(texts["positive"]), torch.tensor([500.0])
    sides: list[Callable[[], Tensor]] = [
        partial(run, STEPS), partial(run, 1), partial(solve, STEPS, noise), partial(solve, 1, noise)
    ]  # fmt: skip
    for branch in plan.branches:
        branch_layout, _ = branch.layout(layout, videos)
        x = torch.randn(branch_layout.tokens, CONFIG.patch_values)
        sides.append(partial(model, x, branch_layout, time, context))
    with Watch() as watch:
        long, short, solve_long, solve_short, *forwards = interleave(*sides, budget=20.0)
    step = (long.median - short.median) / (STEPS - 1)
    alone = sum(timing.median for timing in forwards) + (solve_long.median - solve_short.median) / (STEPS - 1)
    return judged(
        f"a guided step, {mode}",
        step * 1e3,
        alone * 1e3,
        unit="ms",
        shape=f"{layout.tokens} tokens x {CONFIG.width}, {CONFIG.num_layers} layers",
        dtype="float32",
        bar=BAR,
        unfit=watch.unfit,
        note=f"peer: {len(forwards)} forwards and the scheduler, each timed alone; ratio {BAR:.3f} is 1.03x their sum",
    )


def run() -> list[Row]:
    return [row("rv2v", [VIDEO, IMAGE], 1), row("r2v_apg", [Segment("source", (1, 8, 14), 1.0), IMAGE], 0)]
