"""The planner: Qwen2.5-VL, a mask token, a connector and a decoder of ViT embeddings (paper fig. 3 A and B).

The language model and the vision tower are transformers' modules; which keys a token attends to is ours. Of the
language model everything up to the last layer but one is used: what the connector reads is ``hidden_states[-2]``,
before the last layer and the final norm, so these two only run where next-token logits are asked for.

Shapes: T packed tokens, N hidden size, H heads, G key heads, D head dim, V width of a ViT embedding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bernini.kernels import SegmentLayout, interval_attention
from bernini.kernels.segments import Kind
from bernini.parallel.packer import Modality, Packer, Producer
from bernini.parallel.plan import Range
from bernini.parallel.share import ALONE, Share

from .heads import Connector, DecoderConfig, VitDecoder
from .prompt import Conversation

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""``(layer, q_THD, k_SGD, v_SGD, scale) -> out_THD``: the attention of one layer over the given tokens."""

Rotary = tuple[Tensor, Tensor]
"""(cos, sin) of transformers' language model: ``[1, T, D]`` in its version 5, ``[3, 1, T, D]`` in version 4."""

IMPLEMENTATION = "bernini"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Attend, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """What transformers' layers call. The place of the mask carries the function that attends."""
    assert module.layer_idx is not None and query.shape[0] == 1
    q_THD, k_SGD, v_SGD = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention_mask(module.layer_idx, q_THD, k_SGD, v_SGD, scaling)[None], None  # type: ignore[arg-type]


@dataclass(frozen=True)
class PlannerConfig:
    """Everything that decides shapes.

    Args:
        mllm: ``config.json`` of a Qwen2.5-VL, flat (4.x) or with a ``text_config`` (5.x).
        gen_dim: text width of the renderer.
        decoder: of the ViT-embedding decoder.
        mask_tokens: rows of the stored mask tokens; only the first is used, and no plan is longer.
    """

    mllm: Mapping[str, Any]
    gen_dim: int
    decoder: DecoderConfig
    mask_tokens: int = 4096


