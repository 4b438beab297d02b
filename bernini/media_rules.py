"""The rules that turn a media file into the sizes and frames the models were trained on. Plain arithmetic, no files.

They give the released pipelines' numbers exactly, roundings included (golden set ``preprocess``):

* sizes are rounded twice, first to whole pixels, then to a multiple of 16, both half to even as Python's ``round``;
* frame positions are a *float32* linspace rounded half to even. In float64 a few positions that are exact halves
  land on the other side.

Sizes are ``(width, height)`` in pixels, rates are frames per second.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import torch

# As released; a checkpoint's own are in its bernini.geometry.Geometry.
STRIDE = 16  # pixels: the VAE's factor 8 times the transformer's patch size 2
FRAME_STRIDE = 4  # video frames per latent frame; the first frame has a latent of its own
VIT_RATE_DIVISOR = 8  # the planner's vision tower sees so many times fewer frames per second
VIT_FRAME_STRIDE = 2  # frames per patch of the vision tower
RULES = ("renderer", "full", "full_vit")


def make_divisible(value: float, stride: int = STRIDE) -> int:
    """The multiple of ``stride`` nearest to ``value`` (half to even), at least one ``stride``."""
    return max(stride, round(value / stride) * stride)


def _scaled(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    return make_divisible(round(width * scale), stride), make_divisible(round(height * scale), stride)


def resize_size(width: int, height: int, max_size: int, min_size: int = 1, stride: int = STRIDE) -> tuple[int, int]:
    """Size of a source after resizing, keeping its aspect ratio up to the rounding.

    Shrinks until the long edge is at most ``max_size`` and enlarges until the short edge is at least ``min_size``;
    where both cannot hold, ``max_size`` wins. Both edges become multiples of ``stride``, so a ``max_size`` that is not
    one may be passed by less than a stride.

    Args:
        max_size, min_size: pixels. The renderer alone uses ``min_size`` 1, the full pipeline 240.

    Raises:
        ValueError: a size below one pixel.
    """
    if min(width, height, max_size, min_size, stride) < 1:
        raise ValueError(
            f"sizes must be at least 1, got {width}x{height}, max_size {max_size}, min_size {min_size}, stride {stride}"
        )
    scale = max(min(max_size / max(width, height), 1.0), min_size / min(width, height))
    width, height = _scaled(width, height, scale, stride)
    longest = max(width, height)
    if longest > max_size:  # starts from the rounded size, as the release does; it matters for thin strips only
        width, height = _scaled(width, height, max_size / longest, stride)
    return width, height


def frame_count(frames: int, stride: int = FRAME_STRIDE) -> int:
    """The frame count that is really used when ``frames`` are asked for: ``floor(frames / 4) * 4 + 1``."""
    return max(frames, 0) // stride * stride + 1


def vit_rate(fps: float, divisor: int = VIT_RATE_DIVISOR) -> float:
    """Frames per second that the vision tower sees of a video at ``fps``: ``floor(fps / 8)``, at least one."""
    return max(1, fps // divisor)


def frame_indices(
    total: int,
    video_fps: float,
    fps: float,
    num_frames: int,
    rule: str = "renderer",
    *,
    stride: int = FRAME_STRIDE,
    vit_divisor: int = VIT_RATE_DIVISOR,
    vit_stride: int = VIT_FRAME_STRIDE,
) -> list[int]:
    """Which frames of a source are used.

    ``renderer`` and ``full`` spread ``frame_count(total / video_fps * fps)`` positions over the whole source and keep
    the first ``num_frames``. Where the source already has the wanted rate, ``renderer`` takes consecutive frames
    instead, as if the source were ``frame_count(total)`` long: **the last index is then ``total`` when ``total`` is a
    multiple of ``stride``**, one past the end, and a reader repeats the last frame. ``full_vit``, for the planner's
    vision tower, does the same as ``full`` with a multiple of ``vit_stride`` at :func:`vit_rate` frames per second.

    Args:
        total: frames in the source.
        video_fps: rate of the source.
        fps: wanted rate.
        num_frames: upper limit; the pipelines pass a ``frame_count``.
        stride: video frames per latent frame.
        vit_divisor, vit_stride: of the vision tower: what divides its rate, and frames per patch.

    Raises:
        ValueError: an unknown rule, or a number that is not positive.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}; expected one of {', '.join(map(repr, RULES))}")
    if total < 1 or num_frames < 1 or video_fps <= 0 or fps <= 0:
        raise ValueError(
            f"total, num_frames and rates must be positive, got {total}, {num_frames}, {video_fps} fps, {fps} fps"
        )
    if rule == "full_vit":
        count = math.floor(total / video_fps * vit_rate(fps, vit_divisor) / vit_stride) * vit_stride
        count, limit = max(vit_stride, count), max(vit_stride, num_frames // vit_stride * vit_stride)
    else:
        if rule == "renderer" and video_fps == fps:
            total = frame_count(total, stride)
        count = math.floor(total / video_fps * fps / stride) * stride + 1
        limit = num_frames
    positions = torch.linspace(0, total - 1, count, dtype=torch.float32, device="cpu")
    return [int(position) for position in positions.round()[:limit].tolist()]


@dataclass(frozen=True)
class Timeline:
    """When each frame of a video is shown: ``times`` in seconds from the first frame, ascending, and the mean rate."""

    fps: float
    times: list[float]

    @property
    def total(self) -> int:
        return len(self.times)

    def frame_at(self, index: int) -> int:
        """The frame shown at place ``index`` of an even timeline with the same mean rate.

        At a constant rate that is ``index`` itself: half a frame of slack swallows timestamps rounded to
        milliseconds. The last frame is repeated past the end.
        """
        return max(0, bisect.bisect_right(self.times, (index + 0.5) / self.fps) - 1)
