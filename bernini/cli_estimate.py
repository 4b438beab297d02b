"""``bernini estimate RECIPE [key=value ...]`` and ``bernini estimate --model DIR``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .cli_options import count, memory, size
from .cli_screen import quiet_libraries
from .errors import UserError

if TYPE_CHECKING:
    from .estimate.step import Settings

ON = {"on": True, "off": False}
PLACES = {"device": True, "host": False}


def add(commands: Any) -> None:
    """The command's options."""
    estimate = commands.add_parser(
        "estimate", help="tell what a training step or a generated video takes, and the longest that fits",
        description="Builds a recipe's models without values, runs one step of one rank under torch's memory tracker, "
        "and prints its bytes and, by stated rates, its seconds. With --model instead of a recipe: what generating "
        "takes. Nothing is read but configs, and no GPU is needed. 1 GB is 10^9 bytes.",
    )  # fmt: skip
    estimate.add_argument("recipe", nargs="?", metavar="RECIPE", help="a file or a name, as for train")
    estimate.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, as for train")
    group = estimate.add_argument_group("what is computed")
    group.add_argument("--model", metavar="DIR", help="without a recipe: the checkpoint, or a released one's name")
    group.add_argument("--task", default="v2v", metavar="TASK", help="of the one sample (default: v2v)")
    group.add_argument("--tokens", type=count, metavar="N", help="of the renderer's packed sequence, at most")
    group.add_argument("--frames", type=count, metavar="N", help="of every video (default: the checkpoint's)")
    group.add_argument("--size", type=size, metavar="HxW", help="of all pictures (default: the checkpoint's, 480x848)")
    group = estimate.add_argument_group("ranks and memories")
    group.add_argument("--ranks", type=count, default=1, metavar="N", help="processes (default: 1)")
    group.add_argument("--share", type=count, metavar="N",
                       help="of them, those that share a sequence (default: the recipe's, or all)")  # fmt: skip
    group.add_argument("--fsdp", choices=["blocks", "keep", "whole", "none"], default="blocks",
                       help="what is gathered at a time: blocks, as train does; blocks that stay until backward; whole "
                       "models; none: every rank has everything (default: blocks)")  # fmt: skip
    group.add_argument("--recompute", choices=list(ON), help="activation checkpointing (default: the recipe's)")
    group.add_argument("--offload", choices=["none", "hidden", "hidden+attention", "all"],
                       help="saved tensors that go to the host (default: the recipe's)")  # fmt: skip
    group.add_argument("--average", choices=list(PLACES), default="device", help="where the averaged weights are")
    group.add_argument("--optimizer", choices=list(PLACES), default="device", help="where the moments are")
    group.add_argument("--packer", choices=list(ON), default="on",
                       help="off: every rank embeds the whole sequence and keeps its part")  # fmt: skip
    group = estimate.add_argument_group("what is asked")
    group.add_argument("--memory", type=memory, default=80 * 10**9, metavar="SIZE", help="of a rank (default: 80GB)")
    group.add_argument("--host-memory", type=memory, metavar="SIZE", help="of a rank, for what is offloaded")
    group.add_argument("--longest", action="store_true", help="the longest sequence that fits")
    group.add_argument("--search", action="store_true", help="the settings that fit, and the fastest of them")
    group.add_argument("--device", default="h100", metavar="NAME", help="whose rates are taken (default: h100)")
    group.add_argument("--rates", metavar="NAME=N,...", help="other ones: flops, memory, link, peers, network")
    estimate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if (args.recipe is None) == (args.model is None):
        raise UserError("name a recipe, or a checkpoint with --model, and not both; recipes: bernini train")
    if args.tokens is not None and args.frames is not None:
        raise UserError("--tokens and --frames say the same; give one of them")
    if args.longest and args.search:
        raise UserError("--longest takes settings and --search finds them; give one of the two")
    quiet_libraries()
    from .estimate import report
    from .training.dimensions import dimensions

    if args.model is not None:
        _refuse_training(args)
        sizes = dimensions(args.model)
        share = args.ranks if args.share is None else args.share
        if share != args.ranks:
            raise UserError("generating, all ranks share the sequence: leave out --share")
        print(report.generating(args, sizes))
        return 0
    from .training import recipe as recipes

    chosen = recipes.load(args.recipe, args.overrides)
    if chosen.stage in ("vae", "understanding"):
        raise UserError(f"stage {chosen.stage!r} is not estimated: it reads pixels, and these are not made up here")
    print(report.training(args, chosen, dimensions(chosen.model), _settings(args, chosen)))
    return 0


def _settings(args: argparse.Namespace, recipe: Any) -> Settings:
    from .estimate.step import Settings

    share = recipe.sequence if args.share is None else args.share
    if args.ranks % share:
        raise UserError(f"--ranks {args.ranks}: no multiple of the {share} that share a sequence (--share)")
    recompute = recipe.recompute if args.recompute is None else ON[args.recompute]
    offload = args.offload or recipe.offload.policy
    if offload in ("hidden", "hidden+attention") and not recompute:
        raise UserError(
            f"--offload {offload} keeps what blocks begin with, and the rest is computed again: add --recompute on"
        )
    if offload == "all":
        if args.recompute == "on":
            raise UserError("--offload all keeps everything, so nothing is computed again: leave out --recompute on")
        recompute = False
    if args.optimizer == "host" and recipe.optimizer.name != "adamw":
        raise UserError("--optimizer host is known of adamw alone")
    return Settings(
        args.ranks, share, args.fsdp if args.ranks > 1 else "none", recompute, offload,
        average=PLACES[args.average], optimizer=PLACES[args.optimizer], packer=ON[args.packer],
    )  # fmt: skip


def _refuse_training(args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: options that only a recipe has.
    """
    used = [
        name for name, default in (("recompute", None), ("offload", None), ("average", "device"),
                                   ("optimizer", "device"), ("packer", "on"), ("fsdp", "blocks"), ("tokens", None),
                                   ("search", False), ("host_memory", None))
        if getattr(args, name) != default
    ]  # fmt: skip
    if used:
        raise UserError(f"--{used[0].replace('_', '-')} belongs to a recipe, not to --model")
