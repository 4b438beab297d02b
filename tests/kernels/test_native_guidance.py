"""The C++ twin of guide against the float64 reference: errors no larger than rounding makes them, and always the same
bits. Shapes: F frames, M values per frame, L links.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bernini.kernels import guide, which
from bernini.kernels.guidance import native, reference
from bernini.kernels.native import loader

pytestmark = pytest.mark.skipif(loader.missing() is not None, reason=f"the native library {loader.missing()}")

DTYPES = (torch.float32, torch.bfloat16)
# Frames of one value, of a few, of a block and a bit, of several chunks; frames enough to be shared out whole.
SHAPES = [(1, 1), (3, 5), (2, 3, 2), (4,), (2, 2, 1, 33), (3, 1100), (1, 7000), (9, 70)]
CHAIN = [(1, 0, 1.25), (2, 1, 4.5), (3, 2, 4.0), (4, 3, 1.0)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def branches(count: int, *shape: int, dtype: torch.dtype = torch.float32, spread: float = 0.3) -> list[Tensor]:
    """Correlated, as the branches of one step are."""
    common = torch.randn(*shape)
    return [(common + spread * torch.randn(*shape)).to(dtype) for _ in range(count)]


def transposed(x: Tensor) -> Tensor:
    """The same values with other strides."""
    order = list(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def by_reference(predictions: list[Tensor], links: Any, options: dict[str, Any], dtype: torch.dtype) -> Any:
    """(outputs, momentum buffer) of the reference, computed in ``dtype`` and not rounded from it."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype)
        return type(value)(wide(v) for v in value) if isinstance(value, list | tuple) else value

    options = {name: wide(value) for name, value in options.items()}
    momentum, buffer = options.get("momentum", (0.0, None))
    buffer = None if buffer is None else buffer.clone()
    rows, history = options.get("update", ([], []))
    columns: Any = list(zip(*links, strict=True)) or [(), (), ()]
    outputs = reference.guide(
        wide(predictions), *columns, options["apg"], options["space"], options.get("latent"),
        options.get("sigma", 0.0), options.get("eta", 1.0), options.get("thresholds") or [],
        [c for row in rows for c in row], history, "fp32", buffer, momentum,
    )  # fmt: skip
    return outputs, buffer


def check(predictions: list[Tensor], links: Any, options: dict[str, Any]) -> None:
    """Allowed at any element: twice the error of float32's reference, two steps of float32 at the size of what is added
    up (the result may be a small rest of it), and half a step of the output's dtype."""
    (right, right_buffer) = by_reference(predictions, links, options, torch.float64)
    (near, near_buffer) = by_reference(predictions, links, options, torch.float32)
    outputs = guide(predictions, links, **options)
    got = list(outputs) if isinstance(outputs, tuple) else [outputs]
    added = max((p.abs().max().item() for p in predictions if p.numel()), default=0.0)
    added *= 1 + sum(abs(scale) for *_, scale in links)
    pairs = list(zip(got, right, near, strict=True))
    if right_buffer is not None:
        pairs.append((options["momentum"][1], right_buffer, near_buffer))
    for ours, want, theirs in pairs:
        assert ours.shape == want.shape and ours.is_contiguous()
        if not want.numel():
            continue
        size = want.abs().max().item()
        allowed = 2 * (theirs - want).abs().max().item() + 2e-6 * size + 2.4e-7 * added + 1e-37
        half = torch.exp2(torch.frexp(want).exponent - 9.0) if ours.dtype == torch.bfloat16 else 0.0
        assert ((ours.double() - want).abs() <= allowed + half).all()


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], list[tuple[int, int, float]], dict[str, Any]]:
    torch.manual_seed(draw(st.integers(0, 99)))
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    count = draw(st.integers(1, 8))
    predictions = branches(count, *shape, dtype=dtype)
    if draw(st.booleans()):
        predictions = [transposed(p) for p in predictions]
    if draw(st.booleans()):
        predictions[draw(st.integers(0, count - 1))].zero_()  # nothing to project on
    number = st.integers(0, count - 1)  # a link from a prediction to itself has no difference
    links = draw(st.lists(st.tuples(number, number, st.floats(-2, 5)), max_size=9))
    options: dict[str, Any] = {
        "apg": draw(st.sampled_from([None, "frame", "global"])),
        "space": draw(st.sampled_from(["velocity", "x0"])),
    }
    updates = draw(st.booleans())
    if options["space"] == "x0" or updates:
        latent = torch.randn(shape).to(draw(st.sampled_from(DTYPES)))
        options["latent"] = transposed(latent) if draw(st.booleans()) else latent
        options["sigma"] = draw(st.floats(0.2, 1.0))
    if options["apg"] is not None:
        options["eta"] = draw(st.sampled_from([0.0, 0.5, 1.0, 1.7]))
        if draw(st.booleans()):
            limit = st.sampled_from([-1.0, 0.0, 0.5, 3.0, 50.0])
            options["thresholds"] = draw(st.lists(limit, min_size=len(links), max_size=len(links)))
        if draw(st.booleans()):
            options["momentum"] = (draw(st.floats(-0.9, 0.9)), torch.randn(len(links), *shape))
    if updates:
        history = [torch.randn(shape).to(d) for d in draw(st.lists(st.sampled_from(DTYPES), max_size=7))]
        row = st.lists(st.floats(-1, 1), min_size=2 + len(history), max_size=2 + len(history))
        options["update"] = (draw(st.lists(row, min_size=1, max_size=3)), history)
    return predictions, links, options


