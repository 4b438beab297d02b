"""guide on Triton's interpreter against the float64 reference. Shapes: F frames, M values per frame, L links."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bernini.kernels import guide, launch, which
from bernini.kernels.guidance import reference

from . import common
from .common import assert_best_rounding, assert_same_bits, poisoned, rand

pytestmark = common.needs_interpreter

if launch.INTERPRETED:
    from bernini.kernels.guidance import kernel

CHAIN = [(1, 0, 1.25), (2, 1, 4.5), (3, 2, 4.0), (4, 3, 1.0)]

Links = Sequence[tuple[int, int, float]]

# Frames of one value, of a part of a tile, of a whole one, of several; several axes; nothing at all.
shapes = st.sampled_from([(1, 1), (3, 5), (2, 3, 24), (4,), (2, 1024), (3, 1100), (1, 2, 600), (0, 8), (2, 0)])


def sized(module: Any, small: bool = True) -> AbstractContextManager[Any]:
    """Inside, small frames have chunks of several tiles, as large ones have."""
    return mock.patch.multiple(module, TILE=128, FEW_CHUNKS=2, MANY_CHUNKS=4) if small else nullcontext()


def numbers(least: float, most: float) -> st.SearchStrategy[float]:
    """Without the subnormal ones, which make the interpreter compute in float64."""
    return st.floats(least, most, width=32, allow_subnormal=False)


def branches(
    count: int, *shape: int, dtype: torch.dtype = torch.float32, layouts: Sequence[str] = ("contiguous",),
    scale: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """Correlated, as the branches of one step are, with NaNs around; they take turns with the layouts."""
    shared, predictions = rand(*shape, seed=99).double(), []
    for number in range(count):
        # A frame of one value may lie in a row of several.
        layout = layouts[number % len(layouts)] if len(shape) > 1 else "contiguous"
        x = rand(*shape, dtype=dtype, layout=layout, scale=scale, seed=number)
        if layout != "expanded":
            x.copy_(scale * shared + 0.3 * x.double())
        predictions.append(x)
    return predictions


def arguments(predictions: Sequence[Tensor], links: Links, options: dict[str, Any]) -> tuple[Any, ...]:
    """The ops' arguments behind the predictions, from the public function's."""
    new, old, scales = zip(*links, strict=True) if links else ((), (), ())
    rows, history = options.get("update", ((), ()))
    return (
        list(new), list(old), list(scales), options.get("apg"), options.get("space", "velocity"),
        options.get("latent"), options.get("sigma", 0.0), options.get("eta", 1.0), options.get("thresholds") or [],
        [c for row in rows for c in row], list(history), "fp32",
    )  # fmt: skip


def by_reference(
    predictions: Sequence[Tensor], links: Links, options: dict[str, Any], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor | None]:
    """(outputs, momentum buffer) of the reference, computed in ``dtype`` and not rounded from it."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype)
        return type(value)(wide(v) for v in value) if isinstance(value, list | tuple) else value

    options = {name: wide(value) for name, value in options.items()}
    momentum, buffer = options.get("momentum", (0.0, None))
    buffer = None if buffer is None else buffer.clone()
    outputs = reference.guide(wide(predictions), *arguments(predictions, links, options), buffer, momentum)
    return outputs, buffer


def by_kernel(
    module: Any, predictions: Sequence[Tensor], links: Links, options: dict[str, Any], **more: Any
) -> tuple[list[Tensor], Tensor | None]:
    """The same by the kernels, and the buffer's surroundings must stay NaN."""
    args = arguments(predictions, links, options)
    momentum, buffer = options.get("momentum", (0.0, None))
    with poisoned():
        if buffer is None:
            return module.guide(predictions, *args, **more), None
        carried = common.among_nans(buffer)
        latent, update = options.get("latent"), options.get("update")
        dtype = reference.output_dtype(predictions[0], latent, args[4], update is not None)
        outputs = [torch.empty(predictions[0].shape, dtype=dtype) for _ in (update[0] if update else [()])]
        module.guide_momentum(carried, outputs, momentum, predictions, *args, **more)
    around = carried.as_strided((carried.numel() + 2 * common.GUARD,), (1,), 0)
    assert int(around.isnan().sum()) >= 2 * common.GUARD, "written outside of the momentum buffer"
    return outputs, carried


