"""How long a step takes by stated rates of a device: a model, and no measurement.

    compute     operations of projections, feed-forward and attention over the rate that the device sustains
    gathering   FSDP's bytes over the network, beside the compute: only what is longer than it counts
    exchange    Ulysses' bytes between the ranks of a sequence, which wait for them
    offload     bytes to the host and back over its link, beside the compute: only what is longer counts
    optimizer   bytes of weights, gradients and moments over the device's memory, or over the link where they are away

Backward takes twice the operations of forward, attention's 2.5 times; a block that is computed again takes its forward
once more. Text encoder and the decoder of ViT embeddings are left out.

Source: arXiv 2205.14135 (attention's backward); facts on systems, sections 0.6 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import UserError
from ..training.dimensions import Dimensions
from .step import Need, Settings


@dataclass(frozen=True)
class Rates:
    """Per second and rank.

    Args:
        flops: operations that training sustains in bfloat16.
        memory: bytes of the device's memory.
        link: bytes to the host, one way.
        peers: bytes to the ranks of the same sequence.
        network: bytes to all ranks.
    """

    flops: float
    memory: float
    link: float
    peers: float
    network: float


DEVICES: Mapping[str, Rates] = {
    "h100": Rates(4.5e14, 3.3e12, 5e10, 3e11, 4e10),
    "h200": Rates(4.5e14, 4.8e12, 5e10, 3e11, 4e10),
    "b200": Rates(1.0e15, 8.0e12, 5e10, 6e11, 4e10),
    "a100": Rates(1.6e14, 2.0e12, 2.5e10, 2e11, 2e10),
    "mi300x": Rates(4.0e14, 5.3e12, 5e10, 3e11, 4e10),
}
"""About 45 % of the published peak, and what the published links leave after overheads: assumptions, to be stated
otherwise with ``--rates``."""


def rates(device: str, changes: str | None = None) -> Rates:
    """Those of a device, with changes such as ``flops=5e14,link=2.5e10``.

    Raises:
        UserError: an unknown device or rate, or a value that is no positive number.
    """
    if device not in DEVICES:
        raise UserError(f"no device {device!r}; rates are known of {', '.join(DEVICES)}, others are given by --rates")
    found = DEVICES[device]
    for change in (changes or "").split(",") if changes else ():
        name, _, text = change.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if name not in found.__dataclass_fields__ or not 0 < value < float("inf"):
            names = ", ".join(found.__dataclass_fields__)
            raise UserError(f"--rates {change!r}: expected NAME=NUMBER with a name of {names}, e.g. flops=5e14")
        found = replace(found, **{name: value})
    return found


@dataclass(frozen=True)
class Seconds:
    """Of a step."""

    compute: float
    gathering: float
    exchange: float
    offload: float
    optimizer: float

    @property
    def total(self) -> float:
        beside = max(0.0, self.gathering - self.compute) + max(0.0, self.offload - self.compute)
        return self.compute + beside + self.exchange + self.optimizer


@dataclass(frozen=True)
class _Stack:
    """Of blocks: multiplications per token of its matrices, width that is attended with, widths that are exchanged."""

    layers: int
    matrices: int
    width: int
    exchanged: int
    tokens: int


def seconds(sizes: Dimensions, settings: Settings, need: Need, given: Rates) -> Seconds:
    """Of a step that takes ``need``."""
    stacks = _stacks(sizes, need.tokens)
    linear = sum(2 * s.layers * s.matrices * s.tokens for s in stacks) / settings.sequence
    attended = sum(4 * s.layers * s.width * s.tokens**2 for s in stacks) / settings.sequence
    work = 3 * linear + 3.5 * attended
    again = settings.recompute
    if again:
        work += linear + (0 if settings.offload == "hidden+attention" else attended)
    others = (settings.sequence - 1) / settings.sequence
    own = sum(s.layers * s.tokens * s.exchanged for s in stacks) * 2 / settings.sequence * others
    spread = settings.world if settings.fsdp != "none" else 1
    gathers = {"blocks": 2, "keep": 1, "whole": 1, "none": 0}[settings.fsdp]
    through = need.parameters * (gathers * 2 + 4) * (settings.world - 1) / settings.world
    rows = need.parameters / spread
    there = rows * (28 if settings.optimizer else 12) + rows * (12 if settings.average else 4)
    away = rows * (0 if settings.optimizer else 16) + rows * (0 if settings.average else 8)
    held = need.host - (0 if settings.optimizer else rows * 8) - (0 if settings.average else rows * 4)
    return Seconds(
        compute=work / given.flops,
        gathering=through / given.network,
        exchange=own * (4 if again else 3) / given.peers,
        offload=2 * max(0.0, held) / given.link,
        optimizer=max(there / given.memory, away / given.link),
    )


def _stacks(sizes: Dimensions, tokens: tuple[int, int]) -> list[_Stack]:
    config, found = next(iter(sizes.experts.values())), []
    if tokens[0]:
        wide = config.width
        matrices = 6 * wide**2 + 2 * wide * config.ffn_dim
        found.append(_Stack(config.num_layers, matrices, wide, 4 * wide, tokens[0]))
    if tokens[1] and sizes.planner is not None:
        mllm = sizes.planner.mllm
        text = mllm["text_config"] if isinstance(mllm.get("text_config"), dict) else mllm
        wide, heads, keys = (text[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        both = wide * keys // heads
        matrices = 2 * wide**2 + 2 * wide * both + 3 * wide * text["intermediate_size"]
        found.append(_Stack(text["num_hidden_layers"], matrices, wide, 2 * wide + 2 * both, tokens[1]))
    return found
