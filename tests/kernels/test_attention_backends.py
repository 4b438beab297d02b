"""attention's table of backends: who serves what, for which reasons not, and what a library is handed.

FlashAttention-2, -3 and -4 and cuDNN need GPUs of NVIDIA's and cannot run here. Their rows are tested with stand-ins in
``sys.modules`` that have the signatures of the published interfaces, record the call, and compute with plain PyTorch:
what they show is that the call is right, not that the library is. ``sdpa``, ``flex`` and ``reference`` really run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bernini.kernels import attention
from bernini.kernels.attention import backends, reference

NAMES = ["fa3", "fa4", "fa2", "cudnn", "sdpa", "flex", "reference"]
CUDA = torch.device("cuda", 0)
CU_Q, CU_K = [0, 2, 2, 5], [0, 3, 4, 6]


def qkv(dtype: torch.dtype = torch.float32, width: int = 8, of_values: int | None = None) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 4, width), (6, 2, width), (6, 2, of_values or width))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


# --- the libraries, as published ------------------------------------------------------------------------------------


class Library(ModuleType):
    """A module that computes with plain PyTorch and remembers how it was called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls: list[dict[str, Any]] = []
        self.with_stats = False  # early releases of FlashAttention-3 return the log-sum-exp, too

    def result(self, out: Tensor) -> Any:
        return (out, out.new_zeros(1)) if self.with_stats else out

    def one(self, **call: Any) -> Any:
        self.calls.append(call)
        q, k, v = (call[name] for name in "qkv")
        assert q.dim() == k.dim() == v.dim() == 4 and call["causal"] is False
        pieces = [reference.attention(a, b, c, call["softmax_scale"]) for a, b, c in zip(q, k, v, strict=True)]
        return self.result(torch.stack(pieces))

    def packed(self, **call: Any) -> Any:
        self.calls.append(call)
        q, k, v = (call[name] for name in "qkv")
        assert q.dim() == k.dim() == v.dim() == 3 and call["causal"] is False
        borders = []
        for name in "qk":
            cu = call[f"cu_seqlens_{name}"]
            assert cu.dtype == torch.int32 and cu.is_contiguous() and cu.device == q.device
            borders.append(list(pairwise(cu.tolist())))
            assert call[f"max_seqlen_{name}"] == max(b - a for a, b in borders[-1])
        pieces = [
            reference.attention(q[a:b], k[c:d], v[c:d], call["softmax_scale"])
            for (a, b), (c, d) in zip(*borders, strict=True)
        ]
        return self.result(torch.cat(pieces))


class FlashAttention2(Library):
    """``flash_attn`` 2.8: ``flash_attn/flash_attn_interface.py``."""

    def flash_attn_func(
        self, q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
        window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        return self.one(q=q, k=k, v=v, softmax_scale=softmax_scale, causal=causal, deterministic=deterministic)

    def flash_attn_varlen_func(
        self, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
        dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1),
        softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False,
        block_table: Any = None,
    ) -> Any:  # fmt: skip
        return self.packed(
            q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale, causal=causal, deterministic=deterministic,
        )  # fmt: skip


class FlashAttention3(Library):
    """``flash_attn_interface``: ``hopper/flash_attn_interface.py``."""

    def flash_attn_func(
        self, q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False, qv: Any = None,
        q_descale: Any = None, k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1),
        attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
        deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        return self.one(q=q, k=k, v=v, softmax_scale=softmax_scale, causal=causal, deterministic=deterministic)

    def flash_attn_varlen_func(
        self, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
        seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None, causal: bool = False, qv: Any = None,
        q_descale: Any = None, k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1),
        attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
        deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        return self.packed(
            q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale, causal=causal, deterministic=deterministic,
        )  # fmt: skip


