"""Kernel times from replayed CUDA graphs, the implementations of one case taking turns; plain calls on a CPU."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks import families

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


@dataclass(frozen=True)
class Recording:
    """A replayable sequence of calls; `calls` is what its time is divided by."""

    replay: Callable[[], None]
    calls: int


def num_sets(num_bytes: int) -> int:
    """How many sets of tensors to rotate through: past twice the L2, or HOT_SETS where these fit in a quarter of it.

    What is that small a decode step finds in the L2, where the kernel before has just left it.
    """
    if families.device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(families.device).L2_cache_size
    if HOT_SETS * num_bytes <= l2 // 4:
        return HOT_SETS
    return -(-2 * l2 // num_bytes) + 1


def record_calls(calls: list[Callable[[], object]], per: int = 1) -> Recording:
    """All calls in order, as one CUDA graph on a GPU; every `per` of them count as one call."""
    if families.device.type != "cuda":

        def replay() -> None:
            for call in calls:
                call()

        return Recording(replay, len(calls) // per)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:per]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return Recording(graph.replay, len(calls) // per)


def time_recordings(recordings: Mapping[str, Recording]) -> dict[str, Timing]:
    """Time per call of each. A sample replays often enough to last MIN_SAMPLE_US; the recordings take turns, so that
    a drift of the clocks hits all alike."""
    warm_up, limit = 0.0, WARM_UP_US if families.device.type == "cuda" else 0.0
    while warm_up < limit and recordings:
        warm_up += sum(_sample_us(recording, 10) for recording in recordings.values())
    replays = {name: max(1, round(MIN_SAMPLE_US / max(_sample_us(r, 1), 1.0))) for name, r in recordings.items()}
    samples: dict[str, list[float]] = {name: [] for name in recordings}
    for _ in range(SAMPLES):
        for name, recording in recordings.items():
            recording.replay()  # brings back what the others have pushed out of the L2
            us = _sample_us(recording, replays[name])
            samples[name].append(us / replays[name] / recording.calls)
    return {name: Timing.of(values) for name, values in samples.items()}


def _sample_us(recording: Recording, replays: int) -> float:
    if families.device.type != "cuda":
        start_s = time.perf_counter()
        for _ in range(replays):
            recording.replay()
        return (time.perf_counter() - start_s) * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        recording.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
