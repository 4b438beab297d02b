"""The loop: the same for every stage.

    batch k (a pure function of seed, k and recipe) -> losses -> gradients -> clip -> optimizer -> average -> files

Nothing random has a state: noise, masks and drops follow from the run's seed, the example and the step. So what a
checkpoint holds (weights, their average, the optimizer) is all there is, and a run that was killed goes on with the
bits of one that was not.

Of several processes each has its share of the examples and of the weights. Losses are divided by counts of the whole
step, gradients and losses are summed over all: what a step does is the same for any number of processes, but for
rounding. The first process writes and the others send it what it needs, a tensor at a time.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..data.skips import SkipLog
from ..errors import UserError
from ..parallel.checkpoints import Piece
from ..parallel.fsdp import clip, shard, sums, whole
from ..parallel.mesh import Mesh, alone
from ..parallel.patience import patiently
from . import checkpoints
from . import recipe as recipes
from .export import Writer
from .feed import ahead
from .logs import LOG as LOG
from .logs import logs
from .optim import SpreadMuon, factor, names_in, optimizers, set_rates
from .recipe import Recipe
from .stage import Micro, Stage
from .weights import DTYPES, Weights, wide_dtype

MODEL, SAMPLES = "model", "samples"
MAY_CHANGE = (
    "output", "save_every", "keep", "log_every", "samples_every", "sequence", "swap", "offload", "batch.balance",
    "batch.split", "batch.fit",
)  # fmt: skip
"""Keys of a recipe that may differ when a run goes on: none of them decides which examples a step has."""


@dataclass(frozen=True)
class Progress:
    """After a step.

    Args:
        step, steps: done, and in all.
        losses: means over the step, and ``"loss"``, their weighted sum.
        tokens, seconds: of the step; all of it is of all processes.
    """

    step: int
    steps: int
    losses: Mapping[str, float]
    grad_norm: float
    rate: float
    tokens: int
    seconds: float


class Trainer:
    """
    Args:
        recipe: of the run.
        stage: made for it and for the mesh.
        mesh: the processes that train together; this one alone by default.
        report: called after every step.
        note: called with a sentence where something is worth telling: a run that goes on, examples that were skipped.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        *,
        mesh: Mesh | None = None,
        report: Callable[[Progress], None] = lambda progress: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.recipe, self.stage, self._report, self._note = recipe, stage, report, note
        self.run, self.mesh = Path(recipe.output), mesh or alone()
        stage.batches.meet()
        self._compute = shard(
            self.mesh, stage.parts, stage.groups(), compute=DTYPES[recipe.precision], wide=wide_dtype(recipe.precision),
            keep_wide=stage.keep_wide,
        )  # fmt: skip
        self.weights = Weights(stage.parts, recipe.precision, ema=recipe.ema, keep_wide=stage.keep_wide)
        self.optimizers = optimizers(recipe.optimizer, self.weights, self.mesh.world)
        self.step = 0
        self.skipped = SkipLog()
        self._spent: list[float] = []  # seconds of each micro-batch of the last step
        self._saving: checkpoints.Saving | None = None

    # --- from here to there ---

    def train(self, *, until: float | None = None) -> bool:
        """Goes on from the last checkpoint to the end of the recipe.

        Args:
            until: a time of ``time.monotonic()`` at which to save and stop.

        Returns:
            Whether the end was reached; the model is exported then.

        Raises:
            UserError: a loss or gradient that is not finite, a checkpoint that cannot be written or is another run's.
        """
        self.resume()
        written = self.run if self.mesh.first else None
        with (
            ahead(self._micros) as micros,
            logs(written, self.step, every=self.recipe.log_every) as log,
            self._saved(),
        ):
            while self.step < self.recipe.steps:
                started = time.perf_counter()
                batch = micros(self.step)
                losses, norm = self._update(batch)
                rate = factor(self.recipe.optimizer, self.step, self.recipe.steps) * self.recipe.optimizer.lr
                self.step += 1
                tokens, late = self._agreed(batch, until)
                done = Progress(
                    self.step, self.recipe.steps, losses, norm, rate, tokens, time.perf_counter() - started
                )  # fmt: skip
                values = {**losses, "grad_norm": norm, "lr": rate}
                log(self.step, values, tokens, [key for micro in batch for key in micro.keys], done.seconds)
                self._report(done)
                self._count_skipped(batch)
                if self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps or late:
                    self.begin_save()
                if self.recipe.samples_every and self.step % self.recipe.samples_every == 0:
                    self.samples()
                if late and self.step < self.recipe.steps:
                    return False
        self.export(self.run / MODEL)
        if self.skipped.total:
            self._note(f"warning: {self.skipped}")
        return True

    def _micros(self, step: int) -> list[Micro]:
        return [self.stage.micro(step, number) for number in range(self.stage.batches.count(step))]

    def _update(self, batch: list[Micro]) -> tuple[dict[str, float], float]:
        """One optimizer step.

        Returns:
            the losses, and the norm of the gradient before it was clipped.
        """
        self.weights.forget()
        counts: Counter[str] = Counter()
        for micro in batch:
            counts.update(micro.counts)
        means: dict[str, float] = dict.fromkeys(counts, 0.0)
        self._spent = []
        for micro in batch:
            begun, total = time.perf_counter(), cast("Tensor | None", None)
            found = {name: loss / counts[name] for name, loss in self._compute(partial(self._losses, micro)).items()}
            for name, mean in zip(found, sums([self._value(mean) for mean in found.values()], self.mesh), strict=True):
                means[name] += mean
                weighted = self.stage.weights[name] * micro.weights.get(name, 1.0) * found[name]
                total = weighted if total is None else total + weighted
            if total is not None:
                self._finite(means, batch)
                total.backward()
                self.weights.collect()
            if self.recipe.batch.fit and self.mesh.device.type == "cuda":
                torch.cuda.synchronize(self.mesh.device)  # what is only queued has taken no time yet
            self._spent.append(time.perf_counter() - begun)
        self.weights.sum(self.mesh.world)
        norm = self._value(
            clip(self.weights.masters, self.weights.rows, self.recipe.optimizer.clip, self.mesh.world)
        )  # fmt: skip
        if not math.isfinite(norm):
            raise UserError(self._stopped("the gradient is not finite", batch))
        set_rates(self.optimizers, factor(self.recipe.optimizer, self.step, self.recipe.steps))
        for optimizer in self.optimizers:
            optimizer.step()
        self.weights.publish()
        self.weights.average(self.step)
        return {"loss": sum(self.stage.weights[name] * mean for name, mean in means.items()), **means}, norm

    def _losses(self, micro: Micro) -> dict[str, Tensor]:
        return dict(self.stage.losses(micro, self.step))

    def _agreed(self, batch: Sequence[Micro], until: float | None) -> tuple[int, bool]:
        """(tokens of the step, whether the time is up), for all processes; a checkpoint that all have written ends, and
        the times of micro-batches, which are to be the same for all, go to the estimate of work."""
        late = until is not None and time.monotonic() > until
        written = self._saving is not None and self._saving.done
        # The ranks that share examples have the same tokens.
        groups = [self.mesh.sequence if micro.share is None else micro.share.group for micro in batch]
        tokens = sum(micro.tokens for micro, group in zip(batch, groups, strict=True) if group.rank == 0)
        tokens_, late_, written_, *spent = sums([tokens, late, written, *self._spent], self.mesh)
        if written_ == self.mesh.world.size:
            self._settle()
        seconds = [total / self.mesh.world.size for total in spent]
        if said := self.stage.batches.estimate.note(self.step, [micro.load for micro in batch], seconds):
            self._note(said)
        return int(tokens_), late_ > 0

    def _value(self, tensor: Tensor) -> float:
        """Waits for the device; a rehearsal, whose tensors have no values, does not ask."""
        return float(tensor.detach())

    def _finite(self, means: Mapping[str, float], batch: list[Micro]) -> None:
        broken = [name for name, mean in means.items() if not math.isfinite(mean)]
        if broken:
            raise UserError(self._stopped(f"the loss {broken[0]!r} is {means[broken[0]]}", batch))

    def _stopped(self, why: str, batch: list[Micro]) -> str:
        self._settle()
        last, keys = checkpoints.latest(self.run), [key for micro in batch for key in micro.keys]
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        shown = f", with the examples {shown}" if keys else ""
        left = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        return f"stopped at step {self.step}: {why}{shown}; {left}"

    def _count_skipped(self, batch: list[Micro]) -> None:
        for micro in batch:
            for skip in micro.skipped:
                self.skipped.add(skip)

    # --- files ---

    def begin_save(self) -> None:
        """Copies what a checkpoint of the present step has, and leaves the writing to a thread. One is written at a
        time. All processes do this.

        Raises:
            UserError: weights that are not finite, which would spoil the last good checkpoint; or the checkpoint before
                could not be written.
        """
        self._settle()
        pieces = self.weights.state()
        broken = next((name for name, piece in pieces.items() if not bool(torch.isfinite(piece.tensor).all())), None)
        broken = next((name for name in self.mesh.world.tell(broken) if name is not None), None)
        if broken is not None:
            raise UserError(self._stopped(f"{broken} is not finite", []))
        own = dict[str, Piece]()
        for number, optimizer in enumerate(self.optimizers):
            spread = isinstance(optimizer, SpreadMuon)
            found = checkpoints.optimizer_pieces(
                optimizer, names_in(optimizer, self.weights.names), f"optimizer.{number}/",
                {} if spread else self.weights.rows,
            )  # fmt: skip
            (own if spread else pieces).update(found)
        # What is whole on every process is written by the first; what one process alone has, by that.
        pieces = {name: piece for name, piece in pieces.items() if piece.rows is not None or self.mesh.first} | own
        facts = {
            "recipe": self.recipe.to_dict(), "skipped": self.skipped.state(),
            "work": self.stage.batches.estimate.state(),
        }  # fmt: skip
        self._saving = checkpoints.Saving(
            self.run, self.step, pieces, facts, keep=self.recipe.keep, world=self.mesh.world
        )

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written, if there is one."""
        saving, self._saving = self._saving, None
        if saving is not None:
            patiently(self.mesh.world, saving.wait)
            saving.finish()

    @contextmanager
    def _saved(self) -> Iterator[None]:
        """What is being written in the end is waited for."""
        try:
            yield
            self._settle()
        except BaseException:
            if self._saving is not None and self.mesh.alone:  # the others may be anywhere
                with suppress(UserError):
                    self._settle()
            raise

    def resume(self) -> None:
        """Takes up the last checkpoint of the run's folder, if there is one, of whatever number of processes.

        Raises:
            UserError: it belongs to another recipe.
        """
        if self.mesh.first:
            checkpoints.clear(self.run)
        folder = self.mesh.world.tell(checkpoints.latest(self.run))[0]
        if folder is not None:
            patiently(self.mesh.world, partial(self._restore, folder))
            self._note(f"goes on from step {self.step} of {self.recipe.steps} ({folder})")

    def _restore(self, folder: Path) -> None:
        with checkpoints.reading(folder) as (pieces, facts):
            # Keys that are newer than the checkpoint have their defaults.
            theirs = recipes.read(facts["recipe"], str(folder / checkpoints.FACTS))
            differing = _differing(self.recipe.to_dict(), theirs.to_dict())
            if differing:
                raise UserError(
                    f"{folder} is of a run with another recipe ({'; '.join(differing)}); choose another output folder"
                )
            self.weights.restore(pieces)
            for number, optimizer in enumerate(self.optimizers):
                names = names_in(optimizer, self.weights.names)
                rows = {} if isinstance(optimizer, SpreadMuon) else self.weights.rows
                checkpoints.restore_optimizer(optimizer, names, f"optimizer.{number}/", rows, pieces)
            self.step = facts["step"]
            self.skipped.restore(facts["skipped"])
            self.stage.batches.estimate.restore(facts.get("work"))

    def export(self, folder: Path) -> None:
        """Writes the whole checkpoint with the averaged weights. All processes do this."""
        with self.weights.averaged(), torch.no_grad():
            self.stage.export(folder, Writer(self.recipe, self.weights.masters, self._whole, self.mesh.world))

    def _whole(self, name: str) -> Tensor | None:
        return whole(self.weights.masters[name].detach(), self.weights.rows[name], self.mesh.world)

    def samples(self) -> None:
        """Writes pictures of what the averaged weights can do by now. All processes do this; the first makes them."""
        with tempfile.TemporaryDirectory() as work:
            model = Path(work) / "model"
            self.export(model)
            make = partial(self.stage.samples, self.run / SAMPLES, self.step, model)
            patiently(self.mesh.world, make if self.mesh.first else lambda: None)


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any], key: str = "") -> list[str]:
    found = []
    for name in {**mine, **theirs}:
        full = f"{key}{name}"
        if full in MAY_CHANGE:
            continue
        a, b = mine.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differing(a, b, f"{full}.")
        elif a != b:
            found.append(f"{full} was {b}, is {a}")
    return found