def check(module: Any, predictions: Sequence[Tensor], links: Links, options: dict[str, Any]) -> None:
    right, right_buffer = by_reference(predictions, links, options, torch.float64)
    near, near_buffer = by_reference(predictions, links, options, torch.float32)
    outputs, buffer = by_kernel(module, predictions, links, options)
    again, buffer_again = by_kernel(module, predictions, links, options)
    # What is added up may be far larger than the result.
    largest = max((float(p.abs().max()) for p in predictions if p.numel()), default=0.0)
    if buffer is not None and buffer.numel():
        largest = max(largest, float(right_buffer.abs().max()) / options.get("sigma", 1.0))  # type: ignore[union-attr]
    added = largest * (1 + sum(2 * abs(scale) * (1 + abs(1 - options.get("eta", 1.0))) for *_, scale in links))
    if "update" in options:
        rows, history = options["update"]
        others = [float(t.abs().max()) for t in (options["latent"], *history) if t.numel()]
        added = max(sum(abs(c) for c in row) for row in rows) * max([added, *others], default=0.0)
    for y, exact, rough, same in zip(outputs, right, near, again, strict=True):
        assert y.is_contiguous()
        latent = options.get("latent")
        dtype = reference.output_dtype(predictions[0], latent, options.get("space", "velocity"), "update" in options)
        assert_best_rounding(y, exact, dtype, rough, terms=added)
        assert_same_bits(y, same)
    if buffer is not None and buffer.numel():
        assert right_buffer is not None and near_buffer is not None and buffer_again is not None
        assert_best_rounding(buffer, right_buffer, torch.float32, near_buffer, terms=largest)
        assert_same_bits(buffer, buffer_again)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], list[tuple[int, int, float]], dict[str, Any]]:
    shape, scale = draw(shapes), draw(common.scales)
    count = draw(st.integers(1, 8))
    layouts = draw(st.lists(common.layouts, min_size=1, max_size=3))
    if shape[0] == 0 or len(shape) == 1:
        layouts = ["contiguous"]
    predictions = branches(count, *shape, dtype=draw(common.dtypes), layouts=layouts, scale=scale)
    number = st.integers(0, count - 1)  # a link from a prediction to itself has no difference
    links = draw(st.lists(st.tuples(number, number, numbers(-2, 5)), max_size=5))
    space, apg = draw(st.sampled_from(["velocity", "x0"])), draw(st.sampled_from([None, "frame", "global"]))
    options: dict[str, Any] = {"apg": apg, "space": space}
    updates = draw(st.booleans())
    if space == "x0" or updates:
        options["latent"] = rand(*shape, dtype=draw(common.dtypes), layout=layouts[-1], scale=scale, seed=50)
        options["sigma"] = draw(numbers(0.125, 1))
    if updates:
        history = [rand(*shape, dtype=draw(common.dtypes), layout=layouts[0], scale=scale, seed=60 + i)
                   for i in range(draw(st.integers(0, 3)))]  # fmt: skip
        row = st.lists(numbers(-2, 2), min_size=2 + len(history), max_size=2 + len(history))
        options["update"] = (draw(st.lists(row, min_size=1, max_size=3)), history)
    if apg is not None:
        options["eta"] = draw(st.sampled_from([1.0, 0.0, 0.5, 1.5]))
        if draw(st.booleans()):
            size = scale * shape[-1] ** 0.5
            limits = st.sampled_from([0.0, -1.0, 0.2 * size, 100 * size])
            options["thresholds"] = draw(st.lists(limits, min_size=len(links), max_size=len(links)))
        if draw(st.booleans()):
            options["momentum"] = (draw(numbers(-0.75, 0.75)), rand(len(links), *shape, scale=0.3 * scale, seed=70))
    return predictions, links, options


@settings(max_examples=50)
@given(calls(), st.booleans())
def test_against_float64(call: tuple[list[Tensor], list[tuple[int, int, float]], dict[str, Any]], small: bool) -> None:
    with sized(kernel, small):
        check(kernel, *call)


