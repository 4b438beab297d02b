"""guide against plain loops over frames, its op contracts, and mistakes that the comparison must notice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bernini.kernels import guide, which
from bernini.kernels.guidance import reference

CHAIN = [(1, 0, 1.25), (2, 1, 4.5), (3, 2, 4.0)]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def preds(n: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Correlated, as the branches of one step are."""
    common = rand(*shape, seed=100, dtype=dtype)
    return [common + 0.3 * rand(*shape, seed=i, dtype=dtype) for i in range(n)]


def brute(
    predictions: Sequence[Tensor],
    links: Sequence[tuple[int, int, float]],
    *,
    apg: str | None = None,
    latent: Tensor | None = None,
    sigma: float = 1.0,
    eta: float = 1.0,
    thresholds: Sequence[float] | None = None,
    momentum: tuple[float, Tensor] | None = None,
    mistake: str = "",
) -> Tensor:
    """Literal, in Python floats; x0 space if a latent is given. ``mistake`` builds in one error."""
    frames = len(predictions[0])
    x = [p.double().reshape(frames, -1).tolist() for p in predictions]
    z = None if latent is None else latent.double().reshape(frames, -1).tolist()
    if z is not None:
        x = [[[a - sigma * b for a, b in zip(zr, pr, strict=True)] for zr, pr in zip(z, p, strict=True)] for p in x]
    result = [row[:] for row in x[0]]
    for number, (new, old, scale) in enumerate(links):
        d = [[a - b for a, b in zip(r, s, strict=True)] for r, s in zip(x[new], x[old], strict=True)]
        if momentum is not None:
            previous = momentum[1][number].double().reshape(frames, -1).tolist()
            d = [[a + momentum[0] * b for a, b in zip(r, s, strict=True)] for r, s in zip(d, previous, strict=True)]
            if mistake == "momentum after":
                d = [[a - momentum[0] * b for a, b in zip(r, s, strict=True)] for r, s in zip(d, previous, strict=True)]
        whole = apg == "global" or mistake == "all frames"
        groups = [list(range(frames))] if whole else [[f] for f in range(frames)]
        onto = x[old] if mistake == "onto old" else x[new]
        if apg is not None:
            for group in groups:
                norm = math.sqrt(sum(v * v for f in group for v in d[f]))
                threshold = thresholds[number] if thresholds else 0.0
                clip = min(1.0, threshold / norm) if threshold > 0 and norm > 0 else 1.0
                square = sum(v * v for f in group for v in onto[f])
                size = square + 1e-8 if apg == "global" else max(math.sqrt(square), 1e-12) ** 2
                along = sum(clip * a * b for f in group for a, b in zip(d[f], onto[f], strict=True)) / size
                e = 1.0 / eta if mistake == "inverse eta" else eta
                for f in group:
                    parallel = [along * v for v in onto[f]]
                    d[f] = [clip * a - p + e * p for a, p in zip(d[f], parallel, strict=True)]
        result = [[a + scale * b for a, b in zip(r, s, strict=True)] for r, s in zip(result, d, strict=True)]
    if z is not None:
        result = [[(a - b) / sigma for a, b in zip(zr, r, strict=True)] for zr, r in zip(z, result, strict=True)]
    return torch.tensor(result, dtype=torch.float64).reshape(predictions[0].shape)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], list[tuple[int, int, float]], dict[str, Any], dict[str, Any]]:
    """predictions, links, options of guide, options of brute."""
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    shape = draw(st.sampled_from([(1, 1), (3, 5), (2, 3, 2), (4,), (1, 7), (2, 2, 1, 3)]))
    count = draw(st.integers(1, 4))
    predictions = [p.to(dtype) for p in preds(count, *shape)]
    if draw(st.booleans()):  # a transposed copy: same values, other strides
        predictions = [
            p.permute(*reversed(range(p.dim()))).contiguous().permute(*reversed(range(p.dim()))) for p in predictions
        ]
    if draw(st.booleans()):
        predictions[-1] = torch.zeros_like(predictions[-1])  # no direction to project on
    number = st.integers(0, count - 1)
    scale = st.floats(-2, 5)
    links = draw(st.lists(st.tuples(number, number, scale), max_size=3))
    ours: dict[str, Any] = {"apg": draw(st.sampled_from([None, "frame", "global"]))}
    theirs: dict[str, Any] = dict(ours)
    if draw(st.booleans()):
        theirs |= {"latent": rand(*shape, seed=50, dtype=dtype), "sigma": draw(st.floats(0.1, 1.0))}
        ours |= {"space": "x0"} | {key: theirs[key] for key in ("latent", "sigma")}
    if ours["apg"] is not None:
        options: dict[str, Any] = {"eta": draw(st.floats(0, 2))}
        if draw(st.booleans()):
            options["thresholds"] = draw(st.lists(st.floats(0, 2), min_size=len(links), max_size=len(links)))
        if draw(st.booleans()):
            options["momentum"] = (draw(st.floats(-0.9, 0.9)), rand(len(links), *shape, seed=60, dtype=dtype))
        ours, theirs = ours | options, theirs | options
    return predictions, links, ours, theirs


