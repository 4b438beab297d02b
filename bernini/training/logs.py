"""What a run writes down of every step: JSON lines, and TensorBoard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOG, TENSORBOARD = "log.jsonl", "tensorboard"

Log = Callable[[int, Mapping[str, float], int, Sequence[str], float], None]
"""Called with a step, its values by name, its tokens, the keys of its examples, and its seconds."""


@contextmanager
def logs(run: Path | None, step: int, *, every: int) -> Iterator[Log]:
    """
    Args:
        run: the folder; ``None`` where another process writes.
        step: at which the run goes on. Lines behind it are dropped.
        every: steps between points on the board.
    """
    if run is None:
        yield lambda step, values, tokens, keys, seconds: None
        return
    run.mkdir(parents=True, exist_ok=True)
    _cut(run / LOG, step)
    board = _board(run / TENSORBOARD, step)
    with (run / LOG).open("a", encoding="utf-8") as lines:

        def log(step: int, values: Mapping[str, float], tokens: int, keys: Sequence[str], seconds: float) -> None:
            line = {
                "step": step, **values, "tokens": tokens, "examples": len(keys), "batch": digest(keys),
                "seconds": round(seconds, 4),
            }  # fmt: skip
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            if step % every == 0:
                for name, value in values.items():
                    board.add_scalar(name, value, step)
                board.add_scalar("tokens per second", tokens / seconds, step)

        try:
            yield log
        finally:
            board.close()


def digest(keys: Sequence[str]) -> str:
    """Of a step's examples, in whatever order: runs of the same recipe have the same."""
    return hashlib.blake2b(json.dumps(sorted(keys)).encode(), digest_size=4).hexdigest()


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