@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
def test_five_branches_with_adaptive_projection_and_a_unipc_step(dtype: torch.dtype) -> None:
    """Paper eq. 12, with frames of several chunks."""
    shape = (2, 3, 700)
    options = {
        "apg": "frame", "space": "x0", "latent": rand(*shape, seed=50), "sigma": 0.71, "eta": 0.5,
        "thresholds": [5.0, 9.0, 50.0, 1.0],
        "update": ([[0.9, -0.3, 0.2, 0.1], [1.0, -0.71, 0.0, 0.0]], [rand(*shape, seed=51), rand(*shape, seed=52)]),
    }  # fmt: skip
    check(kernel, branches(5, *shape, dtype=dtype), CHAIN, options)


def test_few_frames_have_more_chunks() -> None:
    check(kernel, branches(2, 1, 34 * 1024 + 5), [(1, 0, 3.0)], {"apg": "frame", "eta": 0.2, "thresholds": [20.0]})


def test_sums_of_very_many_frames() -> None:
    """More than a program adds up."""
    for frames in (4, 5, 9):
        with sized(kernel):
            check(kernel, branches(2, frames, 130), [(1, 0, 3.0)], {"apg": "global", "eta": 0.2, "thresholds": [2.0]})


@pytest.mark.parametrize("space", ["velocity", "x0"])
@pytest.mark.parametrize("form", ["frame", "global"])
def test_zero_norms(form: str, space: str) -> None:
    """Nothing to project on, or no difference, is no reason for a NaN; the other frames go on."""
    p = branches(3, 3, 40)
    options: dict[str, Any] = {"apg": form, "eta": 0.3, "thresholds": [0.5, 0.5], "space": space}
    if space == "x0":
        options |= {"latent": rand(3, 40, seed=50), "sigma": 0.5}
        options["latent"][1] = 0
    for x in p:
        x[1] = 0
    p[2][0] = p[1][0]
    check(kernel, p, CHAIN[:2], options)
    zero = [torch.zeros(3, 40) for _ in range(3)]
    if space == "x0":
        options["latent"] = zero[0]
    (y,), _ = by_kernel(kernel, zero, CHAIN[:2], options)
    assert torch.equal(y, zero[0])


def test_predictions_without_a_link_are_not_looked_at() -> None:
    p, options = branches(2, 2, 40), {"apg": "frame", "eta": 0.3}
    want, _ = by_kernel(kernel, p, [(1, 0, 2.0)], options)
    got, _ = by_kernel(kernel, [*p, torch.full_like(p[0], float("nan"))], [(1, 0, 2.0)], options)
    assert_same_bits(got[0], want[0])


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("form", ["frame", "global"])
def test_sums_of_several_ranks(form: str, momentum: bool) -> None:
    """Two ranks with a half of every frame each: what ``reduce`` adds up is all that they exchange."""
    p, latent, buffer = branches(3, 2, 2100), rand(2, 2100, seed=50), rand(2, 2, 2100, scale=0.2, seed=70)
    options: dict[str, Any] = {"apg": form, "space": "x0", "sigma": 0.4, "eta": 0.3, "thresholds": [3.0, 40.0]}
    options |= {"update": ([[1.0, -0.2]], [])}

    def rank(columns: slice, reduce: Callable[[Tensor], None]) -> tuple[Tensor, Tensor | None]:
        own = options | {"latent": latent[:, columns]}
        if momentum:
            own["momentum"] = (0.5, buffer[:, :, columns].contiguous())
        outputs, carried = by_kernel(kernel, [x[:, columns] for x in p], CHAIN[:2], own, reduce=reduce)
        return outputs[0], carried

    halves, sums = (slice(0, 1200), slice(1200, 2100)), []
    for half in halves:
        rank(half, lambda own: sums.append(own.clone()))
    assert all(own.shape == (2, 3, 2 if form == "frame" else 1, 1) and own.is_contiguous() for own in sums)
    parts = [rank(half, lambda own: own.copy_(sums[0] + sums[1])) for half in halves]  # type: ignore[arg-type,return-value]
    whole = options | {"latent": latent} | ({"momentum": (0.5, buffer)} if momentum else {})
    (right,), right_buffer = by_reference(p, CHAIN[:2], whole, torch.float64)
    (near,), near_buffer = by_reference(p, CHAIN[:2], whole, torch.float32)
    assert_best_rounding(torch.cat([y for y, _ in parts], 1), right, torch.float32, near, terms=40.0)
    if momentum:
        assert right_buffer is not None and near_buffer is not None
        carried = torch.cat([b for _, b in parts if b is not None], 2)
        assert_best_rounding(carried, right_buffer, torch.float32, near_buffer, terms=4.0)


