"""Few rows: the shapes of 8B and 70B models, every table entry, and every branch of both kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.kernels.launches import Launch
from tp_attention.kernels.skinny_gemm import Heads, skinny_gemm


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _call(
    rows: int,
    depth: int = 4096,
    columns: int = 6144,
    dtype: torch.dtype = torch.bfloat16,
    group: int | None = None,
    norm: bool = False,
    biased: bool = False,
    **keywords: Any,
) -> Callable[[], object]:
    x, weight = _empty(rows, depth, dtype=dtype), _empty(columns, depth, dtype=dtype if group is None else torch.int8)
    if keywords.get("transposed"):
        weight = _empty(depth, columns, dtype=dtype)
    if group is not None:
        keywords["weight_scale"] = _empty(columns, depth // group, dtype=torch.float32)
    if norm:
        keywords |= {"norm_weight": _empty(depth, dtype=dtype), "rms_eps": 1e-5}
    bias = _empty(columns, dtype=dtype) if biased else None
    return lambda: skinny_gemm(x, weight, bias, **keywords)


def _heads(rows: int, **keywords: Any) -> Heads:
    angles = _empty(rows, 64, dtype=torch.float32)
    return Heads(32, 8, 128, cos=angles, sin=angles, **keywords)


_q_norm = {"q_norm_weight": _empty(128), "k_norm_weight": _empty(128)}

LAUNCHES = {
    "bf16 M1 norm rope": Launch(_call(1, norm=True, heads=_heads(1)), wgmma=True, tma=True),
    "bf16 M32 norm bias q/k norm rope": Launch(
        _call(32, norm=True, biased=True, heads=_heads(32, qk_norm="rmsnorm", **_q_norm)), wgmma=True, tma=True
    ),
    "bf16 M64 q/k layernorm interleaved": Launch(
        _call(64, norm=True, heads=_heads(1, qk_norm="layernorm", interleaved=True)), wgmma=True, tma=True
    ),
    "bf16 M64 70B": Launch(_call(64, 8192, 5120), wgmma=True, tma=True),
    "bf16 M16 unsplit bias": Launch(_call(16, 4096, 128256, biased=True), wgmma=True, tma=True),
    "fp16 M16 transposed": Launch(_call(16, dtype=torch.float16, transposed=True), wgmma=True, tma=True),
    "bf16 M16 odd K": Launch(_call(16, 4095, norm=True), tma=False),
    "bf16 M32 odd K": Launch(_call(32, 4095, norm=True), tma=False),
    "bf16 M64 odd K": Launch(_call(64, 4095, norm=True), tma=False),
    "int8 M16 group 128 norm": Launch(_call(16, group=128, norm=True), wgmma=True, tma=True),
    "int8 M32 group 64": Launch(_call(32, 8192, 5120, group=64), wgmma=True, tma=True),
    "int8 M64 group 80": Launch(_call(64, 5120, 5120, group=80, norm=True), wgmma=True, tma=True),
    "int8 fp16 M16 group 40": Launch(_call(16, 5120, 5120, torch.float16, 40), tma=False),
    "int8 M64 odd group": Launch(_call(64, 4095, group=65, norm=True), tma=False),
    "fp32 M16 norm": Launch(_call(16, dtype=torch.float32, norm=True)),
    "fp32 M32 norm transposed": Launch(_call(32, dtype=torch.float32, norm=True, transposed=True)),
    "fp32 M64 norm": Launch(_call(64, dtype=torch.float32, norm=True)),
    "fp32 M64 odd K": Launch(_call(64, 4095, dtype=torch.float32, norm=True)),
}
