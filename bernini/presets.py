"""Every task's settings as one readable table, and the strings the checkpoints were trained with.

Sources: facts of the released model, sections D.3, D.4 (Bernini-R) and its interface constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SCALES: Mapping[str, float] = {"vid": 1.25, "img": 4.5, "txt": 4.0}


@dataclass(frozen=True)
class Preset:
    """How a task is sampled: guidance mode, steps, scales, and the factor on the scales after the expert switch."""

    mode: str
    steps: int = 40
    scales: Mapping[str, float] = field(default_factory=lambda: dict(SCALES))
    switch_factor: float = 0.8
    eta: float = 0.5
    thresholds: tuple[float, float, float] = (50.0, 50.0, 50.0)
    momentum: float = 0.0
    flow_shift: float = 5.0


PRESETS: Mapping[str, Preset] = {
    "v2v": Preset("v2v_apg"),
}

HEIGHT, WIDTH, NUM_FRAMES, FPS, MAX_SIZE, SEED = 480, 848, 81, 16, 848, 42

TASK_PREFIXES: Mapping[str, str] = {
    "default": "You are a helpful assistant.",
    "v2v": "You are a helpful assistant specialized in video editing.",
}
"""Put before the cleaned positive prompt, without a separator."""

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
