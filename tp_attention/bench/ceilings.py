"""What this device reaches at best, measured in the same run as all that is held against it."""

from __future__ import annotations

import functools

import torch

from tp_attention.bench import timing
from tp_attention.bench.cases import stamp
from tp_attention.bench.results import KernelRow

COPY_BYTES, MATMUL = 4 << 30, 8192


def measure(dtypes: list[torch.dtype], tiny: bool, device: torch.device) -> list[KernelRow]:
    """Device copy in TB/s (read and written), and a square matmul in TFLOP/s for each dtype."""
    nbytes, side = (1 << 20, 128) if tiny else (COPY_BYTES, MATMUL)
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    # a kernel and not copy_, which a CUDA graph gives to the copy engine at two thirds of the rate
    copied = timing.measure([functools.partial(torch.neg, source, out=target)], device)
    rows = [_row("copy", "any", copied, 2 * nbytes, "TB/s", device)]
    for dtype in dtypes:
        a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        multiplied = timing.measure([functools.partial(torch.mm, a, b)], device)
        name = str(dtype).removeprefix("torch.")
        rows.append(_row(f"matmul {side}", name, multiplied, 2 * side**3, "TFLOP/s", device))
    return rows


def of(rows: list[KernelRow], unit: str, dtype: torch.dtype) -> float | None:
    """The ceiling in this unit, of this dtype where it has one."""
    wanted = {str(dtype).removeprefix("torch."), "any"}
    return next((row.rate for row in rows if row.unit == unit and row.dtype in wanted), None)


def _row(name: str, dtype: str, time: timing.Timing, work: float, unit: str, device: torch.device) -> KernelRow:
    return KernelRow(
        benchmark="ceilings",
        row=f"ceiling {name}",
        dtype=dtype,
        who="torch",
        ms=time.ms,
        lower=time.lower,
        upper=time.upper,
        samples=time.samples,
        rate=work / time.ms / 1e9,
        unit=unit,
        ceiling=None,
        best=None,
        error=None,
        allowed=None,
        note="",
        **stamp(device),
    )
