"""Hopper's prefill: every table entry, with and without log-sum-exp and lengths, and a group packed into a tile."""

from __future__ import annotations

import torch

from tests.kernels.launches import Launch
from tp_attention.kernels.flash_prefill_hopper import flash_attention_hopper

ARCHITECTURES = (90,)


def launch(head_dim, causal, dtype=torch.bfloat16, tokens=2048, keys=2048, lengths=False, **keywords):
    q = torch.empty(2, tokens, 32, head_dim, dtype=dtype, device="meta")
    k = torch.empty(2, keys, 8, head_dim, dtype=dtype, device="meta")
    each = torch.empty(2, dtype=torch.int32, device="meta") if lengths else None
    return Launch(
        lambda: flash_attention_hopper(q, k, k, scale=0.1, causal=causal, group_size=4, lengths=each, **keywords),
        wgmma=True,
        tma=True,
        kernels=1,
        setmaxnreg=True,
        moving=causal,
    )


LAUNCHES = {
    **{f"D{d} full": launch(d, False) for d in (64, 128, 256)},
    **{f"D{d} causal": launch(d, True) for d in (64, 128, 256)},
    **{f"D{d} causal, lse": launch(d, True, return_lse=True) for d in (64, 128, 256)},
    **{f"D{d} causal, keys before": launch(d, True, tokens=500, keys=900) for d in (64, 128, 256)},
    **{f"D{d} lengths, lse": launch(d, True, lengths=True, return_lse=True) for d in (64, 128, 256)},
    "D128 lengths, full": launch(128, False, lengths=True),
    "D128 fp16": launch(128, True, torch.float16),
    "D128 a group in a tile": launch(128, True, tokens=32),
}
