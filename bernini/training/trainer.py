"""The loop: the same for every stage.

    batch k (a pure function of seed, k and recipe) -> losses -> gradients -> clip -> optimizer -> average -> files

Nothing random has a state: noise, masks and drops follow from the run's seed, the example and the step. So what a
checkpoint holds (weights, their average, the optimizer) is all there is, and a run that was killed goes on with the
bits of one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.skips import SkipLog
from ..errors import UserError
from . import checkpoints
from .optim import factor, names_in, optimizers, set_rates
from .recipe import Recipe
from .stage import Micro, Stage
from .weights import Weights

LOG, TENSORBOARD, MODEL, SAMPLES = "log.jsonl", "tensorboard", "model", "samples"
MAY_CHANGE = ("output", "save_every", "keep", "log_every", "samples_every")
"""Keys of a recipe that may differ when a run goes on."""


@dataclass(frozen=True)
class Progress:
    """After a step.

    Args:
        step, steps: done, and in all.
        losses: means over the step, and ``"loss"``, their weighted sum.
        tokens, seconds: of the step.
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
        stage: made for it.
        report: called after every step.
        note: called with a sentence where something is worth telling: a run that goes on, examples that were skipped.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        *,
        report: Callable[[Progress], None] = lambda progress: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.recipe, self.stage, self._report, self._note = recipe, stage, report, note
        self.run = Path(recipe.output)
        self.weights = Weights(stage.parts, recipe.precision, ema=recipe.ema, keep_wide=stage.keep_wide)
        self.optimizers = optimizers(recipe.optimizer, self.weights.masters)
        self.step = 0
        self.skipped = SkipLog()

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
        with _ahead(self._micros) as micros, self._logs() as log:
            while self.step < self.recipe.steps:
                started = time.perf_counter()
                batch = micros(self.step)
                losses, norm = self._update(batch)
                rate = factor(self.recipe.optimizer, self.step, self.recipe.steps) * self.recipe.optimizer.lr
                self.step += 1
                tokens, seconds = sum(micro.tokens for micro in batch), time.perf_counter() - started
                done = Progress(self.step, self.recipe.steps, losses, norm, rate, tokens, seconds)
                log(done, sum(len(micro.keys) for micro in batch))
                self._report(done)
                self._count_skipped(batch)
                late = until is not None and time.monotonic() > until
                if self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps or late:
                    self.save()
                if self.recipe.samples_every and self.step % self.recipe.samples_every == 0:
                    with self.weights.averaged(), torch.no_grad():
                        self.stage.samples(self.run / SAMPLES, self.step)
                if late and self.step < self.recipe.steps:
                    return False
        self.export(self.run / MODEL)
        if self.skipped.total:
            self._note(f"warning: {self.skipped}")
        return True

    def _micros(self, step: int) -> list[Micro]:
        return [self.stage.micro(step, number) for number in range(self.recipe.batch.accumulate)]

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
        for micro in batch:
            total: Tensor | None = None
            for name, loss in self.stage.losses(micro, self.step).items():
                mean = loss / counts[name]
                means[name] += self._value(mean)
                weighted = self.stage.weights[name] * mean
                total = weighted if total is None else total + weighted
            if total is not None:
                self._finite(means, batch)
                total.backward()
                self.weights.collect()
        norm = self._value(torch.nn.utils.clip_grad_norm_(self.weights.masters.values(), self.recipe.optimizer.clip))
        if not math.isfinite(norm):
            raise UserError(self._stopped("the gradient is not finite", batch))
        set_rates(self.optimizers, factor(self.recipe.optimizer, self.step, self.recipe.steps))
        for optimizer in self.optimizers:
            optimizer.step()
        self.weights.publish()
        self.weights.average(self.step)
        return {"loss": sum(self.stage.weights[name] * mean for name, mean in means.items()), **means}, norm

    def _value(self, tensor: Tensor) -> float:
        """Waits for the device; a rehearsal, whose tensors have no values, does not ask."""
        return float(tensor.detach())

    def _finite(self, means: Mapping[str, float], batch: list[Micro]) -> None:
        broken = [name for name, mean in means.items() if not math.isfinite(mean)]
        if broken:
            raise UserError(self._stopped(f"the loss {broken[0]!r} is {means[broken[0]]}", batch))

    def _stopped(self, why: str, batch: list[Micro]) -> str:
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

    def save(self) -> Path:
        """Writes a checkpoint of the present step.

        Raises:
            UserError: weights that are not finite, which would spoil the last good checkpoint; or a full disk.
        """
        tensors = self.weights.state()
        broken = next((name for name, value in tensors.items() if not bool(torch.isfinite(value).all())), None)
        if broken is not None:
            raise UserError(self._stopped(f"{broken} is not finite", []))
        for number, optimizer in enumerate(self.optimizers):
            tensors |= checkpoints.optimizer_tensors(
                optimizer, names_in(optimizer, self.weights.names), f"optimizer.{number}/"
            )
        facts = {"recipe": self.recipe.to_dict(), "skipped": self.skipped.state()}
        return checkpoints.save(self.run, self.step, tensors, facts, keep=self.recipe.keep)

    def resume(self) -> None:
        """Takes up the last checkpoint of the run's folder, if there is one.

        Raises:
            UserError: it belongs to another recipe.
        """
        folder = checkpoints.latest(self.run)
        if folder is None:
            return
        tensors, facts = checkpoints.load(folder)
        differing = _differing(json.loads(json.dumps(self.recipe.to_dict())), facts["recipe"])
        if differing:
            raise UserError(
                f"{folder} is of a run with another recipe ({'; '.join(differing)}); choose another output folder"
            )
        self.weights.restore(tensors)
        for number, optimizer in enumerate(self.optimizers):
            names = names_in(optimizer, self.weights.names)
            checkpoints.restore_optimizer(optimizer, names, f"optimizer.{number}/", tensors)
        self.step = facts["step"]
        self.skipped.restore(facts["skipped"])
        self._note(f"goes on from step {self.step} of {self.recipe.steps} ({folder})")

    def export(self, folder: Path) -> None:
        """Writes the whole checkpoint with the averaged weights."""
        with self.weights.averaged(), torch.no_grad():
            self.stage.export(folder)

    @contextmanager
    def _logs(self) -> Iterator[Callable[[Progress, int], None]]:
        """JSON lines and TensorBoard; lines behind the step at which the run goes on are dropped."""
        self.run.mkdir(parents=True, exist_ok=True)
        file = self.run / LOG
        _cut(file, self.step)
        board = _board(self.run / TENSORBOARD, self.step)
        with file.open("a", encoding="utf-8") as lines:

            def log(done: Progress, examples: int) -> None:
                values = {**done.losses, "grad_norm": done.grad_norm, "lr": done.rate}
                line = {"step": done.step, **values, "tokens": done.tokens, "examples": examples}
                lines.write(json.dumps({**line, "seconds": round(done.seconds, 4)}) + "\n")
                lines.flush()
                if done.step % self.recipe.log_every == 0:
                    for name, value in values.items():
                        board.add_scalar(name, value, done.step)
                    board.add_scalar("tokens per second", done.tokens / done.seconds, done.step)

            try:
                yield log
            finally:
                board.close()


