"""``guide``: checks, registration and the public function. Shapes: F frames, M values per frame, L links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from .. import dispatch, launch
from ..native import loader
from . import native, reference

MAX_PREDICTIONS = 8


def _reference_momentum(buffer: Tensor, outputs: Sequence[Tensor], momentum: float, *args: Any) -> None:
    every: tuple[Any, ...] = (*args, buffer, momentum)
    for out, value in zip(outputs, reference.guide(*every), strict=True):
        out.copy_(value)


_NATIVE: dict[str, Any] = {
    "devices": ("cpu",),
    "dtypes": (torch.float32, torch.bfloat16),
    "roundings": ("fp32",),
    "missing": loader.missing,
}
for _op in ("guide", "guide_momentum"):
    dispatch.provide(_op, replace(launch.triton_implementation(__package__, _op), roundings=("fp32",)))
dispatch.provide("guide", dispatch.Implementation("native", native.guide, **_NATIVE))
dispatch.provide("guide", dispatch.Implementation("reference", reference.guide))
dispatch.provide("guide_momentum", dispatch.Implementation("native", native.guide_momentum, **_NATIVE))
dispatch.provide("guide_momentum", dispatch.Implementation("reference", _reference_momentum))


def _dtype(predictions: Sequence[Tensor], *args: Any) -> torch.dtype:
    """What an implementation must be made for: the least usual one; of bf16 and float32 the predictions'."""
    every = [predictions[0].dtype, *(t.dtype for t in (args[5], *args[10]) if t is not None)]
    return max(every, key=lambda dtype: (dtype not in launch.DTYPES, dtype == torch.float16))


def _forward(predictions: Sequence[Tensor], *args: Any) -> list[Tensor]:
    dtype = _dtype(predictions, *args)
    return dispatch.run("guide", predictions[0].device, dtype, args[-1], predictions, *args)


def _momentum(buffer: Tensor, outputs: Sequence[Tensor], momentum: float, *args: Any) -> None:
    every: tuple[Any, ...] = (buffer, outputs, momentum, *args)
    dispatch.run("guide_momentum", buffer.device, _dtype(*args), args[-1], *every)


def _outputs(
    first: Tensor, space: str, latent: Tensor | None, coefficients: Sequence[float], history: Sequence[Tensor]
) -> list[Tensor]:
    count = len(coefficients) // (2 + len(history)) if coefficients else 1
    dtype = reference.output_dtype(first, latent, space, bool(coefficients))
    return [first.new_empty(first.shape, dtype=dtype) for _ in range(count)]


def _fake_forward(predictions: Sequence[Tensor], *args: Any) -> list[Tensor]:
    _, _, _, _, space, latent, _, _, _, coefficients, history, _ = args
    return _outputs(predictions[0], space, latent, coefficients, history)


def _fake_momentum(buffer: Tensor, outputs: Sequence[Tensor], momentum: float, *args: Any) -> None:
    return None


_ARGUMENTS = (
    "Tensor[] predictions, int[] new, int[] old, float[] scales, str? apg, str space, Tensor? latent, float sigma, "
    "float eta, float[] thresholds, float[] coefficients, Tensor[] history, str rounding"
)
dispatch.define(f"guide({_ARGUMENTS}) -> Tensor[]", _forward, _fake_forward)
# The outputs are arguments here because torch.compile cannot functionalize an op that both changes an argument and
# returns a list.
dispatch.define(
    f"guide_momentum(Tensor(a!) buffer, Tensor(b!)[] outputs, float momentum, {_ARGUMENTS}) -> ()",
    _momentum,
    _fake_momentum,
)


@overload
def guide(
    predictions: Sequence[Tensor],
    links: Sequence[tuple[int, int, float]],
    *,
    apg: str | None = None,
    space: str = "velocity",
    latent: Tensor | None = None,
    sigma: float | None = None,
    eta: float = 1.0,
    thresholds: Sequence[float] | None = None,
    momentum: tuple[float, Tensor] | None = None,
    update: None = None,
    rounding: str = "fp32",
) -> Tensor: ...


@overload
def guide(
    predictions: Sequence[Tensor],
    links: Sequence[tuple[int, int, float]],
    *,
    apg: str | None = None,
    space: str = "velocity",
    latent: Tensor | None = None,
    sigma: float | None = None,
    eta: float = 1.0,
    thresholds: Sequence[float] | None = None,
    momentum: tuple[float, Tensor] | None = None,
    update: tuple[Sequence[Sequence[float]], Sequence[Tensor]],
    rounding: str = "fp32",
) -> tuple[Tensor, ...]: ...


