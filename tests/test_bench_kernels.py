"""The kernel benchmarks on tiny shapes: who is measured, that all compute the same, and the rows. No timing here."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bench_perf
from bench_perf import __main__ as main
from bench_perf import gpu, harness, kernels, modulate, providers, qk_rope, rms_norm, scatter
from bernini.kernels import rope_tables

MAKE: dict[str, Callable[[torch.dtype], providers.Case]] = {
    "rms_norm": partial(rms_norm.make_case, 7, 48),
    "qk_rope": partial(qk_rope.make_case, (2, 3, 2), 2, 3, head_dim=16),
    "modulate": partial(modulate.make_case, 7, 48),
    "scatter": partial(scatter.make_case, (3, 5, 1, 2), 48),
}
PEERS = {
    "rms_norm": ["eager", "diffusers", "torch.compile"],
    "qk_rope": ["eager", "diffusers", "complex128", "torch.compile"],
    "modulate": ["eager", "diffusers", "torch.compile"],
    "scatter": ["eager", "index_copy_", "torch.compile"],
}
QUIET = partial(harness.Watch, lambda: (0.0, 0.0))
EVERY = pytest.mark.parametrize("benchmark_name", list(MAKE))


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short sample each, and nothing is compiled: that takes seconds, and the benchmark itself checks it."""
    monkeypatch.setattr(harness, "ROUNDS", (1, 1))
    monkeypatch.setattr(harness, "SAMPLE", 1e-9)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def measure(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[harness.Row]:
    op = {"scatter": "scatter_rows"}.get(name, name)
    return kernels.measure(name, MAKE[name](dtype), op=op, watch=QUIET(), **options)


# --- providers ------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("back", [False, True])
def test_all_that_can_run_here_agree_with_the_reference(benchmark_name: str, dtype: torch.dtype, back: bool) -> None:
    rows = measure(benchmark_name, dtype, back=back)
    name = f"{benchmark_name} backward" if back else benchmark_name
    assert [row.name for row in rows] == [*(f"{name} against {peer}" for peer in PEERS[benchmark_name]),
                                          f"{name} bandwidth"]  # fmt: skip
    assert {row.dtype for row in rows} == {str(dtype).removeprefix("torch.")}
    assert all(row.unit == "ms" and row.ours > 0 and row.peer for row in rows[:-1])
    assert rows[-1].unit == "GB/s"
    assert {(row.bar, row.holds) for row in rows} == {(None, None)}


def test_who_cannot_be_measured_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    first, second, *_ = measure("rms_norm")
    assert first.note.endswith("; not measured: liger, quack, flash_attn, flashinfer (not installed)")
    assert "not measured" not in second.note
    note = measure("qk_rope")[0].note
    assert "flash_attn (not installed)" in note
    assert "liger (rotates halves of a head, not adjacent pairs)" in note
    assert "flashinfer (takes one grid per sequence, here are several segments)" in note


def test_an_optional_library_needs_a_gpu() -> None:
    case = MAKE["rms_norm"](torch.float32)
    with pytest.raises(providers.Unable, match="not installed"):
        providers.optional("no_such_library.part", case)
    with pytest.raises(providers.Unable, match="needs a GPU"):
        providers.optional("json", case)


@pytest.mark.parametrize(
    ("segments", "heads", "dtype", "why"),
    [
        (1, 40, torch.bfloat16, "takes at most 32 heads, here are 40"),
        (2, 12, torch.bfloat16, "takes one grid per sequence, here are several segments"),
        (1, 12, torch.float32, "takes bfloat16 only"),
    ],
)
def test_limits_of_flashinfer(segments: int, heads: int, dtype: torch.dtype, why: str) -> None:
    with pytest.raises(providers.Unable, match=why):
        qk_rope.flashinfer(qk_rope.make_case((1, 2, 2), segments, heads, dtype, head_dim=16))


def test_nobody_is_timed_computing_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: providers.Case) -> providers.Call:
        raise KeyError("inside")

    table = providers._TABLE["rms_norm"]
    monkeypatch.setitem(table, "wrong", lambda case: lambda: case.reference() * 1.01)
    monkeypatch.setitem(table, "nan", lambda case: lambda: case.reference() * float("nan"))
    monkeypatch.setitem(table, "short", lambda case: lambda: case.reference()[1:])
    monkeypatch.setitem(table, "broken", broken)
    rows = measure("rms_norm")
    assert len(rows) == len(PEERS["rms_norm"]) + 1
    assert "wrong (computes something else: error 0.0" in rows[0].note
    assert "nan (computes something else: error nan" in rows[0].note
    assert "short (returns [[6, 48]] instead of [[7, 48]])" in rows[0].note
    assert "broken (fails: KeyError: 'inside')" in rows[0].note
    monkeypatch.setitem(table, providers.OURS, table["wrong"])
    with pytest.raises(RuntimeError, match="rms_norm: ours computes something else"):
        measure("rms_norm")


