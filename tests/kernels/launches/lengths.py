"""One launch after another with other lengths: how many kernels does a serving process compile?"""

from __future__ import annotations

import torch

from tests.kernels.launches import Launch
from tp_attention.kernels.flash_decode import flash_decode
from tp_attention.kernels.flash_prefill import flash_attention
from tp_attention.kernels.gemm import gemm
from tp_attention.kernels.norm import norm
from tp_attention.kernels.skinny_gemm import skinny_gemm

LENGTHS = (17, 64, 65, 100, 128, 333, 512, 1000, 2048, 4095, 16384)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def prefill() -> None:
    for tokens in LENGTHS:
        for keys in (tokens, tokens + 100):
            k = meta(1, keys, 8, 128)
            flash_attention(meta(1, tokens, 32, 128), k, k, reach=(None, 0))


def uneven_prefill() -> None:
    """Two of nine heads of 64: strides that are no multiples of 16."""
    for tokens in LENGTHS:
        k = meta(2, tokens, 1, 64)
        flash_attention(meta(2, tokens, 5, 64), k, k, reach=(None, 0), q_start=4, group_size=9)


def decode() -> None:
    for keys in (1, 2, *LENGTHS):
        k = meta(1, 20000, 8, 128)[:, :keys]
        flash_decode(meta(1, 1, 32, 128), k, k, causal=True)


def projections() -> None:
    weight = meta(6144, 4096)
    for rows in (1, 2, 3, 16, 33, 64, *LENGTHS):
        x = meta(rows, 4096)
        norm(x, meta(4096), None, "rmsnorm", 1e-5)
        (skinny_gemm if rows <= 64 else gemm)(x, weight)


# Prefill: one; beside it Hopper's, for lengths that differ by whole blocks and for others. Decode: one split, and
# several with what combines them. Projections: a norm; products of at most 16, 32 and 64 rows, and their merge; one for
# each of 4 widths of tiles. And one to spare: the numbers of SMs and rows decide.
LAUNCHES = {
    "prefill": Launch(prefill, kernels=3),
    "prefill, uneven heads": Launch(uneven_prefill, kernels=2),
    "decode": Launch(decode, kernels=4),
    "projections": Launch(projections, kernels=10),
}