@settings(max_examples=120, deadline=None)
@given(calls())
def test_matches_loops(
    call: tuple[list[Tensor], list[tuple[int, int, float]], dict[str, Any], dict[str, Any]],
) -> None:
    predictions, links, ours, theirs = call
    expected = brute(predictions, links, **theirs)
    before = ours["momentum"][1].clone() if "momentum" in ours else None
    tolerance = 1e-9 if predictions[0].dtype == torch.float64 else 2e-4
    actual = guide(predictions, links, **ours)
    assert actual.is_contiguous()
    assert actual.dtype == predictions[0].dtype
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
    if before is not None:
        coefficient, buffer = ours["momentum"]
        sign = -ours["sigma"] if "sigma" in ours else 1.0
        for i, (new, old, _) in enumerate(links):
            delta = sign * (predictions[new] - predictions[old]) + coefficient * before[i]
            torch.testing.assert_close(buffer[i], delta)


@pytest.mark.parametrize("rounding", ["fp32", "eager"])
@pytest.mark.parametrize("space", ["velocity", "x0"])
@pytest.mark.parametrize("apg", [None, "frame", "global"])
def test_roundings_agree_in_float64(apg: str | None, space: str, rounding: str) -> None:
    predictions = preds(4, 3, 10, dtype=torch.float64)
    options: dict[str, Any] = {"apg": apg, "eta": 0.3}
    latent = rand(3, 10, seed=9, dtype=torch.float64)
    if apg is not None:
        options["thresholds"] = [0.5, 1.0, 50.0]
    expected = brute(predictions, CHAIN, **options, latent=latent if space == "x0" else None, sigma=0.4)
    actual = guide(predictions, CHAIN, **options, space=space, latent=latent, sigma=0.4, rounding=rounding)
    torch.testing.assert_close(actual, expected)


def test_mistakes_are_noticed() -> None:
    """Each of these must be far above the tolerance of the golden tensors (2e-5)."""
    predictions, latent = preds(4, 3, 40), rand(3, 40, seed=9)
    predictions[2][1] *= 3  # frames of unequal size
    options: dict[str, Any] = {
        "apg": "frame",
        "eta": 0.5,
        "thresholds": [1.0, 1.0, 1.0],
        "latent": latent,
        "sigma": 0.7,
    }
    buffer = rand(3, 3, 40, seed=70)
    right = guide(predictions, CHAIN, space="x0", **options, momentum=(-0.5, buffer.clone()))
    torch.testing.assert_close(
        right.double(), brute(predictions, CHAIN, **options, momentum=(-0.5, buffer)), atol=2e-5, rtol=0
    )
    for mistake in ("all frames", "onto old", "inverse eta", "momentum after"):
        wrong = brute(predictions, CHAIN, **options, momentum=(-0.5, buffer), mistake=mistake)
        assert (right - wrong).abs().max() > 1e-2, mistake
    velocity = guide(predictions, CHAIN, apg="frame", eta=0.5, thresholds=[1.0, 1.0, 1.0])
    assert (right - velocity).abs().max() > 1e-2
    plain = guide(predictions, CHAIN)
    euler = guide(predictions, CHAIN, latent=latent, update=([[1.0, -0.1]], []))
    torch.testing.assert_close(euler[0], latent - 0.1 * plain)
    assert (euler[0] - (latent + 0.1 * plain)).abs().max() > 1e-2  # a step in the wrong direction


