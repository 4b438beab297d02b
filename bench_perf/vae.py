"""A Wan VAE against diffusers' own in one process, two processes against one, and what eight ranks would take.

Single process: the same modules, run by ``bernini.parallel.vae`` and by diffusers' ``AutoencoderKLWan``, in turns; the
outputs are compared first. Two processes have a core each and exchange over gloo; one process has one thread on one
core. Eight ranks are a timetable of the code's own steps (:mod:`.vae_cost`), with seconds per frame measured here and a
stated link; messages and bytes are counted on ``meta`` tensors and are the same on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bernini.parallel.group import Alone, Group
from bernini.parallel.vae import MOST, Part, TemporalVAE

from . import ranks
from .harness import Row, Timing, Watch, compare, judged, take_turns
from .moves import Absent, Counted
from .vae_cost import Event, Link, calibrate, in_step, makespan, seconds, timetable

GB = 1e9
BASE = 32
"""Width of the timed VAE; the released one has 96. Everything else is as released."""
SIZE = (9, 80, 128)
"""Frames, height and width that are timed in one process."""
SHARED_BASE, SHARED = 64, (17, 64, 80)
"""The same for two processes, which exchange the less beside what they compute, the wider it is."""
REAL = (21, 480, 832)
"""Latent frames, height and width of the timetable and of what is counted."""
PICTURE = f"{REAL[1]} x {REAL[2]}"
RANKS = 8
TURNS = 5


def released(base: int = 96, device: str = "cpu") -> Any:
    """A VAE of the released form with random weights."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    with torch.device(device):
        return AutoencoderKLWan(base_dim=base).eval().requires_grad_(False)


def inputs(job: str, frames: int, height: int, width: int, device: str = "cpu") -> Tensor:
    """Pixels ``[1, 3, F, H, W]``, or a latent ``[1, 16, T, h, w]`` of so many frames."""
    draw = torch.Generator().manual_seed(1)
    if job == "encode":
        shape = (1, 3, frames, height, width)
    else:
        shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    return torch.empty(shape, device=device) if device == "meta" else torch.randn(shape, generator=draw)


def run_of(vae: TemporalVAE, job: str, x: Tensor) -> list[Part]:
    return list(vae.decode(x) if job == "decode" else vae.encode(lambda a, b: x[:, :, a:b], x.shape[2]))


def ours(vae: TemporalVAE, job: str, x: Tensor) -> Tensor:
    """The whole result in one process, as diffusers gives it."""
    y = torch.cat([part.own for part in run_of(vae, job, x)], 2)
    return y.clamp_(-1, 1) if job == "decode" else y


def theirs(model: Any, job: str, x: Tensor) -> Tensor:
    return model.decode(x).sample if job == "decode" else model.encode(x).latent_dist.parameters