def _board(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step)


def _cut(file: Path, step: int) -> None:
    if file.is_file():
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # a line that a killed process did not finish
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        file.write_text("".join(kept), encoding="utf-8")


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any], key: str = "") -> list[str]:
    found = []
    for name in {**mine, **theirs}:
        full = f"{key}{name}"
        if not key and name in MAY_CHANGE:
            continue
        a, b = mine.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differing(a, b, f"{full}.")
        elif a != b:
            found.append(f"{full} was {b}, is {a}")
    return found


@contextmanager
def _ahead(make: Callable[[int], list[Micro]]) -> Iterator[Callable[[int], list[Micro]]]:
    """``make``, which works on the next step's batch while this one's is computed."""
    waiting: dict[int, Future[list[Micro]]] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        # One thread for that thread's own operations: with a team of its own there are more threads than cores, and
        # OpenMP then puts ours to sleep between any two operations (1.7 s a step instead of 0.9 on two cores).
        threads = torch.get_num_threads()
        pool.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)

        def take(step: int) -> list[Micro]:
            future = waiting.pop(step, None) or pool.submit(make, step)
            batch = future.result()
            waiting[step + 1] = pool.submit(make, step + 1)
            return batch

        try:
            yield take
        finally:
            for future in waiting.values():
                future.cancel()
