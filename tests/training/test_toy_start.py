"""The renderer that the toy's training starts from looks at places before it has learned anything."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from bernini.kernels import Segment, SegmentLayout, qk_rope
from bernini.toy_start import TOY, write_toy_start


def test_heads_begin_at_their_own_place(tmp_path: Path) -> None:
    tensors = load_file(write_toy_start(tmp_path / "start") / "bernini" / "model.safetensors")
    heads, dim = TOY.renderer.num_attention_heads, TOY.renderer.attention_head_dim
    layout = SegmentLayout(
        [Segment("source", (3, 4, 4), 1.0), Segment("source", (3, 4, 4), 2.0), Segment("target", (3, 4, 4))]
    )
    block = "diff_dec.transformer.blocks.2.attn1."
    q, k = (  # of tokens that say nothing
        tensors[f"{block}to_{name}.bias"].float().view(1, heads, dim).expand(layout.tokens, -1, -1) for name in "qk"
    )
    norms = {f"{name}_weight": tensors[f"{block}norm_{name}.weight"].float() for name in "qk"}
    here = layout.on("cpu")
    q, k = qk_rope(q, k, here.tables(dim), here.rows, **norms)
    logits = torch.einsum("qhd,khd->hqk", q, k)[:, 96:]  # [heads, target, all]
    first, second, own = torch.arange(144).split(48)
    for head in range(heads):
        best = (own, first, None, own, first, second)[head]
        if best is None:
            assert logits[head].abs().max() < 1e-5
        else:
            assert (logits[head].argmax(1) == best).all(), head
            # Any other place of that segment is less than half as likely.
            at = logits[head].gather(1, best[:, None])
            rest = logits[head].scatter(1, best[:, None], -torch.inf)[:, best].amax(1)
            assert ((at[:, 0] - rest) * dim**-0.5 > 0.69).all(), head
