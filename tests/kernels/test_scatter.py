"""scatter_rows and gather_rows against loops over rows, their contracts, and mistakes to be noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bernini.kernels import gather_rows, scatter_rows, which
from bernini.kernels.scatter import reference

FLOATS = [torch.float64, torch.float32, torch.bfloat16]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def scatters(draw: st.DrawFn) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A buffer, pieces of it in other dtypes and strides, and disjoint targets; some rows may stay untouched."""
    rows, width = draw(st.integers(0, 12)), draw(st.integers(0, 4))
    out = rand(rows, width, seed=1, dtype=draw(st.sampled_from(FLOATS)))
    if draw(st.booleans()):
        out = rand(rows, 2 * width, seed=1, dtype=out.dtype)[:, ::2]
    left = draw(st.permutations(range(rows)))
    sources, indices = [], []
    for number in range(draw(st.integers(0, 3))):
        count = draw(st.integers(0, len(left)))
        taken, left = left[:count], left[count:]
        source = rand(width, count, seed=10 + number, dtype=draw(st.sampled_from(FLOATS))).T
        sources.append(source if draw(st.booleans()) else source.contiguous())
        indices.append(torch.tensor(taken, dtype=draw(st.sampled_from([torch.int32, torch.int64]))))
    return out, sources, indices


@settings(max_examples=80, deadline=None)
@given(scatters(), st.booleans())
def test_scatter_matches_loops(call: tuple[Tensor, list[Tensor], list[Tensor]], grad: bool) -> None:
    out, sources, indices = call
    expected = out.clone()
    for source, index in zip(sources, indices, strict=True):
        for i, row in enumerate(index.tolist()):
            expected[row] = source[i]
        source.requires_grad_(grad)
    address = out.data_ptr()
    result = scatter_rows(out, sources, indices)
    assert result is out and out.data_ptr() == address
    assert torch.equal(out.detach(), expected)
    if grad and sources:
        dout = rand(*out.shape, seed=5, dtype=out.dtype)
        for d, source, index in zip(torch.autograd.grad(result, sources, dout), sources, indices, strict=True):
            assert d.dtype == source.dtype
            assert torch.equal(d, dout[index.long()].to(source.dtype))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_gather_matches_loops(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 4))
    x = rand(width, rows, seed=1, dtype=data.draw(st.sampled_from(FLOATS))).T.requires_grad_()
    numbers = data.draw(st.lists(st.integers(0, rows - 1), max_size=9))
    index = torch.tensor(numbers, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    y = gather_rows(x, index)
    assert y.is_contiguous() and y.dtype == x.dtype and y.shape == (len(numbers), width)
    for i, row in enumerate(numbers):
        assert torch.equal(y[i], x[row])
    dy = rand(*y.shape, seed=2, dtype=x.dtype)
    total = torch.zeros(rows, width, dtype=torch.float64)
    for i, row in enumerate(numbers):
        total[row] += dy[i].double()
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == x.dtype
    torch.testing.assert_close(
        dx.double(), total, atol=0 if not numbers else 1e-6, rtol=2**-8 if x.dtype == torch.bfloat16 else 1e-6
    )


def test_repeated_rows_are_summed_wide() -> None:
    """257 bfloat16 ones: a running bfloat16 sum would stop at 256."""
    x = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    (dx,) = torch.autograd.grad(gather_rows(x, torch.zeros(300, dtype=torch.int64)).sum(), x)
    assert dx[0].item() == 300 and dx[1].item() == 0


def test_gradients() -> None:
    sources = [rand(2, 3, seed=i, dtype=torch.float64).requires_grad_() for i in range(2)]
    indices = [torch.tensor([4, 0]), torch.tensor([1, 3], dtype=torch.int32)]
    buffer = rand(5, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: scatter_rows(buffer.clone(), [a, b], indices), tuple(sources))
    index = torch.tensor([1, 1, 0, 4, 1])
    x = buffer.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, index), x)
    dy = rand(5, 3, seed=8, dtype=torch.float64)
    (expected,) = torch.autograd.grad(reference.gather_rows(x, index), x, dy)
    torch.testing.assert_close(reference.gather_rows_backward(dy, index, 5), expected)
    # only some sources need a gradient
    scatter_rows(buffer, [sources[0], sources[1].detach()], indices).sum().backward()
    torch.testing.assert_close(sources[0].grad, torch.ones(2, 3, dtype=torch.float64))
    assert sources[1].grad is None
    with torch.no_grad():
        scatter_rows(buffer.detach(), sources, indices)


def test_mistakes_are_noticed() -> None:
    """Scatter and gather are each other's transpose, not the same: a random order tells them apart."""
    x, order = rand(6, 3), torch.tensor([2, 0, 5, 1, 4, 3])
    scattered = scatter_rows(torch.zeros(6, 3), [x], [order])
    assert torch.equal(gather_rows(scattered, order), x)
    assert not torch.equal(scattered, gather_rows(x, order))