def test_public_function_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    assert {which(op) for op in ("guide", "guide_momentum")} == {"triton"}
    p, latent, buffer = branches(2, 2, 30), rand(2, 30, seed=50), rand(1, 2, 30, seed=70)
    carried, version = buffer.clone(), buffer._version
    v = guide(p, [(1, 0, 2.0)])
    assert torch.allclose(v, p[0] + 2 * (p[1] - p[0]), atol=1e-5)
    options: dict[str, Any] = {"apg": "frame", "eta": 0.5, "latent": latent}
    (got,) = guide(p, [(1, 0, 2.0)], momentum=(0.5, buffer), update=([[1.0, -0.5]], []), **options)
    assert torch.allclose(buffer, p[1] - p[0] + 0.5 * carried, atol=1e-6) and buffer._version > version
    monkeypatch.setenv("BERNINI_KERNELS", "reference")
    (want,) = guide(p, [(1, 0, 2.0)], momentum=(0.5, carried), update=([[1.0, -0.5]], []), **options)
    assert torch.allclose(got, want, atol=1e-5)


def test_bad_input_is_refused_before_any_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    monkeypatch.setattr(launch, "launch", lambda *args, **options: pytest.fail("launched"))
    p, links = branches(2, 2, 30), [(1, 0, 2.0)]
    with pytest.raises(ValueError, match=r"predictions\[1\] is \[2, 31\], but predictions\[0\] is \[2, 30\]"):
        guide([p[0], rand(2, 31)], links)
    with pytest.raises(ValueError, match=r"1 to 8 predictions, got 9"):
        guide([p[0]] * 9, links)
    with pytest.raises(ValueError, match=r"momentum buffer must be .* = \[1, 2, 30\], got \[2, 30\]"):
        guide(p, links, apg="frame", momentum=(0.5, p[0]))
    with pytest.raises(ValueError, match=r"triton implementation has no rounding='eager'"):
        guide(p, links, rounding="eager")
    with pytest.raises(ValueError, match=r"triton implementation does not take torch.float64"):
        guide(p, links, latent=p[0].half(), update=([[1.0, 1.0, 1.0]], [p[0].double()]))


# --- wrong kernels are noticed ---------------------------------------------------------------------------------------


def smoke(module: Any) -> None:
    """A handful of comparisons that any wrong kernel fails."""
    shape = (3, 300)
    p = branches(4, *shape, layouts=("contiguous", "packed", "stepped"))
    latent, history = rand(*shape, layout="packed", seed=50), [rand(*shape, layout="stepped", seed=51)]
    update = ([[0.9, -0.4, 0.2], [0.0, 1.0, -0.5]], history)
    p[2][1] *= 3  # frames of unequal size
    options: dict[str, Any] = {"eta": 0.5, "latent": latent, "sigma": 0.6}
    check(module, p, CHAIN[:3], options)
    for form, space in (("frame", "x0"), ("global", "velocity")):
        chosen = options | {"apg": form, "space": space, "thresholds": [0.0, 3.0, 500.0]}
        for small in (True, False):
            with sized(module, small):
                check(module, p, CHAIN[:3], chosen | {"update": update})
                check(module, p, CHAIN[:3], chosen | {"momentum": (-0.5, rand(3, *shape, seed=70))})
                check(module, branches(2, 1, 280), CHAIN[:1], {"apg": form, "eta": 0.2, "thresholds": [1.0]})
        zero = [torch.zeros(2, 5) for _ in range(2)]
        check(module, zero, CHAIN[:1], {"apg": form, "eta": 0.2})


def test_smoke_accepts_the_kernel() -> None:
    smoke(kernel)


@pytest.mark.parametrize("variant", common.broken("guidance"))
def test_smoke_refuses_broken_kernels(variant: Any) -> None:
    with pytest.raises(AssertionError):
        smoke(variant.load())
