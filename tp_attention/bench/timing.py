"""How long one call takes: inside a CUDA graph with a cold L2 on a GPU, by the wall clock elsewhere.

Graphs, because a decode step is 5 µs of work behind 50 µs of Python: replays leave the host out, for us and for peers
alike. Each call of a list works on a copy of its own of the same inputs, COLD_BYTES and MIN_COPIES of them together, so
that nothing that a call reads is left in the L2 by the one before it; a replay goes round them all.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

COLD_BYTES, MIN_COPIES = 200_000_000, 4
BUDGET_MS = 100.0  # of samples
WARMUP = 0.2  # of the budget, before it
REPLAY_MS = 1.0  # at least, so that starting a graph (some 5 µs) is lost in it
MIN_SAMPLES, MAX_SAMPLES, MAX_CALLS = 5, 100, 400


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of `samples` replays, and the quartiles on either side of it."""

    ms: float
    lower: float
    upper: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, lower, upper, len(samples))


def copies_needed(nbytes: int, device: torch.device) -> int:
    """How many copies of inputs of this size keep a GPU's L2 cold; elsewhere two, to go the same ways."""
    return max(MIN_COPIES, min(math.ceil(COLD_BYTES / nbytes), MAX_CALLS)) if device.type == "cuda" else 2


def measure(calls: Sequence[Call], device: torch.device, budget_ms: float | None = None) -> Timing:
    """Time calls, which do the same work on different copies of the inputs; the result is for one of them."""
    budget_ms = BUDGET_MS if budget_ms is None else budget_ms
    return _graph(calls, budget_ms) if device.type == "cuda" else _wall(calls, budget_ms)


def _wall(calls: Sequence[Call], budget_ms: float) -> Timing:
    samples: list[float] = []
    calls[0]()
    while len(samples) < MIN_SAMPLES or (sum(samples) < budget_ms and len(samples) < MAX_SAMPLES):
        start = time.perf_counter()
        calls[len(samples) % len(calls)]()
        samples.append((time.perf_counter() - start) * 1e3)
    return Timing.of(samples)


def _graph(calls: Sequence[Call], budget_ms: float) -> Timing:
    # Outside of the graph, and on a side stream as capture wants it: compiling, tuning, first allocations.
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    graph, rounds = _capture(calls, 1), 1
    once = statistics.median(_replays(graph, 3))
    wanted = min(math.ceil(REPLAY_MS / once), MAX_CALLS // len(calls))
    if wanted > 1:
        graph, rounds = _capture(calls, wanted), wanted
    replay_ms = once * rounds
    _replays(graph, max(1, int(WARMUP * budget_ms / replay_ms)))
    samples = _replays(graph, min(max(int(budget_ms / replay_ms), MIN_SAMPLES), MAX_SAMPLES))
    return Timing.of([ms / (rounds * len(calls)) for ms in samples])


def _capture(calls: Sequence[Call], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_side_stream()):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Milliseconds of each replay. All are queued before any is waited for, so the GPU is never idle in between."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    graph.replay()  # keeps the GPU busy while the first event and replay are queued
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
