"""Options as people type them: spellings, numbers, sizes, and where a model is to run.

Importing this loads no heavy library, so that ``--help`` and a mistyped option are answered at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import cases
from .errors import UserError
from .presets import PRESETS, TASKS

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; the usage of some forty options would bury it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        # All of several processes were given the same; the first of them says what is wrong with it.
        silent = os.environ.get("RANK", "0") != "0"
        self.exit(2, "" if silent else f"{self.prog}: error: {message}\n")

    def options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def dashed(argv: Sequence[str]) -> list[str]:
    """Options as spelled here from options as the public release spells them: ``--num_frames`` -> ``--num-frames``."""
    words: list[str] = []
    for place, word in enumerate(argv):
        if word == "--":
            return [*words, *argv[place:]]
        option, equals, value = word.partition("=")
        words.append(option.replace("_", "-") + equals + value if option.startswith("--") else word)
    return words


def parse(parser: Parser, commands: dict[str, Parser], argv: Sequence[str]) -> argparse.Namespace:
    """Parses, and names the nearest option where one is unknown."""
    args, unknown = parser.parse_known_args(dashed(argv))
    if unknown:
        command = commands[args.command]
        option = unknown[0].partition("=")[0]
        command.error(f"unknown option {option!r}{cases.nearest(option, command.options())}")
    return args


# --- types of values ------------------------------------------------------------------------------------------------


def _typed(read: Callable[[str], Any], kind: str, check: Callable[[Any], Any]) -> Callable[[str], Any]:
    """An argparse type: ``read`` makes a value of the text, ``check`` is the one that case files use."""

    def convert(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {kind}") from None
        try:
            return check(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


count = _typed(int, "whole number", cases.count)
seed = _typed(int, "whole number", cases.seed)
number = _typed(float, "number", cases.number)
rate = _typed(float, "number", cases.rate)
positive = _typed(float, "number", cases.positive)


def memory(text: str) -> int:
    from .memory.amounts import memory_size

    try:
        return memory_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 7 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HxW, e.g. 480x848")
    height, width = (int(part) for part in parts)
    return height, width


# --- the options of `generate` --------------------------------------------------------------------------------------

REQUEST = (
    "prompt", "videos", "images", "task", "mode", "preset", "negative_prompt", "steps", "seed", "size", "height",
    "width", "num_frames", "fps", "max_size", "source_order", "omega_vid", "omega_img", "omega_txt", "omega_tgt",
    "switch_factor", "eta", "thresholds", "momentum", "flow_shift", "solver", "sigma_schedule",
    "planning_steps", "decoder_steps", "vit_txt_cfg", "vit_img_cfg", "plan_parity", "plan",
)  # fmt: skip
"""Those that say what is to be made: fields of :class:`bernini.request.Request`, ``None`` where not given."""


def add_generate(parser: Parser) -> None:
    parser.usage = "bernini generate [--model DIR] [--prompt TEXT] [--video FILE] [--image FILE] --output FILE [...]"
    parser.description = (
        "Makes or edits a video or an image. The task follows from the inputs (a picture as output asks for an image) "
        "unless --task names it; settings come from the task's preset unless given. Underscores do as well as dashes."
    )
    group = parser.add_argument_group("what to make")
    group.add_argument("--prompt", metavar="TEXT", help="what to make, or what to change")
    group.add_argument("--video", dest="videos", action="extend", nargs="+", type=Path, metavar="FILE",
                       help="source video; may be repeated")  # fmt: skip
    group.add_argument("--image", "--images", dest="images", action="extend", nargs="+", type=Path, metavar="FILE",
                       help="source image or reference; several, or repeated")  # fmt: skip
    group.add_argument("--task", "--task-type", dest="task", metavar="TASK", help=f"one of {', '.join(TASKS)}")
    group.add_argument("--neg-prompt", "--negative-prompt", dest="negative_prompt", metavar="TEXT",
                       help="what to avoid (default: the released text)")  # fmt: skip
    lists = group.add_mutually_exclusive_group()
    lists.add_argument("--case", type=Path, metavar="FILE.json", help="a case file; options given here override it")
    lists.add_argument("--inputs", type=Path, metavar="LIST", help="many cases: a .json list, or .jsonl")
    group.add_argument("--case-root", type=Path, metavar="DIR",
                       help=f"where the sources are that public cases name {cases.PUBLIC_ROOT}/...")  # fmt: skip

    group = parser.add_argument_group("result")
    group.add_argument("--output", type=Path, metavar="FILE",
                       help=".mp4 .mov .mkv .gif; one frame: .png .jpg .webp too; --inputs: a folder")  # fmt: skip
    group.add_argument("--frames-dir", type=Path, metavar="DIR", help="a new folder for the frames as numbered PNGs")
    group.add_argument("--size", type=size, metavar="HxW",
                       help="pixels, multiples of the checkpoint's stride, 16 as released (default: the source's, or "
                            "the checkpoint's or preset's)")  # fmt: skip
    group.add_argument("--height", type=count, metavar="H", help="with --width: the same as --size")
    group.add_argument("--width", type=count, metavar="W", help="with --height: the same as --size")
    group.add_argument("--num-frames", type=count, metavar="N",
                       help="at most so many, as 4n + 1 (default: the checkpoint's, released ones 81)")  # fmt: skip
    group.add_argument("--fps", type=rate, metavar="F",
                       help="frames per second (default: the checkpoint's, released ones 16)")  # fmt: skip
    group.add_argument("--max-size", "--max-image-size", dest="max_size", type=count, metavar="N",
                       help="longest edge of sources (default: the checkpoint's, released ones 848)")  # fmt: skip
    group.add_argument("--source-order", choices=["videos-first", "images-first"],
                       help="which sources get the lower segment ids (default: videos-first, as released)")  # fmt: skip

    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--preset",
        metavar="NAME",
        help=f"{', '.join(PRESETS)} (default: the checkpoint's, released ones bernini-r, or v2 with a planner)",
    )
    group.add_argument("--guidance-mode", dest="mode", metavar="MODE", help="which branches are guided, and how")
    group.add_argument("--steps", "--num-inference-steps", dest="steps", type=count, metavar="N", help="sampling steps")
    group.add_argument("--seed", type=seed, metavar="N", help="seed of the noise (default: 42)")
    for name, what in (("vid", "source video"), ("img", "images"), ("txt", "text"), ("tgt", "planned target")):
        group.add_argument(f"--omega-{name}", type=number, metavar="W", help=f"guidance scale of the {what}")
    group.add_argument("--omega-scale", dest="switch_factor", type=number, metavar="F",
                       help="factor on the scales for the low-noise expert")  # fmt: skip
    group.add_argument("--eta", type=number, metavar="E", help="projected guidance: what stays of the parallel part")
    group.add_argument("--norm-threshold", dest="thresholds", nargs="+", type=number, metavar="T",
                       help="projected guidance: 1 to 3 limits of the difference's norm")  # fmt: skip
    group.add_argument("--momentum", type=number, metavar="M", help="projected guidance: momentum")
    group.add_argument("--flow-shift", type=positive, metavar="S",
                       help="shift of the noise levels (default: the checkpoint's, released ones 5)")  # fmt: skip
    solvers = group.add_mutually_exclusive_group()
    solvers.add_argument("--solver", choices=["unipc", "euler"], help="(default: unipc)")
    solvers.add_argument("--use-unipc", dest="solver", action="store_const", const="unipc", help="--solver unipc")
    solvers.add_argument("--no-use-unipc", dest="solver", action="store_const", const="euler", help="--solver euler")
    group.add_argument("--sigma-schedule", choices=["release", "diffusers-0.42"],
                       help="noise levels as released or as newer diffusers has them (default: release)")  # fmt: skip

    group = parser.add_argument_group("planning (full checkpoints)")
    group.add_argument("--planning-steps", "--planning-step", dest="planning_steps", type=count, metavar="N",
                       help="refinement steps of the plan")  # fmt: skip
    group.add_argument("--decoder-steps", "--vit-denoising-step", dest="decoder_steps", type=count, metavar="N",
                       help="steps of the ViT-embedding decoder")  # fmt: skip
    group.add_argument("--vit-txt-cfg", type=number, metavar="W",
                       help="plan guidance: the sources (default: the checkpoint's, released ones 1.2)")  # fmt: skip
    group.add_argument("--vit-img-cfg", type=number, metavar="W",
                       help="plan guidance: the text (default: the checkpoint's, released ones 1.0)")  # fmt: skip
    group.add_argument("--plan-parity", action="store_const", const=True, default=None,
                       help="plan with the released loop's quirks and random numbers")  # fmt: skip
    group.add_argument("--plan", type=Path, metavar="FILE", help="render this plan instead of making one")
    group.add_argument("--plan-out", type=Path, metavar="FILE", help="save the plan, for --plan")
    group.add_argument("--plan-image", type=Path, metavar="FILE.png", help="draw the plan beside the sources")

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="DIR", help="checkpoint folder, or owner/name on the hub (default: the shipped toy)"
    )
    group.add_argument("--components", metavar="DIR", help="where vae, text_encoder and tokenizer are, if elsewhere")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    group.add_argument("--dtype", choices=DTYPES, help="(default: bfloat16 on a GPU, float32 on a CPU)")
    group.add_argument("--attention", default="auto", metavar="NAME", help="attention backend (default: auto)")
    memories = group.add_mutually_exclusive_group()
    memories.add_argument("--low-memory", action="store_true", help="keep one expert in memory at a time")
    memories.add_argument("--memory", type=memory, metavar="SIZE",
                          help="weights and all that is computed take at most so much, e.g. 12GiB: parts are loaded "
                          "when needed or streamed; the result is the same")  # fmt: skip
    group.add_argument("--vae-tiling", action="store_true",
                       help="the VAE works on tiles: less memory for large frames, another result")  # fmt: skip
    group.add_argument("--share-from", type=count, metavar="N",
                       help="of processes, the tokens from which on they share a sequence (default: 4096)")  # fmt: skip
    group.add_argument("--swap", choices=["auto", "packed", "async", "chunk"], default="auto",
                       help="of processes that share a sequence, how they send each other heads: all at once (packed), "
                       "beside the projections (async), beside attention too (chunk), or what measures fastest (auto); "
                       "the result is the same")  # fmt: skip
    group.add_argument("--branches", choices=["auto", "off"], default="auto",
                       help="of processes: each may have other branches of guidance where that is faster, which may "
                       "take more memory (auto), or all share every branch (off; default: auto)")  # fmt: skip


def request_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of :data:`REQUEST`.

    Raises:
        UserError: options that exclude or need each other.
    """
    given = {name: getattr(args, name) for name in REQUEST if getattr(args, name) is not None}
    if "size" in given and {"height", "width"} & set(given):
        raise UserError("--size and --height/--width say the same; give one of them")
    try:
        if "thresholds" in given:
            given["thresholds"] = cases.thresholds(given["thresholds"])
    except ValueError as error:
        raise UserError(f"--norm-threshold: {error}") from None
    return cases.sized(given, "options")


