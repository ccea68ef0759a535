"""functional.attention without kernels.

It goes to torch's scaled_dot_product_attention where that can express it (no softcap, sinks or lse), else to the
explicit formula. Limit: on a GPU, fp32 products follow torch.set_float32_matmul_precision, so "high" gives TF32 here.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tp_attention import masks
from tp_attention.masks import Window

# Long inputs go by blocks of query rows, so that memory grows with S and not T·S, and keys out of a block's reach are
# skipped. A block has about this many scores (a CPU's cache holds them; more fill a GPU), but a useful number of rows.
CPU_SCORES, GPU_SCORES = 1 << 21, 1 << 26
MIN_ROWS = 64


def attention(
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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """functional.attention unchecked: q [B, T, Hq, D], k and v [B, S, Hkv, D] -> [B, T, Hq, D] (and lse [B, Hq, T])."""
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    if keys == 0 or q.numel() == 0:
        out = torch.zeros_like(q)
        return (out, q.new_full((batch, heads, queries), -torch.inf, dtype=torch.float32)) if return_lse else out

    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    reach = masks.effective_window(queries, keys, causal, window)
    if queries == 1 and reach[0] is not None:  # one query sees every one of the last keys: cut, don't mask
        keys, reach = reach[0] + 1, (None, None)
        k, v = k[:, -keys:], v[:, -keys:]
        mask = mask if mask is None or mask.shape[3] == 1 else mask[..., -keys:]

    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    # torch's GPU flash kernel returns NaN where scale <= 0
    explicit = softcap is not None or sinks is not None or return_lse or scale <= 0
    additive = alibi_slopes is not None or (mask is not None and mask.dtype != torch.bool)
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype = wide if explicit or _sdpa_needs_wide(q, additive) else q.dtype
    groups = _HeadGroups.of(q_start, heads, group_size or heads // k.shape[2], kv_start, folded=queries == 1)
    qs = groups.fold(q.transpose(1, 2).to(dtype))
    ks, vs = (groups.keys(x.transpose(1, 2).to(dtype)) for x in (k, v))

    is_causal = reach == (None, 0) and queries == keys
    if not explicit and not additive and mask is None and (is_causal or reach == (None, None)):
        out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=is_causal, scale=scale)
        return groups.unfold(out).transpose(1, 2).to(q.dtype)

    slopes = None if alibi_slopes is None else alibi_slopes.to(wide)
    sinks = None if sinks is None else groups.fold(sinks.to(wide)[None, :, None, None])
    height = (GPU_SCORES if q.is_cuda else CPU_SCORES) // (batch * heads * keys)
    height = max(MIN_ROWS, height if reach[0] is None else min(height, reach[0]))
    outs, lses = [], []
    for start in range(0, queries, height):
        rows = range(start, min(start + height, queries))
        seen = masks.reachable(rows, keys - queries, keys, reach)
        bias = masks.score_bias(rows, seen, keys - queries, reach, mask, slopes, q.device)
        bias = None if bias is None else groups.fold(bias)
        q_block = qs if len(rows) == queries else qs.narrow(2, start, len(rows))
        k_block, v_block = (x if len(seen) == keys else x.narrow(2, seen.start, len(seen)) for x in (ks, vs))
        if explicit:
            out, lse = _formula(q_block, k_block, v_block, scale, bias, softcap, sinks)
            lses.append(lse)
        else:
            out = _sdpa(q_block, k_block, v_block, scale, bias)
        outs.append(out)
    out = groups.unfold(_join(outs)).transpose(1, 2).to(q.dtype)
    return (out, groups.unfold(_join(lses)).squeeze(-1).float()) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: bool = False,
    **keywords: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """functional.attention_varlen unchecked, one sequence at a time; reads the lengths back to the host."""
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    starts = torch.stack((cu_seqlens_q, cu_seqlens_k), dim=1).tolist()
    for (q_first, k_first), (q_last, k_last) in itertools.pairwise(starts):
        queries, keys = slice(q_first, q_last), slice(k_first, k_last)
        result = attention(q[None, queries], k[None, keys], v[None, keys], return_lse=return_lse, **keywords)
        if return_lse:
            result, lse[:, queries] = result[0], result[1][0]
        out[queries] = result[0]
    return (out, lse) if return_lse else out


def _join(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _sdpa_needs_wide(q: Tensor, additive: bool) -> bool:
    """Whether torch's attention gets fp32 copies: on CPUs its fp16 is slower than those are, and on GPUs an additive
    bias must have q's dtype, too narrow for a mask's or ALiBi's fp32."""
    return additive if q.is_cuda else q.dtype == torch.float16


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """torch's attention over one block of rows, q [B, H, t, D], k and v [B, H, s, D] -> [B, H, t, D]."""
    if bias is not None and bias.shape[-1] != k.shape[2]:  # torch's GPU kernels read past a bias of one key for all
        bias = bias.expand(*bias.shape[:-1], k.shape[2]).contiguous()
    if bias is not None and bias.dtype != torch.bool and q.dtype == torch.float64:  # torch's CPU kernel misreads fp32
        bias = bias.double()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    # torch promises nothing about a row that keeps no key, and its backends differ
    return out if bias is None else out.masked_fill(masks.empty_rows(bias), 0)


