"""What ``bernini estimate`` prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from ..errors import UserError
from ..training.dimensions import Dimensions
from ..training.recipe import Recipe
from ..training.standins import SIZE
from . import sample, search
from .ledger import CATEGORIES, Part
from .rates import Rates, Seconds, rates, seconds
from .step import Need, Settings, layers, track

GB = 1e9
UNCOUNTED = (
    "not counted: the allocator's gaps, workspaces inside of kernels, the buffers of NCCL and the driver's context"
)


# --- training ---------------------------------------------------------------------------------------------------------


def training(args: argparse.Namespace, recipe: Recipe, sizes: Dimensions, settings: Settings) -> str:
    """A few lines for people.

    Raises:
        UserError: a size or task that cannot be, or a sequence of which nothing fits.
    """
    given = rates(args.device, args.rates)
    work = work_of(args, sizes)
    if args.search:
        return _searched(args, recipe, sizes, settings, work, given)
    measure = partial(track, recipe, sizes, settings)
    lines = []
    if args.longest:
        work = _longest(args, recipe, sizes, measure)
        lines.append(
            f"longest     {_sequence(sizes, work)} fits {args.memory / GB:.1f} GB; one more latent frame does not"
        )
    found = measure(work)
    lines += [
        f"trains      {found.parameters / 1e9:.3f} B parameters",
        f"sample      {_sequence(sizes, work)}: {_tokens(found)}",
        f"settings    {described(settings)}",
        *bytes_lines(found, layers(sizes)),
        UNCOUNTED,
        seconds_line(args.device, seconds(sizes, settings, found, given)),
    ]
    return "\n".join(lines)


def work_of(args: argparse.Namespace, sizes: Dimensions) -> sample.Work:
    """The sample that the options ask for."""
    size = args.size or sizes.geometry.size or SIZE
    if args.tokens is not None:
        return sample.of_tokens(sizes, args.task, args.tokens, size)
    return sample.of_frames(sizes, args.task, args.frames or sizes.geometry.num_frames, size)


def _longest(args: argparse.Namespace, recipe: Recipe, sizes: Dimensions, measure: object) -> sample.Work:
    first = work_of(args, sizes)
    frame, videos = sample.frame_tokens(sizes, first.size), sample.kinds(args.task).count("video")
    if not videos:
        raise UserError(f"task {args.task!r} has no video that could be longer")
    reach = next(iter(sizes.experts.values())).rope_max_seq_len

    def sized(units: int) -> sample.Work:
        return sample.of_tokens(sizes, args.task, units * frame, first.size)

    def parts(units: int) -> list[int]:
        return [part.total for part in measure(sized(units)).parts]  # type: ignore[operator]

    least = len(first.latents)
    found = search.longest(
        parts, args.memory, first=sum(first.latents), least=least, most=least - videos + videos * reach
    )  # fmt: skip
    if found is None:
        most = max(parts(least))
        raise UserError(
            f"--memory {args.memory / GB:.1f}GB: not even one frame of each video fits: it takes {most / GB:.1f} GB; "
            "use more --ranks, or look for other settings with --search"
        )
    return sized(found)


def _searched(
    args: argparse.Namespace, recipe: Recipe, sizes: Dimensions, settings: Settings, work: sample.Work, given: Rates
) -> str:
    def measure(own: Settings) -> Need:
        return track(recipe, sizes, own, work)

    tried, best = search.search(sizes, settings, measure, given, args.memory, args.host_memory)
    rows = [f"{'settings':86} {'device':>9} {'host':>9} {'step':>9}"]
    for way in sorted(tried, key=lambda way: way.seconds.total):
        mark = "" if way.fits(args.memory, args.host_memory) else "  does not fit"
        device, host = way.need.most.total / GB, way.need.host / GB
        words = described(way.settings, ranks=False)
        rows.append(f"{words:86} {device:6.1f} GB {host:6.1f} GB {way.seconds.total:7.1f} s{mark}")
    head = f"sample      {_sequence(sizes, work)}: {_tokens(tried[0].need)}; {_ranks(settings)}"
    if best is None:
        least = min(tried, key=lambda way: way.need.most.total)
        amount = f"{least.need.most.total / GB:.1f} GB"
        end = f"nothing fits {args.memory / GB:.1f} GB; the least is {amount}: use more --ranks"
    else:
        end = f"choose      {options(best.settings)}\n            {best.need.most.total / GB:.1f} GB, tracked"
    return "\n".join([head, *rows, end, UNCOUNTED])


# --- lines ------------------------------------------------------------------------------------------------------------


def _sequence(sizes: Dimensions, work: sample.Work) -> str:
    stride = sizes.geometry.frame_stride
    frames = [(count - 1) * stride + 1 for count in work.latents]
    height, width = work.size
    return f"{work.task} of {height}x{width}, {' + '.join(map(str, frames))} frames"


def _tokens(found: Need) -> str:
    pairs = zip(found.tokens, ("renderer", "planner"), strict=True)
    return ", ".join(f"{count:,} tokens ({name})" for count, name in pairs if count)


def _ranks(settings: Settings) -> str:
    shared = f", {settings.sequence} share the sequence" if settings.sequence > 1 else ""
    return f"{settings.world} rank{'s' if settings.world > 1 else ''}{shared}"


def described(settings: Settings, *, ranks: bool = True) -> str:
    """Settings in words."""
    fsdp = {"blocks": "FSDP by blocks", "keep": "FSDP by blocks that stay", "whole": "FSDP of whole models",
            "none": "no FSDP"}[settings.fsdp]  # fmt: skip
    words = [fsdp, "recompute" if settings.recompute else "no recompute", f"offload {settings.offload}"]
    away = [name for name, here in (("average", settings.average), ("moments", settings.optimizer)) if not here]
    words += [f"{' and '.join(away)} on the host"] if away else []
    words += [] if settings.packer else ["no packer"]
    return ", ".join([_ranks(settings), *words] if ranks else words)


def options(settings: Settings) -> str:
    """Settings as options of this command."""
    place = {True: "device", False: "host"}
    recompute = "on" if settings.recompute else "off"
    return (
        f"--ranks {settings.world} --share {settings.sequence} --fsdp {settings.fsdp} --recompute {recompute} "
        f"--offload {settings.offload} --average {place[settings.average]} --optimizer {place[settings.optimizer]}"
    )


def bytes_lines(found: Need, counts: dict[str, int]) -> list[str]:
    """Bytes by category where the step takes most, and the most of each of its phases."""
    most = found.most
    lines = [f"at most     {most.total / GB:.2f} GB, {_where(most, counts)}"]
    lines += [f"  {kind:12} {most.bytes[kind] / GB:8.2f} GB" for kind in CATEGORIES if most.bytes[kind] >= 5e6]
    lines += [f"  {'on the host':12} {found.host / GB:8.2f} GB"] if found.host else []
    phases: dict[str, int] = {}
    for part in found.parts:
        name = " ".join(str(word) for word in part.name if isinstance(word, str))
        phases[name] = max(phases.get(name, 0), part.total)
    return [*lines, "phases      " + ", ".join(f"{name} {count / GB:.1f}" for name, count in phases.items()) + " GB"]


def _where(part: Part, counts: dict[str, int]) -> str:
    name: Sequence[str | int] = part.name
    if len(name) == 3:
        stack, number, way = name
        place = int(number) % counts[str(stack)] + 1
        return f"{way} of {stack} block {place} of {counts[str(stack)]}"
    single = {"before": "before the first block", "optimizer": "in the optimizer's step"}
    return single.get(
        str(name[0]), f"{name[0]}, {name[-1]} forward" if name[-1] == "after" else " ".join(map(str, name))
    )


def seconds_line(device: str, taken: Seconds) -> str:
    return (
        f"a step by the stated rates of {device}: {taken.total:.1f} s: compute {taken.compute:.1f}, exchange "
        f"{taken.exchange:.1f}, optimizer {taken.optimizer:.2f}; beside compute: gathering {taken.gathering:.1f}, "
        f"offload {taken.offload:.1f}"
    )


# --- generating -------------------------------------------------------------------------------------------------------


def generating(args: argparse.Namespace, sizes: Dimensions) -> str:
    """A few lines for people.

    Raises:
        UserError: a size or task that cannot be, or nothing that fits.
    """
    from .generate import Call, Taken, taken, vae_config

    size = args.size or sizes.geometry.size or SIZE
    work = work_of(args, sizes)
    vae = vae_config(args.model)
    stride = sizes.geometry.frame_stride
    frames = sizes.geometry.frame_count(args.frames or sizes.geometry.num_frames)
    known: dict[int, Taken] = {}

    def call(latents: int) -> list[int]:
        length = (latents - 1) * stride + 1
        known[latents] = taken(sizes, Call(args.task, length, size, args.ranks), vae)
        return list(known[latents].low_memory.values())

    latents, lines = (frames - 1) // stride + 1, []
    if args.longest:
        if "video" not in sample.kinds(args.task):
            raise UserError(f"task {args.task!r} has no video that could be longer")
        reach = next(iter(sizes.experts.values())).rope_max_seq_len
        found = search.longest(call, args.memory, first=latents, least=1, most=reach)
        if found is None:
            raise UserError(
                f"--memory {args.memory / GB:.1f}GB: not even one frame fits with --low-memory, which takes "
                f"{max(known[1].low_memory.values()) / GB:.1f} GB; bernini generate --memory streams weights"
            )
        latents = found
        lines.append(
            f"longest     {(latents - 1) * stride + 1} frames fit {args.memory / GB:.1f} GB with --low-memory; "
            f"{latents * stride + 1} do not"
        )
    if latents not in known:
        call(latents)
    one = known[latents]
    height, width = work.size
    lines += [
        f"sample      {args.task} of {height}x{width}, {(latents - 1) * stride + 1} frames: {one.tokens:,} tokens at "
        f"most, {args.ranks} rank{'s' if args.ranks > 1 else ''}",
        *(f"{part:12}{count / GB:8.2f} GB" for part, count in one.weights.items()),
        f"{'stage':12}{'beside':>11}{'resident':>11}{'--low-memory':>14}",
    ]
    for stage, beside in one.beside.items():
        resident, low = one.resident[stage] / GB, one.low_memory[stage] / GB
        lines.append(f"{stage:12}{beside / GB:8.2f} GB{resident:8.2f} GB{low:11.2f} GB")
    return "\n".join([*lines, UNCOUNTED, "bernini generate --memory chooses itself what stays and what is streamed"])
