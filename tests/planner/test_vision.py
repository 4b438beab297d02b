"""The vision tower's patches against transformers' image processor, pairs of frames, and what cannot be seen."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bernini.errors import UserError
from bernini.planner.vision import VisionRules


def processor(rules: VisionRules) -> Any:
    """The one that works on PIL images: transformers 4 and 5 call it, and the limits, differently."""
    limits: dict[str, Any]
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor

        limits = {"size": {"shortest_edge": rules.min_pixels, "longest_edge": rules.max_pixels}}
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor

        limits = {"min_pixels": rules.min_pixels, "max_pixels": rules.max_pixels}
    return Processor(**limits, patch_size=rules.patch, merge_size=rules.merge, temporal_patch_size=rules.temporal)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 ``[H, W, 3]``: a gradient with noise on it, so that a turned or shifted patch shows."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    base = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) * 127 / (height + width)], -1)
    return torch.from_numpy((base + generator.integers(0, 30, base.shape)).clip(0, 255).astype(np.uint8))


def reference(rules: VisionRules, frame: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    found = processor(rules)(images=[Image.fromarray(frame.numpy())], return_tensors="pt")
    return found["pixel_values"], tuple(found["image_grid_thw"][0].tolist())


@pytest.mark.parametrize(
    ("height", "width"),
    [(56, 56), (224, 224), (480, 848), (848, 480), (33, 77), (15, 15), (14, 14), (29, 400), (301, 199), (14, 2800),
     (1000, 17), (42, 70), (70, 42), (16, 16), (720, 1280)],
)  # fmt: skip
def test_images_are_as_the_processor_makes_them(height: int, width: int) -> None:
    rules, frame = VisionRules(), picture(height, width)
    want, grid = reference(rules, frame)
    got, ours = rules.patches(frame[None])
    assert ours == grid and got.shape == want.shape and got.dtype == torch.float32
    assert torch.allclose(got, want, atol=2e-6)
    visual = rules.visual("image", 1, height, width)
    assert visual.kind == "image" and visual.grid == (1, grid[1] // 2, grid[2] // 2)


def test_sizes_are_the_processors() -> None:
    """The rule alone, on many sizes and other limits."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    dice = random.Random(0)
    for _ in range(2000):
        height, width = (dice.choice([dice.randrange(14, 60), dice.randrange(14, 2000)]) for _ in range(2))
        if max(height, width) > 200 * min(height, width):
            continue
        least, most = dice.choice([(3136, 50176), (784, 3136), (3136, 12845056)])
        rules = VisionRules(min_pixels=least, max_pixels=most)
        assert rules.size(height, width) == smart_resize(height, width, 28, least, most)


def test_token_counts_of_the_release() -> None:
    rules = VisionRules()
    assert rules.visual("video", 10, 480, 848).tokens == 300
    assert rules.visual("image", 1, 224, 224).tokens == 64


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_a_video_is_pairs_of_frames(frames: int) -> None:
    """Each frame as the processor sees it alone; the last of an odd number stands for its missing partner too."""
    rules = VisionRules()
    clip = torch.stack([picture(60, 90, seed) for seed in range(frames)])
    got, (t, h, w) = rules.patches(clip)
    assert (t, h, w) == ((frames + 1) // 2, *reference(rules, clip[0])[1][1:])
    assert rules.visual("video", frames, 60, 90).grid == (t, h // 2, w // 2)
    alone = [reference(rules, frame)[0].unflatten(1, (3, 2, 196)) for frame in clip]
    split = got.unflatten(1, (3, 2, 196)).unflatten(0, (t, h * w))
    for pair in range(t):
        first, second = alone[2 * pair], alone[min(2 * pair + 1, frames - 1)]
        assert torch.allclose(split[pair, :, :, 0], first[:, :, 0], atol=2e-6)
        assert torch.allclose(split[pair, :, :, 1], second[:, :, 1], atol=2e-6)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((13, 200), "200x13 pixels is smaller than a patch of the planner's vision tower (14x14)"),
        ((200, 1), "1x200 pixels is smaller than a patch"),
        ((20, 4001), "4001x20 pixels: one side is more than 200 times the other"),
    ],
)
def test_what_cannot_be_seen(size: tuple[int, int], message: str) -> None:
    for look in (lambda: VisionRules().size(*size), lambda: VisionRules().visual("image", 1, *size)):
        with pytest.raises(UserError) as error:
            look()
        assert message in str(error.value)


def test_rules_come_from_the_configs() -> None:
    vision = SimpleNamespace(patch_size=7, spatial_merge_size=3, temporal_patch_size=4)
    rules = VisionRules.of(vision, {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "max_pixels": 99})
    assert rules == VisionRules(7, 3, 4, mean=(0.1, 0.2, 0.3), std=(1, 2, 3)), "the release has limits of its own"
    assert VisionRules.of(SimpleNamespace(), {}) == VisionRules()
    patches, grid = VisionRules(7, 3, 4).patches(torch.zeros(1, 42, 63, 3, dtype=torch.uint8))
    assert patches.shape[1] == 3 * 4 * 7 * 7 and len(patches) == grid[0] * grid[1] * grid[2]
    assert grid[1] % 3 == grid[2] % 3 == 0
