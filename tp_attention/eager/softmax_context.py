"""functional's softmax-context and its three steps without kernels: the formula, with T×S scores in fp32 (fp64)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tp_attention import masks
from tp_attention.eager.prefill import softmax_parts, with_bias
from tp_attention.masks import Window


def softmax_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
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
) -> tuple[Tensor, Tensor]:
    """functional.softmax_context unchecked: -> out [B, T, Hq, D], probabilities [B, Hq, T, S]."""
    scores = score_4d_matmul(
        q,
        k,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        causal=causal,
        window=window,
        mask=mask,
        q_start=q_start,
        group_size=group_size,
        kv_start=kv_start,
        dtype=_wide(q.dtype),
    )
    probabilities = softmax(scores, sinks=sinks)
    out = context_4d_matmul(probabilities, v, q_start=q_start, group_size=group_size, kv_start=kv_start)
    return out, probabilities.to(q.dtype)


def score_4d_matmul(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    mask: Tensor | None = None,
    q_start: int = 0,
    group_size: int | None = None,
    kv_start: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """functional.score_4d_matmul unchecked: q [B, T, Hq, D], k [B, S, Hkv, D] -> [B, Hq, T, S]."""
    wide = _wide(q.dtype)
    keys = _of_query_heads(k.to(wide), q.shape[2], q_start, group_size, kv_start)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = (q.transpose(1, 2).to(wide) * scale) @ keys.mT
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    return _biased(scores, causal, window, mask, alibi_slopes).to(dtype)


def softmax(
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """functional.softmax unchecked: [B, Hq, T, S] -> [B, Hq, T, S]."""
    logits = _biased(scores.to(_wide(scores.dtype)), causal, window, mask, alibi_slopes)
    if scores.numel():
        weights, total, _ = softmax_parts(logits, None if sinks is None else sinks.to(logits.dtype)[:, None, None])
        logits = weights / total
    return logits.to(dtype or scores.dtype) if out is None else out.copy_(logits)


def context_4d_matmul(
    probabilities: Tensor, v: Tensor, *, q_start: int = 0, group_size: int | None = None, kv_start: int = 0
) -> Tensor:
    """functional.context_4d_matmul unchecked: [B, Hq, T, S], v [B, S, Hkv, D] -> [B, T, Hq, D] in v's dtype."""
    wide = _wide(v.dtype)
    values = _of_query_heads(v.to(wide), probabilities.shape[1], q_start, group_size, kv_start)
    return (probabilities.to(wide) @ values).transpose(1, 2).to(v.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _of_query_heads(x: Tensor, heads: int, q_start: int, group_size: int | None, kv_start: int) -> Tensor:
    """k or v [B, S, Hkv, D] -> [B, Hq, S, D], the kv head of each query head."""
    group_size = group_size or heads // x.shape[2]
    first = q_start // group_size
    kv_heads = (q_start + heads - 1) // group_size - first + 1
    x = x.transpose(1, 2).narrow(1, first - kv_start, kv_heads)
    return x if group_size == 1 else x.repeat_interleave(group_size, 1).narrow(1, q_start % group_size, heads)


def _biased(
    scores: Tensor, causal: bool, window: Window | None, mask: Tensor | None, alibi_slopes: Tensor | None
) -> Tensor:
    """Scores [B, Hq, T, S] with ALiBi and mask added, -inf where not kept."""
    queries, keys = scores.shape[2:]
    mask = mask[:, None, None] if mask is not None and mask.dim() == 2 else mask
    slopes = None if alibi_slopes is None else alibi_slopes.to(scores.dtype)
    reach = masks.effective_window(queries, keys, causal, window)
    bias = masks.score_bias(range(queries), range(keys), keys - queries, reach, mask, slopes, scores.device)
    return with_bias(scores, bias)