class FlashAttention4(Library):
    """``flash_attn.cute`` of flash-attn-4: ``flash_attn/cute/interface.py``."""

    def flash_attn_func(
        self, q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False, window_size: Any = (None, None),
        learnable_sink: Any = None, softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
        deterministic: bool = False, mask_mod: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        return self.one(q=q, k=k, v=v, softmax_scale=softmax_scale, causal=causal, deterministic=deterministic)

    def flash_attn_varlen_func(
        self, q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None,
        max_seqlen_k: Any = None, seqused_q: Any = None, seqused_k: Any = None, page_table: Any = None,
        softmax_scale: Any = None, causal: bool = False, window_size: Any = (None, None), learnable_sink: Any = None,
        softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None, deterministic: bool = False,
        score_mod: Any = None, mask_mod: Any = None, block_sparse_tensors: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        return self.packed(
            q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale, causal=causal, deterministic=deterministic,
        )  # fmt: skip


LIBRARIES: dict[str, tuple[str, type[Library]]] = {
    "fa2": ("flash_attn", FlashAttention2),
    "fa3": ("flash_attn_interface", FlashAttention3),
    "fa4": ("flash_attn.cute", FlashAttention4),
}


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("BERNINI_KERNELS", raising=False)
    backends._missing.cache_clear()
    yield
    backends._missing.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> dict[str, Library]:
    """Stand-ins and, in ``folder``, the files by which the packages are told apart."""
    found = {}
    root = folder / "flash_attn"
    (root / "cute").mkdir(parents=True, exist_ok=True)
    spec = ModuleSpec("flash_attn", None, is_package=True)
    spec.submodule_search_locations = [str(root)]
    for name in names:
        module, made = LIBRARIES[name]
        found[name] = made(module)
        monkeypatch.setitem(sys.modules, module, found[name])
    if "fa4" in names and "fa2" not in names:
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    if {"fa2", "fa4"} & set(names):
        sys.modules["flash_attn"].__spec__ = spec
    for name, file, needed in (
        ("fa2", "flash_attn_interface.py", "flash_attn_2_cuda"), ("fa4", "cute/interface.py", "cutlass"),
    ):  # fmt: skip
        if name in names:
            (root / file).touch()
            other = ModuleType(needed)
            other.__spec__ = ModuleSpec(needed, None)
            monkeypatch.setitem(sys.modules, needed, other)
    return found


def gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None = None, cudnn: bool = True
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn)


# --- who serves what ------------------------------------------------------------------------------------------------


def test_the_table_on_this_machine() -> None:
    found = backends.available_backends("cpu", torch.float32)
    assert list(found) == NAMES
    assert [name for name, why in found.items() if why is None] == ["sdpa", "flex", "reference"]
    assert all(found[name] == "needs a GPU, not cpu tensors" for name in NAMES[:4])
    assert backends.pick("auto", torch.device("cpu"), torch.float32).name == "sdpa"
    doubles = backends.available_backends("cpu", torch.float64)
    assert doubles["flex"] == "does not take torch.float64" and doubles["sdpa"] is None
    assert backends.available_backends("meta", torch.float32)["flex"] == "is for cpu and cuda tensors, not meta"
    if not torch.cuda.is_available():
        assert backends.available_backends(CUDA, torch.bfloat16)["cudnn"] == "needs a GPU, and none can be used"


def test_no_library_is_imported_to_look_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packages on the path whose import fails: they are found all the same."""
    for name in ("flash_attn", "flash_attn/cute", "flash_attn_interface", "cutlass", "flash_attn_2_cuda"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "flash_attn" / "flash_attn_interface.py").touch()
    (tmp_path / "flash_attn" / "cute" / "interface.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    gpu(monkeypatch, (9, 0))
    found = backends.available_backends(CUDA, torch.bfloat16)
    assert all(found[name] is None for name in ("fa2", "fa3", "fa4"))


@pytest.mark.parametrize(
    ("capability", "serving", "reasons"),
    [
        (
            (7, 5),
            [],
            {"fa2": "needs compute capability 8.x or more; this is 7.5", "fa3": "needs compute capability 9.x; "},
        ),
        ((8, 0), ["fa2", "cudnn"], {"fa4": "needs compute capability 9.x to 11.x; this is 8.0"}),
        ((9, 0), ["fa3", "fa4", "fa2", "cudnn"], {}),
        ((10, 0), ["fa4", "fa2", "cudnn"], {"fa3": "needs compute capability 9.x; this is 10.0"}),
        ((12, 0), ["fa2", "cudnn"], {"fa4": "needs compute capability 9.x to 11.x; this is 12.0"}),
    ],
)
def test_compute_capabilities(
    capability: tuple[int, int],
    serving: list[str],
    reasons: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    install(monkeypatch, tmp_path, "fa2", "fa3", "fa4")
    gpu(monkeypatch, capability)
    for dtype in (torch.bfloat16, torch.float16):
        found = backends.available_backends(CUDA, dtype)
        assert [name for name in NAMES[:4] if found[name] is None] == serving
        assert all(str(found[name]).startswith(why) for name, why in reasons.items())
        assert backends.pick("auto", CUDA, dtype).name == [*serving, "sdpa"][0]
    floats = backends.available_backends(CUDA, torch.float32)
    assert all(floats[name] == "does not take torch.float32, only float16 and bfloat16" for name in NAMES[:4])


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    found = backends.available_backends(CUDA, torch.bfloat16)
    for name, package in (("fa2", "flash-attn"), ("fa4", "flash-attn-4"), ("fa3", r"flash_attn_interface")):
        assert str(found[name]).startswith(f"needs the package {package}") and str(found[name]).endswith(
            "not installed"
        )
    assert found["flex"] == "needs the package triton, which is not installed"
    with pytest.raises(
        ValueError, match=r"backend='fa4' cannot serve torch.bfloat16 tensors on cuda:0 \(fa3: needs the"
    ):
        backends.pick("fa4", CUDA, torch.bfloat16)


def test_the_two_packages_in_one_folder_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu(monkeypatch, (9, 0))
    install(monkeypatch, tmp_path, "fa4")
    found = backends.available_backends(CUDA, torch.bfloat16)
    assert found["fa4"] is None and found["fa2"] == "needs the package flash-attn, which is not installed"
    backends._missing.cache_clear()
    monkeypatch.delitem(sys.modules, "cutlass")
    found = backends.available_backends(CUDA, torch.bfloat16)
    assert found["fa4"] == "needs the package nvidia-cutlass-dsl, which is not installed"


def test_other_makes_of_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ROCm calls its devices cuda and has capabilities of its own; FlashAttention-2 exists for it."""
    install(monkeypatch, tmp_path, "fa2", "fa3", "fa4")
    gpu(monkeypatch, (9, 4), hip="6.4")
    found = backends.available_backends(CUDA, torch.bfloat16)
    assert found["fa2"] is None
    assert all(found[name] == "needs a GPU of NVIDIA's" for name in ("fa3", "fa4", "cudnn"))
    gpu(monkeypatch, (9, 0), cudnn=False)
    assert (
        backends.available_backends(CUDA, torch.bfloat16)["cudnn"] == "needs cuDNN, which this PyTorch is built without"
    )


@pytest.mark.parametrize(
    ("name", "widths", "why"),
    [
        ("fa2", (64, 32), "takes one head dim, not 64 and 32"),
        ("fa2", (264, 264), "takes head dims in multiples of 8 up to 256"),
        ("fa3", (60, 60), "takes head dims in multiples of 8 up to 256"),
        ("fa4", (192, 192), "takes head dims in multiples of 8 up to 128"),
        ("cudnn", (256, 256), "takes head dims in multiples of 8 up to 128"),
    ],
)
def test_head_dims(
    name: str, widths: tuple[int, int], why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, "fa2", "fa3", "fa4")
    gpu(monkeypatch, (10, 0) if name == "fa4" else (9, 0))
    with FakeTensorMode():
        q, v = (torch.empty(4, 2, width, dtype=torch.bfloat16, device="cuda") for width in widths)
        heads = f"{widths[0]} and {widths[1]}"
        with pytest.raises(
            ValueError, match=f"{name}' cannot serve .* with head dims {heads} on cuda:0 .*{name}: {why}"
        ):
            attention(q, q, v, backend=name)
    assert backends.pick("auto", CUDA, torch.bfloat16, (20, 20)).name == "sdpa"
    assert backends.pick("auto", CUDA, torch.bfloat16, (128, 128)).name == ("fa4" if name == "fa4" else "fa3")


# --- what a library is handed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_library_is_handed(name: str, with_stats: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packed: borders as int32 on the tensors' device; one sequence: the dense function, and no borders at all."""
    library = install(monkeypatch, tmp_path, name)[name]
    library.with_stats = with_stats
    q, k, v = qkv(torch.bfloat16)
    run = backends.BACKENDS[name].run
    out = run(q, k, v, tuple(CU_Q), tuple(CU_K), 0.3)
    want = attention(q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, backend="reference", scale=0.3)
    assert out.shape == (5, 4, 8) and torch.equal(out, want)
    (call,) = library.calls
    assert call["q"] is q and call["k"] is k and call["v"] is v, "no copies"
    assert call["cu_seqlens_q"].tolist() == CU_Q and call["cu_seqlens_k"].tolist() == CU_K
    assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (3, 3)
    assert call["softmax_scale"] == 0.3 and call["deterministic"] is True

    out = run(q, k, v, (0, 5), (0, 6), 0.4)
    assert torch.equal(out, attention(q, k, v, backend="reference", scale=0.4))
    assert "cu_seqlens_q" not in library.calls[1] and library.calls[1]["q"].data_ptr() == q.data_ptr()
    assert not run(q, k[:0], v[:0], (0, 5), (0, 0), 0.4).any() and len(library.calls) == 2


def test_a_library_through_the_public_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Chosen automatically on a Hopper GPU, with tensors that have no memory."""
    found = install(monkeypatch, tmp_path, "fa3", "fa4")
    for library in found.values():
        monkeypatch.setattr(
            library, "packed", lambda call=library.calls, **args: call.append(args) or args["q"].clone()
        )
    gpu(monkeypatch, (9, 0))
    with FakeTensorMode():
        monkeypatch.setattr(
            backends, "_on_device", lambda cu, device: torch.empty(len(cu), dtype=torch.int32, device=device)
        )
        q, k = (torch.empty(5, heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
        out = attention(q, k, k, cu_seqlens_q=CU_Q, cu_seqlens_k=[0, 1, 2, 5])
        assert out.device == CUDA and out.shape == q.shape
        attention(q, k, k, cu_seqlens_q=CU_Q, cu_seqlens_k=[0, 1, 2, 5], backend="fa4")
    for library in found.values():
        (call,) = library.calls
        assert call["softmax_scale"] == 128**-0.5 and call["cu_seqlens_k"].device == CUDA
        assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (3, 3)


def test_borders_are_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """From pinned memory, where there is a GPU."""
    asked: dict[str, Any] = {}
    real = torch.tensor

    def tensor(data: Any, *, dtype: Any, pin_memory: bool) -> Tensor:
        asked["pinned"] = pin_memory
        return real(data, dtype=dtype)

    monkeypatch.setattr(torch, "tensor", tensor)
    assert backends._on_device((0, 3), torch.device("cpu")).tolist() == [0, 3] and asked["pinned"] is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert backends._on_device((0, 3), CUDA).dtype == torch.int32 and asked["pinned"] is True


def test_cudnn_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention as torch_attention

    seen: list[Any] = []
    monkeypatch.setattr(torch_attention, "sdpa_kernel", lambda which: seen.append(which) or nullcontext())
    q, k, v = qkv(torch.bfloat16)
    out = backends.BACKENDS["cudnn"].run(q, k, v, tuple(CU_Q), tuple(CU_K), 0.3)
    want = attention(q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, backend="sdpa", scale=0.3)
    assert torch.equal(out, want) and set(seen) == {torch_attention.SDPBackend.CUDNN_ATTENTION}


# --- FlexAttention --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("borders", [(None, None), (CU_Q, CU_K), ([0, 5, 5], [0, 6, 6]), ([0, 4, 5], [0, 0, 6])])
@pytest.mark.parametrize("of_values", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_really_runs(borders: tuple[Sequence[int] | None, ...], of_values: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype, of_values=of_values)
    options: dict[str, Any] = {"cu_seqlens_q": borders[0], "cu_seqlens_k": borders[1], "scale": 0.3}
    found = attention(q, k, v, backend="flex", **options)
    want = attention(q.double(), k.double(), v.double(), backend="reference", **options)
    assert found.dtype == dtype and found.shape == (5, 4, of_values)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), want, atol=tolerance, rtol=tolerance)


def test_flex_on_the_cpu_has_no_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    with pytest.raises(ValueError, match="backend='flex' computes no gradients on the CPU; use 'sdpa'"):
        attention(q, k, v, backend="flex")


# --- choices by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[:4])
def test_a_backend_that_is_not_there(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"backend='{name}' cannot serve torch.float32 tensors.*{name}: needs a GPU, not cpu"
    ):
        attention(*qkv(), backend=name)


def test_an_unknown_backend_and_mixed_dtypes() -> None:
    q, k, v = qkv()
    with pytest.raises(
        ValueError, match=r"backend='xformers' is unknown \(fa3: needs .*; sdpa: available; flex: available"
    ):
        attention(q, k, v, backend="xformers")
    with pytest.raises(ValueError, match="must have one dtype, got torch.float32, torch.float16 and torch.float32"):
        attention(q, k.half(), v)


def test_nobody_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {"sdpa": backends.BACKENDS["sdpa"]})
    with pytest.raises(ValueError, match=r"'auto' cannot serve torch.float8_e5m2 tensors on cpu \(sdpa: does not take"):
        backends.pick("auto", torch.device("cpu"), torch.float8_e5m2)
