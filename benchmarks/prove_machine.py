"""The machine that `prove_on_gpu` measures: a GPU, or a CPU that stands in for one to run the same code."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from measuring import peak_memory_mib

__all__ = ["Dry", "Gpu"]


class Gpu:
    """Times with CUDA events and a cache flushed before each call, as Triton's own `do_bench`."""

    dry = False
    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.device = torch.device("cuda:0")
        torch.cuda.set_device(self.device)
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        self.arch = f"sm_{properties.major}{properties.minor}"

    def devices(self) -> list[torch.device]:
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def ms(self, function: Callable[[], Any]) -> float:
        """Median of at least three calls and about 200 ms."""
        from triton.testing import do_bench

        for _ in range(2):
            function()
        torch.cuda.synchronize()
        times = do_bench(function, warmup=10, rep=200, return_mode="all")
        assert isinstance(times, list)
        return statistics.median(times)

    def peak_mib(self, function: Callable[[], Any]) -> float:
        return round(peak_memory_mib(function), 1)

    def graph(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What `function` returns, captured, and what replays it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm, as a capture must be
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function()
        return out, graph.replay

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True)

    def free(self) -> None:
        torch.cuda.empty_cache()


class Dry:
    """A CPU: every call runs once, over little, and every time is 1 ms."""

    dry = True
    dtype = torch.bfloat16
    name = "dry run on a CPU"
    arch = "sm_90"
    device = torch.device("cpu")

    def devices(self) -> list[torch.device]:
        return [self.device, self.device]

    def synchronise(self) -> None:
        pass

    def ms(self, function: Callable[[], Any]) -> float:
        function()
        return 1.0

    def peak_mib(self, function: Callable[[], Any]) -> float:
        function()
        return 1.0

    def graph(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
        return function(), function

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend="eager")

    def free(self) -> None:
        pass
