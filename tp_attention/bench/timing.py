"""How long one call takes: inside a CUDA graph with a cold L2 on a GPU, by the wall clock elsewhere.

Graphs, because a decode step is 5 µs of work behind 50 µs of Python: replays leave the host out, for us and for peers
alike. Each call of a list works on a copy of its own of the same inputs, COLD_BYTES and MIN_COPIES of them together, so
that nothing that a call reads is left in the L2 by the one before it; a replay goes round them all.

Those that are compared take turns, A B C C B A: a GPU that warms up or throttles would favour whoever comes first. So
they have one clock in common, which under a power limit is not the clock that each would have alone.

Calls that hold collectives take the group they run on: every rank then makes as many calls as rank 0, in the same
order, and the ranks meet before each capture and before they time. A call that raises does so on every rank.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from tp_attention import comm
from tp_attention.comm import TPGroup

Call = Callable[[], object]
Result = TypeVar("Result")

COLD_BYTES, MIN_COPIES = 200_000_000, 4
BUDGET_MS = 100.0  # of samples
WARMUP = 0.2  # of the budget, before it
REPLAY_MS = 1.0  # at least, so that starting a graph (some 5 µs) is lost in it
MIN_SAMPLES, MAX_SAMPLES, MAX_CALLS = 10, 100, 400


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


@dataclass(frozen=True)
class Contender:
    """Ready to be timed: a replay makes `count` calls in about `ms`. calls: a graph reads the tensors they hold."""

    calls: Sequence[Call]
    replay: Call
    count: int
    ms: float


def measure(
    calls: Sequence[Call], device: torch.device, budget_ms: float | None = None, group: TPGroup | None = None
) -> Timing:
    """Time calls, which do the same work on different copies of the inputs; the result is for one of them."""
    return in_turns([ready(calls, device, group)], device, budget_ms, group)[0]


def ready(calls: Sequence[Call], device: torch.device, group: TPGroup | None = None) -> Contender:
    """All that can fail, and all that is done once: compiling, first allocations, on a GPU the capture of a graph.

    group: all of its ranks call this at once. What raises on one of them is a RuntimeError on the others.
    """
    if device.type == "cuda":
        return _captured(calls, group)
    together(group, calls[0])
    turn = itertools.cycle(calls)
    return Contender(calls, lambda: next(turn)(), 1, of_first(_times([calls[0]], device)[0], group))


def in_turns(
    contenders: Sequence[Contender],
    device: torch.device,
    budget_ms: float | None = None,
    group: TPGroup | None = None,
) -> list[Timing]:
    """Time contenders in rounds of a replay each, every other round in reverse; the budget is for each of them.

    group: its ranks call this at once, with the same contenders in the same order; the times are the slowest rank's.
    """
    if not contenders:
        return []
    budget_ms = len(contenders) * (BUDGET_MS if budget_ms is None else budget_ms)
    round_ms = of_first(sum(one.ms for one in contenders), group)
    rounds = min(max(int(budget_ms / round_ms), MIN_SAMPLES), MAX_SAMPLES)
    rounds += rounds % 2  # as many in reverse
    warm = max(1, int(WARMUP * rounds))
    forward = range(len(contenders))
    order = [i for turn in range(warm + rounds) for i in (reversed(forward) if turn % 2 else forward)]
    samples: list[list[float]] = [[] for _ in contenders]
    meet(group)
    for i, ms in zip(order, _times([contenders[i].replay for i in order], device, group), strict=True):
        samples[i].append(ms / contenders[i].count)
    return [Timing.of(every[warm:]) for every in samples]


def meet(group: TPGroup | None) -> None:
    """Returns once every rank has come here and its GPU is done; at once without a group."""
    if group is not None:
        comm.barrier(group)
        if group.device.type == "cuda":
            torch.cuda.synchronize(group.device)


def together(group: TPGroup | None, step: Callable[[], Result]) -> Result:
    """step(). With a group a RuntimeError where it raised on another rank, which would not come to what follows."""
    if group is None:
        return step()
    failure: Exception | None = None
    try:
        result = step()
    except Exception as error:
        failure = error
    failed = torch.tensor([failure is not None], dtype=torch.int32, device=group.device)  # ints go by the backend
    total = int(comm.all_reduce(failed, group).item())
    if failure is not None:
        raise failure
    if total:
        raise RuntimeError(f"failed on {total} of the other ranks")
    return result


def of_first(value: float, group: TPGroup | None) -> float:
    """Rank 0's value on every rank: a count that follows from each rank's own would not be the same on all."""
    if group is None:
        return value
    return comm.broadcast(torch.tensor([value], dtype=torch.float64, device=group.device), group).item()


def _captured(calls: Sequence[Call], group: TPGroup | None) -> Contender:
    # Outside of the graph, and on a side stream as capture wants it: compiling, tuning, first allocations.
    together(group, lambda: _warm_up(calls))
    graph, rounds = _capture(calls, 1, group), 1
    meet(group)
    once = of_first(statistics.median(_times([graph.replay] * 3, torch.device("cuda"))), group)
    wanted = min(math.ceil(REPLAY_MS / once), MAX_CALLS // len(calls))
    if wanted > 1:
        graph, rounds = _capture(calls, wanted, group), wanted
    return Contender(calls, graph.replay, rounds * len(calls), once * rounds)


def _warm_up(calls: Sequence[Call]) -> None:
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _capture(calls: Sequence[Call], rounds: int, group: TPGroup | None) -> torch.cuda.CUDAGraph:
    def capture() -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # NCCL has threads of its own, which look at events meanwhile: only this one is held to what a capture allows.
        mode = "global" if group is None or group.size == 1 else "thread_local"
        with torch.cuda.graph(graph, stream=_side_stream(), capture_error_mode=mode):
            for _ in range(rounds):
                for call in calls:
                    call()
        return graph

    meet(group)
    return together(group, capture)


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _times(replays: Sequence[Call], device: torch.device, group: TPGroup | None = None) -> list[float]:
    """Milliseconds of each. On a GPU all are queued before any is waited for, so that it is never idle in between.

    group: each begins on all ranks at once and takes as long as on the slowest. Without that, a rank that is done with
    one thing sooner would have its wait for the others counted as part of the next.
    """
    if device.type != "cuda":
        clock = [time.perf_counter()]
        for replay in replays:
            replay()
            clock.append(time.perf_counter())
        return [(end - start) * 1e3 for start, end in itertools.pairwise(clock)]
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in replays] for _ in range(2))
    group = None if group is None or group.size == 1 else group
    word = None if group is None else torch.zeros(1, device=device)
    replays[0]()  # keeps the GPU busy while the first event and replay are queued
    for replay, start, end in zip(replays, starts, ends, strict=True):
        if group is not None and word is not None:
            comm.all_reduce(word, group, out=word)  # on the stream, no wait here
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]
    if group is None:
        return times
    everyones = comm.all_gather(torch.tensor([times], device=device), group, dim=0, sizes=[1] * group.size)
    return everyones.amax(0).tolist()