class Planner(nn.Module):
    """Module names are those of the released bundle but for ``text`` and ``visual``, which it calls ``mllm.model`` and
    ``mllm.visual`` (see :data:`bernini.planner.loading.PREFIXES`).

    Args:
        understanding: whether to have what only next-token logits need: the last layer, the final norm and the head.
    """

    identity: str | None = None
    """Of the stored weights, if it was loaded from a checkpoint; see :func:`bernini.planner.plan_file.fingerprint`."""

    def __init__(self, config: PlannerConfig, *, understanding: bool = True) -> None:
        super().__init__()
        from transformers.modeling_utils import AttentionInterface
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

        AttentionInterface.register(IMPLEMENTATION, _attention)
        text, vision = qwen_configs(config.mllm)
        self.config, self.text_config, self.vision_config = config, text, vision
        self.visual = qwen.Qwen2_5_VisionTransformerPretrainedModel(vision)
        self.text = qwen.Qwen2_5_VLTextModel(text)
        text._attn_implementation = self.text.config._attn_implementation = IMPLEMENTATION
        self._used = text.num_hidden_layers - 1
        if understanding:
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        else:
            self.text.layers = self.text.layers[: self._used]
            self.text.norm = nn.Identity()
        self.connector = Connector(text.hidden_size, config.gen_dim, config.decoder.channels)
        self.vit_decoder = VitDecoder(config.decoder)
        self.mask_tokens = nn.Parameter(torch.zeros(1, config.mask_tokens, text.hidden_size))

    @property
    def dtype(self) -> torch.dtype:
        return self.mask_tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.mask_tokens.device

    @property
    def ticks(self) -> int:
        """By how much a temporal step of a video advances its positions: one second each, as released."""
        return int(self.vision_config.tokens_per_second)

    @property
    def mask_embedding(self) -> Tensor:
        """``[N]``: what stands at every target position that is not filled yet."""
        return self.mask_tokens[0, 0]

    def see(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """ViT embeddings of images and videos, ``[sum of tokens, N]``, in order.

        Args:
            pixels: patches as :func:`bernini.planner.vision.patches` makes them, all visuals in a row.
            grids: (t, h, w) in patches of each.
        """
        out = self.visual(pixels.to(self.dtype), grid_thw=torch.tensor(grids, device=pixels.device))
        return getattr(out, "pooler_output", out)  # transformers 5 returns an object, 4 the tensor

    def embed(
        self, conversation: Conversation, sources: Tensor | None, targets: Modality | None = None,
        share: Share = ALONE,
    ) -> Tensor:  # fmt: skip
        """Input embeddings of a conversation, ``[T, N]``, or of this rank's part of it.

        Args:
            sources: ViT embeddings of all source tokens in order.
            targets: what stands at the target's positions, as :mod:`bernini.parallel.packer` takes it; the mask
                embedding by default.
            share: the ranks that have the same conversation.
        """
        layout = conversation.layout
        packer = Packer(layout, share.rows(layout.tokens))

        def read(kind: Kind) -> Producer:
            ids = conversation.ids[torch.from_numpy(layout.indices(layout.numbers(kind)))]
            return lambda start, stop: self.text.embed_tokens(ids[start:stop].to(self.device))

        modalities: dict[Kind, Modality] = {"text": read("text")}
        modalities["source"] = read("source") if sources is None else sources.to(self.device)
        modalities["target"] = (lambda a, b: self.mask_embedding.expand(b - a, -1)) if targets is None else targets
        modalities = {kind: modality for kind, modality in modalities.items() if layout.numbers(kind)}
        return packer.pack(
            modalities, self.mask_tokens.shape[-1], dtype=self.dtype, device=self.device, touch=("text", "target")
        )

    def hidden(self, embeds_TN: Tensor, positions_3T: Tensor, attend: Attend, at: Tensor | None = None) -> Tensor:
        """``hidden_states[-2]``, ``[T, N]``: the output of the last layer but one.

        Args:
            at: int64, the rows that are wanted; all by default. The others go through the last of the layers only as
                its keys and values: ``attend`` gets fewer queries than keys there.
        """
        layers = self.text.layers[: self._used]
        if at is None:
            return self._run(embeds_TN, positions_3T, attend, layers)
        before = self._run(embeds_TN, positions_3T, attend, layers[:-1])
        return self._partly(layers[-1], before, positions_3T, attend, at)

    def _partly(self, layer: Any, x_TN: Tensor, positions_3T: Tensor, attend: Attend, at: Tensor) -> Tensor:
        """One layer for the rows ``at``, whose queries see the keys and values of all rows."""
        normed, rotary = layer.input_layernorm(x_TN), self._rotary(x_TN, positions_3T)
        k_TGD, v_TGD = (
            project(normed).unflatten(-1, (-1, layer.self_attn.head_dim))
            for project in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        k_TGD = self._turned(k_TGD, rotary)

        def attend_to_all(number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return attend(number, q, k_TGD, v_TGD, scale)

        cos, sin = rotary
        return _through([layer], x_TN[at], attend_to_all, (cos[..., at, :], sin[..., at, :]))

    def _run(self, x_TN: Tensor, positions_3T: Tensor, attend: Attend, layers: Iterable[Any]) -> Tensor:
        return _through(layers, x_TN, attend, self._rotary(x_TN, positions_3T))

    def _rotary(self, x_TN: Tensor, positions_3T: Tensor) -> Rotary:
        return self.text.rotary_emb(x_TN[None], positions_3T[:, None].to(x_TN.device))

    def _turned(self, k_TGD: Tensor, rotary: Rotary) -> Tensor:
        """The rotation that transformers' layers apply to their keys."""
        cos, sin = rotary
        if cos.dim() == 4:  # an axis of the position each; they share the channels
            sections = [*self.text_config.rope_scaling["mrope_section"]] * 2
            cos, sin = (
                torch.cat([piece[n % 3] for n, piece in enumerate(part.split(sections, -1))], -1) for part in rotary
            )
        low, high = k_TGD.chunk(2, dim=-1)
        return k_TGD * cos[0, :, None] + torch.cat([-high, low], dim=-1) * sin[0, :, None]

    def forward(self, embeds_TN: Tensor, positions_3T: Tensor, layout: SegmentLayout, share: Share = ALONE) -> Tensor:
        """:meth:`hidden` of a packed batch under the hybrid mask, nothing cached.

        Args:
            share: the ranks that run it together; where they cut the layout, rows and positions are this rank's.
        """
        return self.hidden(embeds_TN, positions_3T, under_mask(layout, share=share))

    def logits(
        self, hidden_TN: Tensor, positions_3T: Tensor, layout: SegmentLayout, at: Tensor | None = None,
        share: Share = ALONE,
    ) -> Tensor:  # fmt: skip
        """Next-token logits ``[T, vocabulary]`` from what :meth:`forward` returned: the last layer, norm and head.

        Args:
            at: int64 on the host, ascending: the rows of the batch that are wanted; all by default.
            share: as in :meth:`forward`; a rank gets the logits of those of the rows that it has.

        Raises:
            ValueError: the planner was made without them.
        """
        if len(self.text.layers) == self._used:
            raise ValueError("this planner was made without the layers for logits; make it with understanding=True")
        last, attend = self.text.layers[self._used], under_mask(layout, at, share)
        if at is None:
            return self.lm_head(self.text.norm(self._run(hidden_TN, positions_3T, attend, [last])))
        own = share.own(at, layout.tokens).to(hidden_TN.device)
        return self.lm_head(self.text.norm(self._partly(last, hidden_TN, positions_3T, attend, own)))


def _through(layers: Iterable[Any], x_TN: Tensor, attend: Attend, rotary: Rotary) -> Tensor:
    """Through transformers' layers, which want a batch of one."""
    rows = len(x_TN)
    if not rows:
        # A rank may have no rows of a shared sequence and still has keys and values to pass on. The layers cannot take
        # nothing, so they get a row that nobody reads.
        x_TN, attend = x_TN.new_zeros((1, x_TN.shape[1])), _unread(attend)
        cos, sin = (part.new_zeros((*part.shape[:-2], 1, part.shape[-1])) for part in rotary)
        rotary = cos, sin
    x = x_TN[None]
    for layer in layers:
        out = layer(x, attention_mask=attend, position_embeddings=rotary)
        x = out[0] if isinstance(out, tuple) else out  # transformers 4 returns a tuple
    return x[0][:rows]


def _unread(attend: Attend) -> Attend:
    """``attend`` without the one row that there is."""

    def without(layer: int, q_1HD: Tensor, k_1GD: Tensor, v_1GD: Tensor, scale: float) -> Tensor:
        out = attend(layer, q_1HD[:0], k_1GD[:0], v_1GD[:0], scale)
        return torch.cat([out, out.new_zeros((1, *out.shape[1:]))])

    return without


def under_mask(layout: SegmentLayout, at: Tensor | None = None, share: Share = ALONE) -> Attend:
    """The hybrid mask of a packed batch, as key intervals.

    Args:
        at: int64 on the host, ascending: the rows that have queries, all by default.
        share: the ranks among which the batch is cut, if it is.
    """
    queries = layout.tokens if at is None else len(at)
    masks: dict[Range, tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]] = {}

    def intervals(rows: Range) -> list[NDArray[np.int32]]:
        some = slice(*rows) if at is None else at[slice(*rows)].numpy()
        starts, ends, second = layout.intervals
        return [array[some] for array in (starts, ends, *(second or ()))]

    @functools.cache
    def seen(rows: Range) -> Range:
        """Keys between the first and the last that these of the queries see; all where everything is here."""
        if not share.cuts(layout.tokens):
            return 0, layout.tokens
        starts, *ends = (array for n, array in enumerate(intervals(rows)) if n != 2)
        return (int(starts.min()), int(max(array.max() for array in ends))) if len(starts) else (0, 0)

    def mask(rows: Range, device: torch.device) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Intervals of these of the queries: copied once, not once for every layer."""
        if at is None and rows == (0, queries):
            return layout.on(device).intervals
        if rows not in masks:
            # Counted from the first key that is here; those without a second interval keep their 0, 0.
            here = [(array - seen(rows)[0]).clip(0) for array in intervals(rows)]
            first, last, *pair = (torch.from_numpy(array).to(device) for array in here)
            masks[rows] = first, last, (pair[0], pair[1]) if pair else None
        return masks[rows]

    def attend(layer: int, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> Tensor:
        def run(q: Tensor, k: Tensor, v: Tensor, rows: Range) -> Tensor:
            starts, ends, second = mask(rows, q.device)
            return interval_attention(q, k, v, starts, ends, second=second, scale=scale)

        if not share.cuts(layout.tokens):
            return run(q_THD, k_SGD, v_SGD, (0, queries))
        return share.attend(q_THD, k_SGD, v_SGD, run, layout.tokens, at, seen)

    return attend


def qwen_configs(mllm: Mapping[str, Any]) -> tuple[Any, Any]:
    """(text config, vision config) of a ``config.json`` in the form of transformers 4 or 5."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

    values = copy.deepcopy(dict(mllm))
    values.pop("architectures", None)
    config = Qwen2_5_VLConfig(**values)
    text, vision = config.get_text_config(), config.vision_config
    text.use_cache = False
    return text, vision


@contextmanager
def released_frequencies(planner: Planner) -> Iterator[None]:
    """Rotary frequencies rounded to bfloat16 for as long as this lasts: the released pipeline casts the whole model,
    and these buffers with it (facts, K.3).

    0.12 rad off at position 100 with the real head size: needed to match its outputs, wrong otherwise.
    """
    rotaries = (planner.text.rotary_emb, planner.visual.rotary_pos_emb)
    exact = [rotary.inv_freq for rotary in rotaries]
    try:
        for rotary in rotaries:
            rotary.inv_freq = rotary.inv_freq.to(torch.bfloat16).to(rotary.inv_freq.dtype)
        yield
    finally:
        for rotary, frequencies in zip(rotaries, exact, strict=True):
            rotary.inv_freq = frequencies