def _formula(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention written out in fp32 or fp64, q [B, H, t, D], k and v [B, H, s, D] -> [B, H, t, D], lse [B, H, t, 1].

    sinks: [1, H, 1, 1], or [1, H, t, 1] where the rows of a group are folded heads.
    """
    scores = (q * scale) @ k.mT
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights, total, lse = softmax_parts(with_bias(scores, bias), sinks)
    return weights @ v / total, lse


def with_bias(scores: Tensor, bias: Tensor | None) -> Tensor:
    """scores with a masks.score_bias: added, or -inf where it keeps nothing."""
    if bias is None:
        return scores
    return scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias


def softmax_parts(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """weights [..., s] and total [..., 1], whose ratio is the softmax of scores, 0 in an empty row; lse [..., 1]."""
    top = scores.amax(-1, keepdim=True)
    # finite, so that a row with nothing kept gives exp(-inf - pivot) = 0 and no NaN
    pivot = (top if sinks is None else torch.maximum(top, sinks)).clamp(min=torch.finfo(top.dtype).min)
    weights = (scores - pivot).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - pivot).exp()
    lse = (pivot + total.log()).masked_fill(top == -torch.inf, -torch.inf)
    # the greatest term of a total is 1: the clamp lifts only the 0 of an empty row
    return weights, total.clamp(min=1), lse


@dataclass(frozen=True)
class _HeadGroups:
    """How the local query heads lie over the kv heads: `count` of these from `first` on, each read by `size` heads in a
    row, except that the first group lacks its first `front` heads and the last one perhaps some at its end.

    folded: the heads of a group become the rows of one matrix, so that k and v are read once and never copied. This
    needs a single query per head; for more, k and v are repeated, at 1/T of the cost of the attention itself.
    """

    first: int
    count: int
    size: int
    front: int
    heads: int
    folded: bool

    @classmethod
    def of(cls, q_start: int, heads: int, group_size: int, kv_start: int, folded: bool) -> _HeadGroups:
        first, last = q_start // group_size, (q_start + heads - 1) // group_size
        if first == last:  # one kv head: a group of just the heads there are
            return cls(first - kv_start, 1, heads, 0, heads, folded)
        return cls(first - kv_start, last - first + 1, group_size, q_start % group_size, heads, folded)

    def keys(self, x: Tensor) -> Tensor:
        """k or v [B, Hkv, S, D] -> [B, count, S, D] where folded, else one for each query head."""
        x = x[:, self.first : self.first + self.count]
        if self.folded or self.size == 1:
            return x
        if self.count == 1:
            return x.expand(-1, self.heads, -1, -1)
        return x.repeat_interleave(self.size, dim=1)[:, self.front : self.front + self.heads]

    def fold(self, x: Tensor) -> Tensor:
        """[b, Hq, 1, c] -> [b, count, size, c] where folded; one head for all stays as it is."""
        if not self.folded or x.shape[1] == 1:
            return x
        back = self.count * self.size - self.front - self.heads
        if self.front or back:
            x = F.pad(x, (0, 0, 0, 0, self.front, back))
        return x.reshape(x.shape[0], self.count, self.size, x.shape[3])

    def unfold(self, x: Tensor) -> Tensor:
        """[B, count, size, c] -> [B, Hq, 1, c] where folded."""
        if not self.folded:
            return x
        return x.reshape(x.shape[0], -1, 1, x.shape[3])[:, self.front : self.front + self.heads]
