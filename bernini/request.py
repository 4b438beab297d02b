"""What can be asked of a model, and the choices that follow from it before any model or file is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError
from .media import Clip
from .media_rules import STRIDE, frame_count
from .presets import (
    ETA,
    FLOW_SHIFT,
    FPS,
    MAX_SIZE,
    MOMENTUM,
    NUM_FRAMES,
    PRESETS,
    SEED,
    TASKS,
    THRESHOLDS,
    Preset,
    infer_task,
)
from .renderer.guidance import PLANS, Plan
from .renderer.sampler import Guidance
from .renderer.schedule import SIGMA_SCHEDULES, SOLVERS

Video = str | Path | Clip
Image = str | Path | Tensor


@dataclass(frozen=True)
class Request:
    """One generation. ``None`` takes the preset's value, or the released default.

    Args:
        prompt: what to make, or what to change.
        videos, images: files, or media already read (clips; uint8 ``[H, W, 3]`` images).
        task: a name of ``presets.TASKS``; by default what the inputs mean.
        still: makes an image (one frame) where the task is to be inferred.
        preset: a name of ``presets.PRESETS``.
        mode: guidance mode, a name of ``renderer.guidance.PLANS``.
        negative_prompt: what to avoid.
        steps: sampling steps.
        seed: of the noise, which is drawn on the CPU: the same on every device.
        size: (height, width) of the result in pixels, multiples of 16. The source that is edited is brought to it;
            by default the result follows that source.
        num_frames: at most this many, rounded down to 4n + 1.
        fps: rate at which videos are read and the result is shown.
        max_size: longest edge of sources, in pixels.
        scales: guidance scales by name (``vid``, ``img``, ``txt``, ``tgt``), over the preset's.
        switch_factor: factor on the scales from the low-noise expert's first step on.
        eta, thresholds, momentum: of adaptive projected guidance.
        flow_shift, solver, sigma_schedule: see :func:`bernini.renderer.schedule.schedule`.
    """

    prompt: str
    videos: Sequence[Video] = ()
    images: Sequence[Image] = ()
    task: str | None = None
    still: bool = False
    preset: str = "bernini-r"
    mode: str | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    seed: int = SEED
    size: tuple[int, int] | None = None
    num_frames: int = NUM_FRAMES
    fps: float = FPS
    max_size: int = MAX_SIZE
    scales: Mapping[str, float] = field(default_factory=dict)
    switch_factor: float | None = None
    eta: float = ETA
    thresholds: Sequence[float] = THRESHOLDS
    momentum: float = MOMENTUM
    flow_shift: float = FLOW_SHIFT
    solver: str = "unipc"
    sigma_schedule: str = "release"


@dataclass(frozen=True)
class Settings:
    """A request with every choice made."""

    task: str
    plan: Plan
    mode: str
    preset: Preset
    steps: int
    guidance: Guidance
    frames: int


def settle(request: Request) -> Settings:
    """Makes every choice that needs no model and no file.

    Raises:
        UserError: an option that cannot work, or inputs that do not fit the task. The message names it.
    """
    videos, images = len(request.videos), len(request.images)
    task = request.task or infer_task(videos, images, still=request.still)
    _known("task", task, TASKS)
    _known("preset", request.preset, PRESETS)
    for what, count, (least, most) in (
        ("video", videos, TASKS[task].videos),
        ("image", images, TASKS[task].images),
    ):
        if count < least:
            raise UserError(f"task {task} needs {'a source' if least == 1 else least} {what}, and none was given")
        if most is not None and count > most:
            raise UserError(f"task {task} takes {'no' if most == 0 else f'at most {most}'} source {what}, got {count}")
    presets = PRESETS[request.preset]
    if task not in presets:
        raise UserError(f"the preset {request.preset} has no task {task}; it has {', '.join(presets)}")
    preset = presets[task]
    mode = request.mode or preset.mode
    if mode not in PLANS:
        planner = mode in {p.mode for table in PRESETS.values() for p in table.values()}
        why = " needs the planner, which this checkpoint has not" if planner else " is unknown"
        raise UserError(f"guidance mode {mode}{why}; there are {', '.join(PLANS)}")
    steps = preset.steps if request.steps is None else request.steps
    frames = 1 if TASKS[task].still else frame_count(request.num_frames)
    _known("solver", request.solver, SOLVERS)
    _known("sigma schedule", request.sigma_schedule, SIGMA_SCHEDULES)
    for name, number in (
        ("the number of steps", steps),
        ("the number of frames", request.num_frames),
        ("the frame rate", request.fps),
        ("the flow shift", request.flow_shift),
        ("the largest size", request.max_size),
    ):
        if not 0 < number < math.inf:
            raise UserError(f"{name} must be positive, got {number}")
    if request.size is not None and any(side < STRIDE or side % STRIDE for side in request.size):
        raise UserError(f"size {'x'.join(map(str, request.size))}: both sides must be positive multiples of {STRIDE}")
    unknown = set(request.scales) - set(preset.scales)
    if unknown:
        raise UserError(f"unknown guidance scale {min(unknown)!r}; there are {', '.join(preset.scales)}")
    factor = preset.switch_factor if request.switch_factor is None else request.switch_factor
    numbers = {**{f"omega-{name}": value for name, value in request.scales.items()}, "omega-scale": factor}
    numbers |= {"eta": request.eta, "momentum": request.momentum}
    numbers |= {f"norm-threshold {i}": value for i, value in enumerate(request.thresholds)}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise UserError(f"{name} must be a finite number, got {number}")
    plan = PLANS[mode].without_planner()
    if plan.apg and len(request.thresholds) < len(plan.links):
        raise UserError(f"mode {mode} needs {len(plan.links)} norm thresholds, got {len(request.thresholds)}")
    guidance = Guidance(
        {**preset.scales, **request.scales}, factor, request.eta, tuple(request.thresholds), request.momentum
    )
    return Settings(task, plan, mode, preset, steps, guidance, frames)


def _known(what: str, name: str, names: Any) -> None:
    if name not in names:
        raise UserError(f"unknown {what} {name!r}; there are {', '.join(names)}")
