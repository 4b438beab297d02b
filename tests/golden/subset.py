"""Makes the folder ``data``: the telling part of the golden sets, small enough to live in the repository.

    python tests/golden/subset.py DIR        # DIR holds the full sets

Keeps the tensors that ``KEEP`` names and all metadata; file names stay. Checkers check what is there, so a tensor
left out only means one comparison less. A set is added by adding its files here and running this again. Texts are
mostly pads: of a tensor whose rows are for the greater part zeros only the others are written (compare.py puts the
zeros back).
"""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DATA = Path(__file__).with_name("data")
LIMIT = 12 * 2**20  # bytes, all sets together
SHORT = "rows_that_are_not_zero"
"""Metadata key of files that leave zero rows out: by tensor, its whole shape and the rows that are there."""

# Patterns of tensor names by file; a pattern with a leading "-" drops what an earlier one kept.
KEEP: dict[str, tuple[str, ...]] = {
    "preprocess": ("*",),
    # Adaptive projection of the renderer runs over three steps: of those with momentum or active thresholds, the last.
    "guidance": ("*", "-out.R.*_apg.mom*.step[01]"),
    # Every grid and id at the small head size, where t, h and w have unlike shares; a few at the real one.
    "sa3d_rope": (
        "ids.*",
        "rope.d64.*.id[0135]",
        "rope.*.n7.*",
        "rope.d128.g3x4x6.id2",
        "rope.d128.g2x6x4.id5",
        "qk.d128.q*",
        "qk.d64.factor",
    ),
    "renderer_forward_weights": ("*",),
    # Left out: the 600 tokens long context, every second timestep, and what the target rows already tell.
    "renderer_forward_cases": (
        "*",
        "-*text_long600*",
        "-out.*.t37",
        "-out.*.t875",
        "-out_all_tokens.*.t999",
        "out_all_tokens.videos2_images2.t999",
        "-mid.*.block*",
    ),
    # Both experts. First and last step of one mode; of the others how they end. (The port's own runs, which test the
    # same things with other weights, are checked where the full sets are.)
    "sampler_weights": ("*",),
    "sampler_cases": (
        "in.*",
        "out.v2v_apg.*",
        "-out.v2v_apg.step[1234].*",
        "out.v2v_apg_mom-0.5_thr3.step2.*",
        "out.*.final",
        "out.*.timesteps",
        "out.*.sigmas",
        "-out.full.vae_txt_vit.*",
        "out_bf16.rv2v.final",
    ),
    "contexts": (
        "weights.connector.*",
        "in.long.t5",
        "in.long.hidden_cond",
        "in.long.target_mask_cond",
        "out.long.wtxt_wvit",
        "in.short.t5_neg",
        "in.short.hidden_uncond",
        "in.short.target_mask_uncond",
        "out.short.wotxt_wovit",
    ),
    # Draws by the name "default" are those of t2i; nothing is computed from the predictions of the mixing cases.
    "noise_training": ("*", "-out.draw.*.default.*", "-in.*.prediction_patches", "-out.pack_bf16*.rope"),
    "planner_rng": ("*",),
    "full_packing": ("*",),
    "connector_vit_decoder": ("*", "-out.sample.n[1235].*"),
    # Every token and position; the masks of one conversation with a video and images, and of arbitrary kinds.
    "planner_layouts": ("*", "-*.mask_*", "v*_rv2v.*.mask_visible", "random_kinds.*"),
    # The language model. Its vision tower is transformers' own, and its weights and pixels are most of the set.
    "planner_weights": ("*", "-mllm.visual.*"),
    "planner_forward_cases": ("*", "-*.vis*", "-*.inputs_embeds", "-*.mask_visible", "-out.*.hidden.*", "-out*.t2i.*"),
    # Whole runs of the loop by how they end, one of them step by step.
    "planner_loop_weights": ("*",),
    "planner_loop_cases": (
        "in.*",
        "-*.mask_visible",
        "-in.*.inputs_embeds",
        "out.*.revealed.*",
        "out.*.target_embeds",
        "out.K4_n2_cfg.embeds.*",
        "out.K4_n2_cfg.ctx_*",
        "-*.ctx_wotxt_wvit",
    ),
}


def kept(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the last pattern that matches ``name`` keeps it."""
    verdict = False
    for pattern in patterns:
        if fnmatchcase(name, pattern.removeprefix("-")):
            verdict = not pattern.startswith("-")
    return verdict


def shortened(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without their zero rows, where these are most of them, and the metadata to put them back."""
    short, notes = dict(tensors), dict[str, Any]()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dim() > 1:
            rows = tensor.flatten(0, -2)
            filled = rows.any(1).nonzero().flatten()
            if 2 * len(filled) < len(rows):
                short[name] = rows[filled]
                notes[name] = [list(tensor.shape), filled.tolist()]
    return short, {SHORT: json.dumps(notes, separators=(",", ":"))} if notes else {}


def main(source: Path) -> int:
    DATA.mkdir(exist_ok=True)
    total = 0
    for stem, patterns in KEEP.items():
        with safe_open(str(source / f"{stem}.safetensors"), framework="pt") as file:
            names = sorted(name for name in file.keys() if kept(name, patterns))  # noqa: SIM118, no mapping
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata()
        path = DATA / f"{stem}.safetensors"
        tensors, notes = shortened(tensors)
        save_file(tensors, str(path), metadata=metadata | notes)
        total += path.stat().st_size
        print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 2**20:.2f} MiB")
    print(f"together {total / 2**20:.2f} of at most {LIMIT / 2**20:.0f} MiB")
    return int(total > LIMIT)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DIR")
    sys.exit(main(Path(sys.argv[1])))