@pytest.mark.parametrize("latent_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [False, True])
def test_update_outputs(latent_dtype: torch.dtype, momentum: bool) -> None:
    predictions = [p.bfloat16() for p in preds(2, 3, 4, 5)]
    latent, history = rand(3, 4, 5, seed=8).to(latent_dtype), [rand(3, 4, 5, seed=s) for s in (6, 7)]
    rows = [[1.0, -0.1, 0.5, 0.25], [0.0, 1.0, 0.0, 0.0], [1.0, -0.7, 0.0, 0.0]]
    options: dict[str, Any] = {"apg": "frame", "eta": 0.5, "space": "x0", "sigma": 0.7}
    with_buffer = options | ({"momentum": (0.3, torch.zeros(1, 3, 4, 5))} if momentum else {})
    outputs = guide(predictions, [(1, 0, 4.0)], latent=latent, update=(rows, history), **with_buffer)
    wide = [p.float() for p in predictions]
    v = guide(wide, [(1, 0, 4.0)], latent=latent.float(), **options)
    assert len(outputs) == 3
    for row, output in zip(rows, outputs, strict=True):
        expected = row[0] * latent.float() + row[1] * v + row[2] * history[0] + row[3] * history[1]
        assert output.dtype == latent_dtype
        torch.testing.assert_close(output, expected.to(latent_dtype))


def test_dtypes_and_zero_differences() -> None:
    bf16, latent = [p.bfloat16() for p in preds(4, 2, 6)], rand(2, 6, seed=3)
    for rounding in ("fp32", "eager"):
        assert guide(bf16, CHAIN, rounding=rounding).dtype == torch.bfloat16
        assert guide(bf16, CHAIN, apg="global", eta=0.2, rounding=rounding).dtype == torch.bfloat16
        x0 = guide(bf16, CHAIN, apg="frame", space="x0", latent=latent, sigma=0.5, rounding=rounding)
        assert x0.dtype == torch.float32
        same = [bf16[0]] * 4
        for form in ("frame", "global"):
            still = guide(same, CHAIN, apg=form, eta=0.2, thresholds=[1.0, 1.0, 1.0], rounding=rounding)
            assert torch.equal(still, bf16[0])
    once = guide([p.float() for p in bf16], CHAIN).bfloat16()
    assert torch.equal(guide(bf16, CHAIN), once)  # fp32: rounded once ...
    assert not torch.equal(guide(bf16, CHAIN, rounding="eager"), once)  # ... eager: after every operation


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)])
def test_empty(shape: tuple[int, ...]) -> None:
    predictions = preds(2, *shape)
    for form in ("frame", "global"):
        assert guide(predictions, [(1, 0, 2.0)], apg=form, thresholds=[1.0]).shape == shape
    alone = guide(predictions[:1], [])
    assert torch.equal(alone, predictions[0])
    assert not alone.numel() or alone.data_ptr() != predictions[0].data_ptr()


@pytest.mark.parametrize("space", ["velocity", "x0"])
@pytest.mark.parametrize("apg", [None, "frame", "global"])
def test_reference_gradients(apg: str | None, space: str) -> None:
    """The op has no gradient, but its definition is differentiable, zero differences included."""
    inputs = [p.requires_grad_() for p in preds(3, 2, 3, dtype=torch.float64)]
    latent = rand(2, 3, seed=5, dtype=torch.float64).requires_grad_()

    def run(a: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        thresholds = [0.2, 9.0, 1.0] if apg else []
        args: tuple[Any, ...] = (
            [1, 2, 1],
            [0, 1, 1],
            [1.5, 4.0, 2.0],
            apg,
            space,
            z,
            0.6,
            0.3,
            thresholds,
            [],
            [],
            "fp32",
        )
        return reference.guide([a, b, c], *args)[0]

    torch.autograd.gradcheck(run, (*inputs, latent))


def op_args(**changed: Any) -> tuple[Any, ...]:
    values: dict[str, Any] = {
        "predictions": preds(3, 2, 6),
        "new": [1, 2],
        "old": [0, 1],
        "scales": [2.0, 3.0],
        "apg": "frame",
        "space": "x0",
        "latent": rand(2, 6, seed=4),
        "sigma": 0.5,
        "eta": 0.5,
        "thresholds": [1.0, 0.0],
        "coefficients": [],
        "history": [],
        "rounding": "fp32",
    }
    return tuple((values | changed).values())


def test_opcheck() -> None:
    update = {"coefficients": [1.0, 0.1, 0.2, 0.0, 1.0, 0.0], "history": [rand(2, 6, seed=5)]}
    plain: dict[str, Any] = {"apg": None, "space": "velocity", "latent": None, "thresholds": []}
    for changed in ({}, update, plain):
        torch.library.opcheck(torch.ops.bernini.guide.default, op_args(**changed))
    outputs = [torch.empty(2, 6) for _ in range(2)]
    torch.library.opcheck(
        torch.ops.bernini.guide_momentum.default, (torch.zeros(2, 2, 6), outputs, 0.5, *op_args(**update))
    )


def test_compile() -> None:
    predictions, latent = preds(3, 2, 6), rand(2, 6, seed=4)

    def step(predictions: list[Tensor], latent: Tensor, buffer: Tensor, sigma: float) -> tuple[Tensor, ...]:
        v = guide(predictions, [(1, 0, 2.0), (2, 1, 3.0)], apg="global", eta=0.2)
        outputs = guide(
            [v, predictions[1]], [(1, 0, 2.0)], apg="frame", space="x0", latent=latent, sigma=sigma, eta=0.5,
            thresholds=[1.0], momentum=(0.5, buffer), update=([[1.0, -0.1]], []),
        )  # fmt: skip
        return (*outputs, buffer + 0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, theirs = torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)
    for sigma in (0.9, 0.7, 0.3):
        for a, b in zip(
            compiled(predictions, latent, ours, sigma), step(predictions, latent, theirs, sigma), strict=True
        ):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours, theirs)


