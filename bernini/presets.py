"""Every task's settings as one readable table, and the strings the checkpoints were trained with.

Sources: paper table 5; facts of the released model, sections D.3 and D.4, and its interface constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What a task takes, as (least, most) with ``None`` for any number, and whether its result is an image."""

    videos: tuple[int, int | None]
    images: tuple[int, int | None]
    still: bool = False


TASKS: Mapping[str, Task] = {
    "t2i": Task((0, 0), (0, 0), still=True),
    "i2i": Task((0, 0), (1, None), still=True),
    "t2v": Task((0, 0), (0, 0)),
    "v2v": Task((1, None), (0, 0)),
    "mv2v": Task((1, None), (0, 0)),
    "r2v": Task((0, 0), (1, None)),
    "rv2v": Task((1, None), (1, None)),
    "ads2v": Task((1, None), (0, None)),
}


@dataclass(frozen=True)
class Preset:
    """How a task is sampled: guidance mode, steps, the scales, and the factor on them after the expert switch.

    ``planning`` and ``decoder`` are the planner's steps. ``size`` is (height, width), ``None`` where it follows the
    source.
    """

    mode: str
    steps: int = 40
    txt: float = 4.0
    tgt: float = 0.5
    img: float = 4.5
    vid: float = 1.25
    switch_factor: float = 0.8
    size: tuple[int, int] | None = None
    planning: int = 25
    decoder: int = 5

    @property
    def scales(self) -> dict[str, float]:
        return {"txt": self.txt, "tgt": self.tgt, "img": self.img, "vid": self.vid}


_SQUARE, _WIDE, _TINY = (512, 512), (480, 848), (32, 32)
_FULL = "vae_txt_vit_wapg"  # the planner's modes; a renderer alone has none of them
_EQ12 = "eq12"

# fmt: off
PRESETS: Mapping[str, Mapping[str, Preset]] = {
    # the renderer alone, as its scripts and its web page run it
    "bernini-r": {
        "t2i":   Preset("t2v_apg", size=_SQUARE),
        "i2i":   Preset("v2v"),
        "t2v":   Preset("t2v_apg", size=_WIDE),
        "v2v":   Preset("v2v_apg"),
        "mv2v":  Preset("v2v_apg"),
        "r2v":   Preset("r2v_apg", size=_WIDE),
        "rv2v":  Preset("rv2v"),
        "ads2v": Preset("v2v_apg"),
    },
    # paper, table 5 (S2V is r2v): equation 12 throughout
    "paper": {
        "t2v":   Preset(_EQ12, 60, txt=4, vid=1.25, img=1.0,  tgt=1.0, switch_factor=1, size=_WIDE),
        "r2v":   Preset(_EQ12, 40, txt=4, vid=1.25, img=2.5,  tgt=1.5, switch_factor=1, size=_WIDE),
        "v2v":   Preset(_EQ12, 40, txt=4, vid=1.25, img=1.25, tgt=0.5, switch_factor=1),
        "rv2v":  Preset(_EQ12, 40, txt=4, vid=1.25, img=3.0,  tgt=1.5, switch_factor=1),
    },
    # the toy that comes with the package: equation 12, without the branches of sources that a task has not
    "toy": {
        "t2i":   Preset(_EQ12, 12, txt=3, tgt=1, img=0,   vid=0,    switch_factor=1, size=_TINY, planning=8, decoder=4),
        "i2i":   Preset(_EQ12, 12, txt=3, tgt=1, img=1.5, vid=0,    switch_factor=1, planning=8, decoder=4),
        "t2v":   Preset(_EQ12, 12, txt=3, tgt=1, img=0,   vid=0,    switch_factor=1, size=_TINY, planning=8, decoder=4),
        "v2v":   Preset(_EQ12, 12, txt=3, tgt=1, img=0,   vid=1.25, switch_factor=1, planning=8, decoder=4),
        "r2v":   Preset(_EQ12, 12, txt=3, tgt=1, img=1.5, vid=0,    switch_factor=1, size=_TINY, planning=8, decoder=4),
        "rv2v":  Preset(_EQ12, 12, txt=3, tgt=1, img=1.5, vid=1.25, switch_factor=1, planning=8, decoder=4),
    },
    # planner and renderer, first release: its shell scripts
    "v1": {
        "t2i":   Preset(_FULL, 50, txt=4, tgt=0.5, img=1,    vid=1,    switch_factor=1,    size=_SQUARE),
        "i2i":   Preset(_FULL, 40, txt=4, tgt=0.5, img=1.25, vid=1.25, switch_factor=0.75, size=_SQUARE),
        "t2v":   Preset(_FULL, 50, txt=4, tgt=0.5, img=1,              switch_factor=1,    size=_WIDE),
        "v2v":   Preset(_FULL, 40, txt=4, tgt=0.5, img=1.25, vid=1.25, switch_factor=0.75),
        "r2v":   Preset(_FULL, 40, txt=4, tgt=1.5, img=4.5,            switch_factor=0.8,  size=_WIDE),
        "rv2v":  Preset("rv2v_wapg", 40, txt=4, tgt=1.5, img=3, vid=0.75, switch_factor=0.75),
    },
    # planner and renderer, second release: its web page
    "v2": {
        "t2i":   Preset(_FULL, 50, txt=4, tgt=0.5, img=1,    vid=1,    switch_factor=1,    size=_SQUARE),
        "i2i":   Preset(_FULL, 40, txt=4, tgt=0.5, img=1.25, vid=1.25, switch_factor=0.75, size=_SQUARE),
        "t2v":   Preset(_FULL, 50, txt=5,   tgt=1.2, img=1,    switch_factor=1,    size=_WIDE, planning=50, decoder=1),
        "v2v":   Preset(_FULL, 40, txt=4,   tgt=1.2, img=1.25, switch_factor=0.75, planning=50, decoder=1),
        "mv2v":  Preset(_FULL, 40, txt=4,   tgt=1.2, img=1.25, switch_factor=0.75, planning=50, decoder=1),
        "ads2v": Preset(_FULL, 40, txt=4,   tgt=1.2, img=1.25, switch_factor=0.75, planning=50, decoder=1),
        "r2v":   Preset(_FULL, 40, txt=4.5, tgt=1.5, img=3,    switch_factor=0.75, size=_WIDE, planning=50, decoder=1),
        "rv2v":  Preset("rv2v_wapg", 40, txt=5.5, tgt=1.5, img=4, vid=1.75, switch_factor=0.75, planning=50, decoder=1),
    },
}
# fmt: on

