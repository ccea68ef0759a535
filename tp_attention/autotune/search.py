"""Which configuration is fastest for some launches: right first, then fast, by more than the noise.

What a launch asks the tables for is seen by watching it ask, and a configuration is tried by answering in the table's
place: so a launch is any call that ends in a kernel, and nobody here knows which. Compiling costs seconds and timing
milliseconds, so all is compiled first, by as many threads as there are processors: Triton lets go of Python's lock
where it matters. Limit: time ends what comes too late, but not a compilation that has begun.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as TimeIsUp
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from tp_attention.autotune.comparison import TOLERANCE, first, relative_error, winner
from tp_attention.autotune.layer import Launch
from tp_attention.autotune.spaces import SPACES, Entry, entry
from tp_attention.kernels import configs, replay

log = logging.getLogger("tp_attention")

Measure = Callable[[Launch], float]  # milliseconds of a launch
Report = Callable[[str], None]

COMPILING = 0.6  # of the time, at most; what is not compiled by then is dropped
THREADS = 16  # at most, since other ranks and models share the host
WARMUP_MS, SAMPLES_MS = 2, 10

_answer: ContextVar[Callable[[str, configs.Key], Any] | None] = ContextVar("answer", default=None)  # of this thread


class _Asked(Exception):
    """Ends a launch where it asks for (kernel, key)."""


@contextmanager
def watched() -> Iterator[None]:
    """Inside, `asked` and `forced` work, in any thread. Outside, a launch does not pay for them."""
    choose = configs.choose

    def answer_or_choose(kernel: str, table: Any, key: configs.Key, config: Any = None) -> Any:
        answer = _answer.get()
        return choose(kernel, table, key, config if answer is None else answer(kernel, key) or config)

    configs.choose = answer_or_choose
    try:
        yield
    finally:
        configs.choose = choose


def asked(launch: Launch) -> tuple[str, configs.Key] | None:
    """The kernel and key that a launch asks the tables for first, None where it asks nothing. No kernel runs."""

    def ask(kernel: str, key: configs.Key) -> Any:
        raise _Asked(kernel, key)

    try:
        _run(launch, ask)
    except _Asked as found:
        kernel, key = found.args
        return kernel, key
    return None


def forced(launch: Launch, kernel: str, key: configs.Key, config: Any) -> Any:
    """What a launch returns with this configuration in the table's place."""
    return _run(launch, lambda *ask: config if ask == (kernel, key) else None)


def _run(launch: Launch, answer: Callable[[str, configs.Key], Any]) -> Any:
    token = _answer.set(answer)
    try:
        with replay.paused():  # or it would start the kernel that it started before
            return launch()
    finally:
        _answer.reset(token)


def median_ms(launch: Launch) -> float:
    """By events, the L2 emptied before each run: while it is, Python gets ahead of the GPU."""
    from triton.testing import do_bench

    return do_bench(launch, warmup=WARMUP_MS, rep=SAMPLES_MS, return_mode="median")


def search(
    launches: Iterable[tuple[str, Launch]],
    device: torch.device,
    seconds: float,
    *,
    families: Collection[str] = tuple(SPACES),
    measure: Measure = median_ms,
    report: Report = lambda text: None,
) -> list[Entry]:
    """The entries that beat those of the tables, for what named launches ask of these families.

    measure: the seam for tests, which have nothing to time. report: is told how far it is.
    Raises where a table's own entry fails, or the GPU does; of a launch that has no room, the log says so.
    """
    start = time.monotonic()
    with watched(), _current(device):
        questions = _questions(launches).items()
        contests = [_Contest(*question, asking) for question, asking in questions if question[0] in families]
        compiled = _compiled(contests, seconds * COMPILING, device, report)
        for contest in contests:
            contest.begin(measure)
        for done, (contest, config) in enumerate(compiled):
            if time.monotonic() - start > seconds:
                log.info("autotune: out of time after %d of %d configurations", done, len(compiled))
                break
            report(f"timed {done} of {len(compiled)}")
            contest.time(config, measure, device)
        won = [(contest, contest.winner(measure)) for contest in contests]
    return [Entry(contest.kernel, contest.key, config) for contest, config in won if config != contest.default]


