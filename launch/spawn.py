"""spawn(): runs a function on N ranks of this machine; brings back what they return, or the failure that came first.

The ranks see torchrun's environment, so what works under torchrun works here. Limit: one machine; that a killed parent
takes its ranks along holds on Linux.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from tp_attention.comm import process_groups as groups
from tp_attention.launch.environment import Environment
from tp_attention.launch.failure import Failure, RankError

GRACE = 1.0  # seconds from the first failure seen to the verdict: the one that caused it may be reported later
CUDA_ERROR_NOT_INITIALIZED = 3  # what cuInit returns in a fork of a process that has called it
PATIENCE = 10.0  # seconds for a rank that has returned to end

Rank = tuple[BaseProcess, Connection]  # and our end of the pipe through which it reports


def spawn(
    fn: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float | None = None,
    threads: int = 1,
    start_method: str | None = None,
) -> list[Any]:
    """Runs fn(*args) in `ranks` processes and returns their return values in rank order.

    Inside, launch.init() joins them. timeout: seconds for everything, None for no limit. threads: torch threads of
    each rank. start_method: None is "fork" (0.1 s) where that is safe: one thread per rank, and in this process CUDA
    unused and no process group. Else "spawn" (seconds; fn and args are pickled). Return values are pickled; a rank's
    standard input is empty.

    Raises RankError when a rank raises, exits or is killed, TimeoutError naming the ranks still running; in both cases
    no rank is left.
    """
    if ranks < 1 or threads < 1:
        raise ValueError(f"spawn needs at least one rank and one thread each, got ranks={ranks} and threads={threads}")
    if start_method not in (None, "fork", "spawn"):
        raise ValueError(f"start_method={start_method!r} is not known; use 'fork', 'spawn' or None")
    if start_method == "fork" and groups.initialised():
        raise ValueError("a forked rank would take this process's process group for its own; use start_method='spawn'")
    if start_method is None:
        start_method = "spawn" if threads > 1 or groups.initialised() or _cuda_was_used() else "fork"
    deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
    listener = socket.create_server(("127.0.0.1", 0), backlog=ranks + 128)
    port = listener.getsockname()[1]
    started: list[Rank] = []
    patience = 0.0
    try:
        for rank in range(ranks):
            place = Environment("torchrun", rank, ranks, rank, ranks, "127.0.0.1", port, hosted=True)
            started.append(_start(start_method, place, threads, fn, args))
        with groups.hosted_store(listener):  # after the forks, which its thread would not survive
            results, failures = _collect(started, deadline)
        if failures:
            raise RankError(failures, ranks)
        if running := [rank for rank in range(ranks) if rank not in results]:
            raise TimeoutError(f"ranks {running} of {ranks} still running after {timeout} s")
        patience = PATIENCE
        return [results[rank] for rank in range(ranks)]
    finally:
        _stop([process for process, _ in started], patience)
        for _, pipe in started:
            pipe.close()
        listener.close()


def _start(method: str, place: Environment, threads: int, fn: Any, args: Any) -> Rank:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_rank_main, args=(place, os.getpid(), theirs, threads, fn, args))  # type: ignore
    with theirs, _forking():
        process.start()
    return process, ours


def _collect(started: list[Rank], deadline: float) -> tuple[dict[int, Any], list[Failure]]:
    """Return values by rank, and failures. Ends with the last rank, at the deadline, or soon after a failure."""
    results: dict[int, Any] = {}
    failures: list[Failure] = []
    running = dict(enumerate(started))
    while running and (left := deadline - time.monotonic()) > 0:
        events = [event for process, pipe in running.values() for event in (pipe, process.sentinel)]
        wait(events, min(left, 3600.0))
        for rank, (process, pipe) in list(running.items()):
            ended = process.exitcode is not None  # asked first: what it wrote before it ended is then there to read
            if not ended and not pipe.poll():
                continue
            del running[rank]
            outcome = _receive(pipe)
            if outcome is None:
                process.join(GRACE)
                failures.append(Failure.of_exit(rank, process.exitcode or 0))
            elif isinstance(outcome, Failure):
                failures.append(outcome)
            else:
                (results[rank],) = outcome
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE)
    return results, failures


def _receive(pipe: Connection) -> Any:
    """A Failure, (value,), or None from a rank that ended without a word."""
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll() else None
    except (EOFError, ConnectionError):
        return None


def _stop(processes: list[BaseProcess], patience: float) -> None:
    """Waits `patience` seconds for the processes to end, then ends them and what they started."""
    for send in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + patience
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        patience = 1.0
        for process in processes:
            _signal_group(process, send)
    for process in processes:
        process.join()
        process.close()


def _signal_group(process: BaseProcess, number: int) -> None:
    """To the rank's whole process group, or to the rank alone where it has not come to make one."""
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _cuda_was_used() -> bool:
    """Whether a forked rank could not use CUDA. Asking whether there is a GPU is enough, and only a fork can tell.

    The driver is asked beside torch: a library may have initialised it past torch's notice (loading a transformers
    model does), and no child of this process can use it then.
    """
    if not torch.backends.cuda.is_built():
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver, no GPU
        return False
    with _forking():
        pid = os.fork()
        if pid == 0:
            os._exit(int(torch.cuda._is_in_bad_fork() or driver.cuInit(0) == CUDA_ERROR_NOT_INITIALIZED))
    return os.waitpid(pid, 0)[1] != 0


@contextmanager
def _forking() -> Iterator[None]:
    gc.freeze()  # a child must not collect our garbage: destructors would wait for threads that it does not have
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: a rank needs none of ours
            yield
    finally:
        gc.unfreeze()


def _rank_main(place: Environment, parent: int, pipe: Connection, threads: int, fn: Any, args: Any) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which then ends us and what we started
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before that call
            os._exit(1)
    torch.set_num_threads(threads)  # first: the thread pool of a forked parent is not here, and waiting for it hangs
    os.environ.update(place.variables(), TORCHELASTIC_RESTART_COUNT="0")
    try:
        message = pickle.dumps((fn(*args),))
    except BaseException as error:
        message = pickle.dumps(Failure.of_exception(place.rank, error))
    pipe.send_bytes(message)
