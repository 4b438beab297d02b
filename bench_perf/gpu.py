"""Timing on a GPU: CUDA graphs over rotating buffers, and the state of the device that a figure belongs to.

A graph holds the same call on several copies of its inputs, each with outputs of its own, so many that one replay moves
twice what the L2 cache holds: no call finds its data where the last one left it. Replaying a graph costs the host next
to nothing, so what is timed is the device. Replays follow each other between two events, and so the wait for the
first one hardly counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch


class Device(Protocol):
    """What :func:`bench_perf.kernels.measure` asks of a GPU; tests pass a fake."""

    def use(self) -> AbstractContextManager[None]:
        """Everything that is to be captured is prepared inside."""

    def copies(self, moved: int) -> int:
        """How many copies of inputs that a call reads and writes ``moved`` bytes of must be rotated over."""

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
        """A function that runs all calls, one after the other, without the host's help."""

    def sample(self, replay: Callable[[], Any], repeats: int) -> float:
        """Seconds of the device for one replay."""

    def state(self) -> str:
        """The device and, where they can be read, its clocks and power."""


def copies(moved: int, l2: int) -> int:
    """So many that together they move twice the L2's size."""
    return max(1, math.ceil(2 * l2 / moved))


class Cuda:
    """The current CUDA or ROCm device."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Makes the stream of the captures the current one. Autograd runs a backward on the stream of its forward, so
        the forward must have run on this one, too."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()

    def copies(self, moved: int) -> int:
        return copies(moved, torch.cuda.get_device_properties().L2_cache_size)

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
        for call in calls:  # compilers and workspaces must be done before
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            outputs = [call() for call in calls]  # all alive at the end: none is written where another one was

        def replay(_kept: object = outputs) -> None:
            graph.replay()

        return replay

    def sample(self, replay: Callable[[], Any], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    def state(self) -> str:
        return state()


def state() -> str:
    """Name of the current device, and its clocks and power as nvidia-ml-py reads them this moment."""
    properties = torch.cuda.get_device_properties()
    unknown = f"{properties.name}, clocks and power unknown"
    try:
        import pynvml
    except ImportError:
        return f"{unknown} (nvidia-ml-py is not installed)"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        core, memory = (
            pynvml.nvmlDeviceGetClockInfo(handle, kind) for kind in (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM)
        )
        watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    except pynvml.NVMLError as error:
        return f"{unknown} ({error})"
    return f"{properties.name} at {core} MHz, memory {memory} MHz, {watts:.0f} W"


def extra_memory(call: Callable[[], Any]) -> int:
    """Bytes of the device that the call allocates at its peak, its result included, beyond those in use before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