class Fakes:
    """GPU libraries as their documentation has them, in plain torch: what the adapters hand over must fit them."""

    @staticmethod
    def rms_norm_fn(x: Tensor, weight: Tensor, bias: None, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    class LigerRMSNormFunction:
        @staticmethod
        def apply(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
            assert (offset, casting, in_place) == (0.0, "llama", False)
            return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        assert interleaved and x.dim() == 4 and cos.shape == (x.shape[1], x.shape[3] // 2)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin).unsqueeze(1)).flatten(-2).to(x.dtype)

    @staticmethod
    def fused_qk_rmsnorm_rope(
        qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *, ppf: int, pph: int, ppw: int, num_frame_channels: int,
        num_height_channels: int, num_width_channels: int, num_heads_q: int, num_heads_k: int, num_heads_v: int,
        head_dim: int, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tables = rope_tables(head_dim, (ppf, pph, ppw), [0])[:3]
        assert [2 * table.shape[1] for table in tables] == [num_frame_channels, num_height_channels, num_width_channels]
        axes = torch.cartesian_prod(*map(torch.arange, (ppf, pph, ppw))).unbind(1)
        cos, sin = torch.cat([table[rows] for table, rows in zip(tables, axes, strict=True)], 1).unbind(-1)
        q, k, v = qkv.split([n * head_dim for n in (num_heads_q, num_heads_k, num_heads_v)], -1)
        q, k = F.rms_norm(q, q_weight.shape, q_weight, eps), F.rms_norm(k, k_weight.shape, k_weight, eps)
        q, k = (Fakes.apply_rotary_emb(x.unflatten(-1, (-1, head_dim)), cos, sin, interleaved=True) for x in (q, k))
        return q, k, v.unflatten(-1, (-1, head_dim))


def test_adapters_of_gpu_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rms_norm, qk_rope):
        monkeypatch.setattr(module, "optional", lambda name, case: Fakes)
    for name in ("liger", "quack", "flash_attn", "flashinfer"):
        case = MAKE["rms_norm"](torch.bfloat16)
        providers.check(providers.provided("rms_norm")[name](case)(), (case.double().reference(),), case.dtype)
    case = qk_rope.make_case((2, 3, 2), 1, 4, torch.bfloat16, head_dim=16)
    for name in ("flash_attn", "flashinfer"):
        providers.check(providers.provided("qk_rope")[name](case)(), case.double().reference(), case.dtype)


# --- cases ----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_formulas() -> None:
    moved = {
        name: (case.moved, case.moved_backward) for name, case in ((n, f(torch.bfloat16)) for n, f in MAKE.items())
    }
    row = 2 * 48  # bytes
    assert moved == {
        "rms_norm": (2 * 7 * row, 3 * 7 * row),
        "qk_rope": (2 * 2 * 24 * row, 3 * 2 * 24 * row),
        "modulate": (4 * 7 * row, 6 * 7 * row),
        "scatter": (2 * 11 * row + 11 * 8, 2 * 11 * row + 11 * 8),
    }


@EVERY
def test_copies_are_equal_and_share_nothing(benchmark_name: str) -> None:
    case = MAKE[benchmark_name](torch.bfloat16)
    copy, wide = case.copy(), case.double()
    for mine, theirs in zip(case.leaves(), copy.leaves(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    assert {leaf.dtype for leaf in wide.leaves()} == {wide.dtype} == {torch.float64}
    assert (copy.shape, copy.moved) == (case.shape, case.moved)


# --- rows -----------------------------------------------------------------------------------------------------------


def test_bars_are_judged() -> None:
    bars = {"eager": 1e-9, "torch.compile": 1e9}
    eager, diffusers, compiled, bandwidth = measure("modulate", bars=bars, bandwidth=1e-9)
    assert [(row.bar, row.holds) for row in (eager, diffusers, compiled, bandwidth)] == [
        (1e-9, True), (None, None), (1e9, False), (1e-9, True)
    ]  # fmt: skip
    assert bandwidth.ours * eager.ours == pytest.approx(MAKE["modulate"](torch.float32).moved / 1e6)
    assert bandwidth.ratio == pytest.approx(bandwidth.ours / (bandwidth.peer or 0))
    assert re.fullmatch(r"ours: \w+; min\.\.p80 \S+ against \S+ ms", eager.note)


def test_nothing_is_judged_on_a_busy_machine() -> None:
    ticks = iter([(0.0, 0.0), (1e6, 0.0)])
    case = MAKE["scatter"](torch.float32)
    row = kernels.measure(
        "scatter", case, op="scatter_rows", bars={"eager": 1.0}, watch=harness.Watch(lambda: next(ticks))
    )[0]
    assert (row.bar, row.holds) == (1.0, None)
    assert row.note.startswith("not judged: other processes")


def test_the_run_with_default_malloc_leaves_the_backward_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = MAKE["rms_norm"](torch.float32)
    backward = ["rms_norm backward bandwidth"]
    for value, extra in (("0", backward), (None, [])):
        monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
        if value is not None:
            monkeypatch.setenv("MALLOC_MMAP_MAX_", value)
        rows = kernels.both_ways("rms_norm", case, ("rms_norm", "rms_norm_backward"))
        assert [row.name for row in rows if row.unit == "GB/s"] == ["rms_norm bandwidth", *extra]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory_that_a_call_needs() -> None:
    assert harness.extra_memory(lambda: None) < 1e6
    assert 19e6 < harness.extra_memory(lambda: torch.ones(5_000_000).sum()) < 25e6  # counted in lumps of pages
    row = scatter.memory(scatter.make_case((4096, 1024, 512, 64), 1024, torch.float32))
    assert row.holds is True
    assert 22 <= int(row.note.removeprefix("eager: ").removesuffix(" MB")) <= 25


def test_memory_that_cannot_be_read_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(call: object) -> int:
        raise OSError("no such file")

    monkeypatch.setattr(scatter, "extra_memory", unreadable)
    row = scatter.memory(scatter.make_case((3, 1), 8, torch.float32))
    assert (row.bar, row.holds) == (scatter.MEMORY, None)
    assert "does not tell the peak of memory (no such file)" in row.note


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kernels", "all"])
def test_groups_run_each_of_their_benchmarks_once(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []
    monkeypatch.setattr(main, "fresh", lambda name, malloc: ran.append(name) or [])
    assert main.main([name, "--chart", str(tmp_path / "rows.png")]) == 0
    assert ran == (list(bench_perf.BENCHMARKS) if name == "all" else list(bench_perf.GROUPS["kernels"]))


# --- GPUs -----------------------------------------------------------------------------------------------------------


class FakeGpu:
    """A device on which every call takes a millisecond and runs on the CPU."""

    def __init__(self, wanted: int = 3) -> None:
        self.wanted = wanted
        self.graphs: list[list[Callable[[], Any]]] = []
        self.inside = False
        self.refused: tuple[int, ...] = ()

    @contextmanager
    def use(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def copies(self, moved: int) -> int:
        return self.wanted

    def capture(self, calls: Any) -> Callable[[], Any]:
        assert self.inside
        number = len(self.graphs)
        self.graphs.append(list(calls))
        if number in self.refused:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return partial(len, calls)

    def sample(self, replay: Callable[[], Any], repeats: int) -> float:
        assert self.inside
        return 1e-3 * replay()

    def state(self) -> str:
        return "a fake at 1 MHz"


@pytest.mark.parametrize("back", [False, True])
def test_a_gpu_rotates_over_copies_and_judges_nothing(back: bool) -> None:
    device = FakeGpu()
    rows = measure("modulate", gpu=device, back=back, bars={"eager": 1e9}, bandwidth=1e9)
    assert [len(graph) for graph in device.graphs] == [3] * 5, "ours, three peers and the copy"
    assert all(row.bar is row.holds is None for row in rows)
    assert all("on a fake at 1 MHz; 3 copies in turn; the bars are promised for CPUs only" in row.note for row in rows)
    assert all("p20..p80 1..1 against 1..1 ms" in row.note for row in rows[:-1])
    assert [row.ours for row in rows[:-1]] == pytest.approx([1.0] * 3), "per call, not per replay of three"
    assert rows[-1].ratio == pytest.approx(1.0)


def test_copies_on_a_gpu_are_tensors_of_their_own() -> None:
    device = FakeGpu()
    measure("rms_norm", gpu=device)
    inputs = {call.args[0].data_ptr() for call in device.graphs[0]}  # type: ignore[attr-defined]
    assert len(inputs) == 3


def test_a_peer_that_no_graph_can_hold_is_named() -> None:
    device = FakeGpu()
    device.refused = (1,)
    rows = measure("rms_norm", gpu=device)
    assert [row.name for row in rows] == ["rms_norm against diffusers", "rms_norm against torch.compile",
                                          "rms_norm bandwidth"]  # fmt: skip
    assert "eager (cannot be captured in a graph: RuntimeError: operation not permitted" in rows[0].note
    device = FakeGpu()
    device.refused = (0,)
    with pytest.raises(RuntimeError, match="stream is capturing"):
        measure("rms_norm", gpu=device)


def test_copies_exceed_the_l2_twice() -> None:
    assert [gpu.copies(moved, l2=50) for moved in (1, 30, 50, 99, 100, 1000)] == [100, 4, 2, 2, 1, 1]


class FakeCuda:
    """The parts of ``torch.cuda`` that are used, on a clock that graphs move."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0
        self.stream_in_use: object = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Stream:
            def wait_stream(self, other: object) -> None:
                fake.log.append("wait")

        class CUDAGraph:
            def replay(self) -> None:
                fake.log.append("replay")
                fake.now += 2.0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def synchronize(self) -> None:
                fake.log.append("wait for the end")

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        @contextmanager
        def stream(chosen: object) -> Iterator[None]:
            fake.stream_in_use = chosen
            yield
            fake.stream_in_use = None

        @contextmanager
        def graph(into: CUDAGraph, stream: object) -> Iterator[None]:
            assert stream is fake.stream_in_use
            fake.log.append("begin")
            yield
            fake.log.append("end")

        for name, value in {
            "Stream": Stream, "CUDAGraph": CUDAGraph, "Event": Event, "stream": stream, "graph": graph,
            "current_stream": lambda: None, "synchronize": lambda: fake.log.append("synchronize"),
            "get_device_properties": lambda: SimpleNamespace(L2_cache_size=50, name="Fake GPU", uuid="1-2"),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


def test_the_cuda_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)
    device = gpu.Cuda()
    calls = [partial(fake.log.append, name) for name in "ab"]
    with device.use():
        replay = device.capture(calls)
        assert fake.log == ["wait", "a", "b", "synchronize", "begin", "a", "b", "end"], "warm before it is captured"
        fake.log.clear()
        assert device.sample(replay, 5) == pytest.approx(2e-3), "milliseconds of five replays as seconds of one"
        assert fake.log == ["replay"] * 5 + ["wait for the end"]
    assert device.copies(10) == 10


def test_state_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda().install(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu.state() == "Fake GPU, clocks and power unknown (nvidia-ml-py is not installed)"

    fake: Any = ModuleType("pynvml")
    fake.NVMLError = type("NVMLError", (Exception,), {})
    fake.NVML_CLOCK_SM, fake.NVML_CLOCK_MEM = 1, 2
    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByUUID = {"GPU-1-2": "handle"}.__getitem__
    fake.nvmlDeviceGetClockInfo = lambda handle, kind: {1: 1980, 2: 2619}[kind]
    fake.nvmlDeviceGetPowerUsage = {"handle": 412_300}.__getitem__
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert gpu.state() == "Fake GPU at 1980 MHz, memory 2619 MHz, 412 W"

    def fail() -> None:
        raise fake.NVMLError("no driver")

    fake.nvmlInit = fail
    assert gpu.state() == "Fake GPU, clocks and power unknown (no driver)"
