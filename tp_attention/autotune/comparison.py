"""When a configuration may take the place of a table's entry: its results are right, and it is faster than the noise.

For autotune and for bench.tune; bench's errors are the same ones. Without Triton, which may be missing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

TOLERANCE = 2e-2  # of the largest value, against the table's entry: two orders of summation apart, in bf16
WORTH = 1.01  # an entry gives way to one that is faster by more than the noise


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; inf where actual holds NaN. expected: fp64."""
    if actual.shape != expected.shape:
        raise ValueError(f"the result has shape {list(actual.shape)}, expected {list(expected.shape)}")
    error = ((actual.double() - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def first(result: Any) -> Tensor:
    """The result itself, of launches that return more."""
    return result[0] if isinstance(result, tuple) else result


def winner(default: Any, speedups: Sequence[Mapping[Any, float]]) -> tuple[Any, float]:
    """The fastest configuration and its speed over the table's entry, which stays where none is WORTH it.

    speedups: of each launch. The geometric mean over them counts, and a configuration that lacks one is out.
    """
    everywhere = [config for config in speedups[0] if all(config in of for of in speedups)]
    means = {config: statistics.geometric_mean(of[config] for of in speedups) for config in everywhere}
    best = max(means, key=lambda config: means[config], default=default)
    return (best, means[best]) if means.get(best, 0) > WORTH else (default, 1.0)
