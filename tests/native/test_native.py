"""The native library: row copies against torch indexing, and one OpenMP runtime. Shapes: T rows, N width."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bernini.kernels.native import loader
from bernini.kernels.scatter import native

needs_library = pytest.mark.skipif(loader.missing() is not None, reason=f"the native library {loader.missing()}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
BIG = (3000, 96)  # more bytes than the library copies on one thread, in every dtype but the bytes


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gather_and_scatter(dtype: torch.dtype, index_dtype: torch.dtype, threads: int) -> None:
    x_TN = values(*BIG, dtype=dtype)
    index = torch.randperm(BIG[0])[:2500].to(index_dtype)
    gathered = native.gather_rows(x_TN, index)
    assert gathered.is_contiguous()
    assert torch.equal(gathered, x_TN[index.long()])

    out_TN = values(*BIG, dtype=dtype)
    expected = out_TN.clone()
    expected[index.long()] = gathered
    native.scatter_rows(out_TN, [gathered[:700], gathered[700:]], [index[:700], index[700:]])
    assert torch.equal(out_TN, expected)


@needs_library
@given(data=st.data())
def test_strides_and_shapes(data: st.DataObject) -> None:
    """Rows of any rank at any distance, empty ones too; indices that are a view of something wider."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    rows, picked = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 7))
    inner = data.draw(st.lists(st.integers(0, 5), max_size=2))
    gap, left = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3)) if len(inner) == 1 else 0
    store = values(rows * gap, *inner) if left == 0 else values(rows * gap, left + inner[0])[:, left:]
    x = store[::gap]
    index = torch.randint(0, rows, (2 * picked,))[::2]
    assert torch.equal(native.gather_rows(x, index), x[index])

    kept = store.clone()
    once = torch.randperm(rows)[:picked]
    source = values(len(once), *x.shape[1:])
    expected = kept.clone()
    expected[::gap][once] = source
    native.scatter_rows(kept[::gap], [source], [once])
    assert torch.equal(kept, expected)


@needs_library
def test_one_source_row_for_all() -> None:
    out_TN = torch.zeros(4, 3)
    native.scatter_rows(out_TN, [torch.ones(3).expand(2, 3)], [torch.tensor([3, 1])])
    assert out_TN.sum(1).tolist() == [0, 3, 0, 3]


@needs_library
@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_outside(bad: int, dtype: torch.dtype) -> None:
    out_TN, index = torch.zeros(5, 2), torch.tensor([0, 4, bad], dtype=dtype)
    with pytest.raises(IndexError, match=f"index {bad} at position 2 is outside a buffer of 5 rows"):
        native.gather_rows(out_TN, index)
    with pytest.raises(IndexError, match="position 2"):
        native.scatter_rows(out_TN, [torch.ones(1, 2), torch.ones(3, 2)], [torch.tensor([1]), index])
    assert out_TN.sum() == 0, "nothing may be written before every index was checked"


@needs_library
def test_what_bytes_cannot_serve() -> None:
    x_TN, index = torch.zeros(4, 6), torch.arange(2)
    for call in (
        lambda: native.gather_rows(x_TN[:, ::2], index),
        lambda: native.gather_rows(x_TN, index.float()),
        lambda: native.gather_rows(x_TN, index[None]),
        lambda: native.scatter_rows(x_TN, [torch.zeros(2, 6).bfloat16()], [index]),
        lambda: native.scatter_rows(x_TN, [torch.zeros(2, 5)], [index]),
        lambda: native.scatter_rows(x_TN, [torch.zeros(3, 6)], [index]),
        lambda: native.scatter_rows(x_TN, [torch.zeros(2, 6)], []),
    ):
        with pytest.raises(ValueError, match="must be|other rows|need as many|but 0 indices"):
            call()
    assert not native.serves(x_TN, torch.zeros(2, 6).bfloat16())
    assert not native.serves(x_TN.T)
    assert native.serves(x_TN, x_TN[::2])


@needs_library
def test_one_openmp_runtime() -> None:
    """In a process of its own, after torch and the library have both run on several threads."""
    code = (
        "import torch; torch.set_num_threads(2); from bernini.kernels.scatter import native; "
        "from bernini.kernels.native import loader; x = torch.ones(2000, 500); x @ x.T; "
        "native.gather_rows(x, torch.arange(1000)); print(len(loader.openmp_runtimes()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert done.stdout.strip() == "1"


def test_abi_is_one_number() -> None:
    header = Path(loader.__file__).with_name("common.h").read_text()
    found = re.search(r"#define BERNINI_NATIVE_ABI (\d+)", header)
    assert found is not None
    assert int(found[1]) == loader.ABI


@pytest.mark.parametrize(("content", "why"), [(None, "is not built"), (b"not a library", "cannot be loaded")])
def test_missing_says_why(content: bytes | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "kernels/native/lib.so"
    target.parent.mkdir(parents=True)
    (tmp_path / "CMakeLists.txt").touch()
    if content is not None:
        target.write_bytes(content)
    monkeypatch.setattr(loader, "LIBRARY", target)
    monkeypatch.setattr(loader, "_load", loader._load.__wrapped__)
    assert (loader.missing() or "").startswith(why)
    with pytest.raises(RuntimeError, match=f"the native library {why}"):
        loader.library()