NUM_FRAMES, FPS, MAX_SIZE, SEED = 81, 16, 848, 42
VIT_TXT_CFG, VIT_IMG_CFG = 1.2, 1.0
ETA, THRESHOLDS, MOMENTUM, FLOW_SHIFT = 0.5, (50.0, 50.0, 50.0), 0.0, 5.0

SYSTEM_PROMPTS: Mapping[str, str] = {
    "default": "You are a helpful assistant.",
    "t2i": "You are a helpful assistant specialized in text-to-image generation.",
    "t2v": "You are a helpful assistant specialized in text-to-video generation.",
    "i2i": "You are a helpful assistant specialized in image editing.",
    "v2v": "You are a helpful assistant specialized in video editing.",
    "r2v": "You are a helpful assistant specialized in subject-to-video generation.",
    "rv2v": "You are a helpful assistant specialized in video editing with reference.",
}
"""The planner's system turn by task; a task that is not here takes the default (facts, section E.2)."""

TASK_PREFIXES: Mapping[str, str] = {
    "t2i": "You are a helpful assistant specialized in text-to-image generation.",
    "t2v": "You are a helpful assistant specialized in text-to-video generation.",
    "i2i": "You are a helpful assistant specialized in image editing.",
    "v2v": "You are a helpful assistant specialized in video editing.",
    "r2v": "You are a helpful assistant specialized in subject-to-video generation.",
    "rv2v": "You are a helpful assistant specialized in video editing with reference.",
    "ads2v": "You are a helpful assistant specialized in ads insertion.",
    "mv2v": "You are a helpful assistant for editing. You might need to adjust the video's style, lighting, colors, "
    "textures, and the subject's pose or action.",
}
"""Put before the cleaned positive prompt, without a separator."""

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def infer_task(videos: int, images: int, *, still: bool) -> str:
    """The task that such inputs mean; ``still`` asks for an image."""
    if videos:
        return "rv2v" if images else "v2v"
    if images:
        return "i2i" if still else "r2v"
    return "t2i" if still else "t2v"
