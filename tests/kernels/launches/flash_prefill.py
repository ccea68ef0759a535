"""Flash prefill: every table entry with and without edges, and every feature once."""

from __future__ import annotations

import torch

from tests.kernels.launches import Launch
from tp_attention.kernels.flash_prefill import flash_attention


def launch(dtype=torch.bfloat16, head_dim=128, tokens=2048, keys=2048, heads=32, kv_heads=8, batch=2, **keywords):
    q = torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device="meta")
    k = torch.empty(batch, keys, kv_heads, head_dim, dtype=dtype, device="meta")
    return lambda: flash_attention(q, k, k, **keywords)


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


CAUSAL = {"reach": (None, 0)}
LAUNCHES = {
    **{
        f"bf16 D{d} {name}": Launch(launch(head_dim=d, **edge), wgmma=True, tma=True)
        for d in (16, 40, 64, 80, 128, 256)
        for name, edge in (("full", {}), ("causal", CAUSAL))
    },
    **{f"fp32 D{d}": Launch(launch(torch.float32, d, **CAUSAL), tma=False) for d in (64, 128, 256)},
    "fp16 D41, a padded copy": Launch(launch(torch.float16, 41, **CAUSAL), wgmma=True, tma=True),
    "bool mask": Launch(launch(mask=meta(2, 2048, dtype=torch.bool), **CAUSAL), wgmma=True),
    "everything": Launch(
        launch(
            mask=meta(2, 1, 2048, 2048),
            alibi_slopes=meta(32),
            sinks=meta(32),
            softcap=30.0,
            reach=(100, 0),
            return_lse=True,
        ),
        wgmma=True,
    ),
    "everything D256": Launch(
        launch(
            head_dim=256,
            mask=meta(2, 1, 2048, 2048),
            alibi_slopes=meta(32),
            sinks=meta(32),
            softcap=30.0,
            reach=(100, 0),
            return_lse=True,
        ),
        wgmma=True,
    ),
    "window": Launch(launch(reach=(1024, 0)), wgmma=True),
    "packed sequences": Launch(
        launch(batch=1, cu_seqlens=(meta(9, dtype=torch.int32), meta(9, dtype=torch.int32)), **CAUSAL), wgmma=True
    ),
}
