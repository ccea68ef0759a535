"""functional.attention_decode and append_kv without kernels: the cache is gathered, dequantised and masked whole.

Limit: memory and time grow with the cache's capacity, not with the lengths, and with a copy of it where it is paged or
quantised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tp_attention.eager.prefill import attention
from tp_attention.masks import NOT_KEPT, Window
from tp_attention.rope import apply_rope


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_start: int = 0,
    group_size: int | None = None,
    kv_start: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """functional.attention_decode unchecked: q [B, T, Hq, D] -> [B, T, Hq, D] (and lse [B, Hq, T])."""
    tokens = q.shape[1]
    k, v = (_dense(*cache, block_table, q.dtype) for cache in ((k_cache, k_scale), (v_cache, v_scale)))
    o_j = torch.arange(k.shape[1], device=q.device)
    used = o_j < lengths[:, None]  # [B, S]
    k, v = (x.masked_fill(~used[:, :, None, None], 0) for x in (k, v))  # what lies behind may be NaN

    # Sequences end at different places, so that every rule about positions becomes a mask, [B, 1, T, S].
    distance = o_j - (lengths[:, None] - tokens + torch.arange(tokens, device=q.device))[:, None, :, None]
    keep = used[:, None, None].expand_as(distance)
    left, right = (None if side == -1 else side for side in window or (None, None))
    if causal:
        keep = keep & (distance <= 0)
    if left is not None:
        keep = keep & (distance >= -left)
    if right is not None:
        keep = keep & (distance <= right)
    added = None
    if mask is not None:
        mask = mask[:, None, None] if mask.dim() == 2 else mask
        added = None if mask.dtype == torch.bool else mask.float()
        keep = keep & (mask if added is None else added > NOT_KEPT)
    if alibi_slopes is not None:
        alibi = -alibi_slopes.float()[:, None, None] * distance.abs()
        added = alibi if added is None else added + alibi
    whole = keep if added is None else torch.where(keep, added, -torch.inf)
    return attention(
        q,
        k,
        v,
        scale=scale,
        mask=whole,
        softcap=softcap,
        sinks=sinks,
        q_start=q_start,
        group_size=group_size,
        kv_start=kv_start,
        return_lse=return_lse,
    )


def append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """functional.append_kv unchecked: writes k, v [B, T, Hkv, D] behind the tokens there are, returns q rotated."""
    batch, tokens = k.shape[:2]
    if rope is not None:
        q, k = (apply_rope(x, *rope, interleaved=interleaved) for x in (q, k))
    size = k_cache.shape[1]
    at = lengths[:, None].long() - tokens + torch.arange(tokens, device=q.device)  # [B, T]
    if block_table is None:
        rows, fits = torch.arange(batch, device=q.device)[:, None].expand_as(at), (at >= 0) & (at < size)
    else:
        fits = (at >= 0) & (at < size * block_table.shape[1])
        rows = block_table.long().gather(1, torch.where(fits, at, 0) // size)
    i_row, i_at = rows[fits], at[fits] % size
    for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        new = new[fits]  # [n, Hkv, D]
        if cache.dtype != new.dtype:
            new = new.float()
            largest = 127.0 if cache.dtype == torch.int8 else torch.finfo(cache.dtype).max
            if scale is not None and scale.dim() == 3:
                step = new.abs().amax(-1).clamp(min=1e-12) / largest  # one per token and head
                scale[i_row, i_at] = step
                new = new / step[..., None]
            elif scale is not None:
                new = new / scale.view(-1, 1)
            # ties go up, as the kernel rounds
            new = (new + 0.5).floor() if cache.dtype == torch.int8 else new
            new = new.clamp(-largest, largest)
        cache[i_row, i_at] = new.to(cache.dtype)
    return q


def _dense(cache: Tensor, scale: Tensor | None, block_table: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The cache as [B, S, Hkv, D] of this dtype."""
    if block_table is not None:  # entries behind a sequence's end may be anything
        pages = block_table.long().clamp(0, cache.shape[0] - 1)
        cache = cache[pages].flatten(1, 2)
        if scale is not None and scale.dim() == 3:
            scale = scale[pages].flatten(1, 2)
    if scale is None:
        return cache.to(dtype)
    return (cache.float() * (scale[..., None] if scale.dim() == 3 else scale.view(-1, 1))).to(dtype)
