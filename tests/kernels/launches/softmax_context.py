"""Softmax-context: every table entry, and every feature once, of the fused kernel and of the three steps."""

from __future__ import annotations

import torch

from tests.kernels.launches import Launch
from tp_attention.kernels import materialised
from tp_attention.kernels.softmax_context import softmax_context


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def qkv(dtype, head_dim, tokens=2048, keys=2048, batch=4, heads=32, kv_heads=8):
    packed = meta(batch, tokens, 2, heads, head_dim, dtype=dtype)  # q is a view
    k = meta(batch, keys, kv_heads, head_dim, dtype=dtype)
    return packed[:, :, 0], k, k


def fused(dtype=torch.float16, head_dim=128, tokens=2048, keys=2048, **keywords):
    return lambda: softmax_context(*qkv(dtype, head_dim, tokens, keys), **keywords)


def scores(dtype=torch.float16, head_dim=128, **keywords):
    return lambda: materialised.score_4d_matmul(*qkv(dtype, head_dim)[:2], **keywords)


def rows(keys, dtype=torch.float16, **keywords):
    x = meta(4, 32, 2048, keys, dtype=dtype)
    return lambda: materialised.softmax(x, x, **keywords)


def context(dtype=torch.float16, head_dim=128, probabilities=torch.float16):
    p, v = meta(4, 32, 2048, 2048, dtype=probabilities), qkv(dtype, head_dim)[2]
    return lambda: materialised.context_4d_matmul(p, v)


CAUSAL = {"reach": (None, 0)}
BIAS = {"mask": meta(4, 1, 2048, 2048), "alibi_slopes": meta(32), "reach": (100, 0)}
EVERYTHING = {**BIAS, "sinks": meta(32), "softcap": 30.0}
HALF, FULL = torch.float16, torch.float32
LAUNCHES = {
    **{f"fp16 D{d} causal": Launch(fused(head_dim=d, **CAUSAL), wgmma=True, tma=True) for d in (32, 64, 128, 256)},
    **{f"fp16 D{d} short": Launch(fused(head_dim=d, tokens=128, keys=128), wgmma=True) for d in (64, 128, 256)},
    **{f"fp16 D{d} few": Launch(fused(head_dim=d, tokens=1)) for d in (128, 256)},
    "fp16 D128 few everything": Launch(fused(tokens=16, **{**EVERYTHING, "mask": meta(4, 1, 1, 2048)})),
    **{f"fp16 D{d} everything": Launch(fused(head_dim=d, **EVERYTHING), wgmma=True) for d in (64, 128, 256)},
    **{f"fp32 D{d} everything": Launch(fused(FULL, d, **EVERYTHING), tma=False) for d in (64, 128, 256)},
    "bf16 D80 window": Launch(fused(torch.bfloat16, 80, reach=(1000, 0)), wgmma=True, tma=True),
    "fp16 bool mask": Launch(fused(mask=meta(4, 2048, dtype=torch.bool)), wgmma=True),
    "fp16 D40 odd keys": Launch(fused(head_dim=40, keys=2047, **CAUSAL), wgmma=True, tma=True),
    "fp16 D128 odd keys": Launch(fused(keys=2047, **CAUSAL), wgmma=True, tma=True),
    **{f"scores fp16 D{d}": Launch(scores(head_dim=d, **CAUSAL), wgmma=True) for d in (64, 128, 256)},
    "scores everything": Launch(scores(softcap=30.0, dtype=HALF, **BIAS), wgmma=True),
    **{f"scores fp32 D{d}": Launch(scores(FULL, d, **CAUSAL)) for d in (128, 256)},
    **{f"softmax S{keys}": Launch(rows(keys, **CAUSAL)) for keys in (128, 4096, 16384)},
    "softmax everything": Launch(rows(2048, FULL, **BIAS, sinks=meta(32))),
    **{f"context fp16 D{d}": Launch(context(head_dim=d), wgmma=True) for d in (64, 128, 256)},
    "context fp32 probabilities": Launch(context(probabilities=FULL), wgmma=True),
    **{f"context fp32 D{d}": Launch(context(FULL, d, FULL)) for d in (128, 256)},
}
