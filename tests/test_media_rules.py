"""The size and frame rules, by hand; the golden set ``preprocess`` holds many more of the released code's numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bernini.media_rules import Timeline, frame_count, frame_indices, make_divisible, resize_size


def test_make_divisible_rounds_half_to_even_and_never_to_zero() -> None:
    assert [make_divisible(v) for v in (1, 8, 23, 24, 40, 488, 489)] == [16, 16, 16, 32, 32, 480, 496]
    assert make_divisible(10, 4) == 8


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((1920, 1080, 848), (848, 480)),
        ((1080, 1920, 624), (352, 624)),
        ((640, 360, 848), (640, 352)),  # small enough: only snapped
        ((200, 150, 848, 240), (320, 240)),  # enlarged to the short edge
        ((3000, 200, 848, 240), (848, 64)),  # the long edge wins
        ((3654, 2044, 842, 240), (848, 464)),  # a maximum that is no multiple of 16
        ((3256, 1014, 848), (848, 256)),  # 264.1 is rounded to 264 first, and 264 / 16 = 16.5 then to even
        ((5, 5, 848), (16, 16)),
    ],
)
def test_resize_size(case: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert resize_size(*case) == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([624, 848, 1280]), st.sampled_from([1, 240]))
def test_resize_size_stays_within_its_limits(width: int, height: int, longest: int, shortest: int) -> None:
    size = resize_size(width, height, longest, shortest)
    assert size[0] % 16 == 0 and size[1] % 16 == 0
    assert 16 <= max(size) <= longest
    assert resize_size(*size, longest, shortest) == size


def test_renderer_takes_consecutive_frames_at_the_same_rate() -> None:
    assert frame_indices(83, 16.0, 16, 81) == list(range(81))
    assert frame_indices(36, 16.0, 16, 81) == list(range(37))  # one past the end
    assert frame_indices(36, 16.0, 16, 81, "full")[17:20] == [17, 18, 18]
    assert frame_indices(36, 16.0, 16, 81, "full")[-1] == 35


def test_positions_are_rounded_half_to_even_and_cut_not_spread() -> None:
    assert frame_indices(121, 24.0, 16, 81)[:8] == [0, 2, 3, 4, 6, 8, 9, 10]
    assert frame_indices(121, 24.0, 16, 33) == frame_indices(121, 24.0, 16, 81)[:33]
    assert frame_indices(411, 23.976, 24, 121, "full")[100:104] == [100, 101, 103, 104]  # only in float32


def test_the_vision_tower_gets_an_even_number_of_frames() -> None:
    assert frame_indices(81, 16.0, 16, 81, "full_vit") == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]
    assert frame_indices(5, 16.0, 16, 81, "full_vit") == [0, 4]
    assert len(frame_indices(1000, 60.0, 16, 17, "full_vit")) == 16
    assert frame_indices(1, 16.0, 16, 1, "full_vit") == [0, 0]


@given(st.integers(1, 2000), st.sampled_from([8.0, 16.0, 23.976, 24.0, 29.97, 60.0]), st.integers(1, 121))
def test_frame_counts_suit_the_vae(total: int, rate: float, limit: int) -> None:
    limit = frame_count(limit)
    for rule in ("renderer", "full"):
        indices = frame_indices(total, rate, 16, limit, rule)
        assert len(indices) % 4 == 1 and len(indices) <= limit
        assert indices == sorted(indices) and indices[0] == 0 and indices[-1] <= total


def test_frame_rules_do_not_depend_on_torch_defaults() -> None:
    expected = frame_indices(411, 23.976, 24, 121)
    torch.set_default_dtype(torch.float64)
    try:
        assert frame_indices(411, 23.976, 24, 121) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("arguments", [(0, 16, 16, 81), (81, 0, 16, 81), (81, 16, -1, 81), (81, 16, 16, 0)])
def test_frame_rules_refuse_nonsense(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        frame_indices(*arguments)
    with pytest.raises(ValueError, match="expected one of"):
        frame_indices(81, 16, 16, 81, "other")
    with pytest.raises(ValueError, match="at least 1"):
        resize_size(0, 10, 848)


def test_a_timeline_of_rounded_timestamps_is_the_identity() -> None:
    jittered = Timeline(29.97, [round(number / 29.97, 3) for number in range(300)])
    assert [jittered.frame_at(index) for index in range(301)] == [*range(300), 299]
