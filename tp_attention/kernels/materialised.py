"""Attention in three steps through memory: scores = Q·Kᵀ, probabilities = softmax(scores), out = probabilities·V.

For callers who change the scores or probabilities in between. Each step is bound by reading or writing B·Hq·T·S values;
softmax_context.py does all three at once and reads none of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_attention.kernels import configs
from tp_attention.kernels.launch import launch
from tp_attention.kernels.operands import aligned, load_rows, strides_of, unit_last
from tp_attention.kernels.scores import (
    LN2,
    LOG2E,
    as_kernels_read,
    in_units,
    masked_scores,
    reach_mask,
    shape_scores,
)


@dataclass(frozen=True)
class Config:
    """block_m query rows by block_n keys a step; of softmax block_m·block_n values, rows up to block_n in one sweep."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (architecture, step, padded head dim, bytes per element of q or v); softmax: (architecture, "softmax")
CONFIGS: dict[configs.Key, Config] = {
    (0, "softmax"): Config(1, 4096, 8, 1),
    **{(90, "scores", d, 2): Config(128, 128, 8, 1) for d in (16, 32, 64, 128)},
    **{(0, "scores", d, 2): Config(64, 64, 4, 1) for d in (16, 32, 64, 128)},
    (0, "scores", 256, 2): Config(64, 32, 4, 1),
    **{(0, "scores", d, 4): Config(32, 32, 4, 1) for d in (16, 32, 64, 128)},
    (0, "scores", 256, 4): Config(16, 32, 4, 1),
    **{(90, "context", d, 2): Config(128, 64, 4, 3) for d in (16, 32, 64)},
    **{(90, "context", d, 2): Config(128, 64, 8, 3) for d in (128, 256)},
    **{(0, "context", d, 2): Config(64, 32, 4, 3) for d in (16, 32, 64, 128)},
    (0, "context", 256, 2): Config(64, 32, 8, 2),
    **{(0, "context", d, 4): Config(32, 32, 4, 1) for d in (16, 32, 64, 128)},
    (0, "context", 256, 4): Config(16, 32, 4, 1),
}


# `keys` is the row stride of scores and probabilities: wide accesses need to know when it is a multiple of 16.
@triton.jit(
    do_not_specialize=[
        "tokens", "heads", "q_start", "group_size", "kv_start", "left", "right", "stride_mb", "stride_mh", "stride_mt",
    ]
)  # fmt: skip
def score_kernel(
    q, k, p_s,  # [B, T, Hq, D], [B, S, Hkv, D], [B, Hq, T, S] contiguous
    p_mask, p_slopes,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_mb, stride_mh, stride_mt, stride_ms,
    tokens, keys, heads, q_start, group_size, kv_start, scale, softcap, left, right,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
    UNIT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of queries · B·Hq, tiles of keys)."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) % tiles * BLOCK_M
    i_head = tl.program_id(0) // tiles
    i_b, i_h = i_head // heads, i_head % heads
    i_kv = (q_start + i_h) // group_size - kv_start
    b64, h64 = i_b.to(tl.int64), i_h.to(tl.int64)
    j = tl.program_id(1) * BLOCK_N
    o_t = row + tl.arange(0, BLOCK_M)  # [M] query tokens, at key positions o_i
    o_i = o_t + keys - tokens
    o_j = j + tl.arange(0, BLOCK_N)
    m_s = (o_t < tokens)[:, None] & (o_j < keys)[None, :]

    seen = True  # by some row of the tile
    if HAS_RIGHT:
        seen = seen & (j <= row + BLOCK_M - 1 + keys - tokens + right)
    if HAS_LEFT:
        seen = seen & (j + BLOCK_N - 1 >= row + keys - tokens - left)
    b_s = tl.full((BLOCK_M, BLOCK_N), -float("inf"), tl.float32)
    if seen:
        b_q = load_rows(q + b64 * stride_qb + h64 * stride_qh, i_b, i_h, row, tokens, stride_qt, D, BLOCK_M, BLOCK_D,
                        False, True)  # fmt: skip
        b_k = load_rows(k + b64 * stride_kb + i_kv.to(tl.int64) * stride_kh, i_b, i_kv, j, keys, stride_ks, D, BLOCK_N,
                        BLOCK_D, False, True)  # fmt: skip
        if UPCAST:
            b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        b_s = tl.dot(b_q, b_k.T, input_precision="ieee")
        b_slope = tl.load(p_slopes + i_h).to(tl.float32) if HAS_ALIBI else 0.0
        b_s = shape_scores(b_s, scale, softcap, b_slope, o_i, o_j, HAS_SOFTCAP, HAS_ALIBI)
        if MASK:
            p_rows = p_mask + (b64 * stride_mb + h64 * stride_mh + o_t.to(tl.int64)[:, None] * stride_mt) * UNIT
            b_s = masked_scores(b_s, p_rows + o_j.to(tl.int64)[None, :] * stride_ms, m_s, MASK)
        b_s = tl.where(reach_mask(o_i, o_j, keys, left, right, HAS_LEFT, HAS_RIGHT), b_s * LN2, -float("inf"))
    p_s += (i_head.to(tl.int64) * tokens + o_t)[:, None] * keys + o_j[None, :]
    tl.store(p_s, b_s.to(p_s.dtype.element_ty), mask=m_s)