class _Contest:
    """One key of a family: the launches that ask for it, what they return, and each configuration's speed on them."""

    def __init__(self, kernel: str, key: configs.Key, launches: list[tuple[str, Launch]]) -> None:
        self.kernel, self.key, self.default = kernel, key, entry(kernel, key)
        # few: each candidate is timed on all of them
        self.launches = dict((launches[0], launches[len(launches) // 2], launches[-1]))
        self.expected: dict[str, Tensor] = {}
        self.base: dict[str, float] = {}
        self.speedups: dict[str, dict[Any, float]] = {}

    def candidates(self) -> Iterator[tuple[_Contest, Any]]:
        return ((self, config) for config in SPACES[self.kernel].candidates(self.default))

    def run(self, name: str, config: Any) -> Any:
        return forced(self.launches[name], self.kernel, self.key, config)

    def begin(self, measure: Measure) -> None:
        """Run and time the table's entry."""
        for name in list(self.launches):
            try:
                self.expected[name] = first(self.run(name, self.default)).double()
                self.base[name] = measure(functools.partial(self.run, name, self.default))
                self.speedups[name] = {}
            except torch.OutOfMemoryError:
                log.info("autotune: %s has no room to be timed: left out", name)

    def time(self, config: Any, measure: Measure, device: torch.device) -> None:
        """A configuration that fails on one launch, or returns something else, is out."""
        if config == self.default:
            return
        try:
            for name, speedups in self.speedups.items():
                if not relative_error(first(self.run(name, config)), self.expected[name]) <= TOLERANCE:
                    log.info("autotune: %s %s %s returns something else on %s", self.kernel, self.key, config, name)
                    return
                speedups[config] = self.base[name] / measure(functools.partial(self.run, name, config))
        except Exception as failure:  # too much shared memory, say: a space is allowed to hold such
            log.debug("autotune: %s %s %s: %s", self.kernel, self.key, config, failure)
            _synchronize(device)

    def winner(self, measure: Measure) -> Any:
        """Of many measurements the luckiest looks faster than it is: the best one has to win once more."""
        if not self.speedups:
            return self.default
        best, _ = winner(self.default, list(self.speedups.values()))
        if best == self.default:
            return best
        again = []
        for name in self.speedups:
            base, ms = (measure(functools.partial(self.run, name, config)) for config in (self.default, best))
            again.append({best: base / ms})
        return winner(self.default, again)[0]


def _questions(launches: Iterable[tuple[str, Launch]]) -> dict[tuple[str, configs.Key], list[tuple[str, Launch]]]:
    """The launches that ask for each (kernel, key)."""
    found: dict[tuple[str, configs.Key], list[tuple[str, Launch]]] = {}
    for name, launch in launches:
        try:
            question = asked(launch)
        except torch.OutOfMemoryError:  # a matrix of probabilities, say: the layer itself may never be so long
            log.info("autotune: %s has no room for its results: left out", name)
            continue
        if question is None:
            log.info("autotune: %s launches no kernel with a table: left out", name)
        else:
            found.setdefault(question, []).append((name, launch))
    return found


def _compiled(
    contests: list[_Contest], seconds: float, device: torch.device, report: Report
) -> list[tuple[_Contest, Any]]:
    """The candidates that compile and run within the seconds, of all contests in turn so that each gets its share."""
    turns = itertools.zip_longest(*(contest.candidates() for contest in contests))
    candidates = [candidate for turn in turns for candidate in turn if candidate is not None]

    def run(contest: _Contest, config: Any) -> None:
        for name in contest.launches:
            with suppress(torch.OutOfMemoryError):  # of all threads together
                contest.run(name, config)

    for candidate in candidates[:1]:  # a table's entry, alone: Triton starts its driver
        run(*candidate)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), initializer=_enter, initargs=(device,)) as pool:
        running = [pool.submit(run, *candidate) for candidate in candidates]
        try:
            with suppress(TimeIsUp):
                for done, _ in enumerate(as_completed(running, seconds), 1):
                    report(f"compiled {done} of {len(candidates)}")
        finally:
            pool.shutdown(cancel_futures=True)
    _synchronize(device)
    return [
        candidate
        for candidate, future in zip(candidates, running, strict=True)
        if not future.cancelled() and future.exception() is None
    ]


def _enter(device: torch.device) -> None:
    """A thread's first steps: the current GPU and its context are a thread's own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _synchronize(device: torch.device) -> None:
    """Raises where a launch broke the device's context, and with it all that would follow."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
