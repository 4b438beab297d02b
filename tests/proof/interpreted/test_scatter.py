"""scatter_rows, gather_rows and its gradient on Triton's interpreter: rows are copied, so bits are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bernini.kernels import gather_rows, launch, scatter_rows, which
from bernini.kernels.scatter import reference

from . import common
from .common import assert_same_bits, poisoned, rand

pytestmark = common.needs_interpreter

if launch.INTERPRETED:
    from bernini.kernels.scatter import kernel

# One piece, several, a whole row of lanes, idle lanes, several rows a program, and rows of more than one chunk.
widths = st.sampled_from([1, 2, 7, 32, 100, 128, 1500, 1536, 5120, 8193])
index_dtypes = st.sampled_from([torch.int32, torch.int64])


def index_of(numbers: list[int] | range, dtype: torch.dtype = torch.int64, *, stepped: bool = False) -> Tensor:
    """An index among zeros; ``stepped``: of every second number of a longer tensor."""
    index = torch.tensor(list(numbers), dtype=dtype)
    return common.among_nans(torch.stack([index, index + 7], 1)[:, 0] if stepped else index)


def storage(x: Tensor) -> Tensor:
    """Everything around a tensor, as one row."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def twin(x: Tensor) -> Tensor:
    """A copy with the same surroundings."""
    return storage(x).clone().as_strided(x.shape, x.stride(), x.storage_offset())


def check_scatter(module: Any, out: Tensor, sources: list[Tensor], indices: list[Tensor]) -> None:
    expected = twin(out)
    reference.scatter_rows(expected, sources, indices)
    assert module.scatter_rows(out, sources, indices) is None
    assert_same_bits(storage(out), storage(expected))


def check_gather(module: Any, x: Tensor, index: Tensor) -> None:
    with poisoned():
        y = module.gather_rows(x, index)
    assert y.is_contiguous()
    assert_same_bits(y, reference.gather_rows(x, index))


def check_gather_backward(module: Any, dy: Tensor, index: Tensor, rows: int) -> None:
    with poisoned():
        dx = module.gather_rows_backward(dy, index, rows)
        again = module.gather_rows_backward(dy, index, rows)
    assert dx.is_contiguous()
    assert_same_bits(dx, reference.gather_rows_backward(dy, index, rows))  # the same sums in the same order
    assert_same_bits(dx, again)


@st.composite
def scatters(draw: st.DrawFn) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A buffer with any strides and up to ten sources of it in any dtype; some rows stay untouched."""
    rows, width = draw(st.integers(0, 13)), draw(widths)
    layout = st.sampled_from(["contiguous", "packed", "stepped", "transposed"])
    out = rand(rows, width, dtype=draw(common.dtypes), layout=draw(layout), seed=1)
    left = draw(st.permutations(range(rows)))
    sources, indices = [], []
    for number in range(draw(st.sampled_from([0, 1, 2, 3, 10]))):
        count = draw(st.integers(0, min(len(left), 6)))
        taken, left = left[:count], left[count:]
        dtype = draw(st.sampled_from([*launch.DTYPES, torch.float64]))
        layout = draw(common.layouts)
        sources.append(rand(count, width, dtype=dtype, layout=layout, scale=draw(common.scales), seed=10 + number))
        indices.append(index_of(taken, draw(index_dtypes), stepped=draw(st.booleans())))
    return out, sources, indices


@settings(max_examples=40)
@given(scatters())
def test_scatter(call: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    check_scatter(kernel, *call)


@settings(max_examples=25)
@given(st.data(), common.dtypes, common.layouts, widths)
def test_gather(data: st.DataObject, dtype: torch.dtype, layout: str, width: int) -> None:
    rows = data.draw(st.integers(1, 6))
    numbers = data.draw(st.lists(st.integers(0, rows - 1), max_size=9))
    index = index_of(numbers, data.draw(index_dtypes), stepped=data.draw(st.booleans()))
    check_gather(kernel, rand(rows, width, dtype=dtype, layout=layout), index)


@settings(max_examples=25)
@given(st.data(), common.dtypes, common.layouts, common.scales, widths)
def test_gather_backward(data: st.DataObject, dtype: torch.dtype, layout: str, scale: float, width: int) -> None:
    rows = data.draw(st.integers(1, 5))
    numbers = data.draw(st.lists(st.integers(0, rows - 1), max_size=9))
    index = index_of(numbers, data.draw(index_dtypes))
    check_gather_backward(kernel, rand(len(numbers), width, dtype=dtype, layout=layout, scale=scale), index, rows)


@pytest.mark.parametrize("dtype", launch.DTYPES)
def test_special_values_pass_unchanged(dtype: torch.dtype) -> None:
    """A copy is of bits: NaNs, infinities, zeros with a sign, subnormals."""
    smallest = torch.finfo(dtype).smallest_normal
    row = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, 0.0, smallest / 2, smallest]], dtype=dtype)
    out = torch.ones(3, 7, dtype=dtype)
    check_scatter(kernel, out, [row], [index_of([1])])
    check_gather(kernel, out, index_of([1, 0, 1]))


def test_nine_sources_are_two_launches_and_none_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    plain = launch.launch

    def count(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        grids.append(grid)
        plain(kernel, grid, *args, **options)

    monkeypatch.setattr(launch, "launch", count)
    out = rand(20, 48)
    check_scatter(kernel, out, [rand(2, 48, seed=i) for i in range(9)], [index_of([i, 19 - i]) for i in range(9)])
    assert len(grids) == 2
    for sources in ([], [rand(0, 48)]):
        check_scatter(kernel, out, sources, [index_of([])] * len(sources))
    check_gather(kernel, rand(3, 0), index_of([0, 1]))
    check_gather(kernel, rand(3, 8), index_of([]))
    assert len(grids) == 2
    check_gather_backward(kernel, rand(0, 8), index_of([]), 3)  # zeros must be written
    assert len(grids) == 4


def test_blocks_of_all_sources_are_shared_by_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program takes its part of every source, however the numbers of blocks and programs fall."""
    for programs in (1, 2, 3, 5, 50):
        monkeypatch.setattr(kernel, "_programs", lambda on, blocks, most=programs: min(most, blocks))
        lengths, left = (5, 1, 8, 3), list(torch.randperm(17, generator=torch.Generator().manual_seed(3)).tolist())
        sources, indices = [], []
        for number, length in enumerate(lengths):
            sources.append(rand(length, 2048, seed=number))
            indices.append(index_of(left[:length]))
            left = left[length:]
        check_scatter(kernel, rand(17, 2048, seed=9), sources, indices)
        check_gather(kernel, rand(6, 2048), index_of([5, 0, 0, 3, 1, 2, 4]))