# --- where a model runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Device, number type and attention backend of a run, all known to work on this machine."""

    device: str
    dtype: torch.dtype
    attention: str

    def describe(self) -> str:
        """What runs there: device, number type, attention backend, and the implementation of each public kernel."""
        from bernini import kernels

        homes: dict[str, list[str]] = {}
        for op, name in kernels.which(None, self.device, self.dtype).items():
            if op in kernels.__all__ and op != "interval_attention":  # which is the planner's
                homes.setdefault(name, []).append(op)
        listed = ", ".join(f"{name} ({', '.join(ops)})" for name, ops in homes.items())
        return f"{self.device} {str(self.dtype).removeprefix('torch.')}, attention {self.attention}, kernels {listed}"


def place(device: str | None, dtype: str | None, attention: str) -> Place:
    """Checks what was asked for, before anything is loaded.

    Raises:
        UserError: a device, backend or forced implementation that is unknown or not to be had here.
    """
    import torch

    from bernini.kernels import which
    from bernini.kernels.attention import backends

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = check_device(device)
    kind = getattr(torch, dtype or ("float32" if where.type == "cpu" else "bfloat16"))
    try:
        which(None, where, kind)
        chosen = backends.pick(attention, where, kind)
    except ValueError as error:
        raise UserError(str(error)) from None
    return Place(device, kind, chosen.name)


def check_device(name: str) -> torch.device:
    """
    Raises:
        UserError: no such device, here or at all.
    """
    import torch

    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UserError(f"unknown device {name!r}; there are cpu, cuda and cuda:0, cuda:1, ...")
    if device.type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            raise UserError(f"device {name}: this PyTorch ({torch.__version__}) is built for the CPU only")
        if not torch.cuda.is_available():
            raise UserError(f"device {name}: no GPU was found")
        if (device.index or 0) >= torch.cuda.device_count():
            have = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
            raise UserError(f"device {name}: there is no such GPU, only {have}")
    return device
