"""The one workload mix behind every packing, balance and memory figure.

Task shares are those of joint training, arXiv 2605.22344, Table 2, stage III, first row. The paper gives no lengths;
ours: clips of 2 to 7.5 seconds (uniform) at 16 fps and 480 x 848, images of one frame, 1 to 4 reference images, 50 to
500 text tokens (uniform). An edited video is as long as its source. Understanding data is text alone, text with an
image or text with a clip, a third each, and generates nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

# Percent of the samples. T2I: text to image, IV2V: reference images and a video to a video, Und: understanding, ...
SHARES = {"T2I": 16.0, "T2V": 24.0, "I2I": 32.0, "V2V": 2.6, "I2V": 2.8, "IV2V": 2.6, "Und": 20.0}
HEIGHT, WIDTH, FPS = 480, 848, 16
SECONDS = (2.0, 7.5)
REFERENCES = (1, 4)
TEXT_TOKENS = (50, 500)


@dataclass(frozen=True)
class Visual:
    """A source or a target in pixels: ``frames`` pictures of ``height`` x ``width``; an image has one frame."""

    kind: Literal["source", "target"]
    frames: int
    height: int = HEIGHT
    width: int = WIDTH

    @property
    def grid(self) -> tuple[int, int, int]:
        """Renderer tokens along (t, h, w): 4 frames to a latent after the first, 16 pixels to a token."""
        return (self.frames - 1) // 4 + 1, self.height // 16, self.width // 16

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w


@dataclass(frozen=True)
class Record:
    """One training sample: its task, its visual segments (sources, then the target if any) and its text length."""

    task: str
    segments: tuple[Visual, ...]
    text_tokens: int

    @property
    def visual_tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)


def sample(n: int, seed: int = 0) -> list[Record]:
    """``n`` records. The same seed gives the same records, and a longer list begins with the shorter one."""
    draw = random.Random(seed)
    return [_record(draw) for _ in range(n)]


def _record(draw: random.Random) -> Record:
    task = draw.choices(list(SHARES), list(SHARES.values()))[0]
    frames = int(draw.uniform(*SECONDS) * FPS) // 4 * 4 + 1  # drawn for every task: one draw changes no other
    references = draw.randint(*REFERENCES)
    text_tokens = draw.randint(*TEXT_TOKENS)
    shown = draw.choice([(), (1,), (frames,)])
    sources = {"T2I": (), "T2V": (), "V2V": (frames,), "IV2V": (frames, *[1] * references), "Und": shown}
    target = {"T2I": (1,), "I2I": (1,), "Und": ()}
    segments = [Visual("source", length) for length in sources.get(task, (1,) * references)]
    segments += [Visual("target", length) for length in target.get(task, (frames,))]
    return Record(task, tuple(segments), text_tokens)