@triton.jit(do_not_specialize=["tokens", "heads", "left", "right", "stride_mb", "stride_mh", "stride_mt"])
def softmax_kernel(
    p_s, p_p,  # [B, Hq, T, S], last stride 1
    p_mask, p_slopes, p_sinks,
    stride_sb, stride_sh, stride_st, stride_pb, stride_ph, stride_pt, stride_mb, stride_mh, stride_mt, stride_ms,
    tokens, keys, heads, left, right,
    ROWS: tl.constexpr, BLOCK_S: tl.constexpr, ONE_BLOCK: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of ROWS queries · B·Hq. Rows longer than a block are read twice. p_p may be p_s."""
    tiles = tl.cdiv(tokens, ROWS)
    row = tl.program_id(0) % tiles * ROWS
    i_head = tl.program_id(0) // tiles
    i_b, i_h = (i_head // heads).to(tl.int64), i_head % heads
    h64 = i_h.to(tl.int64)
    o_t = row + tl.arange(0, ROWS)  # [M] query tokens, at key positions o_i
    o_i = o_t + keys - tokens
    m_t = (o_t < tokens)[:, None]
    t64 = o_t.to(tl.int64)[:, None]
    p_s += i_b * stride_sb + h64 * stride_sh + t64 * stride_st
    p_p += i_b * stride_pb + h64 * stride_ph + t64 * stride_pt
    if MASK:
        p_mask += (i_b * stride_mb + h64 * stride_mh + t64 * stride_mt) * UNIT
    b_slope = tl.load(p_slopes + i_h).to(tl.float32) if HAS_ALIBI else 0.0

    # Sums are relative to exp2(top). A sink is one more logit.
    if HAS_SINKS:
        top = tl.zeros((ROWS,), tl.float32) + tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        total = tl.full((ROWS,), 1.0, tl.float32)
    else:
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
    inverse = total
    for SWEEP in tl.static_range(1 if ONE_BLOCK else 2):
        for j in tl.range(0, BLOCK_S if ONE_BLOCK else keys, BLOCK_S):
            o_j = tl.multiple_of(j, BLOCK_S) + tl.arange(0, BLOCK_S)
            m_j = m_t & (o_j < keys)[None, :]
            m_s = m_t & reach_mask(o_i, o_j, keys, left, right, HAS_LEFT, HAS_RIGHT)
            b_s = tl.load(p_s + o_j[None, :], mask=m_s, other=-float("inf")).to(tl.float32)  # [M, N]
            b_s = shape_scores(b_s, 1.0, 0.0, b_slope, o_i, o_j, False, HAS_ALIBI)
            if MASK:
                b_s = masked_scores(b_s, p_mask + o_j.to(tl.int64)[None, :] * stride_ms, m_s, MASK)
            if SWEEP == 0:
                top_new = tl.maximum(top, tl.max(b_s, 1))
                pivot = tl.where(top_new == -float("inf"), 0.0, top_new)
                b_p = tl.exp2(b_s - pivot[:, None])
                total = total * tl.exp2(top - pivot) + tl.sum(b_p, 1)
                top = top_new
            if ONE_BLOCK:
                inverse = 1 / tl.where(total == 0, 1.0, total)
            if ONE_BLOCK or SWEEP == 1:
                if SWEEP == 1:
                    b_p = tl.exp2(b_s - top[:, None])
                tl.store(p_p + o_j[None, :], (b_p * inverse[:, None]).to(p_p.dtype.element_ty), mask=m_j)
        if SWEEP == 0 and not ONE_BLOCK:
            inverse = 1 / tl.where(total == 0, 1.0, total)
            top = tl.where(top == -float("inf"), 0.0, top)  # rows that keep nothing


@triton.jit(do_not_specialize=["tokens", "heads", "q_start", "group_size", "kv_start"])
def context_kernel(
    p_p, v, p_out,  # [B, Hq, T, S], [B, S, Hkv, D], last stride 1; [B, T, Hq, D] contiguous
    stride_pb, stride_ph, stride_pt, stride_vb, stride_vs, stride_vh,
    tokens, keys, heads, q_start, group_size, kv_start,
    D: tl.constexpr, D_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of queries · B·Hq."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) % tiles * BLOCK_M
    i_head = tl.program_id(0) // tiles
    i_b, i_h = i_head // heads, i_head % heads
    i_kv = (q_start + i_h) // group_size - kv_start
    b64, h64 = i_b.to(tl.int64), i_h.to(tl.int64)
    o_t = row + tl.arange(0, BLOCK_M)
    m_t = (o_t < tokens)[:, None]
    v += b64 * stride_vb + i_kv.to(tl.int64) * stride_vh
    p_p += b64 * stride_pb + h64 * stride_ph + o_t.to(tl.int64)[:, None] * stride_pt
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for j in tl.range(0, keys, BLOCK_N):
        o_j = tl.multiple_of(j, BLOCK_N) + tl.arange(0, BLOCK_N)
        b_p = tl.load(p_p + o_j[None, :], mask=m_t & (o_j < keys)[None, :], other=0)  # [M, N]
        b_v = load_rows(v, i_b, i_kv, j, keys, stride_vs, D, BLOCK_N, BLOCK_D, False, True)
        if UPCAST:
            b_v = b_v.to(tl.float32)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc, input_precision="ieee")
    o_d = tl.arange(0, BLOCK_D)
    p_out += ((b64 * tokens + o_t) * heads + h64)[:, None] * D_OUT + o_d[None, :]
    tl.store(p_out, acc.to(p_out.dtype.element_ty), mask=m_t & (o_d < D_OUT)[None, :])


def score_4d_matmul(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    reach: tuple[int | None, int | None] = (None, None),
    mask: Tensor | None = None,
    q_start: int = 0,
    group_size: int | None = None,
    kv_start: int = 0,
    dtype: torch.dtype = torch.float32,
    config: Config | None = None,
) -> Tensor:
    """functional.score_4d_matmul by the kernel: q [B, T, Hq, D], k [B, S, Hkv, D] -> [B, Hq, T, S].

    reach: masks.effective_window's (left, right), causal included. D <= 256, S >= 1.
    """
    (batch, tokens, heads, head_dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    scores = torch.empty((batch, heads, tokens, keys), dtype=dtype, device=q.device)
    q, k = aligned(q), aligned(k)
    left, right = reach
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    mask, kind, mask_strides = as_kernels_read(mask)
    mask_strides, unit = in_units(mask_strides)
    alibi_slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    key = (configs.architecture(q.device), "scores", block_d, q.element_size())
    config = configs.choose("materialised", CONFIGS, key, config)
    args = (
        q, k, scores, mask, alibi_slopes, *strides_of(q), *strides_of(k), *mask_strides,
        tokens, keys, heads, q_start, group_size or heads // kv_heads, kv_start,
        1 / math.sqrt(head_dim) if scale is None else scale, softcap or 0.0, left or 0, right or 0,
    )  # fmt: skip
    constexprs = dict(
        D=q.shape[3], BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, MASK=kind, UNIT=unit,
        HAS_LEFT=left is not None, HAS_RIGHT=right is not None, HAS_SOFTCAP=softcap is not None,
        HAS_ALIBI=alibi_slopes is not None, UPCAST=configs.interpreted(),
    )  # fmt: skip
    grid = -(-tokens // config.block_m) * batch * heads, -(-keys // config.block_n)
    launch(
        score_kernel, grid, q.device, args, constexprs, num_warps=config.num_warps, num_stages=config.num_stages
    )  # fmt: skip
    return scores


def softmax(
    scores: Tensor,
    out: Tensor,
    *,
    mask: Tensor | None = None,
    reach: tuple[int | None, int | None] = (None, None),
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """functional.softmax by the kernel, into out, which may be scores: [B, Hq, T, S], out's last stride 1."""
    batch, heads, tokens, keys = scores.shape
    scores = unit_last(scores)
    left, right = reach
    mask, kind, mask_strides = as_kernels_read(mask)
    mask_strides, unit = in_units(mask_strides)
    alibi_slopes, sinks = (None if x is None else x.contiguous() for x in (alibi_slopes, sinks))
    config = configs.choose("materialised", CONFIGS, (configs.architecture(scores.device), "softmax"), config)
    # a power of two: a kernel for each, not for each length
    block_s = min(config.block_n, max(64, 1 << (keys - 1).bit_length()))
    rows = config.block_m * config.block_n // block_s
    args = (
        scores, out, mask, alibi_slopes, sinks, *strides_of(scores), *strides_of(out), *mask_strides,
        tokens, keys, heads, left or 0, right or 0,
    )  # fmt: skip
    constexprs = dict(
        ROWS=rows, BLOCK_S=block_s, ONE_BLOCK=keys <= block_s, MASK=kind, UNIT=unit, HAS_LEFT=left is not None,
        HAS_RIGHT=right is not None, HAS_ALIBI=alibi_slopes is not None, HAS_SINKS=sinks is not None,
    )  # fmt: skip
    launch(
        softmax_kernel, (-(-tokens // rows) * batch * heads,), scores.device, args, constexprs,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def context_4d_matmul(
    probabilities: Tensor,
    v: Tensor,
    *,
    q_start: int = 0,
    group_size: int | None = None,
    kv_start: int = 0,
    config: Config | None = None,
) -> Tensor:
    """functional.context_4d_matmul by the kernel: [B, Hq, T, S], v [B, S, Hkv, D] -> [B, T, Hq, D] in v's dtype.

    D <= 256, S >= 1.
    """
    (batch, heads, tokens, keys), (kv_heads, head_dim) = probabilities.shape, v.shape[2:]
    out = torch.empty((batch, tokens, heads, head_dim), dtype=v.dtype, device=v.device)
    probabilities, v = unit_last(probabilities), aligned(v)
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    key = (configs.architecture(v.device), "context", block_d, v.element_size())
    config = configs.choose("materialised", CONFIGS, key, config)
    args = (
        probabilities, v, out, *strides_of(probabilities), *strides_of(v),
        tokens, keys, heads, q_start, group_size or heads // kv_heads, kv_start,
    )  # fmt: skip
    constexprs = dict(
        D=v.shape[3], D_OUT=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d,
        UPCAST=configs.interpreted(),
    )  # fmt: skip
    launch(
        context_kernel, (-(-tokens // config.block_m) * batch * heads,), v.device, args, constexprs,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
