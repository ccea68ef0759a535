"""pytest plugin: `world(n)` runs a function on n ranks, the launcher's where there are some and spawned ones otherwise.

    def test_sum(world):
        assert world(2)(rank_sum) == [1, 1]

Under a launcher (`torchrun --nproc-per-node=2 -m pytest tests/multirank`, `mpirun -n 2 python -m pytest …`, `deepspeed
--num_accelerators 2 --module pytest …`) every rank runs the same tests; a test for another number of ranks than the
launcher's is skipped, except that worlds of one run on every rank by itself. Limit: there, a rank that hangs outside a
collective is ended by pytest-timeout alone.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from tp_attention.comm import process_groups as groups
from tp_attention.launch import environment
from tp_attention.launch.failure import Failure, RankError
from tp_attention.launch.spawn import spawn
from tp_attention.launch.world import World, init

Run = Callable[..., list[Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--local_rank", "--local-rank", help="from deepspeed; unused, for LOCAL_RANK says it too")


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Callable[..., Run]:
    """world(n, tp=None, timeout=60) -> run; run(fn, *args) -> [fn(World, *args) of rank 0, rank 1, ...].

    fn and its return value must be picklable; tensors come back on the CPU. A failing rank is a RankError with its
    traceback, on every rank.
    """
    calls = itertools.count()

    def make(n: int, tp: int | None = None, timeout: float = 60) -> Run:
        def run(fn: Callable[..., Any], *args: Any) -> list[Any]:
            # Not where there are GPUs: once this process has used CUDA, the ranks of later tests could not be forked.
            if n == 1 and (environment.launched() or not torch.cuda.device_count()):
                groups.check_tp(tp or 1, 1)
                with World.alone() as alone:
                    return [_on_cpu(fn(alone, *args))]
            if not environment.launched():
                return spawn(_on_rank, n, tp, timeout, fn, args, timeout=timeout)
            request.getfixturevalue("_launched_world")
            key = f"{request.node.nodeid}, call {next(calls)}"
            return _on_all_launched(key, tp, timeout, fn, args)

        if n != 1 and environment.launched() and n != environment.read().size:
            pytest.skip(f"needs {n} ranks, the launcher started {environment.read().size}")
        return run

    return make


@pytest.fixture(scope="session")
def _launched_world() -> Iterator[None]:
    """The default process group for the whole session: each test's World joins it and makes groups of its own."""
    with init():
        yield


def _on_rank(tp: int | None, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    with init(tp=tp, timeout=timeout) as joined:
        return _on_cpu(fn(joined, *args))


def _on_cpu(value: Any) -> Any:
    """Tensors of several GPUs cannot be compared, nor those of a process that ended."""
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, value)


def _on_all_launched(
    key: str, tp: int | None, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]
) -> list[Any]:
    """Leaving a failed rank's World closes its connections, which wakes the ranks that wait for it in a collective."""
    groups.exchange(f"{key}: start", b"", timeout)  # a rank that never came to this test must not hang init
    rank, size = groups.default_place()
    try:
        outcome: Any = (_on_rank(tp, timeout, fn, args),)
        message = pickle.dumps(outcome)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # pytest.fail and pytest.skip are no Exceptions
        message = pickle.dumps(Failure.of_exception(rank, error))
    outcomes = [pickle.loads(item) for item in groups.exchange(f"{key}: end", message, timeout)]
    if failures := [outcome for outcome in outcomes if isinstance(outcome, Failure)]:
        raise RankError(failures, size)
    return [value for (value,) in outcomes]
