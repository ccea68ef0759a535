"""pytest plugin (draft): fixture `world`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tp_attention.launch.spawn import spawn
from tp_attention.launch.world import init


@pytest.fixture
def world() -> Callable[..., Callable[..., list[Any]]]:
    def make(n: int, tp: int | None = None, timeout: float = 60) -> Callable[..., list[Any]]:
        def run(fn: Callable[..., Any], *args: Any) -> list[Any]:
            return spawn(_with_world, n, tp, timeout, fn, args, timeout=timeout)

        return run

    return make


def _with_world(tp: int | None, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    with init(tp=tp, timeout=timeout) as joined:
        return fn(joined, *args)