def guide(
    predictions: Sequence[Tensor],
    links: Sequence[tuple[int, int, float]],
    *,
    apg: str | None = None,
    space: str = "velocity",
    latent: Tensor | None = None,
    sigma: float | None = None,
    eta: float = 1.0,
    thresholds: Sequence[float] | None = None,
    momentum: tuple[float, Tensor] | None = None,
    update: tuple[Sequence[Sequence[float]], Sequence[Tensor]] | None = None,
    rounding: str = "fp32",
) -> Tensor | tuple[Tensor, ...]:
    """Combines the predictions of one denoising step: ``p[0] + sum over links of scale * A(p[new] - p[old])``.

    ``A`` is the identity for ``apg=None`` (classifier-free guidance, a chain of any length). Otherwise, for each link,
    ``A`` takes ``d = p[new] - p[old]`` and, in this order,

    1. with momentum: ``buffer = d + coefficient * buffer``, ``d = buffer``;
    2. for a threshold > 0: ``d = d * min(1, threshold / |d|)``;
    3. ``A(d) = orthogonal + eta * parallel``, the parts of d across and along ``p[new]``.

    Norms and projections run over each frame by itself (``apg="frame"``) or over the whole tensor (``"global"``). The
    direction's norm is not taken below 1e-12 (frame); 1e-8 is added to its square (global).

    Reads every prediction twice when APG is on (sums, then result) and once when not. In bytes per element for five
    float32 predictions and an Euler step: 20 for the sums, 20 again (a video's latents stay in a GPU's L2), 4 + 4 for
    the latent and the result; each history tensor and each further output adds 4. Momentum adds 12 per link: its
    buffer is read and written, then read again.

    Inference only: it has no gradient.

    Args:
        predictions: 1 to 8 velocities ``[F, ...]`` of one shape and dtype; axis 0 are the latent frames.
        links: ``(new, old, scale)`` with numbers of predictions. None at all returns ``predictions[0]``.
        apg: ``None``, ``"frame"`` or ``"global"``.
        space: ``"velocity"``, or ``"x0"``: everything above is done on ``x0 = latent - sigma * p`` and the result
            turned back by ``v = (latent - x0) / sigma``.
        latent: the noisy latent, shaped like a prediction. Needed in x0 space and for ``update``.
        sigma: noise level, > 0, a host number. Needed in x0 space.
        eta: weight of the parallel part; 1 leaves d as it is.
        thresholds: one per link; 0 or less means none.
        momentum: ``(coefficient, buffer)`` with a contiguous ``[L, F, ...]`` buffer in float32 (float64 if any input
            is), zeros before the first step, **updated in place**.
        update: ``(coefficients, history)``: the scheduler's linear step folded in. ``history`` holds K tensors shaped
            like the predictions, ``coefficients`` J rows of 2 + K host numbers; output j is ``c[0] * latent + c[1] * v
            + sum of c[2 + i] * history[i]``. An Euler step is ``([[1, dsigma]], [])``.
        rounding: ``"fp32"`` computes in float32 (float64 if any input is) and rounds once. ``"eager"`` rounds after
            every operation as the released code does: with bf16 predictions it stays in bf16, except in x0 space with
            a float32 latent; v is rounded before an update, and the update itself is computed as in ``"fp32"``.

    Returns:
        The guided velocity, contiguous and shaped like a prediction, in the predictions' dtype (in x0 space: the
        latent's). With ``update``: the tuple of the J outputs in the latent's dtype.

    Raises:
        ValueError: wrong counts, shapes, dtypes, devices or options; a tensor where a host number belongs (reading it
            would wait for the device); a tensor that requires grad while grad is enabled.

    Source: arXiv 2207.12598, eq. 6; arXiv 2410.02416, sec. 4; the Bernini paper, eq. 12.
    """
    dispatch.check_rounding("guide", rounding)
    coefficients, history = ([], []) if update is None else (update[0], list(update[1]))
    coefficient, buffer = (0.0, None) if momentum is None else momentum
    numbers = [c for row in coefficients for c in row]
    _check_host(sigma, eta, coefficient, *(thresholds or ()), *(link[2] for link in links), *numbers)
    _check_tensors(list(predictions), latent, history, buffer, len(links))
    _check_options(len(predictions), links, apg, space, latent, sigma, thresholds, momentum, update)
    args = (
        list(predictions),
        [link[0] for link in links],
        [link[1] for link in links],
        [float(link[2]) for link in links],
        apg,
        space,
        latent,
        0.0 if sigma is None else float(sigma),
        float(eta),
        [] if thresholds is None else [float(t) for t in thresholds],
        [float(c) for c in numbers],
        history,
        rounding,
    )
    if buffer is None:
        outputs = torch.ops.bernini.guide(*args)
    else:
        outputs = _outputs(predictions[0], space, latent, args[10], history)
        torch.ops.bernini.guide_momentum(buffer, outputs, float(coefficient), *args)
    return outputs[0] if update is None else tuple(outputs)


