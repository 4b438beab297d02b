"""How long examples take, as batches are balanced by it: counted from the models' sizes, then fitted to measured times.

A fit is used from the second step behind it on: the batch of the first is made beside the step that was measured. All
processes are told the same times, fit the same and so place the same; a checkpoint has what is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..parallel.workload import Measured, Sizes, Workload
from ..renderer.config import RendererConfig


class Load(NamedTuple):
    """What a rank computes in a micro-batch.

    Args:
        samples: its own, dummies left out.
        ranks: over how many each is cut.
    """

    samples: tuple[Sizes, ...] = ()
    ranks: tuple[int, ...] = ()


NOTHING = Load()


def counted(renderer: RendererConfig | None, language: Any, *, again: bool, latent: float = 0.0) -> Workload:
    """From the sizes of what is trained, the same on any device; see
    :meth:`bernini.parallel.workload.Workload.of_models`.

    Args:
        language: the planner's language model's config, as transformers has it; or ``None``.
        again: whether the forward is computed again in the backward.
        latent: operations for each latent token.
    """
    sizes: dict[str, int] = {"width": 0, "ffn": 0, "layers": 0}
    if renderer is not None:
        width = renderer.num_attention_heads * renderer.attention_head_dim
        sizes |= {"width": width, "ffn": renderer.ffn_dim, "layers": renderer.num_layers}
    if language is not None:
        width = language.hidden_size
        sizes |= {
            "planner_width": width, "planner_ffn": language.intermediate_size,
            "planner_keys": width // language.num_attention_heads * language.num_key_value_heads,
            "planner_layers": language.num_hidden_layers,
        }  # fmt: skip
    return Workload.of_models(**sizes, latent_flops=latent, again=again)


class Estimate:
    """
    Args:
        first: what is not measured yet; what a step has is always decided by it.
        every: steps between fits; 0 for none.
    """

    def __init__(self, first: Workload, every: int = 0) -> None:
        self.first, self._now, self._every, self._warm = first, first, every, False
        self._used: tuple[tuple[int, Workload], ...] = ((0, first),)

    def at(self, step: int) -> Workload:
        """What the examples of a step are placed by."""
        return next(workload for start, workload in reversed(self._used) if start <= step)

    def note(self, step: int, loads: Sequence[Load], seconds: Sequence[float]) -> str | None:
        """Takes the times of a step's micro-batches; what there is to say of a fit.

        Args:
            step: steps done by now.
            loads: of each micro-batch that of the rank with most; the others wait for it.
            seconds: that it took; the same on all processes.
        """
        warm, self._warm = self._warm, True
        if not self._every or not warm:  # the first step of a process allocates and compiles
            return None
        records = zip(loads, seconds, strict=True)
        self._now = self._now.fit(Measured(load.samples, time, load.ranks) for load, time in records)
        if step % self._every:
            return None
        self._used = (*self._used[-1:], (step + 1, self._now))
        return f"work is fitted to the times of {step} steps; it was wrong by {self._now.error:.0%} of late"

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint; ``None`` where nothing is fitted."""
        if not self._every:
            return None
        return {"now": self._now.state(), "used": [[start, workload.state()] for start, workload in self._used]}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        if state is not None and self._every:
            self._now = Workload.of_state(state["now"])
            self._used = tuple((start, Workload.of_state(workload)) for start, workload in state["used"])
