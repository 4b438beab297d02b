"""Five branches (paper eq. 12), adaptive projection per frame in x0 space, and a step of UniPC: one op against chains.

480p, 81 frames: a latent of 21 frames. Our op computes from the sixth of the levels that the case keeps; diffusers'
solver remembers one tensor more than ours (the state before its last prediction), which only its side reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bernini.kernels import guide
from bernini.kernels.guidance import reference
from bernini.renderer.schedule import Schedule, UniPC, schedule

from .harness import Row, judged
from .kernels import BANDWIDTH, DTYPES, device, measure
from .providers import Call, Case, Prepare, compiled, provider

LATENT = (21, 16, 60, 104)  # frames first, as guidance has them
LINKS = [(1, 0, 1.25), (2, 1, 4.5), (3, 2, 4.0), (4, 3, 1.0)]
ETA, THRESHOLD = 0.5, 50.0
LEVELS, STEP = schedule("unipc", "release", 40, 5.0), 5
SIGMA = LEVELS.sigmas[STEP]
BARS = {"eager": 30.0, "torch.compile": 2.0}


class _At(UniPC):
    """Our solver in the middle of a run."""

    def __init__(self, levels: Schedule, m1: Tensor, m2: Tensor) -> None:
        super().__init__(levels)
        self._history = [m1, m2]


@dataclass(frozen=True, kw_only=True)
class Guidance(Case):
    """Tensors are ``[frames, channels, height, width]``; outputs are the next state and this step's clean latent."""

    predictions: tuple[Tensor, ...]
    latent: Tensor
    m1: Tensor
    m2: Tensor
    """The clean latents as seen from the last step and the one before."""
    last: Tensor
    """The state that ``latent`` was predicted from."""

    @property
    def shape(self) -> str:
        return f"{len(self.predictions)} x [{', '.join(map(str, self.latent.shape))}]"

    @property
    def moved(self) -> int:
        """Five predictions twice (for the sums, then for the result); latent and two of history; two outputs."""
        return 2 * sum(p.nbytes for p in self.predictions) + 5 * self.latent.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.predictions[0].dtype

    @property
    def device(self) -> torch.device:
        return self.latent.device

    def update(self) -> tuple[list[list[float]], list[Tensor]]:
        return _At(LEVELS, self.m1, self.m2).update(STEP)

    def reference(self) -> list[Tensor]:
        rows, history = self.update()
        numbers = [c for row in rows for c in row]
        new, old, scales = zip(*LINKS, strict=True)
        thresholds = [THRESHOLD] * len(LINKS)
        return reference.guide(
            self.predictions, new, old, scales, "frame", "x0", self.latent, SIGMA, ETA, thresholds, numbers, history,
            "fp32",
        )  # fmt: skip


def unipc(state: dict[str, Any]) -> Any:
    """diffusers' solver, set to the middle of a run."""
    from diffusers import UniPCMultistepScheduler

    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    solver.set_timesteps(LEVELS.steps)
    solver.sigmas, solver.timesteps = torch.tensor(LEVELS.sigmas), torch.tensor(LEVELS.timesteps).to(torch.int64)
    for name, value in state.items():
        setattr(solver, name, value)
    return solver


def make_case(dtype: torch.dtype, shape: tuple[int, ...] = LATENT) -> Guidance:
    torch.manual_seed(0)
    where = device()
    common, last, m1, m2 = (torch.randn(shape, device=where) for _ in range(4))
    predictions = tuple((common + 0.3 * torch.randn(shape, device=where)).to(dtype) for _ in LINKS + LINKS[:1])
    before = unipc({"_step_index": STEP - 1, "model_outputs": [m2, m1]})
    latent = before.multistep_uni_p_bh_update(m1, sample=last, order=2)
    return Guidance(gradients=(), predictions=predictions, latent=latent, m1=m1, m2=m2, last=last)


@provider("guidance", "bernini")
def bernini(case: Guidance) -> Call:
    return partial(
        guide, case.predictions, LINKS, apg="frame", space="x0", latent=case.latent, sigma=SIGMA, eta=ETA,
        thresholds=[THRESHOLD] * len(LINKS), update=case.update(),
    )  # fmt: skip