def _check_tensors(
    predictions: list[Tensor], latent: Tensor | None, history: list[Tensor], buffer: Tensor | None, links: int
) -> None:
    if not 1 <= len(predictions) <= MAX_PREDICTIONS:
        raise ValueError(f"guide: expected 1 to {MAX_PREDICTIONS} predictions, got {len(predictions)}")
    named: dict[str, Tensor | None] = {f"predictions[{i}]": p for i, p in enumerate(predictions)}
    named |= {"latent": latent} | {f"history[{i}]": h for i, h in enumerate(history)}
    first = predictions[0]
    if first.dim() == 0:
        raise ValueError("guide: predictions must be [frames, ...], got a scalar")
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != first.shape:
            raise ValueError(
                f"guide: {name} is {list(tensor.shape)}, but predictions[0] is {list(first.shape)}; all must be equal"
            )
    for name, tensor in list(named.items())[1 : len(predictions)]:
        if tensor is not None and tensor.dtype != first.dtype:
            raise ValueError(f"guide: {name} is {tensor.dtype}, but predictions[0] is {first.dtype}")
    if buffer is not None:
        named["the momentum buffer"] = buffer
        dispatch.check_shape("guide", "the momentum buffer", buffer, (links, *first.shape), "[links, frames, ...]")
        wide = reference.compute_dtype(*predictions, latent, *history)
        if buffer.dtype != wide or not buffer.is_contiguous():
            raise ValueError(
                f"guide: the momentum buffer must be contiguous {wide}, got {buffer.dtype} with strides "
                f"{buffer.stride()}"
            )
    dispatch.check_float("guide", **named)
    dispatch.check_same_device("guide", **named)
    if torch.is_grad_enabled():
        tracked = [name for name, tensor in named.items() if tensor is not None and tensor.requires_grad]
        if tracked:
            raise ValueError(f"guide: inference only, but {', '.join(tracked)} requires grad; use torch.no_grad()")


def _check_options(
    predictions: int,
    links: Sequence[tuple[int, int, float]],
    apg: str | None,
    space: str,
    latent: Tensor | None,
    sigma: float | None,
    thresholds: Sequence[float] | None,
    momentum: tuple[float, Tensor] | None,
    update: tuple[Sequence[Sequence[float]], Sequence[Tensor]] | None,
) -> None:
    for number, (new, old, _) in enumerate(links):
        if not (0 <= new < predictions and 0 <= old < predictions):
            raise ValueError(f"guide: link {number} is ({new}, {old}), but there are {predictions} predictions")
    if apg not in (None, "frame", "global"):
        raise ValueError(f"guide: apg={apg!r}; expected None, 'frame' or 'global'")
    if space not in ("velocity", "x0"):
        raise ValueError(f"guide: space={space!r}; expected 'velocity' or 'x0'")
    if apg is None and (thresholds is not None or momentum is not None):
        raise ValueError("guide: thresholds and momentum belong to apg='frame' or 'global', got apg=None")
    if thresholds is not None and len(thresholds) != len(links):
        raise ValueError(f"guide: {len(thresholds)} thresholds for {len(links)} links")
    if (space == "x0" or update is not None) and latent is None:
        raise ValueError(f"guide: latent is needed for {'x0 space' if space == 'x0' else 'an update'}")
    if space == "x0" and (sigma is None or not sigma > 0):
        raise ValueError(f"guide: x0 space needs sigma > 0, got {sigma}")
    if update is not None:
        wrong = [len(row) for row in update[0] if len(row) != 2 + len(update[1])]
        if wrong or not len(update[0]):
            raise ValueError(
                f"guide: update needs one or more rows of 2 + {len(update[1])} coefficients (latent, velocity, "
                f"history), got rows of {[len(row) for row in update[0]]}"
            )


def _check_host(*numbers: float | None) -> None:
    if any(isinstance(number, Tensor) for number in numbers):
        raise ValueError("guide: sigma, eta, scales, thresholds and coefficients must be host numbers, got a tensor")