def test_fake_at_real_size() -> None:
    """21 latent frames of 480 x 848, five branches, UniPC with two history tensors."""
    with FakeTensorMode():
        predictions = [torch.empty(21, 16, 60, 106, dtype=torch.bfloat16) for _ in range(5)]
        latent, buffer = torch.empty(21, 16, 60, 106), torch.empty(4, 21, 16, 60, 106)
        links = [(i + 1, i, 2.0) for i in range(4)]
        v = guide(predictions, links, apg="global", eta=0.2)
        assert v.shape == latent.shape and v.dtype == torch.bfloat16
        rows, history = [[1.0, 0.1, 0.2, 0.3], [1.0, -0.5, 0.0, 0.0]], [latent, latent]
        outputs = guide(
            predictions, links, apg="frame", space="x0", latent=latent, sigma=0.5, momentum=(-0.5, buffer),
            update=(rows, history),
        )  # fmt: skip
        assert [(o.shape, o.dtype) for o in outputs] == [(latent.shape, torch.float32)] * 2


def test_which() -> None:
    assert which("guide", rounding="eager") == which("guide_momentum", dtype=torch.float64) == "reference"


P = preds(2, 3, 4)
L = [(1, 0, 2.0)]
BAD: list[tuple[str, Sequence[Tensor], Any, dict[str, Any]]] = [
    ("1 to 8 predictions, got 0", [], [], {}),
    ("1 to 8 predictions, got 9", [P[0]] * 9, L, {}),
    (r"predictions\[1\] is \[3, 5\], but predictions\[0\] is \[3, 4\]", [P[0], rand(3, 5)], L, {}),
    (r"predictions\[1\] is torch.float64, but", [P[0], P[1].double()], L, {}),
    ("floating point", [p.int() for p in P], L, {}),
    ("got a scalar", [torch.tensor(1.0)], [], {}),
    (r"link 0 is \(2, 0\), but there are 2", P, [(2, 0, 1.0)], {}),
    (r"link 0 is \(1, -1\)", P, [(1, -1, 1.0)], {}),
    ("apg='row'", P, L, {"apg": "row"}),
    ("space='pixel'", P, L, {"space": "pixel"}),
    ("rounding='bf16'", P, L, {"rounding": "bf16"}),
    ("got apg=None", P, L, {"thresholds": [1.0]}),
    ("got apg=None", P, L, {"momentum": (0.5, torch.zeros(1, 3, 4))}),
    ("2 thresholds for 1 links", P, L, {"apg": "frame", "thresholds": [1.0, 2.0]}),
    ("latent is needed for x0 space", P, L, {"space": "x0", "sigma": 0.5}),
    ("latent is needed for an update", P, L, {"update": ([[1.0, 0.1]], [])}),
    (r"latent is \[3, 5\]", P, L, {"latent": rand(3, 5)}),
    ("sigma > 0, got None", P, L, {"space": "x0", "latent": P[0]}),
    ("sigma > 0, got 0.0", P, L, {"space": "x0", "latent": P[0], "sigma": 0.0}),
    ("host numbers, got a tensor", P, L, {"space": "x0", "latent": P[0], "sigma": torch.tensor(0.5)}),
    ("host numbers, got a tensor", P, [(1, 0, torch.tensor(2.0))], {}),
    (r"rows of 2 \+ 1 coefficients .* got rows of \[2\]", P, L, {"latent": P[0], "update": ([[1.0, 0.1]], [P[0]])}),
    (r"got rows of \[\]", P, L, {"latent": P[0], "update": ([], [])}),
    (r"history\[0\] is \[2, 4\]", P, L, {"latent": P[0], "update": ([[1.0, 0.1, 0.0]], [rand(2, 4)])}),
    (
        r"\[links, frames, ...\] = \[1, 3, 4\], got \[3, 4\]",
        P,
        L,
        {"apg": "frame", "momentum": (0.5, torch.zeros(3, 4))},
    ),
    (
        "contiguous torch.float32, got torch.float64",
        P,
        L,
        {"apg": "frame", "momentum": (0.5, torch.zeros(1, 3, 4).double())},
    ),
    ("different devices", [P[0], P[1].to("meta")], L, {}),
    (r"inference only, but predictions\[1\] requires grad", [P[0], P[1].clone().requires_grad_()], L, {}),
]


@pytest.mark.parametrize(("message", "predictions", "links", "options"), BAD)
def test_bad_inputs(message: str, predictions: Sequence[Tensor], links: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        guide(predictions, links, **options)


def test_no_grad_accepts_parameters() -> None:
    with torch.no_grad():
        guide([P[0], P[1].clone().requires_grad_()], L)