def test_public_functions_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    assert {which(op) for op in ("scatter_rows", "gather_rows", "gather_rows_backward")} == {"triton"}
    source, x = rand(3, 24).requires_grad_(), rand(5, 24).requires_grad_()
    out = torch.zeros(5, 24)
    scatter_rows(out, [source], [torch.tensor([4, 0, 2])])
    (grad,) = torch.autograd.grad(out, source, rand(5, 24, seed=1))
    assert torch.equal(grad, rand(5, 24, seed=1)[[4, 0, 2]])
    y = gather_rows(x, torch.tensor([1, 1, 4], dtype=torch.int32))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad[:, 0].tolist() == [0, 2, 0, 0, 1]


def test_bad_input_is_refused_before_any_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    monkeypatch.setattr(launch, "launch", lambda *args, **options: pytest.fail("launched"))
    out, index = rand(4, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"sources\[0\] must be .* = \[\*, 8\], got \[2, 9\]"):
        scatter_rows(out, [rand(2, 9)], [index])
    with pytest.raises(ValueError, match=r"indices\[0\] is \[2\], but sources\[0\] is \[3, 8\]"):
        scatter_rows(out, [rand(3, 8)], [index])
    with pytest.raises(ValueError, match=r"index must be int32 or int64, got torch.float32 \[2\]"):
        gather_rows(out, index.float())
    with pytest.raises(ValueError, match=r"x must be \[rows, width\] = \[\*, \*\], got \[8\]"):
        gather_rows(out[0], index)
    with pytest.raises(ValueError, match=r"triton implementation does not take torch.float64"):
        gather_rows(out.double(), index)


# --- wrong kernels are noticed ---------------------------------------------------------------------------------------


def smoke(module: Any) -> None:
    """A handful of comparisons that any wrong kernel fails."""
    for dtype, width in ((torch.float32, 100), (torch.float16, 1024), (torch.float16, 1500)):
        out = rand(9, width, dtype=dtype, layout="packed")
        sources = [rand(n, width, dtype=torch.float32, layout="packed", seed=n) for n in (3, 1, 2)]
        check_scatter(module, out, sources, [index_of([8, 0, 3]), index_of([5]), index_of([7, 6], torch.int32)])
        x = rand(4, width, dtype=dtype, layout="stepped")
        check_gather(module, x, index_of([3, 0, 0, 2, 1]))
        dy = rand(6, width, dtype=dtype, layout="packed")
        check_gather_backward(module, dy, index_of([2, 0, 2, 3, 2, 0]), 4)


def test_smoke_accepts_the_kernel() -> None:
    smoke(kernel)


@pytest.mark.parametrize("variant", common.broken("scatter"))
def test_smoke_refuses_broken_kernels(variant: Any) -> None:
    with pytest.raises(AssertionError):
        smoke(variant.load())
