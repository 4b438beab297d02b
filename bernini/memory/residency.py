"""The parts of a checkpoint under a memory limit: each comes when its stage begins, and goes when it may not stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bernini.offload.weights import WeightStream

from ..checkpoint import ExpertFiles
from ..renderer.model import Renderer
from ..renderer.sampler import Which
from .choose import Choice, Mode, Part, choose
from .needs import Job, Model, Stage, needs

if TYPE_CHECKING:
    from ..planner.stage import PlannerStage

T = TypeVar("T")
Loaded = tuple[T, WeightStream | None]
RESIDENT, ONE, LOADED, STREAMED = "resident", "one at a time", "loaded for its stage", "streamed"
LOADING = 2**24 + 2**20
"""Bytes of host memory that loading takes beside the weights (see :mod:`bernini.weights`)."""


class Held(Generic[T]):
    """A part that may be there or not.

    Args:
        load: whole; ``stream``: with its blocks streamed.
    """

    def __init__(self, load: Callable[[], T], stream: Callable[[], Loaded[T]] | None = None) -> None:
        self._load, self._stream = load, stream
        self._value: T | None = None
        self._flow: WeightStream | None = None
        self.mode = RESIDENT

    @property
    def loaded(self) -> bool:
        return self._value is not None

    def get(self) -> T:
        if self._value is None:
            if self.mode == STREAMED and self._stream is not None:
                self._value, self._flow = self._stream()
            else:
                self._value = self._load()
        return self._value

    def set(self, mode: str) -> None:
        """Another way to keep it; what is there in a way that differs goes."""
        if (mode == STREAMED) != (self.mode == STREAMED) or mode != RESIDENT:
            self.drop()
        self.mode = mode

    def leave(self) -> None:
        """Its stage is over."""
        if self.mode != RESIDENT:
            self.drop()

    def drop(self) -> None:
        self._value = None
        if self._flow is not None:
            self._flow.close()
            self._flow = None


class Lazy:
    """Stands for a model that is fetched when something of it is wanted.

    Args:
        known: attributes that it answers by itself.
    """

    def __init__(self, held: Held[Any], **known: Any) -> None:
        self._held = held
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held.get(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._held.get()(*args, **kwargs)


class HeldExperts:
    """An :class:`bernini.renderer.sampler.ExpertPair` of held experts."""

    def __init__(self, files: ExpertFiles, held: Mapping[Which, Held[Renderer]]) -> None:
        self.config, self.has_low, self.boundary, self._held = files.config, files.has_low, files.boundary, held

    def get(self, which: Which) -> Renderer:
        for other, held in self._held.items():
            if other != which:
                held.leave()  # first, so that the two never meet in memory
        return self._held[which].get()


class Residency:
    """Decides for each request, and lets parts go between the stages.

    Args:
        limit: bytes on the device: weights, and what is computed; the interpreter and its libraries come on top.
        experts, text, planner, vae: the parts.
        sizes: (all weights, streamed) of each part in bytes, by ``high``, ``low``, ``text``, ``planner`` and ``vae``.
    """

    def __init__(
        self, limit: int, model: Model, *, experts: Mapping[Which, Held[Renderer]], text: Held[Any], vae: Held[Any],
        planner: Held[PlannerStage] | None, sizes: Mapping[str, tuple[int, int]], tiled: bool = False,
    ) -> None:  # fmt: skip
        self.limit, self.model, self.tiled, self._sizes = limit, model, tiled, sizes
        self._experts, self._text, self._vae, self._planner = experts, text, vae, planner
        self._found: dict[Job, Choice] = {}

    def choice(self, job: Job) -> Choice:
        """What is right for a request.

        Raises:
            UserError: it does not fit; the message names the least that would.
        """
        if job not in self._found:
            beside = needs(self.model, job)
            if self.model.on_host:
                beside = {stage: size + LOADING for stage, size in beside.items()}
            self._found[job] = choose(self.limit, self._parts(job), beside, tiled=self.tiled)
        return self._found[job]

    def prepare(self, job: Job) -> Choice:
        """As :meth:`choice`, and what is loaded already and may not stay goes."""
        choice = self.choice(job)
        for held in self._experts.values():
            held.set(choice.modes["experts"].name)
        self._text.set(choice.modes["text encoder"].name)
        self._vae.set(choice.modes["vae"].name)
        if self._planner is not None:
            self._planner.set(choice.modes["planner"].name)
        return choice

    def leave(self, stage: Stage) -> None:
        """A stage is over."""
        if stage == "planning" and self._planner is not None:
            self._planner.leave()
        elif stage == "text":
            self._text.leave()
        elif stage == "sampling":
            for held in self._experts.values():
                held.leave()
        elif stage in ("encoding", "decoding"):
            self._vae.leave()

    def leave_all(self) -> None:
        """A request is over, or has failed."""
        for stage in ("planning", "text", "sampling", "decoding"):
            self.leave(stage)

    def _parts(self, job: Job) -> list[Part]:
        experts = [self._sizes[which] for which in self._experts]
        whole, largest = sum(size for size, _ in experts), max(size for size, _ in experts)
        flowing = max(size for _, size in experts)
        alone = LOADED if len(experts) == 1 else ONE
        parts = [
            Part("experts", ("sampling",), (
                Mode(RESIDENT, whole, whole, 0),
                Mode(alone, 0, largest, whole),
                Mode(STREAMED, 0, flowing, largest * (job.steps * job.branches + 2 * len(experts))),
            )),
            _part("text encoder", ("text",), *self._sizes["text"], passes=2),
            Part("vae", ("encoding", "decoding"), (
                Mode(RESIDENT, self._sizes["vae"][0], self._sizes["vae"][0], 0),
                Mode(LOADED, 0, self._sizes["vae"][0], 2 * self._sizes["vae"][0]),
            )),
        ]  # fmt: skip
        if self._planner is not None:
            parts.insert(0, _part("planner", ("planning",), *self._sizes["planner"], passes=job.planning + 2))
        return parts


def _part(name: str, stages: tuple[Stage, ...], whole: int, flowing: int, *, passes: int) -> Part:
    return Part(
        name, stages,
        (Mode(RESIDENT, whole, whole, 0), Mode(LOADED, 0, whole, whole), Mode(STREAMED, 0, flowing, passes * whole)),
    )  # fmt: skip
