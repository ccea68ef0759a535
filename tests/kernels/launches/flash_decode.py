"""Decode: every row of its table, and every branch of its kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.kernels.launches import Launch
from tp_attention.kernels.append_kv import append_kv
from tp_attention.kernels.flash_decode import CONFIGS, flash_decode

INT8, FP8 = torch.int8, torch.float8_e5m2  # e4m3 would not compile for sm_80


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def decode(
    batch: int,
    heads: int,
    kv_heads: int,
    keys: int,
    dim: int,
    tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    page: int = 0,
    scale: str | None = None,
    **keywords: Any,
) -> Launch:
    shape = (batch * keys // page, page, kv_heads, dim) if page else (batch, keys, kv_heads, dim)
    scale_shape = {None: (), "head": (kv_heads,), "token": shape[:3]}[scale]

    def call() -> None:
        scales = meta(*scale_shape, dtype=torch.float32) if scale else None
        flash_decode(
            meta(batch, tokens, heads, dim, dtype=dtype),
            meta(*shape, dtype=cache or dtype),
            meta(*shape, dtype=cache or dtype),
            meta(batch, dtype=torch.int32),
            block_table=meta(batch, keys // page, dtype=torch.int32) if page else None,
            k_scale=scales,
            v_scale=scales,
            **{name: value() if callable(value) else value for name, value in keywords.items()},
        )

    return Launch(call)


def append(
    dim: int, tokens: int, cache: torch.dtype, page: int = 0, scale: str | None = None, **options: Any
) -> Launch:
    shape = (4096, page, 8, dim) if page else (8, 4096, 8, dim)
    scale_shape = {None: (), "head": (8,), "token": shape[:3]}[scale]

    def call() -> None:
        new = [meta(8, tokens, heads, dim) for heads in (32, 8, 8)]
        scales = meta(*scale_shape, dtype=torch.float32) if scale else None
        angles = meta(8, tokens, dim // 2, dtype=torch.float32)
        append_kv(
            *new,
            *(meta(*shape, dtype=cache) for _ in "kv"),
            meta(8, dtype=torch.int32),
            rope=(angles, angles),
            block_table=meta(8, 4096 // page, dtype=torch.int32) if page else None,
            k_scale=scales,
            v_scale=scales,
            **options,
        )

    return Launch(call)


def every_feature(batch: int, heads: int, kv_heads: int, dim: int, mask: tuple[int, ...], kind: torch.dtype) -> Launch:
    return decode(
        batch, heads, kv_heads, 4096, dim, tokens=3, causal=True, window=(1000, None), softcap=30.0, return_lse=True,
        page=32, mask=lambda: meta(*mask, dtype=kind), sinks=lambda: meta(heads),
        alibi_slopes=lambda: meta(heads, dtype=torch.float32),
    )  # fmt: skip


LAUNCHES = {
    "small heads": decode(64, 64, 8, 2048, 64, causal=True),
    "few kv heads": decode(1, 32, 8, 4096, 128, causal=True),
    "one split": decode(64, 32, 8, 4096, 128),
    "wide head": decode(8, 16, 2, 8192, 256),
    "odd head": decode(8, 9, 3, 8192, 80, window=(511, 0)),
    "pages": decode(8, 32, 8, 8192, 128, page=64),
    "small pages": decode(8, 32, 8, 8192, 128, page=16, tokens=4, causal=True),
    "int8 tokens": decode(8, 32, 8, 8192, 128, cache=INT8, scale="token", page=128),
    "fp16, fp8 heads": decode(8, 32, 8, 8192, 128, dtype=torch.float16, cache=FP8, scale="head"),
    "fp16, int8 tokens": decode(8, 32, 8, 8192, 128, dtype=torch.float16, cache=INT8, scale="token"),
    "int8 small heads": decode(64, 64, 8, 2048, 64, cache=INT8, scale="head"),
    "int8 wide head": decode(8, 16, 2, 8192, 256, cache=INT8, scale="head"),
    "many rows": decode(1, 32, 8, 8192, 128, tokens=16, causal=True),
    "many rows, one split": decode(64, 64, 4, 8192, 64, tokens=8, window=(100, 3), return_lse=True),
    "many rows, wide head": decode(1, 32, 8, 8192, 256, tokens=16, causal=True),
    "many rows, int8": decode(1, 32, 8, 8192, 128, tokens=16, causal=True, cache=INT8, scale="token"),
    "many rows, int8, wide head": decode(1, 32, 8, 8192, 256, tokens=16, cache=INT8, scale="head"),
    "every feature": every_feature(2, 16, 4, 128, (2, 16, 3, 4096), torch.bfloat16),
    "every feature, one split": every_feature(64, 32, 8, 64, (64, 4096), torch.bool),
    "safe": decode(8, 32, 8, 4096, 128, config=CONFIGS[0, 128, 2, 2, False, False]),
    "safe, wide head, int8": decode(
        8, 32, 8, 4096, 256, cache=INT8, scale="token", config=CONFIGS[0, 256, 2, 1, False, False]
    ),
    "fp32": decode(2, 8, 2, 4096, 128, tokens=2, dtype=torch.float32, causal=True),
    "fp32, wide head": decode(2, 8, 2, 4096, 256, tokens=16, dtype=torch.float32, cache=INT8, scale="token"),
    "append": append(128, 1, torch.bfloat16),
    "append to pages of int8": append(80, 16, INT8, page=64, scale="token", interleaved=True),
    "append fp8": append(256, 1, FP8, scale="head"),
}
