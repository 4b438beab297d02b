"""``bernini train RECIPE [key=value ...]``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_options import positive
from .cli_ranks import options, sizes, together
from .cli_screen import quiet_libraries, say
from .errors import UserError

if TYPE_CHECKING:
    from .parallel.mesh import Mesh
    from .training.recipe import Recipe
    from .training.trainer import Progress


def add(commands: Any) -> None:
    """The command's options."""
    train = commands.add_parser(
        "train", help="train a stage by a recipe",
        description="Trains by a recipe: a TOML file, or the name of one that ships with the package. A run that was "
        "stopped goes on from its last checkpoint; at the end the model is written to OUTPUT/model. Several processes "
        "train together under torchrun: torchrun --nproc-per-node 8 -m bernini train RECIPE.",
    )  # fmt: skip
    train.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a file or a name; without one, the names are listed"
    )
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.lr=1e-4 output=runs/a")
    train.add_argument("--minutes", type=positive, metavar="N", help="save and stop after so many minutes")
    train.add_argument("--rehearse", action="store_true",
                       help="one step without its memory: does it build, and what does it take")  # fmt: skip
    train.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    train.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .training import recipe as recipes

    if args.recipe is None:
        print("recipes: " + ", ".join(recipes.shipped()))
        return 0
    chosen = recipes.load(args.recipe, args.overrides)
    if args.rehearse:
        return _rehearse(chosen)
    agree = {"option": options(args), "recipe": chosen.to_dict(), "model": lambda: sizes(Path(chosen.model))}
    with together(args.device, sequence=chosen.sequence, agree=agree) as mesh:
        return _train(args, chosen, mesh)


def _train(args: argparse.Namespace, chosen: Recipe, mesh: Mesh) -> int:
    _check_tensorboard()
    quiet_libraries()
    from .parallel.patience import patiently
    from .training.stages import make_stage
    from .training.trainer import MODEL, Trainer

    # Of several processes each opens the models in its host's memory, and takes its part from there.
    place = args.device if mesh.alone else "cpu"
    stage = patiently(mesh.world, lambda: make_stage(chosen, place, mesh))
    counts = {
        part: sum(p.numel() for p in module.parameters() if p.requires_grad) for part, module in stage.parts.items()
    }
    with _screen(chosen.log_every) as report:
        trainer = Trainer(chosen, stage, mesh=mesh, report=report, note=say)
        trained = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in counts.items())
        ranks = "" if mesh.alone else f", {mesh.world.size} processes"
        say(f"stage {chosen.stage}: training {trained} parameters, {chosen.steps} steps{ranks}")
        until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
        done = trainer.train(until=until)
    if done:
        print(Path(chosen.output) / MODEL)
    else:
        say(f"stopped after step {trainer.step} of {chosen.steps}; the same command goes on from there")
    return 0


def _rehearse(chosen: Recipe) -> int:
    quiet_libraries()
    from .training.rehearsal import rehearse

    done = rehearse(chosen)
    print(done.describe())
    say(f"rehearsed in {done.seconds:.0f} s; nothing was read, trained or written")
    return 0


def _check_tensorboard() -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UserError("training writes TensorBoard logs: pip install 'bernini[train]'") from None


@contextmanager
def _screen(every: int) -> Iterator[Callable[[Progress], None]]:
    """A bar with the loss, tokens per second and time left; lines instead of it where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    spent = {"tokens": 0.0, "seconds": 0.0, "steps": 0.0}

    def line(done: Progress) -> str:
        rate = spent["tokens"] / spent["seconds"]
        left = (done.steps - done.step) * spent["seconds"] / spent["steps"]
        losses = "  ".join(f"{name} {value:.4f}" for name, value in done.losses.items())
        return f"{losses}  {rate:,.0f} tokens/s  {_clock(left)} left"

    def count(done: Progress) -> None:
        for key, value in (("tokens", done.tokens), ("seconds", done.seconds), ("steps", 1)):
            spent[key] = 0.95 * spent[key] + value  # the last twenty steps or so

    if not console.is_terminal:

        def plain(done: Progress) -> None:
            count(done)
            if done.step % every == 0 or done.step == done.steps:
                say(f"step {done.step}/{done.steps}  {line(done)}")

        yield plain
        return
    with Bar(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console
    ) as bar:
        task = bar.add_task("", total=None)

        def report(done: Progress) -> None:
            count(done)
            bar.update(task, total=done.steps, completed=done.step, description=line(done))

        yield report


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
