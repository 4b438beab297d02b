"""The one workload mix behind every packing, balance and memory figure.

Task shares are those of joint training, arXiv 2605.22344, Table 2, stage III, first row
(:data:`bernini.data.mixture.TABLE_2`). The paper gives no lengths. Ours:

* clips of 2 to 7.5 seconds (uniform) at 16 fps and 480 x 848, 4 n + 1 frames as the autoencoder wants them; images are
  one frame of that size;
* 50 to 500 text tokens (uniform): all text of the planner's conversation, its roles and marks included;
* the planner's vision tower sees clips at 2 fps, in whole seconds, within 50176 pixels (facts, section E.5).

Where the table is silent about what a task has:

====  =====================  ========  =============================================================================
task  sources                target    why
====  =====================  ========  =============================================================================
T2I   none                   image
T2V   none                   clip
I2I   1 to 4 images          image     the paper's I2I has single edits and several references (Table 1)
V2V   a clip                 clip      an edited video is as long as its source
I2V   1 to 4 images          clip      video from references: the paper's name for r2v
IV2V  a clip, 1 to 4 images  clip      video first, as the released code orders them
Und   none, image or clip    none      a third each; half of its text is the answer, and nothing is rendered
====  =====================  ========  =============================================================================
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from bernini.data.mixture import TABLE_2

# Percent of the samples. T2I: text to image, IV2V: reference images and a video to a video, Und: understanding, ...
SHARES = {name.rstrip("."): float(share) for name, share in TABLE_2["III-1"].items()}
HEIGHT, WIDTH, FPS = 480, 848, 16
SECONDS = (2.0, 7.5)
REFERENCES = (1, 4)
TEXT_TOKENS = (50, 500)
VIT_SIDES = (6, 10)  # merged patches of 28 pixels: 480 x 848 shrinks to 168 x 280


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
    def vit_grid(self) -> tuple[int, int, int]:
        """Planner tokens along (t, h, w), at the mix's size: a step for each whole second, of two frames at 2 fps."""
        return max(1, self.frames // FPS), *VIT_SIDES

    @property
    def tokens(self) -> int:
        """Of the renderer."""
        t, h, w = self.grid
        return t * h * w

    @property
    def vit_tokens(self) -> int:
        """Of the planner."""
        t, h, w = self.vit_grid
        return t * h * w


@dataclass(frozen=True)
class Record:
    """One training sample: its task, its visual segments (sources, then the target if any) and its text length."""

    task: str
    segments: tuple[Visual, ...]
    text_tokens: int

    @property
    def target(self) -> Visual | None:
        return self.segments[-1] if self.segments and self.segments[-1].kind == "target" else None

    @property
    def sources(self) -> tuple[Visual, ...]:
        return tuple(segment for segment in self.segments if segment.kind == "source")

    @property
    def visual_tokens(self) -> int:
        """Latent tokens of all that is seen, also where nothing is rendered."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def renderer_tokens(self) -> int:
        """Of the renderer's sequence: none without a target."""
        return 0 if self.target is None else self.visual_tokens

    @property
    def planner_tokens(self) -> int:
        """Of the planner's conversation: text and the ViT embeddings of all visuals."""
        return self.text_tokens + sum(segment.vit_tokens for segment in self.segments)


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
