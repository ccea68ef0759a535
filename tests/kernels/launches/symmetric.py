"""Sums through symmetric memory: every number of ranks that differs, and each of what one launch does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.kernels.launches import Launch
from tp_attention.comm.norm import Norm
from tp_attention.comm.symmetric.inbox import INBOX_BYTES, Inboxes
from tp_attention.comm.symmetric.overlap import STAGE_BYTES, Overlap
from tp_attention.kernels.gemm import gemm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def inboxes(ranks: int, rank: int | None = None) -> Inboxes:
    """Of a rank in the middle, unless another one is named."""
    rank = ranks // 2 if rank is None else rank
    return Inboxes(rank, [meta(INBOX_BYTES, dtype=torch.uint8)] * ranks, patience=1_000_000)


def one_shot(
    ranks: int, rows: int = 4, columns: int = 8192, dtype: torch.dtype = BF16, splits: int = 0, bias: bool = False,
    residual: bool = False, norm: str | None = None,
) -> Callable[[], object]:  # fmt: skip
    def call() -> None:
        out, row = meta(rows, columns, dtype=dtype), meta(columns, dtype=dtype)
        x = meta(splits, rows, columns, dtype=FP32) if splits else out
        keywords: dict[str, Any] = {"bias": row if bias else None, "residual": out if residual else None}
        if norm is not None:
            assert inboxes(ranks).holds(columns, dtype.itemsize)
            keywords |= {"norm": Norm(norm, row, row if norm == "layernorm" else None), "normed": out}
        inboxes(ranks).one_shot(x, out, **keywords)

    return call


def two_shot(ranks: int, dtype: torch.dtype = BF16, added: bool = False) -> Callable[[], object]:
    x, row = meta(1 << 10, 1 << 12, dtype=dtype), meta(1 << 12, dtype=dtype)
    keywords = {"bias": row, "residual": x} if added else {}
    return lambda: inboxes(ranks).two_shot(x, meta(*x.shape, dtype=dtype), **keywords)


def gather(ranks: int, rows: int = 512, columns: int = 8192) -> Callable[[], object]:
    return lambda: inboxes(ranks).gather(meta(ranks * rows, columns), rows, rows)


def projection(ranks: int, rows: int, *added: Tensor | None) -> Callable[[], object]:
    """As the last rank sees it, which may have a chunk without rows. added: bias, residual."""

    def call() -> None:
        multiply = functools.partial(gemm, weight=meta(8192, 4096))
        stages = [meta(STAGE_BYTES, dtype=torch.uint8)] * ranks
        bias, residual = added or (None, None)
        Overlap(inboxes(ranks, ranks - 1), stages).project(multiply, meta(rows, 4096), meta(rows, 8192), bias, residual)

    return call


LAUNCHES = {
    **{f"one shot of {ranks}": Launch(one_shot(ranks), polls=True) for ranks in (2, 3, 4, 8)},
    "one shot fp16": Launch(one_shot(2, dtype=FP16), polls=True),
    "one shot fp32": Launch(one_shot(4, dtype=FP32), polls=True),
    "one shot, an odd number of words": Launch(one_shot(2, 3, 4098)),
    "barrier": Launch(lambda: Overlap(inboxes(2), []).barrier()),
    **{f"partial sums of {ranks}": Launch(one_shot(ranks, splits=4), polls=True) for ranks in (2, 8)},
    **{
        f"partial sums of {ranks}, bias, residual, rmsnorm {columns}": Launch(
            one_shot(ranks, 64, columns, splits=4, bias=True, residual=True, norm="rmsnorm"),
            cluster=True,
        )
        for ranks, columns in ((2, 4096), (2, 8192), (2, 16384), (4, 4096), (4, 8192), (8, 4096))
    },
    "residual and rmsnorm": Launch(one_shot(2, residual=True, norm="rmsnorm"), polls=True, cluster=True),
    "residual and rmsnorm of many rows": Launch(one_shot(2, 300, residual=True, norm="rmsnorm"), cluster=True),
    "rmsnorm of a short row": Launch(one_shot(2, columns=250, norm="rmsnorm"), cluster=False),
    "bias and layernorm fp32": Launch(one_shot(2, 4, 8192, FP32, bias=True, norm="layernorm"), cluster=True),
    "residual and layernorm of 8": Launch(one_shot(8, 4, 4096, residual=True, norm="layernorm"), cluster=True),
    **{f"two shots of {ranks}": Launch(two_shot(ranks), polls=True) for ranks in (2, 3, 4, 8)},
    **{f"gather of {ranks}": Launch(gather(ranks), polls=True) for ranks in (2, 3, 8)},
    "gather of 2, rows of 4098": Launch(gather(2, 3, 4098)),
    "projection": Launch(projection(2, 8192), kernels=5),
    "projection of rows that do not share out": Launch(projection(2, 8193), kernels=5),
    "projection of 8, bias, residual": Launch(projection(8, 8193, meta(8192), meta(8193, 8192)), kernels=5),
    **{f"two shots of {ranks}, bias, residual": Launch(two_shot(ranks, added=True), polls=True) for ranks in (3, 8)},
    "two shots fp32": Launch(two_shot(4, FP32), polls=True),
}
