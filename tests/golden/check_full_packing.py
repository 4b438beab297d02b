"""Golden set ``full_packing``: source ids, patches and rotations of the full pipeline's sources.

The release regroups the sources into an image stream (whatever has one latent frame) and a video stream; the order in
a stream does not change what is computed, so here they stay in the conversation's order and are regrouped to compare.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bernini.kernels import Segment, SegmentLayout, rope_tables, segment_phases
from bernini.kernels.qk_rope.reference import rope_factors
from bernini.renderer.latents import patch_grid, patchify

from . import compare

PATCH = (1, 2, 2)


def check(files: dict[str, Path]) -> int:
    cases, meta = compare.load(files["cases"])
    done = 0
    for name, case in meta["cases"].items():
        kinds = [("video", i) for i in range(len(case["videos"]))] + [("image", i) for i in range(len(case["images"]))]
        if f"out.{name}.image_stream_patches" not in cases:
            continue
        latents = [cases[f"in.{name}.{kind}.{i}"] for kind, i in kinds]
        phases = segment_phases(len(latents))
        compare.same(f"{name} ids", list(phases), case["ids_in_conversation_order"])
        layout = SegmentLayout(
            [Segment("source", patch_grid(tuple(x.shape), PATCH), p) for x, p in zip(latents, phases, strict=True)]
        )
        tables = rope_tables(meta["head_dim"], layout.grid_sizes, layout.phases, dtype=torch.float64)
        factors = rope_factors(tables, torch.from_numpy(layout.rows))
        patches = torch.cat([_channel_first(patchify(x, PATCH), x.shape[0]) for x in latents])
        still = [number for number, x in enumerate(latents) if x.shape[1] == 1]
        moving = [number for number in range(len(latents)) if number not in still]
        for stream, numbers in (("image", still), ("video", moving)):
            if f"out.{name}.{stream}_stream_patches" not in cases:
                assert not numbers, f"{name}: no golden {stream} stream for {numbers}"
                continue
            rows = torch.from_numpy(layout.indices(numbers))
            compare.same(f"{name} {stream} patches", patches[rows], cases[f"out.{name}.{stream}_stream_patches"])
            compare.close(f"{name} {stream} rope", factors[rows], cases[f"out.{name}.{stream}_stream_rope"], atol=1e-12)
            done += 2
        done += 1
    return done


def _channel_first(tokens: torch.Tensor, channels: int) -> torch.Tensor:
    """``[tokens, rows * columns * channels]`` -> ``[tokens, channels, 1, rows, columns]``."""
    return tokens.unflatten(1, (*PATCH, channels)).movedim(-1, 1)
