"""What can be asked of a model, and the choices that follow from it before any model or file is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import UserError
from .geometry import RELEASED, Geometry
from .media import Clip
from .media_rules import make_divisible
from .planner.settings import PlanSettings, check_visuals
from .presets import (
    ETA,
    MOMENTUM,
    PRESETS,
    SEED,
    TASKS,
    THRESHOLDS,
    VIT_IMG_CFG,
    VIT_TXT_CFG,
    Preset,
    infer_task,
)
from .renderer.guidance import NEEDS_PLANNER, PLANS, Plan
from .renderer.sampler import Guidance
from .renderer.schedule import SIGMA_SCHEDULES, SOLVERS

if TYPE_CHECKING:
    from .planner.plan_file import Plan as SavedPlan

Video = str | Path | Clip
Image = str | Path | Tensor
SOURCE_ORDERS = ("videos-first", "images-first")
"""How sources get their segment ids, counted from 1: as the released code does, or as one port of v2 reports."""


@dataclass(frozen=True)
class Request:
    """One generation. ``None`` takes the preset's value, or the checkpoint's default (:mod:`bernini.geometry`).

    Args:
        prompt: what to make, or what to change.
        videos, images: files, or media already read (clips; uint8 ``[H, W, 3]`` images).
        task: a name of ``presets.TASKS``; by default what the inputs mean.
        still: makes an image (one frame) where the task is to be inferred.
        preset: a name of ``presets.PRESETS``; by default the checkpoint's (released: ``bernini-r`` for a renderer alone
            and ``v2`` with a planner).
        mode: guidance mode, a name of ``renderer.guidance.PLANS``.
        negative_prompt: what to avoid.
        steps: sampling steps.
        seed: of the noise, which is drawn on the CPU: the same on every device.
        size: (height, width) of the result in pixels, multiples of the checkpoint's stride (released: 16). The source
            that is edited is brought to it; by default the result follows that source.
        num_frames: at most this many, rounded down to a multiple of the frame stride, and one (4n + 1; released: 81).
        fps: rate at which videos are read and the result is shown (released: 16).
        max_size: longest edge of sources, in pixels (released: 848).
        source_order: a name of :data:`SOURCE_ORDERS`: which sources get the lower segment ids.
        scales: guidance scales by name (``vid``, ``img``, ``txt``, ``tgt``), over the preset's.
        switch_factor: factor on the scales from the low-noise expert's first step on.
        eta, thresholds, momentum: of adaptive projected guidance.
        flow_shift, solver, sigma_schedule: see :func:`bernini.renderer.schedule.schedule`.
        planning_steps, decoder_steps: of the planner, see :class:`bernini.planner.settings.PlanSettings`.
        vit_txt_cfg, vit_img_cfg: its guidance, by the released names: weights of the sources and of the text.
        plan_parity: plans with the released loop's quirks and random numbers.
        plan: a file (or a plan) to render instead of planning.
    """

    prompt: str
    videos: Sequence[Video] = ()
    images: Sequence[Image] = ()
    task: str | None = None
    still: bool = False
    preset: str | None = None
    mode: str | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    seed: int = SEED
    size: tuple[int, int] | None = None
    num_frames: int | None = None
    fps: float | None = None
    max_size: int | None = None
    source_order: str = SOURCE_ORDERS[0]
    scales: Mapping[str, float] = field(default_factory=dict)
    switch_factor: float | None = None
    eta: float = ETA
    thresholds: Sequence[float] = THRESHOLDS
    momentum: float = MOMENTUM
    flow_shift: float | None = None
    solver: str = "unipc"
    sigma_schedule: str = "release"
    planning_steps: int | None = None
    decoder_steps: int | None = None
    vit_txt_cfg: float | None = None
    vit_img_cfg: float | None = None
    plan_parity: bool = False
    plan: str | Path | SavedPlan | None = None


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
    preset_name: str
    planning: PlanSettings | None
    """``None`` for a renderer alone."""
    fps: float
    max_size: int
    flow_shift: float
    negative_prompt: str
    geometry: Geometry = RELEASED


def settle(request: Request, *, planner: bool = False, geometry: Geometry = RELEASED) -> Settings:
    """Makes every choice that needs no model and no file.

    Args:
        planner: whether the model has one.
        geometry: of the model: its strides and defaults.

    Raises:
        UserError: an option that cannot work, or inputs that do not fit the task. The message names it.
    """
    videos, images = len(request.videos), len(request.images)
    task = request.task or infer_task(videos, images, still=request.still)
    _known("task", task, TASKS)
    preset_name = request.preset or geometry.default_preset(planner)
    _known("preset", preset_name, PRESETS)
    for what, count, (least, most) in (
        ("video", videos, TASKS[task].videos),
        ("image", images, TASKS[task].images),
    ):
        if count < least:
            raise UserError(f"task {task} needs {'a source' if least == 1 else least} {what}, and none was given")
        if most is not None and count > most:
            raise UserError(f"task {task} takes {'no' if most == 0 else f'at most {most}'} source {what}, got {count}")
    presets = PRESETS[preset_name]
    if task not in presets:
        raise UserError(f"the preset {preset_name} has no task {task}; it has {', '.join(presets)}")
    preset = presets[task]
    mode = request.mode or preset.mode
    _known("guidance mode", mode, PLANS)
    if not planner and mode in NEEDS_PLANNER:
        able = ", ".join(other for other in PLANS if other not in NEEDS_PLANNER)
        raise UserError(f"guidance mode {mode} needs the planner, which this checkpoint has not; there are {able}")
    planning = None
    if planner:
        check_visuals(videos + images + 1)
        planning = _planning(request, preset, geometry)
    else:
        _refuse_planning(request)
    steps = preset.steps if request.steps is None else request.steps
    num_frames, fps, max_size, flow_shift = (
        asked if asked is not None else usual
        for asked, usual in (
            (request.num_frames, geometry.num_frames),
            (request.fps, geometry.fps),
            (request.max_size, geometry.max_size),
            (request.flow_shift, geometry.flow_shift),
        )
    )
    _known("solver", request.solver, SOLVERS)
    _known("sigma schedule", request.sigma_schedule, SIGMA_SCHEDULES)
    _known("order of the sources", request.source_order, SOURCE_ORDERS)
    for name, number in (
        ("the number of steps", steps),
        ("the number of frames", num_frames),
        ("the frame rate", fps),
        ("the flow shift", flow_shift),
        ("the largest size", max_size),
    ):
        if not 0 < number < math.inf:
            raise UserError(f"{name} must be positive, got {number}")
    _check_size(request, geometry.pixel_stride)
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
    plan = PLANS[mode] if planner else PLANS[mode].without_planner()
    if plan.apg and plan.apg.threshold is None and len(request.thresholds) < len(plan.links):
        raise UserError(f"mode {mode} needs {len(plan.links)} norm thresholds, got {len(request.thresholds)}")
    guidance = Guidance(
        {**preset.scales, **request.scales}, factor, request.eta, tuple(request.thresholds), request.momentum
    )
    frames = 1 if TASKS[task].still else geometry.frame_count(int(num_frames))
    negative = geometry.negative_prompt if request.negative_prompt is None else request.negative_prompt
    return Settings(
        task, plan, mode, preset, steps, guidance, frames, preset_name, planning, fps, int(max_size), flow_shift,
        negative, geometry,
    )  # fmt: skip


def _check_size(request: Request, stride: int) -> None:
    if request.size is not None and any(side < stride or side % stride for side in request.size):
        (height, width), (near, wide) = request.size, (make_divisible(side, stride) for side in request.size)
        why = f"both sides must be positive multiples of {stride}; the nearest is {near}x{wide}"
        raise UserError(f"size {height}x{width}: {why}")


def _planning(request: Request, preset: Preset, geometry: Geometry) -> PlanSettings:
    steps = preset.planning if request.planning_steps is None else request.planning_steps
    decoder = preset.decoder if request.decoder_steps is None else request.decoder_steps
    for what, number in (("planning steps", steps), ("decoder steps", decoder)):
        if number < 1:
            raise UserError(f"the number of {what} must be positive, got {number}")
    visual = geometry.vit_txt_cfg if request.vit_txt_cfg is None else request.vit_txt_cfg
    text = geometry.vit_img_cfg if request.vit_img_cfg is None else request.vit_img_cfg
    for what, weight in (("vit-txt-cfg", visual), ("vit-img-cfg", text)):
        if not math.isfinite(weight):
            raise UserError(f"{what} must be a finite number, got {weight}")
    if request.plan_parity and not 0 <= request.seed < 2**32:
        raise UserError(f"plan parity needs a seed below 2^32, as the released generators do; got {request.seed}")
    return PlanSettings(steps, decoder, visual, text, request.plan_parity)


def _refuse_planning(request: Request) -> None:
    given = {
        "planning steps": request.planning_steps,
        "decoder steps": request.decoder_steps,
        "a plan": request.plan,
        "plan parity": request.plan_parity or None,
        "vit-txt-cfg": None if request.vit_txt_cfg == VIT_TXT_CFG else request.vit_txt_cfg,
        "vit-img-cfg": None if request.vit_img_cfg == VIT_IMG_CFG else request.vit_img_cfg,
    }
    asked = [what for what, value in given.items() if value is not None]
    if asked:
        verb = "need" if asked[0].endswith("steps") else "needs"
        raise UserError(f"{asked[0]} {verb} the planner, which this checkpoint has not")


def _known(what: str, name: str, names: Any) -> None:
    if name not in names:
        raise UserError(f"unknown {what} {name!r}; there are {', '.join(names)}")
