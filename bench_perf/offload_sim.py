"""How long a training step waits for offloaded activations, on a virtual clock: a model, and no measurement of a GPU.

A stack of 40 layers of Wan 14B (width 5120, 40 heads, feed-forward 13824, bfloat16), a sequence shared by 8 ranks, one
forward and backward. Device: 400e12 operations a second, whatever they are (an assumption: 40 % of what an H100 states
for dense bfloat16); links of 25, 50 and 200 GB/s each way (PCIe 4 and 5, and a coherent one); 10 us a copy. Every layer
takes up to 10 % more or less than the schedule was made for (seed 0).

What a layer saves, and what it computes again in the backward:

* ``hidden``: its input; everything again.
* ``hidden+attention``: the attention's output and its log-sum-exp too; all but the attention again.
* ``all``: what its operations save, 14 tensors of the width and two of the feed-forward's; nothing again.

A cell qualifies where a layer's bytes over the link rate are at most 0.9 of the compute of its forward. Peers: ``wait
at use`` fetches a tensor when the compute is there (torchtune's way, without what a host far ahead hides); ``one group
ahead`` when the layer above begins its backward (Megatron's).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from bernini.offload.simulate import AT_USE, DEADLINE, LOOKAHEAD, Layer, Link, Result, Schedule, simulate

from .harness import Row, judged

RATE = 400e12
LAYERS, WIDTH, FFN, HEADS, RANKS = 40, 5120, 13824, 40, 8
TOKENS = (32_000, 64_000, 100_000, 128_000, 200_000, 256_000, 320_000, 440_000)
LINKS = (25e9, 50e9, 200e9)
POLICIES = ("hidden", "hidden+attention", "all")
NEAR = 0.9
BAR = 1.0  # percent of the step
QUALIFY = 60.0  # percent of the cells
JITTER = 0.1


@dataclass(frozen=True)
class Cell:
    policy: str
    tokens: int
    rate: float

    @property
    def layer(self) -> Layer:
        """One of a rank's layers. Backward counts twice for products with weights and 2.5 times for attention."""
        own = self.tokens / RANKS
        linear = own * 2 * (8 * WIDTH * WIDTH + 2 * WIDTH * FFN) / RATE  # self- and cross-attention, feed-forward
        attention = 4 * own * self.tokens * WIDTH / RATE  # of self-attention; keys of text are few
        again = {"hidden": linear + attention, "hidden+attention": linear, "all": 0.0}[self.policy]
        hidden, sums = 2 * WIDTH, 4 * HEADS
        each = {"hidden": hidden, "hidden+attention": 2 * hidden + sums, "all": 14 * hidden + sums + 2 * 2 * FFN}
        return Layer(linear + attention, 2 * linear + 2.5 * attention + again, round(own * each[self.policy]))

    @property
    def load(self) -> float:
        """Time of a layer's bytes on the link, as a part of its forward."""
        return self.layer.nbytes / self.rate / self.layer.forward

    @property
    def qualifies(self) -> bool:
        return self.load <= NEAR

    def run(self, schedule: Schedule, seed: int = 0) -> Result:
        return _run(self.layer, self.rate, schedule, seed)


@cache
def _run(layer: Layer, rate: float, schedule: Schedule, seed: int) -> Result:
    draw = random.Random(seed)
    paces = [1 + JITTER * draw.uniform(-1, 1) for _ in range(LAYERS)]
    actual = [replace(layer, forward=layer.forward * pace, backward=layer.backward * pace) for pace in paces]
    return simulate([layer] * LAYERS, Link(rate), schedule, actual)


def cells() -> Iterator[Cell]:
    for policy in POLICIES:
        for tokens in TOKENS:
            for rate in LINKS:
                yield Cell(policy, tokens, rate)


def row(cell: Cell) -> Row:
    ours, use, ahead = (cell.run(schedule) for schedule in (DEADLINE, AT_USE, LOOKAHEAD))
    everything = LAYERS * cell.layer.nbytes
    note = (
        f"{'qualifies' if cell.qualifies else 'does not qualify'}: {cell.load:.2f} of a layer's forward; wait at use "
        f"{100 * use.share:.2f} %, one group ahead {100 * ahead.share:.2f} %; the step takes {ours.seconds:.3g} s and "
        f"has at most {ours.device_bytes / 1e9:.2f} of {everything / 1e9:.1f} GB on the device, one group ahead "
        f"{ahead.device_bytes / 1e9:.2f}"
    )
    return judged(
        f"offload stall, {cell.policy}", 100 * ours.share, unit="% of the step", dtype="bfloat16", note=note,
        shape=f"{cell.tokens // 1000}K tokens, {cell.rate / 1e9:.0f} GB/s", bar=BAR if cell.qualifies else None,
    )  # fmt: skip


def run() -> list[Row]:
    every = list(cells())
    good = [cell for cell in every if cell.qualifies]
    share = judged(
        "offload stall, cells that qualify", 100 * len(good) / len(every), unit="%", bar=QUALIFY, higher_is_better=True,
        shape=f"{len(every)} cells", note=f"{len(good)} have a load of at most {NEAR}",
    )  # fmt: skip
    rows = [share]
    for name, peer in (("wait at use", AT_USE), ("one group ahead", LOOKAHEAD)):
        for title, group in (("that qualify", good), ("that do not", [cell for cell in every if not cell.qualifies])):
            ours, theirs = (max(100 * cell.run(s).share for cell in group) for s in (DEADLINE, peer))
            rows.append(
                judged(
                    f"offload stall, the worst of the cells {title}", ours, theirs, unit="% of the step",
                    shape=f"{len(group)} cells", dtype="bfloat16", note=f"peer: {name}; a model at 400 TFLOP/s",
                )
            )  # fmt: skip
    return [*rows, edge(), *(row(cell) for cell in every)]


def edge() -> Row:
    """With links just fast enough to qualify, at every length."""
    found = []
    for policy in POLICIES:
        for tokens in TOKENS:
            cell = Cell(policy, tokens, 1.0)
            found.append(replace(cell, rate=cell.load / NEAR))
    worst, at = max((100 * cell.run(DEADLINE).share, cell.rate) for cell in found)
    return judged(
        "offload stall, the worst where a layer's bytes take 0.9 of its forward", worst, unit="% of the step", bar=BAR,
        shape=f"{len(found)} cells", dtype="bfloat16", note=f"links of {min(c.rate for c in found) / 1e9:.2g} to "
        f"{max(c.rate for c in found) / 1e9:.2g} GB/s; the worst at {at / 1e9:.2g} GB/s",
    )  # fmt: skip
