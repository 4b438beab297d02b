"""Frames -> the patches that Qwen2.5-VL's vision tower reads, by the rules of its processor.

The frames are brought to a size between two limits of area, both sides multiples of a merged patch, by bicubic
interpolation; two frames make one patch in time. Source: Qwen2-VL (arXiv 2409.12191, section 2.1), facts of the
released model, section E.5. Shapes: F frames, P patches of ``3 * temporal * patch * patch`` values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bernini.errors import UserError

from .prompt import Visual

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LONGEST_RATIO = 200


@dataclass(frozen=True)
class VisionRules:
    """Of the processor. Sizes in pixels; ``merge`` patches a side become one token."""

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 3136
    max_pixels: int = 50176
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def of(cls, vision: Any, preprocessor: Mapping[str, Any]) -> VisionRules:
        """From the vision tower's config and ``preprocessor_config.json``.

        The limits of area are the release's own, and not those of that file, unless it has ``bernini_min_pixels`` and
        ``bernini_max_pixels``.

        Raises:
            ValueError: limits that cannot be; the message names the key.
        """
        limits = {key: preprocessor[f"bernini_{key}"] for key in ("min_pixels", "max_pixels")
                  if preprocessor.get(f"bernini_{key}") is not None}  # fmt: skip
        for key, value in limits.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"bernini_{key} must be a positive whole number, is {value!r}")
        least, most = (limits.get(key, getattr(cls, key)) for key in ("min_pixels", "max_pixels"))
        if least > most:
            raise ValueError(f"bernini_min_pixels is {least}, more than the {most} of bernini_max_pixels")
        return cls(
            int(getattr(vision, "patch_size", cls.patch)),
            int(getattr(vision, "spatial_merge_size", cls.merge)),
            int(getattr(vision, "temporal_patch_size", cls.temporal)),
            mean=tuple(preprocessor.get("image_mean", MEAN)),
            std=tuple(preprocessor.get("image_std", STD)),
            **limits,
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that frames are resized to.

        Raises:
            UserError: thinner than a patch, or too long a strip.
        """
        factor = self.patch * self.merge
        if min(height, width) < self.patch:
            raise UserError(
                f"{width}x{height} pixels is smaller than a patch of the planner's vision tower "
                f"({self.patch}x{self.patch})"
            )
        if max(height, width) > LONGEST_RATIO * min(height, width):
            raise UserError(f"{width}x{height} pixels: one side is more than {LONGEST_RATIO} times the other")
        tall, wide = (round(side / factor) * factor for side in (height, width))  # 0 for half a factor: grown below
        if tall * wide > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            tall, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
        elif tall * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            tall, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
        return tall, wide

    def visual(self, kind: str, frames: int, height: int, width: int) -> Visual:
        """The tokens of ``frames`` frames of this size; an image is one frame."""
        tall, wide = self.size(height, width)
        side = self.patch * self.merge
        times = 1 if kind == "image" else -(-frames // self.temporal)
        return Visual("image" if kind == "image" else "video", (times, tall // side, wide // side))

    def patches(self, frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """``[F, H, W, 3]`` uint8 -> (float32 ``[P, values]``, (t, h, w) in patches).

        A single image, or the last of an odd number of frames, is repeated in time. Patches of a merged token are
        neighbours; the values of a patch are ordered channel, time, row, column.
        """
        tall, wide = self.size(frames.shape[1], frames.shape[2])
        resized = [
            np.asarray(Image.fromarray(frame.numpy()).resize((wide, tall), Image.Resampling.BICUBIC))
            for frame in frames
        ]
        pixels = torch.from_numpy(np.stack(resized)).to(torch.float32) / 255
        pixels = ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(0, 3, 1, 2)
        missing = -len(pixels) % self.temporal
        pixels = torch.cat([pixels, *[pixels[-1:]] * missing])
        merge, patch = self.merge, self.patch
        t, h, w = len(pixels) // self.temporal, tall // patch, wide // patch
        split = pixels.reshape(t, self.temporal, 3, h // merge, merge, patch, w // merge, merge, patch)
        ordered = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return ordered.reshape(t * h * w, -1).contiguous(), (t, h, w)