@provider("guidance", "eager")
def eager(case: Guidance) -> Call:
    """The released chain: x0 of every branch, each link projected in float64 as diffusers does, diffusers' solver.

    On tensors as the released code has them, ``[1, channels, frames, height, width]``: its sums over a frame step over
    the others. They are brought into that layout once, outside of what is timed.

    Unlike it, bfloat16 predictions are widened first: rounded products with sigma are not what the others compute.
    """
    axes = (-1, -2, -4)

    def call() -> tuple[Tensor, Tensor]:
        clean = [latent - SIGMA * p.float() for p in predictions]
        result = clean[0]
        for new, old, scale in LINKS:
            delta = clean[new] - clean[old]
            norm = delta.norm(p=2, dim=axes, keepdim=True)
            delta = delta * torch.minimum(torch.ones_like(delta), THRESHOLD / norm)
            v0, v1 = delta.double(), clean[new].double()
            v1 = torch.nn.functional.normalize(v1, dim=axes)
            parallel = (v0 * v1).sum(dim=axes, keepdim=True) * v1
            orthogonal = v0 - parallel
            update = orthogonal.to(delta.dtype) + ETA * parallel.to(delta.dtype)
            result = result + scale * update
        v = (latent - result) / SIGMA
        warm = {"_step_index": STEP, "model_outputs": [m2, m1], "last_sample": last, "lower_order_nums": 2}
        for name, value in warm.items():
            setattr(solver, name, value)
        state = solver.step(v, LEVELS.timesteps[STEP], latent, return_dict=False)[0]
        return state[0].transpose(0, 1), solver.model_outputs[-1][0].transpose(0, 1)

    def released(x: Tensor) -> Tensor:
        return x.transpose(0, 1)[None].contiguous()

    predictions = [released(p) for p in case.predictions]
    latent, m1, m2, last = map(released, (case.latent, case.m1, case.m2, case.last))
    solver = unipc({"this_order": 2, "timestep_list": list(LEVELS.timesteps[STEP - 2 : STEP])})
    return call


@provider("guidance", "torch.compile")
def torch_compile(case: Guidance) -> Call:
    """The well-written form: float32 throughout, differences of velocities, the solver as a linear combination."""
    rows, _ = case.update()
    axes = (1, 2, 3)

    def chain(predictions: tuple[Tensor, ...], latent: Tensor, m1: Tensor, m2: Tensor) -> list[Tensor]:
        p = [x.float() for x in predictions]
        v = p[0]
        for new, old, scale in LINKS:
            delta, onto = -SIGMA * (p[new] - p[old]), latent - SIGMA * p[new]
            clip = (THRESHOLD / delta.square().sum(axes, keepdim=True).sqrt()).clamp(max=1.0)
            size = onto.square().sum(axes, keepdim=True).clamp(min=1e-24)
            along = (delta * onto).sum(axes, keepdim=True) / size
            v = v - scale / SIGMA * clip * (delta + (ETA - 1) * along * onto)
        return [a * latent + b * v + c * m1 + d * m2 for a, b, c, d in rows]

    return compiled(chain, case.predictions, case.latent, case.m1, case.m2)


class Launches(TorchDispatchMode):
    """Counts the ops that would start something on a GPU: their results there are more than views or room.

    The device is ``meta``, where tensors have no memory: the host's own small tensors stay apart, and no GPU is needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.all = self.large = 0
        """``large``: those that work on more than a number per frame."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.device.type == "meta"]
        if results and not func.is_view and not func.__name__.startswith("empty"):
            self.all += 1
            self.large += any(x.numel() > LATENT[0] for x in tree_leaves((args, results)) if isinstance(x, Tensor))
        return result


def launches(prepare: Prepare) -> Launches:
    """What one call of a provider starts."""
    call = prepare(make_case(torch.float32).copy(lambda x: x.to("meta")))
    with torch.no_grad(), Launches() as counted:
        call()
    return counted


def run() -> list[Row]:
    ours, theirs = launches(bernini), launches(eager)
    note = (
        f"peer: eager; as torch dispatches them, without views and allocations; {theirs.large} on whole tensors, the "
        f"others on numbers that diffusers' solver computes on the device"
    )
    rows = [judged("guidance ops in a step", ours.all, theirs.all, unit="ops", shape="any", note=note)]
    for dtype in DTYPES:
        rows += measure("guidance", make_case(dtype), op="guide", bars=BARS, bandwidth=BANDWIDTH)
    return rows