def alike(one: Tensor, other: Tensor) -> float:
    """The largest difference, of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


# --- one process ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def single() -> list[Row]:
    model, rows = released(BASE), []
    for job in ("encode", "decode"):
        x = inputs(job, *SIZE)
        vae, exact = TemporalVAE(model), TemporalVAE(model, exact=True)
        peer = partial(theirs, model, job, x)
        apart, same = alike(ours(vae, job, x), peer()), torch.equal(ours(exact, job, x), peer())
        if apart > 1e-4 or not same:
            raise RuntimeError(f"{job}: differs by {apart:.1e} of the largest value, exact form equal: {same}")
        case: dict[str, Any] = {"shape": f"{'x'.join(map(str, SIZE))}, width {BASE}", "dtype": "float32", "unit": "s"}
        rows.append(
            compare(
                f"{job} in one process", partial(ours, vae, job, x), peer, bar=1.1, budget=20,
                peer_name="diffusers", note=f"differs by {apart:.1e} of the largest value", **case,
            )
        )  # fmt: skip
    return rows


# --- two processes ----------------------------------------------------------------------------------------------------


def rank(group: Group) -> dict[str, Any]:
    """What each of the processes does; the first also runs alone."""
    model, found = released(SHARED_BASE), {}
    with torch.no_grad():
        for job in ("encode", "decode"):
            x = inputs(job, *SHARED)

            def parted(job: str = job, x: Tensor = x) -> list[Part]:
                return run_of(TemporalVAE(model, group), job, x)

            def whole(job: str = job, x: Tensor = x) -> list[Part]:
                return run_of(TemporalVAE(model, Alone()), job, x) if group.rank == 0 else []

            _check(parted(), run_of(TemporalVAE(model), job, x), group.rank)
            both = [partial(ranks.together, call, to_the_end=True) for call in (parted, whole)]
            found[job] = [asdict(timing) for timing in take_turns(both, (TURNS, TURNS), 0)]
    return found


def _check(parts: Iterable[Part], serial: Iterable[Part], rank: int) -> None:
    whole = torch.cat([part.own for part in serial], 2)
    for part in parts:
        if not torch.equal(part.own, whole[:, :, part.cut[rank] : part.cut[rank + 1]]):
            raise RuntimeError("two processes get something else than one")


def two() -> list[Row]:
    times, unfit = ranks.ask(__spec__.name)
    rows = []
    for job, found in times.items():
        both, alone = (Timing(**timing) for timing in found)
        rows.append(
            judged(
                f"{job} by two processes", both.median, alone.median, unit="s", dtype="float32", bar=1.7,
                unfit=unfit, shape=f"{'x'.join(map(str, SHARED))}, width {SHARED_BASE}",
                note=f"peer: one process, one thread, one core; the same bits; min..p80 {both.spread('s')} against "
                f"{alone.spread('s')} s",
            )
        )  # fmt: skip
    return rows


# --- eight ranks ------------------------------------------------------------------------------------------------------


def real(job: str) -> tuple[Any, Tensor]:
    """The released VAE at the real size, on ``meta``."""
    latents, height, width = REAL
    return released(device="meta"), inputs(job, 4 * (latents - 1) + 1, height, width, "meta")


def eight() -> list[Row]:
    small, rows = released(BASE), []
    frames, height, width = SIZE
    area = REAL[1] * REAL[2] / (height * width)
    for job in ("decode", "encode"):
        with Watch() as watch:
            each = calibrate(small, job, inputs(job, frames, height, width), 2)
        cost = {key: found * area for key, found in each.items()}
        model, x = real(job)
        tables, serial = timetable(model, job, x, RANKS, MOST), timetable(model, job, x, 1, 1)[0]
        alone, link = seconds(serial, cost), Link()
        faster = {key: found / 1000 for key, found in cost.items()}
        note = (
            f"timetable; link {link.rate / GB:.0f} GB/s, {link.latency * 1e6:.0f} us; bound (the busiest rank's "
            f"computing) {alone / max(seconds(table, cost) for table in tables):.2f}; whole frames, layer by layer in "
            f"step, nothing sent {alone / in_step(tables, cost):.2f}; with ranks 1000 times as fast "
            f"{_speedup(serial, tables, faster):.2f}"
        )
        rows.append(
            judged(
                f"{job} by 8 ranks", _speedup(serial, tables, cost), 1.0, unit="x", higher_is_better=True, bar=7.0,
                shape=f"{REAL[0]} latents of {PICTURE}", dtype="float32", unfit=watch.unfit, note=note,
            )
        )  # fmt: skip
        rows += counted(job)
    return rows


def _speedup(serial: list[Event], tables: list[list[Event]], cost: dict[tuple[str, str], float]) -> float:
    return seconds(serial, cost) / makespan(tables, cost, Link())


def halos(job: str, model: Any, x: Tensor) -> list[int]:
    """Bytes that each convolution over time must have from other ranks, by what diffusers runs: two frames for each
    rank but the first, or one where every other frame is made.
    """
    seen: dict[str, int] = {}

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def see(module: Any, args: Any, out: Any) -> None:
            given = args[0]
            frames = 2 if module.stride[0] == 1 else 1
            seen[name] = (RANKS - 1) * frames * given[:, :, 0].numel() * given.itemsize

        return see

    modules = [
        (name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Conv3d) and m.kernel_size[0] > 1
    ]
    hooks = [module.register_forward_hook(hook(name)) for name, module in modules]
    theirs(model, job, x[:, :, : 9 if job == "encode" else 3])
    for handle in hooks:
        handle.remove()
    return list(seen.values())


@torch.no_grad()
def counted(job: str) -> list[Row]:
    """Bytes and messages of all ranks together, and of a rank at most."""
    model, x = real(job)
    groups = [Counted(Absent(rank, RANKS)) for rank in range(RANKS)]
    for group in groups:
        run_of(TemporalVAE(model, group), job, x)
    sent = sum(exchange.sent for group in groups for exchange in group.exchanges)
    messages = sum(exchange.messages for group in groups for exchange in group.exchanges)
    asked = sum(len(group.others) for group in groups)
    least = halos(job, model, x)
    case: dict[str, Any] = {"shape": f"{REAL[0]} latents of {PICTURE}, {RANKS} ranks", "dtype": "float32"}
    note = f"peer: the halos alone, by diffusers' own shapes; {1 - sum(least) / sent:.2%} are frames that are cut anew"
    return [
        judged(f"{job}: sent", sent / GB, sum(least) / GB, unit="GB", bar=0.95, note=note, **case),
        judged(
            f"{job}: messages", messages, (RANKS - 1) * len(least), unit="messages", bar=0.9, **case,
            note=f"peer: one per convolution and border; {asked} other questions to the group",
        ),
    ]  # fmt: skip


def run() -> list[Row]:
    if "MALLOC_MMAP_MAX_" not in os.environ:  # the run with the default malloc, which nothing judges
        return single()
    # First: once this process has computed, its idle threads spin (OMP_WAIT_POLICY) on a core that a rank has.
    return [*two(), *single(), *eight()]


if __name__ == "__main__":
    ranks.answer(rank, own_core=True)
