"""Which implementation runs, what it says when it cannot, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from bernini.kernels import dispatch, rms_norm, which


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv("BERNINI_KERNELS", raising=False)


@pytest.fixture
def table(monkeypatch):
    """Adds implementations of an op ``toy`` for one test, with no memory of what was already reported."""
    monkeypatch.setattr(dispatch, "_SAID", set())

    def add(name, **limits):
        dispatch.provide("toy", dispatch.Implementation(name, lambda *args: name, **limits))

    yield add
    dispatch._TABLE.pop("toy", None)


def test_order_and_limits(table):
    table("reference")
    table("native", devices=("cpu",), dtypes=(torch.float32,), roundings=("fp32",))
    table("triton", devices=("cuda",))
    assert dispatch.pick("toy", "cpu", torch.float32).name == "native"
    assert dispatch.pick("toy", "cpu", torch.float64).name == "reference"
    assert dispatch.pick("toy", "cpu", torch.float32, "eager").name == "reference"
    assert dispatch.pick("toy", "cuda:1", torch.float32).name == "triton"
    assert dispatch.pick("toy", "meta", torch.float32).name == "reference"
    assert dispatch.run("toy", torch.device("cpu"), torch.float32, "fp32", 1, 2) == "native"


def test_forcing(table, monkeypatch):
    table("reference")
    table("native", devices=("cpu",), dtypes=(torch.float32,), roundings=("fp32",))
    monkeypatch.setenv("BERNINI_KERNELS", "reference")
    assert dispatch.pick("toy", "cpu", torch.float32).name == "reference"
    monkeypatch.setenv("BERNINI_KERNELS", "native")
    assert dispatch.pick("toy", "cpu", torch.float32).name == "native"
    for device, dtype, rounding, why in (
        ("cuda", torch.float32, "fp32", "is for cpu tensors, not cuda"),
        ("cpu", torch.bfloat16, "fp32", "does not take torch.bfloat16"),
        ("cpu", torch.float32, "eager", "has no rounding='eager'"),
    ):
        with pytest.raises(ValueError, match=f"toy: BERNINI_KERNELS=native, but the native implementation {why}"):
            dispatch.pick("toy", device, dtype, rounding)
    monkeypatch.setenv("BERNINI_KERNELS", "triton")
    with pytest.raises(ValueError, match="the triton implementation does not exist for this op"):
        dispatch.pick("toy", "cpu", torch.float32)
    monkeypatch.setenv("BERNINI_KERNELS", "")
    assert dispatch.pick("toy", "cpu", torch.float32).name == "native"


def test_forcing_is_read_at_each_call(monkeypatch):
    x = torch.randn(3, 8)
    monkeypatch.setenv("BERNINI_KERNELS", "reference")
    rms_norm(x)
    monkeypatch.setenv("BERNINI_KERNELS", "cuda")
    with pytest.raises(ValueError, match="'cuda': expected one of quack, triton, native, tiled, reference"):
        rms_norm(x)


def test_a_missing_implementation_is_reported_once_and_fails_when_forced(table, monkeypatch):
    table("reference")
    table("native", missing=lambda: "was not built")
    with pytest.warns(RuntimeWarning, match="toy: the native implementation was not built") as caught:
        assert dispatch.pick("toy", "cpu", torch.float32).name == "reference"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.pick("toy", "cpu", torch.float32).name == "reference"
    monkeypatch.setenv("BERNINI_KERNELS", "native")
    with pytest.raises(ValueError, match="BERNINI_KERNELS=native, but the native implementation was not built"):
        dispatch.pick("toy", "cpu", torch.float32)


def test_a_door_outside_its_limits_is_not_reported(table):
    table("reference")
    table("triton", devices=("cuda",), missing=lambda: "is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.pick("toy", "cpu", torch.float32).name == "reference"


def test_nothing_serves(table):
    table("native", devices=("cpu",))
    with pytest.raises(ValueError, match="toy: no implementation for cuda tensors of torch.float32"):
        dispatch.pick("toy", "cuda", torch.float32)


def test_unknown_names(table):
    with pytest.raises(
        ValueError, match="toy: unknown implementation 'fast'; there are quack, triton, native, tiled, reference"
    ):
        table("fast")
    with pytest.raises(ValueError, match=r"unknown op 'soft_max'; there are .*modulate.*qk_rope.*rms_norm"):
        which("soft_max")


def test_which(monkeypatch):
    assert which("rms_norm") == "native"
    everything = which()
    assert everything["rms_norm_backward"] in dispatch.ORDER
    assert {"rms_norm", "qk_rope", "qk_rope_out", "modulate", "modulate_norm"} <= set(everything)
    assert which("qk_rope", dtype=torch.float64) == "reference"
    monkeypatch.setenv("BERNINI_KERNELS", "reference")
    assert which("rms_norm") == which("modulate") == "reference"


# --- the package itself, in a fresh interpreter ----------------------------------------------------------------------


def python(code: str) -> None:
    # -P keeps the working directory off the path: from the repository root `kernels` would shadow other packages.
    flags = ["-P"] if sys.version_info >= (3, 11) else ["-I"]
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_neither_torch_nor_triton():
    python(
        "import sys, bernini.kernels\n"
        "assert 'rms_norm' in dir(bernini.kernels)\n"
        "loaded = {'torch', 'triton', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "from bernini.kernels import rms_norm; import bernini.kernels.rms_norm.reference",
        "import bernini.kernels.rms_norm.reference; from bernini.kernels import rms_norm",
        "import bernini.kernels.rms_norm.op",
    ],
)
def test_the_family_name_stays_the_function(imports):
    python(
        f"{imports}\n"
        "import sys, types, bernini.kernels as k\n"
        "others = [m for m in sys.modules if m.startswith('bernini.kernels.') and m.endswith('.op')]\n"
        "assert set(others) <= {'bernini.kernels.rms_norm.op'}, others  # one family loads no other\n"
        "for f in (k.rms_norm, k.qk_rope, k.modulate): assert isinstance(f, types.FunctionType), f\n"
        "from bernini.kernels.rms_norm import reference\n"
        "assert isinstance(reference, types.ModuleType)"
    )


def test_unknown_attribute():
    import bernini.kernels

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bernini.kernels.nothing  # noqa: B018
