"""Golden set ``preprocess``: the resize rule, rounding to a stride, and which frames are taken. All exact."""

from __future__ import annotations

from pathlib import Path

from bernini.media_rules import frame_indices, make_divisible, resize_size

from . import compare

RULES = {"renderer_vae": "renderer", "full_vae": "full", "full_vit": "full_vit"}


def check(files: dict[str, Path]) -> int:
    cases, meta = compare.load(files["cases"])
    done = 0
    for row in cases["resize_rows"].tolist() if "resize_rows" in cases else []:
        width, height, max_size, min_size, *want, resized = row
        got = resize_size(width, height, max_size, min_size)
        compare.same(f"resize_rows {width}x{height} max {max_size} min {min_size}", list(got), want)
        compare.same(f"resize_rows {width}x{height} resized", got != (width, height), bool(resized))
        done += 1
    for value, stride, want in cases["make_divisible"].tolist() if "make_divisible" in cases else []:
        compare.same(f"make_divisible {value} {stride}", make_divisible(value, stride), want)
        done += 1
    for name, want in cases.items():
        if name.startswith("frames."):
            _, number, kind = name.split(".")
            case = meta["frame_cases"][number]
            got = frame_indices(case["total"], case["video_fps"], case["fps"], case["num_frames"], RULES[kind])
            compare.same(f"{name} {case}", got, want.tolist())
            done += 1
    return done
