"""How long work takes: on CUDA by its events, turn by turn; on the CPU, where the scripts are tried, by its clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], Any]
# More than the caches of any card at hand hold.
FLUSHED_BYTES = 256 << 20


class Kernel(NamedTuple):
    """A kernel, or a copy, within some work of ours."""

    name: str
    launches: float
    us: float
    """All launches together."""


class Times(NamedTuple):
    """What was measured of one operation."""

    ms: dict[str, float]
    """Medians by side."""
    kernels: list[Kernel] = []
    """What the device does for our side of the C interface, longest first."""

    def divided(self, n: int) -> Times:
        """For one of n equal parts."""
        kernels = [kernel._replace(launches=kernel.launches / n, us=kernel.us / n) for kernel in self.kernels]
        return Times({name: ms / n for name, ms in self.ms.items()}, kernels)


def described(error: BaseException | None) -> str:
    """An error and those before it: the end of a broken capture hides what broke it."""
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__context__
    return ", after ".join(texts)


class Timer:
    """Times work on a device.

    Args:
        device: where.
        seconds: how long all turns of one comparison may take, warming up not counted.

    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.on_cuda = device.type == "cuda"
        self.notes: list[str] = []
        """What could not be captured."""
        size = FLUSHED_BYTES if self.on_cuda else 1
        self._flushed = torch.zeros(size, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def graphs(self, works: dict[str, Work]) -> dict[str, Work]:
        """The same works as CUDA graphs, under names that end in `_graph`; on the CPU the works themselves.

        What cannot be captured is left out, and noted.
        """
        if not self.on_cuda:
            return {f"{name}_graph": work for name, work in works.items()}
        found = {}
        current = torch.cuda.current_stream(self.device)
        for name, work in works.items():
            try:
                found[f"{name}_graph"] = self._captured(work)
            except Exception as error:
                # PyTorch leaves the stream of a capture that broke as the current one.
                torch.cuda.set_stream(current)
                self.notes.append(f"{name}: cannot be captured: {described(error)}")
                print(self.notes[-1], flush=True)
        return found

    def _captured(self, work: Work) -> Work:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def elapsed(self, work: Work, is_graph: bool) -> float:
        """Milliseconds of one turn, from cold caches.

        A graph is launched while the device is still busy with what clears the caches, so that its launch does not
        count. Other work begins on an idle device: how fast it is launched counts, as in a trainer that does so.
        """
        self._flushed.zero_()
        if not self.on_cuda:
            begin = time.perf_counter()
            work()
            return (time.perf_counter() - begin) * 1e3
        if not is_graph:
            self.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def medians(self, works: dict[str, Work]) -> dict[str, float]:
        """Medians in milliseconds, turn by turn, so that a drift of the card meets all.

        Args:
            works: by name; those whose names end in `_graph` are graphs.

        """
        for work in 2 * list(works.values()):
            work()
        self.synchronize()
        times: dict[str, list[float]] = {name: [] for name in works}
        end = time.perf_counter() + self.seconds
        turns = 0
        while turns < 5 or (time.perf_counter() < end and turns < 200):
            for name, work in works.items():
                times[name].append(self.elapsed(work, name.endswith("_graph")))
            turns += 1
        return {name: statistics.median(each) for name, each in times.items()}

    def times(self, works: dict[str, Work]) -> Times:
        """Medians of all, and the kernels of the work that is called `c`."""
        return Times(self.medians(works), self.kernels(works["c"]))

    def kernels(self, work: Work, repetitions: int = 10) -> list[Kernel]:
        """What the device does in a work; on the CPU, PyTorch's operators."""
        with profile(activities=[ProfilerActivity.CUDA if self.on_cuda else ProfilerActivity.CPU]) as profiled:
            for _ in range(repetitions):
                work()
            self.synchronize()
        found = [
            Kernel(
                event.key[:100],
                event.count / repetitions,
                (event.self_device_time_total if self.on_cuda else event.self_cpu_time_total) / repetitions,
            )
            for event in profiled.key_averages()
        ]
        return sorted((kernel for kernel in found if kernel.us > 0), key=lambda kernel: -kernel.us)

    def copy_bytes_per_ms(self) -> float:
        """Bytes that a copy of a large tensor reads and writes per millisecond."""
        size = 1 << 30 if self.on_cuda else 1 << 24
        source, target = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        return 2 * size / self.medians({"copy_graph": lambda: target.copy_(source)})["copy_graph"]

    @property
    def stream(self) -> int | None:
        """The current stream, as the library takes it."""
        return torch.cuda.current_stream(self.device).cuda_stream if self.on_cuda else None
