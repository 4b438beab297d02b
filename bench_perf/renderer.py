"""One forward at the 1.3B widths, of the renderer and of a patched diffusers model, against stock diffusers.

12 heads x 128, feed-forward 8960, two layers, one video of 3120 tokens (1 x 60 x 52 latents), 512 text tokens. About
nine tenths of it are matrix products and attention, which are the same library calls on both sides; what differs is
everything between them. Text keys and values are computed inside the timed call on both sides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from bernini import patch_diffusers
from bernini.kernels import Segment, SegmentLayout
from bernini.renderer.config import RendererConfig
from bernini.renderer.latents import patchify
from bernini.renderer.model import KEEP_IN_FP32, Renderer

from .harness import Row, compare

CONFIG = RendererConfig(num_attention_heads=12, num_layers=2, ffn_dim=8960)
LATENT = (16, 2, 60, 104)
BAR = 1.05


def sides(dtype: torch.dtype) -> tuple[dict[str, Callable[[], Tensor]], Callable[[], Tensor]]:
    """(ours by name, diffusers'), all returning the velocity of the same latent."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    config = {key: value for key, value in CONFIG.to_dict().items() if key != "_class_name"}
    theirs = WanTransformer3DModel(**config).eval()
    for name, parameter in theirs.named_parameters():
        if not any(part in name.split(".") for part in KEEP_IN_FP32):
            parameter.data = parameter.data.to(dtype)
    with torch.device("meta"):
        ours = Renderer(CONFIG).eval()
    # One copy of the weights for all: where a matrix lies in memory changes its product's time by a tenth here.
    ours.load_state_dict(theirs.state_dict(), assign=True)
    patched = patch_diffusers(copy.deepcopy(theirs, {id(p): p for p in theirs.parameters()}))
    latent, text = torch.randn(LATENT), torch.randn(512, CONFIG.text_dim).to(dtype)
    tokens, time = patchify(latent, CONFIG.patch_size).to(dtype), torch.tensor([500])
    layout = SegmentLayout([Segment("target", (LATENT[1], LATENT[2] // 2, LATENT[3] // 2))])
    batch = latent[None].to(dtype)

    def run_ours() -> Tensor:
        return ours(tokens, layout, time, ours.text_context(text))

    def run_patched() -> Tensor:
        return patched(batch, time, text[None], return_dict=False)[0]

    def run_theirs() -> Tensor:
        return theirs(batch, time, text[None], return_dict=False)[0]

    return {"renderer": run_ours, "patched diffusers": run_patched}, run_theirs


@torch.no_grad()
def run() -> list[Row]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = sides(dtype)
        rows += [
            compare(
                f"{name} forward, 1.3B widths, 2 layers",
                side,
                theirs,
                shape="3120 tokens x 1536",
                dtype=str(dtype).removeprefix("torch."),
                peer_name="diffusers WanTransformer3DModel",
                bar=BAR,
                budget=80.0,  # seconds: the machine drifts by several percent over a few of these long calls
            )
            for name, side in ours.items()
        ]
    return rows
