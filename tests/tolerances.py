"""How far from the fp64 reference a result may be: one number per dtype, a fraction of the largest expected value.

Of the largest, because attention averages values: where they cancel, the error stays that of the terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = {
    torch.float64: 1e-12,  # sums of thousands of terms, each rounded to 1e-16
    torch.float32: 2e-5,  # likewise at 6e-8; and a logit of 100 is rounded to 4e-6, which exp makes a fraction
    torch.float16: 2e-3,  # 2 ulp (2^-10): half for rounding the output, the rest for probabilities rounded before P @ V
    torch.bfloat16: 1.6e-2,  # 2 ulp (2^-7), for the same two roundings
}


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest finite expected value (over 1 where that is 0); inf if infinities differ."""
    actual, expected = actual.double(), expected.to(actual.device)  # of two ranks, say
    finite = expected.isfinite()
    if not torch.equal(actual[~finite], expected[~finite]):
        return math.inf
    actual, expected = actual[finite], expected[finite]
    if not expected.numel():
        return 0.0
    error = (actual - expected).abs().max().item() / (expected.abs().max().item() or 1.0)
    return math.inf if math.isnan(error) else error


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> float:
    """Fail unless actual has expected's shape and is within TOLERANCE[dtype] (None: actual's); return the error."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert expected.dtype == torch.float64, f"the expected values are {expected.dtype}; compute them in fp64"
    dtype = dtype or actual.dtype
    error = error_of(actual, expected)
    assert error <= TOLERANCE[dtype], (
        f"error {error:.3g} of the largest value exceeds {TOLERANCE[dtype]:.3g} for {dtype}"
    )
    return error
