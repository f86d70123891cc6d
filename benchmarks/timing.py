"""Kernel times from replayed CUDA graphs, the implementations of one case taking turns."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SAMPLES = 15
MIN_SAMPLE_US = 300.0
WARM_UP_US = 50_000.0  # an idle GPU takes tens of milliseconds to reach its clocks
HOT_SETS = 40


@dataclass(frozen=True)
class Timing:
    us: float  # median of the samples
    us_spread: float  # distance between the quartiles

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        low, median, high = statistics.quantiles(samples, n=4)
        return cls(median, high - low)


def num_sets(num_bytes: int) -> int:
    """How many sets of tensors to rotate through: past twice the L2, or HOT_SETS where these fit in a quarter of it.

    What is that small a decode step finds in the L2, where the kernel before has just left it.
    """
    l2 = torch.cuda.get_device_properties("cuda").L2_cache_size
    if HOT_SETS * num_bytes <= l2 // 4:
        return HOT_SETS
    return -(-2 * l2 // num_bytes) + 1


def capture(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls in order, warmed up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def time_graphs(graphs: Mapping[str, torch.cuda.CUDAGraph], calls_per_graph: int) -> dict[str, Timing]:
    """Time per call of each graph. A sample replays a graph often enough to last MIN_SAMPLE_US; the graphs take turns,
    so that a drift of the clocks hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    warm_up = 0.0
    while warm_up < WARM_UP_US and graphs:
        warm_up += sum(_replay_us(graph, 10) for graph in graphs.values())
    replays = {name: max(1, round(MIN_SAMPLE_US / max(_replay_us(graph, 1), 1.0))) for name, graph in graphs.items()}
    for _ in range(SAMPLES):
        for name, graph in graphs.items():
            samples[name].append(_replay_us(graph, replays[name]) / replays[name] / calls_per_graph)
    return {name: Timing.of(values) for name, values in samples.items()}


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
