"""When rms_norm goes to quack, and what it is handed. Quack needs a Hopper GPU: here a stand-in computes."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bernini.kernels import dispatch, launch, which
from bernini.kernels.rms_norm import quack, reference

WIDE = 65_536


class FakeQuack(ModuleType):
    """``quack.rmsnorm`` as of quack-kernels 0.6: what the adapter uses of it, with its checks and its results."""

    def __init__(self) -> None:
        super().__init__("quack.rmsnorm")
        self.calls: list[str] = []

    def rmsnorm_fwd(
        self, x: Tensor, weight: Tensor | None = None, bias: None = None, residual: None = None, out_dtype: None = None,
        residual_dtype: None = None, eps: float = 1e-6, store_rstd: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        self.calls.append("fwd")
        assert x.dim() == 2 and x.is_contiguous() and x.dtype in launch.DTYPES
        assert weight is None or (weight.dim() == 1 and weight.is_contiguous() and weight.dtype in launch.DTYPES)
        rstd = torch.rsqrt(x.float().square().mean(-1) + eps) if store_rstd else None
        return reference.rms_norm(x, weight, eps, "fp32"), x, rstd

    def rmsnorm_bwd(
        self, x: Tensor, weight: Tensor | None, dout: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        self.calls.append("bwd")
        assert x.shape == dout.shape and dout.is_contiguous() and rstd.shape == x.shape[:1]
        r, g = rstd[:, None], dout.float() if weight is None else dout.float() * weight.float()
        dx = r * (g - x.float() * r.square() * (g * x.float()).mean(-1, keepdim=True))
        dw = None if weight is None else (dout.float() * x.float() * r).sum(0).to(weight.dtype)
        return dx.to(x.dtype), dw, None, None


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("BERNINI_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_SAID", set())
    quack._installed.cache_clear()
    yield
    quack._installed.cache_clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeQuack:
    """A machine with a Hopper GPU and quack."""
    package, module = ModuleType("quack"), FakeQuack()
    package.__spec__ = ModuleSpec("quack", None)
    package.rmsnorm = lambda *args: pytest.fail("the package's attribute is its differentiable function")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return module


def test_only_rows_too_wide_for_ours_go_to_quack(fake: FakeQuack) -> None:
    def chosen(width: int | None, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> set[str]:
        return {which(op, device, dtype, width=width) for op in ("rms_norm", "rms_norm_backward")}

    assert chosen(WIDE) == chosen(launch.WIDEST + 1) == chosen(WIDE, torch.float32) == {"quack"}
    for width in (None, 128, 5120, launch.WIDEST, 2 * 262_144):
        assert chosen(width) == {"triton"}
    assert chosen(WIDE, torch.float64) == {"reference"}
    assert "quack" not in chosen(WIDE, device="cpu")
    assert which("scatter_rows", "cuda", torch.bfloat16, width=WIDE) == "triton"


def test_triton_can_be_forced_and_so_can_quack(fake: FakeQuack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    assert which("rms_norm", "cuda", torch.bfloat16, width=WIDE) == "triton"
    monkeypatch.setenv("BERNINI_KERNELS", "quack")
    assert which("rms_norm", "cuda", torch.bfloat16, width=WIDE) == "quack"
    with pytest.raises(ValueError, match="the quack implementation is for rows of 32769 to 262144 elements"):
        which("rms_norm", "cuda", torch.bfloat16, width=5120)
    with pytest.raises(ValueError, match="the quack implementation does not exist for this op"):
        which("qk_rope", "cuda", torch.bfloat16)


def test_where_it_is_missing_it_says_why(fake: FakeQuack, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quack.missing() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.warns(RuntimeWarning, match=r"quack implementation needs compute capability 9\.0 .*, this is 8\.6"):
        assert which("rms_norm", "cuda", torch.bfloat16, width=WIDE) == "triton"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert quack.missing() == "needs a GPU of NVIDIA's"
    monkeypatch.setattr(quack.importlib.util, "find_spec", lambda name: None)
    quack._installed.cache_clear()
    assert quack.missing() == "needs the package quack-kernels, which is not installed"


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16, torch.float64])
def test_what_is_handed_over_and_back(fake: FakeQuack, weight_dtype: torch.dtype | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 3, 2, generator=generator).permute(2, 1, 0)  # nothing contiguous about it
    dy = torch.randn(2, 3, 96, generator=generator)[..., ::2]
    weight = None if weight_dtype is None else torch.randn(48, generator=generator).to(weight_dtype)
    y = quack.rms_norm(x, weight, 1e-3, "fp32")
    assert fake.calls == ["fwd"] and y.is_contiguous()
    torch.testing.assert_close(y, reference.rms_norm(x, weight, 1e-3, "fp32"))
    dx, dweight = quack.rms_norm_backward(dy, x, weight, 1e-3)
    assert fake.calls == ["fwd", "fwd", "bwd"] and dx.is_contiguous()
    torch.testing.assert_close((dx, dweight), reference.rms_norm_backward(dy, x, weight, 1e-3), rtol=1e-5, atol=1e-5)
