"""Projection benchmarks: RMSNorm + QKV, the output projection, and int8 weights, over numbers of tokens M.

Up to SKINNY tokens they are bound by reading the weight (TB/s), above by the tensor cores (TFLOP/s). The peer is
cuBLAS, after torch's RMSNorm where there is a norm; beside int8 weights it reads bf16 ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tp_attention import functional, reference
from tp_attention.bench import peers
from tp_attention.bench.cases import Case, Inputs, Prepare, relative_error, sampled

DTYPE = torch.bfloat16
EPS = 1e-6
GROUP = 128  # columns that share one scale of an int8 weight
SKINNY = 64

TOKENS = (1, 8, 16, 64, 512, 4096, 16384)
INT8_TOKENS = (1, 8, 16, 64)
# (K, N): 32 query and 8 kv heads of 128 on one rank; 64 and 8 on each of two
QKV = ((4096, 6144), (8192, 5120))
OUTPUT = ((4096, 4096), (4096, 8192))


def norm_qkv(tiny: bool, device: torch.device) -> Iterator[Case]:
    """functional.norm_qkv with RMSNorm."""

    def ours(x: Tensor, norm_weight: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        return lambda: functional.norm_qkv(x, weight, norm="rmsnorm", norm_weight=norm_weight, eps=EPS)

    yield from _cases("norm_qkv", QKV, TOKENS, ours, peers.norm_linear(EPS), EPS, tiny, device)


def linear(tiny: bool, device: torch.device) -> Iterator[Case]:
    """functional.linear."""

    def ours(x: Tensor, norm_weight: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        return lambda: functional.linear(x, weight)

    yield from _cases("linear", (*QKV, *OUTPUT), TOKENS, ours, peers.norm_linear(None), None, tiny, device)


def int8(tiny: bool, device: torch.device) -> Iterator[Case]:
    """functional.norm_qkv with int8 weights, beside bf16 ones: ours, and RMSNorm + cuBLAS."""

    def ours(x: Tensor, norm_weight: Tensor, weight: Tensor, quantised: Tensor, scale: Tensor) -> Callable[[], Tensor]:
        return lambda: functional.norm_qkv(
            x, quantised, norm="rmsnorm", norm_weight=norm_weight, eps=EPS, weight_scale=scale
        )

    def ours_wide(x: Tensor, norm_weight: Tensor, weight: Tensor, *_: Tensor) -> Callable[[], Tensor]:
        return lambda: functional.norm_qkv(x, weight, norm="rmsnorm", norm_weight=norm_weight, eps=EPS)

    rivals = {"ours bf16": ours_wide, **peers.norm_linear(EPS)}
    yield from _cases("int8", QKV, INT8_TOKENS, ours, rivals, EPS, tiny, device)


def _cases(
    name: str,
    sizes: tuple[tuple[int, int], ...],
    tokens: tuple[int, ...],
    ours: Prepare,
    rivals: Any,
    eps: float | None,
    tiny: bool,
    device: torch.device,
) -> Iterator[Case]:
    quantised = name == "int8"
    for k, n in [(256, 384)] if tiny else sizes:
        for m in (1, 96) if tiny else tokens:
            weight_bytes = n * k + n * k // GROUP * 4 if quantised else n * k * DTYPE.itemsize
            skinny = m <= SKINNY
            moved = weight_bytes + m * (k + n) * DTYPE.itemsize
            yield Case(
                benchmark=name,
                name=f"{name} K{k} N{n} M{m}",
                dtype=DTYPE,
                work=moved if skinny else 2 * m * n * k,
                unit="TB/s" if skinny else "TFLOP/s",
                make=maker(m, k, n, quantised, device),
                ours=ours,
                peers=rivals,
                baseline="cublas",
                truth=_truth(eps),
                reads=moved,
            )


def maker(m: int, k: int, n: int, quantised: bool, device: torch.device) -> Callable[[], Inputs]:
    def make() -> Inputs:
        x = torch.randn(1, m, k, dtype=DTYPE, device=device)
        norm_weight = 1 + 0.1 * torch.randn(k, dtype=DTYPE, device=device)
        if not quantised:
            return x, norm_weight, torch.randn(n, k, dtype=DTYPE, device=device) / k**0.5
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        scale = (0.5 + torch.rand(n, k // GROUP, device=device)) / (74 * k**0.5)  # 74: the codes' standard deviation
        return x, norm_weight, _dequantised(codes, scale).to(DTYPE), codes, scale

    return make


def _dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    """[N, K] int8, [N, K / GROUP] fp32 -> [N, K] fp32, or fp64 for a scale of that."""
    return (codes.unflatten(1, (-1, GROUP)) * scale[:, :, None]).flatten(1)


def _truth(eps: float | None) -> Callable[..., Callable[[Any], float]]:
    """Compares sampled rows with the fp64 reference; all of the result must be finite."""

    def truth(x: Tensor, norm_weight: Tensor, weight: Tensor, *int8: Tensor) -> Callable[[Any], float]:
        rows = sampled(x.shape[1], x.device)
        exact = _dequantised(int8[0], int8[1].double()) if int8 else weight
        some = x[:, rows] if eps is None else reference.norm(x[:, rows], norm_weight, eps=eps)
        expected = reference.linear(some, exact)

        def error_of(result: Any) -> float:
            return relative_error(result[:, rows], expected) if result.isfinite().all() else float("inf")

        return error_of

    return truth
