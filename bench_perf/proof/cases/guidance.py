"""Guidance of 81 frames: latents of 21 frames with 16 channels, at 480p and 720p; five predictions, paper eq. 12.

Where something must be summed: predictions in, for the sums; predictions, latent and history in and the outputs out.
x0 space needs the latent for the sums too. Momentum reads and writes its buffer once, and reads it for the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..case import Broken, Case

SMALL, LARGE = (21, 16, 60, 104), (21, 16, 90, 160)
CHAIN = [(1, 0, 1.25), (2, 1, 4.5), (3, 2, 4.0), (4, 3, 1.0), (5, 4, 2.0), (6, 5, 1.5), (7, 6, 3.0)]


@dataclass(frozen=True)
class _Guide:
    """A call: ``predictions`` in a chain of links, ``outputs`` rows of a scheduler's update with ``history``.

    Latent, history and outputs are float32, as the solver keeps them, or in ``other``; only an update has them.
    """

    apg: str | None = "frame"
    space: str = "x0"
    shape: tuple[int, ...] = LARGE
    predictions: int = 5
    outputs: int = 2
    history: int = 2
    momentum: bool = False
    narrow: bool = False
    """Latent, history and outputs in the predictions' dtype."""

    def _other(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.narrow or not self.outputs else torch.float32

    def __call__(self, kernel: Any, dtype: torch.dtype) -> None:
        def tensors(count: int, kind: torch.dtype, *shape: int) -> list[Tensor]:
            return [torch.empty(shape or self.shape, dtype=kind, device="cuda") for _ in range(count)]

        other, links = self._other(dtype), CHAIN[: self.predictions - 1]
        history, (latent,) = tensors(self.history, other), tensors(1, other)
        new, old, scales = (list(column) for column in zip(*links, strict=True))
        projects: dict[str, Any] = {"eta": 0.5 if self.apg else 1.0, "thresholds": [50.0] * len(links) * bool(self.apg)}
        rows: Sequence[float] = [1.0, -0.1, 0.2, 0.3][: 2 + self.history] * self.outputs
        args = (tensors(self.predictions, dtype), new, old, scales, self.apg, self.space, latent, 0.7,
                projects["eta"], projects["thresholds"], rows, history, "fp32")  # fmt: skip
        if self.momentum:
            (buffer,) = tensors(1, torch.float32, len(links), *self.shape)
            kernel.guide_momentum(buffer, tensors(self.outputs, other), 0.5, *args)
        else:
            kernel.guide(*args)

    def minimum(self, dtype: torch.dtype) -> int:
        sums = self.apg is not None
        read = (1 + sums) * self.predictions * dtype.itemsize
        if self.momentum:  # d comes from the buffer
            read += 3 * 4 * (self.predictions - 1)
        update = ((1 + (sums and self.space == "x0")) + self.history + self.outputs) * self._other(dtype).itemsize
        return prod(self.shape) * (read + (update if self.outputs else dtype.itemsize))


def _case(name: str, call: _Guide, loads: int = 0, **budgets: int) -> Case:
    """``loads``: instructions of the second launch for the sums, by default three of a link."""
    loads = loads or 3 * (call.predictions - 1)
    narrow = {
        "guide_sums_kernel": (1, "a chunk's sums"),
        "guide_kernel": (loads, "the sums of a frame's chunks, one for each lane of a warp"),
    }
    return Case(
        name, "guidance.kernel", call, call.minimum, launches=1 if call.apg is None else 2,
        narrow=narrow if call.apg else {}, **budgets,
    )  # fmt: skip


# Predictions in bf16 and all else in float32: eight values per thread are one load of these and two of those, but only
# four go into one store, so that values change threads between, through shared memory.
CASES = [
    _case("guide", _Guide()),
    _case("guide at 480p", _Guide(shape=SMALL)),
    # Every program adds up 256 chunks, by all of its threads: two of them for each, or one on AMD's.
    _case("guide over all frames", _Guide(apg="global", space="velocity"), loads=24, barriers=20),
    _case("guide with momentum", _Guide(momentum=True, outputs=1, history=0), barriers=16),
    _case("guide of eight predictions", _Guide(predictions=8, narrow=True, outputs=1), registers=176, barriers=10),
    _case("guide without projection", _Guide(apg=None, space="velocity", outputs=1, history=0)),
    _case("guide to a velocity", _Guide(apg=None, space="velocity", predictions=2, outputs=0, history=0)),
]


def _broken(name: str, old: str, new: str, caught_by: str, case: str | None = None) -> Broken:
    return Broken(name, "guidance.kernel", old, new, caught_by, case)


_LOAD = "tl.load(pointers[number] + frame * rows[number] + at, there, 0.0)"
_LATENT = "latent = tl.load(inputs.latent + frame * inputs.latent_row + at, there, 0.0)"
_IN_SUMS = f"        if IN_X0:\n            {_LATENT}"
_PROGRAM = "    frame, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)\n"
_NARROW = "    frame, chunk = tl.program_id(0), tl.program_id(1)\n"
_FRAMES = "    frames, chunks = tl.num_programs(0).to(tl.int64), tl.num_programs(1)"
_STORE_SUMS = "tl.store(partials_ptr + where, totals, number < 3 * len(LINKS))"
_VELOCITY = "v.to(outputs[0].dtype.element_ty), there)"
_OUTPUT = "total.to(outputs[number].dtype.element_ty), there)"

BROKEN = [
    _broken("wrong stride of predictions and history", _LOAD, _LOAD.replace("rows[number]", "rows[0]"), "semantics"),
    _broken("wrong stride of the latent", _IN_SUMS, _IN_SUMS.replace("latent_row", "prediction_rows[0]"), "semantics"),
    _broken("loads beyond a frame", _LOAD, _LOAD.replace(", there, 0.0", ""), "semantics"),
    _broken("no halves of a difference", "d = onto - ps[old]", "d = onto", "semantics"),
    _broken("a link the wrong way round", "d = onto - ps[old]", "d = ps[old] - onto", "semantics"),
    _broken("projects on the velocity in x0 space", "onto = latent - sigma * onto", "onto = onto", "semantics"),
    # sums
    _broken("sums: int32 offset", _PROGRAM + _FRAMES, _NARROW + _FRAMES, "lint", "guide"),
    _broken("sums: in no fixed order", _STORE_SUMS, _STORE_SUMS.replace("store", "atomic_add"), "atomics", "guide"),
    _broken("sums: in float64", "zeros((TILE // LANES,), tl.float32)", "zeros((TILE // LANES,), tl.float64)", "fp64",
            "guide"),
    _broken("sums: one reduction each", "totals = tl.sum(_stacked(sums), 0)\n",
            "totals = tl.zeros((triton.next_power_of_2(3 * len(LINKS)),), tl.float32)\n"
            "    for link in tl.static_range(3 * len(LINKS)):\n"
            "        totals = tl.where(tl.arange(0, totals.shape[0]) == link, tl.sum(sums[link]), totals)\n",
            "barriers", "guide"),
    _broken("sums: of the last tile only", "sums[3 * link] + tl.sum(d * d, 1)", "tl.sum(d * d, 1)", "semantics"),
    _broken("sums: of another link", "number < 3 * len(LINKS))", "number < 3 * len(LINKS) - 1)", "semantics"),
    _broken("sums: missing mask of the buffer", "tl.store(carried_ptr, d, there)", "tl.store(carried_ptr, d)",
            "semantics"),
    _broken("sums: the buffer stays as it was", "tl.store(carried_ptr, d, there)", "pass", "semantics"),
    _broken("sums: a spilling tile", "size, call.links, call.in_x0, *call.shape(), num_warps",
            "size, call.links, call.in_x0, 16 * TILE, call.shape()[1], num_warps", "spills", "guide"),
    # outputs
    _broken("outputs: int32 offset", _PROGRAM + "    frames = tl", _NARROW + "    frames = tl", "lint", "guide"),
    _broken("outputs: missing mask of the velocity", _VELOCITY, _VELOCITY.replace(", there", ""), "semantics"),
    _broken("outputs: missing mask of an update", _OUTPUT, _OUTPUT.replace(", there", ""), "semantics"),
    _broken("outputs: another frame's sums", '(frame * parts if FORM == "frame" else 0)', "0", "semantics"),
    _broken("outputs: chunks forgotten", "FEW_CHUNKS if parts <= FEW_CHUNKS else MANY_CHUNKS", "FEW_CHUNKS",
            "semantics"),
    _broken("outputs: missing floor of the norm", "tl.maximum(size, FRAME_FLOOR)", "size", "semantics"),
    _broken("outputs: missing addend of the squared norm", "size + GLOBAL_EPS", "size", "semantics"),
    _broken("outputs: clips to a threshold of zero", "(threshold > 0) & (norm > threshold)", "norm > threshold",
            "semantics"),
    _broken("outputs: enlarges what is below the threshold", "(threshold > 0) & (norm > threshold)", "threshold > 0",
            "semantics"),
    _broken("outputs: parallel part unclipped", "(eta - 1.0) * weight *", "(eta - 1.0) * share *", "semantics"),
    _broken("outputs: a spilling tile", "MANY_CHUNKS, *call.shape(), num_warps",
            "MANY_CHUNKS, 16 * TILE, call.shape()[1], num_warps", "spills", "guide without projection"),
    _broken("outputs: two values at a time", "16 // min(x.element_size() for x in every)", "2", "widths", "guide"),
    _broken("outputs: idle lanes", "TILE = 1024", "TILE = 1 << 14", "traffic", "guide"),
    _broken("sums where none are needed", "partials = None if call.form is None else partial_sums(call)",
            "partials = partial_sums(call)", "launches", "guide without projection"),
]  # fmt: skip