def test_conversion_has_no_full_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CONVERT_ROWS", 3)
    out, source = torch.zeros(8, 2, dtype=torch.bfloat16), rand(8, 2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    scatter_rows(out, [source], [order])
    assert torch.equal(out[order], source.bfloat16())


def test_opcheck() -> None:
    indices = [torch.tensor([4, 0]), torch.tensor([1, 3], dtype=torch.int32)]
    sources = [rand(2, 3, seed=1), rand(2, 3, seed=2, dtype=torch.bfloat16)]
    torch.library.opcheck(torch.ops.bernini.scatter_rows.default, (torch.zeros(5, 3), sources, indices))
    x, index = rand(5, 3).requires_grad_(), torch.tensor([1, 1, 4])
    torch.library.opcheck(torch.ops.bernini.gather_rows.default, (x, index))
    torch.library.opcheck(torch.ops.bernini.gather_rows_backward.default, (rand(3, 3), index, 5))


def test_compile() -> None:
    indices = [torch.tensor([4, 0]), torch.tensor([1, 3], dtype=torch.int32)]
    sources = [rand(2, 3, seed=i).requires_grad_() for i in range(2)]

    def pack(a: Tensor, b: Tensor) -> Tensor:
        packed = scatter_rows(torch.zeros(5, 3), [a * 2, b], indices)
        return gather_rows(packed, torch.tensor([0, 0, 3])).square().sum()

    compiled = torch.compile(pack, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*sources), sources), torch.autograd.grad(pack(*sources), sources), strict=True
    ):
        torch.testing.assert_close(a, b)

    def write(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return scatter_rows(out, [a, b], indices) + 1

    buffer = torch.zeros(5, 3)
    given = [s.detach() for s in sources]
    result = torch.compile(write, fullgraph=True, backend="aot_eager")(buffer, *given)
    assert torch.equal(buffer, scatter_rows(torch.zeros(5, 3), given, indices))
    assert torch.equal(result, buffer + 1)
    tracked = torch.zeros(5, 3)
    torch.compile(write, fullgraph=True, backend="aot_eager")(tracked, *sources).sum().backward()
    assert torch.equal(tracked.detach(), buffer)
    torch.testing.assert_close(sources[0].grad, torch.ones(2, 3))


def test_fake_at_real_size() -> None:
    with FakeTensorMode():
        out = torch.empty(440_000, 5120, dtype=torch.bfloat16)
        source = torch.empty(220_000, 5120, requires_grad=True)
        index = torch.empty(220_000, dtype=torch.int64)
        packed = scatter_rows(out, [source], [index])
        assert packed.shape == out.shape and packed.dtype == torch.bfloat16
        y = gather_rows(packed, index)
        assert y.shape == source.shape and y.dtype == torch.bfloat16
        (d,) = torch.autograd.grad(y.sum(), source)
        assert d.shape == source.shape and d.dtype == torch.float32


def test_which() -> None:
    assert which("scatter_rows", dtype=torch.float64) and which("gather_rows") and which("gather_rows_backward")


X, ROWS = rand(4, 3), torch.tensor([0, 1])
BAD: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
    (ValueError, "1 sources but 2 indices", (X, [X[:2]], [ROWS, ROWS])),
    (ValueError, r"out must be \[rows, width\] = .* got \[4\]", (X[:, 0], [X[:2]], [ROWS])),
    (ValueError, r"sources\[0\] must be .*\[\*, 3\], got \[2, 2\]", (X, [X[:2, :2]], [ROWS])),
    (ValueError, r"indices\[1\] is \[2\], but sources\[1\] is \[3, 3\]", (X, [X[:2], X[:3]], [ROWS, ROWS])),
    (ValueError, r"indices\[0\] must be int32 or int64, got torch.bool \[2\]", (X, [X[:2]], [ROWS.bool()])),
    (ValueError, r"indices\[0\] must be \[rows\] = \[\*\], got \[2, 1\]", (X, [X[:2]], [ROWS[:, None]])),
    (ValueError, "floating point", (X, [X[:2].int()], [ROWS])),
    (ValueError, "different devices", (X, [X[:2].to("meta")], [ROWS])),
    (
        ValueError,
        r"out \[4, 3\] requires grad; it must be a pre-allocated",
        (X.clone().requires_grad_(), [X[:2]], [ROWS]),
    ),
    (IndexError, "index -1 at position 1 is outside a buffer of 4 rows", (X.clone(), [X[:2]], [-ROWS])),
    (IndexError, "index 4 at position 1 is outside", (X.clone(), [X[:2]], [ROWS * 4])),
]


@pytest.mark.parametrize(("error", "message", "args"), BAD)
def test_bad_scatters(error: type[Exception], message: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        scatter_rows(*args)


def test_a_bad_index_writes_nothing() -> None:
    out = torch.zeros(4, 3)
    with pytest.raises(IndexError):
        scatter_rows(out, [X[:2], X[:2]], [ROWS, ROWS - 1])
    assert not out.any()


BAD_GATHERS: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
    (ValueError, r"x must be \[rows, width\] = .* got \[4\]", (X[:, 0], ROWS)),
    (ValueError, "floating point", (X.int(), ROWS)),
    (ValueError, r"index must be \[rows\]", (X, ROWS[None])),
    (ValueError, r"index must be int32 or int64, got torch.float32", (X, ROWS.float())),
    (ValueError, "different devices", (X, ROWS.to("meta"))),
    (IndexError, "index -1 at position 1 is outside a buffer of 4 rows", (X, -ROWS)),
    (IndexError, r"index 4 at position 1 is outside", (X, ROWS * 4)),
]


@pytest.mark.parametrize(("error", "message", "args"), BAD_GATHERS)
def test_bad_gathers(error: type[Exception], message: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        gather_rows(*args)
