"""Ground truth in fp64 for tests, benchmarks and examples: the contracts of functional.py written down head by head.

Shares no code with the fast paths, so that it cannot share their mistakes. Slow, and never on a hot path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_start: int = 0,
    group_size: int | None = None,
    kv_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """q [B, T, Hq, D], k and v [B, S, Hkv, D] -> out [B, T, Hq, D] and lse [B, Hq, T], both fp64.

    Keywords as in functional.attention.
    """
    (batch, queries, heads, head_dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    group_size = group_size or heads // kv_heads
    out = torch.zeros(batch, queries, heads, head_dim, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64, device=q.device)
    if mask is not None:
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask
        mask = mask.expand(batch, heads, queries, keys)
    i = torch.arange(queries, device=q.device)[:, None] + keys - queries  # aligned bottom-right
    j = torch.arange(keys, device=q.device)[None, :]
    left, right = (None if side == -1 else side for side in window or (None, None))

    for b in range(batch):
        for h in range(heads):
            kv = (q_start + h) // group_size - kv_start
            scores = q[b, :, h].double() @ k[b, :, kv].double().T
            scores = scores * (1 / math.sqrt(head_dim) if scale is None else scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if alibi_slopes is not None:
                scores = scores - alibi_slopes[h].double() * (i - j).abs()
            keep = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
            if mask is not None and mask.dtype == torch.bool:
                keep = keep & mask[b, h]
            elif mask is not None:
                added = mask[b, h].float().double()
                keep = keep & (added > -1e30)
                scores = scores + added
            if causal:
                keep = keep & (j <= i)
            if left is not None:
                keep = keep & (i - left <= j)
            if right is not None:
                keep = keep & (j <= i + right)
            scores = scores.masked_fill(~keep, -math.inf)
            logits = scores
            if sinks is not None:
                logits = torch.cat((scores, sinks[h].double().expand(queries, 1)), dim=1)
            rows = keep.any(dim=1)  # the others keep no key: their out stays 0, their lse -inf
            lse[b, h, rows] = torch.logsumexp(logits[rows], dim=1)
            # not exp(scores - lse): log(n) would drown in masks of -1e29
            out[b, rows, h] = torch.softmax(logits[rows], dim=1)[:, :keys] @ v[b, :, kv].double()
    return out, lse


def probabilities(q: Tensor, k: Tensor, **keywords: Any) -> Tensor:
    """What `attention` weighs the values of each key by: q [B, T, Hq, D], k [B, S, Hkv, D] -> [B, Hq, T, S], fp64."""
    keys, head_dim = k.shape[1], q.shape[3]
    columns = []
    for first in range(0, keys, head_dim):  # values that are rows of an identity come out as these keys' weights
        v = torch.zeros_like(k, dtype=torch.float64)
        for j in range(first, min(first + head_dim, keys)):
            v[:, j, :, j - first] = 1
        columns.append(attention(q, k, v, **keywords)[0])
    return (
        torch.cat(columns, dim=3)[..., :keys].transpose(1, 2)
        if columns
        else q.new_zeros(q.shape[0], q.shape[2], q.shape[1], 0, dtype=torch.float64)
    )


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, kind: str = "rmsnorm", eps: float = 1e-5
) -> Tensor:
    """x [..., E], weight and bias [E] -> [..., E], fp64."""
    x = x.double()
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.double()
    return x if bias is None else x + bias.double()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out], fp64."""
    y = torch.einsum("...i,oi->...o", x.double(), weight.double())
    return y if bias is None else y + bias.double()


def rope_angles(positions: Tensor, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, dim / 2], fp64, of integer positions [B, T]: pair n turns by position · theta^(−2n/dim)."""
    angles = positions[..., None].double() * theta ** (-torch.arange(0, dim, 2, device=positions.device).double() / dim)
    return angles.cos(), angles.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x [B, T, H, D] with the pairs of its first 2·n elements turned, cos and sin [B or 1, T, n] -> [B, T, H, D], fp64.

    Pair p is (p, p + n), or (2p, 2p + 1) where interleaved.
    """
    x, pairs = x.double(), cos.shape[-1]
    turned = x.clone()
    for p in range(pairs):
        first, second = (2 * p, 2 * p + 1) if interleaved else (p, p + pairs)
        c, s = cos[..., p, None].double(), sin[..., p, None].double()  # [B or 1, T, 1]: the same for every head
        turned[..., first] = x[..., first] * c - x[..., second] * s
        turned[..., second] = x[..., first] * s + x[..., second] * c
    return turned


_norm, _rope = norm, rope  # self_attention has arguments of these names


def self_attention(
    x: Tensor,
    weights: Mapping[str, Tensor],
    *,
    heads: int,
    kv_heads: int | None = None,
    norm: str | None = None,
    norm_eps: float = 1e-5,
    qk_norm: str | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    **keywords: Any,
) -> Tensor:
    """A whole attention layer in one process: x [B, T, E] -> [B, T, E], fp64.

    weights: q_weight [heads·D, E], k_weight and v_weight [kv_heads·D, E], out_weight [E, heads·D], and where the layer
    has them q_bias, k_bias, v_bias and out_bias, norm_weight and norm_bias [E], q_norm_weight and k_norm_weight [D],
    sinks [heads]. rope: cos and sin [B or 1, T, n]. keywords: those of `attention`.
    """
    normed = x if norm is None else _norm(x, weights.get("norm_weight"), weights.get("norm_bias"), norm, norm_eps)

    def project(name: str, count: int) -> Tensor:
        y = linear(normed, weights[f"{name}_weight"], weights.get(f"{name}_bias")).unflatten(-1, (count, -1))
        if name == "v":
            return y
        y = y if qk_norm is None else _norm(y, weights.get(f"{name}_norm_weight"), None, qk_norm, norm_eps)
        return y if rope is None else _rope(y, *rope, interleaved)

    q, k, v = project("q", heads), project("k", kv_heads or heads), project("v", kv_heads or heads)
    context, _ = attention(q, k, v, sinks=weights.get("sinks"), **keywords)
    return linear(context.flatten(2), weights["out_weight"], weights.get("out_bias"))