@settings(max_examples=300)
@given(calls())
def test_against_float64(call: tuple[list[Tensor], list[tuple[int, int, float]], dict[str, Any]]) -> None:
    check(*call)


def options_of(form: str | None, space: str, momentum: bool, shape: tuple[int, ...]) -> dict[str, Any]:
    """Everything at once, on random tensors."""
    options: dict[str, Any] = {"apg": form, "space": space, "latent": torch.randn(shape), "sigma": 0.7}
    if form is not None:
        options |= {"eta": 0.5, "thresholds": [2.0, 50.0, 0.0, 5.0]}
        if momentum:
            options["momentum"] = (-0.5, torch.randn(len(CHAIN), *shape))
    history = [torch.randn(shape), torch.randn(shape).bfloat16()]
    return options | {"update": ([[1.0, -0.1, 0.2, 0.1], [1.0, -0.7, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], history)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("space", ["velocity", "x0"])
@pytest.mark.parametrize("form", [None, "frame", "global"])
def test_the_same_bits_for_any_number_of_threads(
    form: str | None, space: str, momentum: bool, dtype: torch.dtype
) -> None:
    """Few threads share frame after frame where eight go through all of them twice; and results that are streamed past
    the cache."""
    for shape in ((9, 5000), (2, 40_000), (3, 300_000)):
        torch.manual_seed(0)
        predictions, options = branches(5, *shape, dtype=dtype), options_of(form, space, momentum, shape)
        results = []
        for count in (1, 2, 3, 8):
            with threads(count):
                own = dict(options)
                if "momentum" in own:
                    own["momentum"] = (own["momentum"][0], own["momentum"][1].clone())
                outputs = guide(predictions, CHAIN, **own)
                results.append([*outputs, *([own["momentum"][1]] if "momentum" in own else [])])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), shape


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("spread", [0.3, 1e-3])
@pytest.mark.parametrize("form", [None, "frame", "global"])
@pytest.mark.parametrize("space", ["velocity", "x0"])
def test_accuracy(form: str | None, space: str, spread: float) -> None:
    """bfloat16 results within 1.05 of the best rounding, float32 ones no worse than the float32 reference.

    Branches that hardly differ show whether the sums were taken over differences. Both sides round a handful of
    weights once for a whole frame, and who is luckier there makes up to 2 %.
    """
    torch.manual_seed(0)
    shape = (4, 16 * 30 * 13)
    for latent_dtype in DTYPES:
        predictions, options = branches(5, *shape, spread=spread), options_of(form, space, False, shape)
        options["latent"] = options["latent"].to(latent_dtype)
        right, _ = by_reference(predictions, CHAIN, options, torch.float64)
        near, _ = by_reference(predictions, CHAIN, options, torch.float32)
        for ours, want, theirs in zip(guide(predictions, CHAIN, **options), right, near, strict=True):
            if latent_dtype == torch.bfloat16:
                assert rms(ours - want) <= 1.05 * rms(want.bfloat16() - want)
            else:
                assert rms(ours - want) <= 1.03 * rms(theirs - want)


def test_zero_norms_leave_the_first_branch() -> None:
    for dtype in DTYPES:
        p = branches(1, 3, 200, dtype=dtype)[0]
        zero = torch.zeros_like(p)
        for form in ("frame", "global"):
            options: dict[str, Any] = {"apg": form, "eta": 0.2, "thresholds": [1.0] * 4}
            assert torch.equal(guide([p] * 5, CHAIN, **options), p)
            assert torch.equal(guide([zero] * 5, CHAIN, **options), zero)
            still = guide([zero] * 5, CHAIN, space="x0", latent=zero.float(), sigma=0.5, **options)
            assert torch.equal(still, zero.float())


def test_a_prediction_that_no_link_names_does_not_matter() -> None:
    p, other = branches(2, 3, 40)
    bad = torch.full_like(p, torch.nan)
    for form in (None, "frame", "global"):
        eta = 1.0 if form is None else 0.5
        want = guide([p, other], [(1, 0, 2.0)], apg=form, eta=eta)
        assert torch.equal(guide([p, other, bad], [(1, 0, 2.0)], apg=form, eta=eta), want)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty(shape: tuple[int, ...]) -> None:
    p, latent = torch.empty(shape), torch.empty(shape)
    momentum = (0.5, torch.empty(1, *shape))
    outputs = guide([p, p], [(1, 0, 2.0)], apg="frame", latent=latent, momentum=momentum, update=([[1.0, 0.5]], []))
    assert [x.shape for x in outputs] == [p.shape]


def test_other_dtypes_take_the_reference() -> None:
    """A latent or a history that the library does not read decides, whatever the predictions are."""
    assert which("guide") == which("guide_momentum", dtype=torch.bfloat16) == "native"
    p, q = branches(2, 2, 6)
    for dtype in (torch.float64, torch.float16):
        latent = torch.randn(2, 6).to(dtype)
        (state,) = guide([p, q], [(1, 0, 2.0)], latent=latent, update=([[1.0, -0.5]], []))
        want = latent.double() - 0.5 * (p.double() + 2.0 * (q.double() - p.double()))
        assert state.dtype == dtype
        torch.testing.assert_close(state, want.to(dtype))
        (state,) = guide([p, q], [(1, 0, 2.0)], latent=p, update=([[1.0, 0.0, 1.0]], [latent]))
        torch.testing.assert_close(state, (p.double() + latent.double()).to(p.dtype))


def test_changes_are_seen_by_autograd() -> None:
    p, q = branches(2, 2, 6)
    buffer = torch.zeros(1, 2, 6)
    before = buffer._version
    guide([p, q], [(1, 0, 2.0)], apg="frame", eta=0.5, momentum=(0.5, buffer))
    assert buffer._version > before
    torch.testing.assert_close(buffer[0], q - p)
    with torch.inference_mode():
        inside = torch.zeros(1, 2, 6)
        guide([p, q], [(1, 0, 2.0)], apg="frame", eta=0.5, momentum=(0.5, inside))
    assert torch.equal(inside, buffer)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_temporaries() -> None:
    from bench_perf.harness import extra_memory

    shape = (21, 16 * 30 * 52)
    predictions, options = branches(5, *shape, dtype=torch.bfloat16), options_of("frame", "x0", True, shape)
    outputs = 3 * 4 * predictions[0].numel()
    assert extra_memory(lambda: guide(predictions, CHAIN, **options)) < outputs + 2e6


def test_the_library_is_called_directly() -> None:
    """As the dispatcher does, and once per call."""
    p, q = branches(2, 3, 4)
    args: tuple[Any, ...] = ([1], [0], [2.0], None, "velocity", None, 0.0, 1.0, [], [], [], "fp32")
    (v,) = native.guide([p, q], *args)
    torch.testing.assert_close(v, p + 2.0 * (q - p))
