"""Attention that also returns its probabilities: out = P·V, with P [B, Hq, T, S] written once and never read.

A first sweep over the keys makes each row's maximum and sum from Q·Kᵀ alone; a second one makes the scores again,
writes P normalised, and multiplies by V. That is 1.5 times the products of flash attention, against four passes over a
T×S matrix in memory for the steps one by one (materialised.py). Rows that fit one block of keys need one sweep. Blocks
out of reach of causal or window cost no product, only the zeros that P has there.
Where P is not wanted, flash_prefill.py is faster: here the time is at least that of writing B·Hq·T·S values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tp_attention.kernels import configs
from tp_attention.kernels.launch import launch
from tp_attention.kernels.operands import aligned, descriptor, load_rows, strides_of
from tp_attention.kernels.scores import (
    ADDITIVE_MASK,
    LOG2E,
    as_kernels_read,
    in_units,
    masked_scores,
    reach_mask,
    shape_scores,
)


@dataclass(frozen=True)
class Config:
    """block_m query rows by block_n keys a step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (architecture, padded head dim, bytes per element, case). Cases: few query tokens; pointers to a mask, or to rows of P
# that are not 16-byte aligned, which take registers; few keys, in one block and one sweep; none of these.
FEW, SHORT = 16, 128
CASES = ("few", "pointers", "short", "long")
CONFIGS = {
    **{(90, d, 2, "long"): Config(128, 64, 8, 3) for d in (16, 32, 64, 128)},
    (90, 256, 2, "long"): Config(128, 64, 8, 2),
    **{(90, d, 2, "pointers"): Config(128, 32, 8, 2) for d in (16, 32, 64, 128)},
    (90, 256, 2, "pointers"): Config(64, 32, 8, 2),
    **{(80, d, 2, "long"): Config(128, 32, 8, 3) for d in (16, 32, 64)},
    **{(80, d, 2, "pointers"): Config(64, 32, 8, 3) for d in (16, 32, 64)},
    **{(80, 128, 2, case): Config(64, 32, 8, 3) for case in ("long", "pointers")},
    (80, 256, 2, "long"): Config(64, 32, 8, 2),
    **{(arch, d, 2, "short"): Config(64, 128, 8, 1) for arch in (80, 90) for d in (16, 32, 64, 128)},
    (90, 256, 2, "short"): Config(64, 128, 8, 1),
    (90, 128, 2, "few"): Config(16, 32, 4, 3),
    **{(0, d, 2, case): Config(64, 32, 8, 2) for d in (16, 32, 64, 128) for case in CASES},
    **{(0, 256, 2, case): Config(32, 32, 8, 1) for case in CASES},
    **{(0, d, 2, "few"): Config(16, 64, 4, 2) for d in (16, 32, 64, 128)},
    (0, 256, 2, "few"): Config(16, 32, 4, 2),
    # fp32 products take no tensor cores, and hold whole operands in registers
    **{(0, d, 4, case): Config(32, 32, 8, 1) for d in (16, 32, 64) for case in CASES},
    **{(0, 128, 4, case): Config(16, 32, 8, 1) for case in CASES},
    **{(0, 256, 4, case): Config(16, 32, 8, 1) for case in CASES},
}


@triton.jit
def _store(p_p, i_head, row, j, b_p, m_t, keys, TMA: tl.constexpr, EDGE: tl.constexpr):
    """b_p [M, N] into P at row, j. p_p: a descriptor of [B·Hq, T, S], or [M, 1] pointers to the starts of the rows."""
    if TMA:
        p_p.store([i_head, row, j], b_p.to(p_p.dtype)[None, :, :])
    else:
        o_j = j + tl.arange(0, b_p.shape[1])
        b_p = b_p.to(p_p.dtype.element_ty)
        if EDGE:
            tl.store(p_p + o_j[None, :], b_p, mask=m_t & (o_j < keys)[None, :])
        else:
            tl.store(p_p + o_j[None, :], b_p, mask=m_t)


# Not `keys`: it is the row stride of P, and wide stores need to know when it is a multiple of 16.
@triton.jit(
    do_not_specialize=[
        "tokens", "heads", "q_start", "group_size", "kv_start", "left", "right", "stride_mb", "stride_mh", "stride_mt",
    ]
)  # fmt: skip
def softmax_context_kernel(
    q, k, v,  # [B, T, Hq, D], [B, S, Hkv, D]: pointers, or descriptors of [B, H, tokens, D] where TMA
    p_out, p,  # [B, T, Hq, D], [B, Hq, T, S], contiguous; p is a descriptor of [B·Hq, T, S] where TMA_P
    p_mask, p_slopes, p_sinks,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_mb, stride_mh, stride_mt, stride_ms,
    tokens, keys, heads, q_start, group_size, kv_start, scale, softcap, left, right,
    D: tl.constexpr, D_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ONE_BLOCK: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, RAW: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr, TMA_P: tl.constexpr,
):  # fmt: skip
    """Grid: tiles · B·Hq. The tiles of a head lie side by side, so that its keys stay in L2, the longest rows first."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    i_head = tl.program_id(0) // tiles
    i_b, i_h = i_head // heads, i_head % heads
    i_kv = (q_start + i_h) // group_size - kv_start
    b64, h64, kv64 = i_b.to(tl.int64), i_h.to(tl.int64), i_kv.to(tl.int64)
    if not TMA:
        q += b64 * stride_qb + h64 * stride_qh
        k += b64 * stride_kb + kv64 * stride_kh
        v += b64 * stride_vb + kv64 * stride_vh

    offset = keys - tokens
    o_t = row + tl.arange(0, BLOCK_M)  # [M] query tokens, at key positions o_i
    o_i = o_t + offset
    m_t = (o_t < tokens)[:, None]
    if not TMA_P:
        p += (i_head.to(tl.int64) * tokens + o_t)[:, None] * keys  # [M, 1]: row starts
    if MASK:
        p_mask += (b64 * stride_mb + h64 * stride_mh + o_t.to(tl.int64)[:, None] * stride_mt) * UNIT

    b_q = load_rows(q, i_b, i_h, row, tokens, stride_qt, D, BLOCK_M, BLOCK_D, TMA, True)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_slope = tl.load(p_slopes + i_h).to(tl.float32) if HAS_ALIBI else 0.0
    # RAW scores are scaled only here: max(s)·c and the s·c − top of exp2 cost one instruction an element
    factor = scale * LOG2E if RAW else 1.0

    # Keys first..last are seen by some row of the block, full_first..full_last by every one; blocks from first on.
    first, last = 0, keys
    full_first, full_last = 0, keys
    end_row = tl.minimum(row + BLOCK_M, tokens)
    if HAS_LEFT:
        first = tl.minimum(tl.maximum(0, row + offset - left), keys) // BLOCK_N * BLOCK_N
        full_first = end_row - 1 + offset - left
    if HAS_RIGHT:
        last = tl.maximum(first, tl.minimum(keys, end_row + offset + right))
        full_last = row + offset + right + 1
    last_block = tl.cdiv(last, BLOCK_N) * BLOCK_N
    full_first = tl.minimum(tl.maximum(first, tl.cdiv(full_first, BLOCK_N) * BLOCK_N), last_block)
    full_last = tl.maximum(full_first, tl.minimum(full_last, keys) // BLOCK_N * BLOCK_N)

    # Sums are relative to exp2(top). A sink is one more logit, with no value.
    if HAS_SINKS:
        top = tl.zeros((BLOCK_M,), tl.float32) + tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    inverse = total
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    for SWEEP in tl.static_range(1 if ONE_BLOCK else 2):
        for ZONE in tl.static_range(2 if ONE_BLOCK else 0 if HAS_LEFT else 1, 3):  # left edge, middle, right edge
            EDGE = ZONE != 1
            if ONE_BLOCK:
                zone_first, zone_last = 0, BLOCK_N
            elif ZONE == 0:
                zone_first, zone_last = first, full_first
            elif ZONE == 1:
                zone_first, zone_last = full_first, full_last
            else:
                zone_first, zone_last = full_last, last_block
            for j in tl.range(zone_first, zone_last, BLOCK_N):
                j = tl.multiple_of(j, BLOCK_N)
                o_j = j + tl.arange(0, BLOCK_N)
                b_k = load_rows(k, i_b, i_kv, j, keys, stride_ks, D, BLOCK_N, BLOCK_D, TMA, EDGE)
                if UPCAST:
                    b_k = b_k.to(tl.float32)
                b_s = tl.dot(b_q, b_k.T, input_precision="ieee")  # [M, N]
                if not RAW:
                    b_s = shape_scores(b_s, scale, softcap, b_slope, o_i, o_j, HAS_SOFTCAP, HAS_ALIBI)
                if MASK:
                    p_block = p_mask + j.to(tl.int64) * stride_ms + tl.arange(0, BLOCK_N)[None, :] * stride_ms
                    b_s = masked_scores(b_s, p_block, m_t & (o_j < keys)[None, :], MASK)
                if EDGE:
                    b_s = tl.where(reach_mask(o_i, o_j, keys, left, right, HAS_LEFT, HAS_RIGHT), b_s, -float("inf"))

                if SWEEP == 0:
                    top_new = tl.maximum(top, tl.max(b_s, 1) * factor)
                    pivot = tl.where(top_new == -float("inf"), 0.0, top_new)
                    b_p = tl.exp2(b_s * factor - pivot[:, None])
                    total = total * tl.exp2(top - pivot) + tl.sum(b_p, 1)
                    top = top_new
                if ONE_BLOCK:
                    inverse = 1 / tl.where(total == 0, 1.0, total)
                if ONE_BLOCK or SWEEP == 1:
                    if SWEEP == 1:
                        b_p = tl.exp2(b_s * factor - top[:, None])
                    _store(p, i_head, row, j, b_p * inverse[:, None], m_t, keys, TMA_P, EDGE)
                    b_v = load_rows(v, i_b, i_kv, j, keys, stride_vs, D, BLOCK_N, BLOCK_D, TMA, EDGE)
                    if UPCAST:
                        b_v = b_v.to(tl.float32)
                    # not normalised: of many keys these would be too small for fp16
                    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc, input_precision="ieee")
        if SWEEP == 0 and not ONE_BLOCK:
            inverse = 1 / tl.where(total == 0, 1.0, total)
            top = tl.where(top == -float("inf"), 0.0, top)  # rows that keep nothing

    if not ONE_BLOCK:
        b_zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_LEFT:
            for j in tl.range(0, first, BLOCK_N):
                _store(p, i_head, row, tl.multiple_of(j, BLOCK_N), b_zero, m_t, keys, TMA_P, False)
        if HAS_LEFT or HAS_RIGHT:
            for j in tl.range(last_block, keys, BLOCK_N):
                _store(p, i_head, row, tl.multiple_of(j, BLOCK_N), b_zero, m_t, keys, TMA_P, True)

    o_d = tl.arange(0, BLOCK_D)
    p_out += ((b64 * tokens + o_t) * heads + h64)[:, None] * D_OUT + o_d[None, :]
    tl.store(p_out, (acc * inverse[:, None]).to(p_out.dtype.element_ty), mask=m_t & (o_d < D_OUT)[None, :])


def softmax_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    reach: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_start: int = 0,
    group_size: int | None = None,
    kv_start: int = 0,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """functional.softmax_context by the kernel: q [B, T, Hq, D], k, v [B, S, Hkv, D] -> [B, T, Hq, D], [B, Hq, T, S].

    reach: masks.effective_window's (left, right), causal included. D <= 256, S >= 1.
    """
    (batch, tokens, heads, head_dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    probabilities = torch.empty((batch, heads, tokens, keys), dtype=q.dtype, device=q.device)
    left, right = reach
    q, k, v = aligned(q), aligned(k), aligned(v)
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    mask, kind, mask_strides = as_kernels_read(mask)
    mask_strides, unit = in_units(mask_strides)
    alibi_slopes, sinks = (None if x is None else x.contiguous() for x in (alibi_slopes, sinks))
    architecture = configs.architecture(q.device)
    tma = architecture == 90 and q.element_size() == 2
    tma_p = tma and keys % 8 == 0  # P is contiguous, and the copy engine writes rows that are 16-byte aligned
    pointers = mask is not None or keys % 8 != 0
    case = "few" if tokens <= FEW else "pointers" if pointers else "short" if keys <= SHORT else "long"
    config = configs.choose("softmax_context", CONFIGS, (architecture, block_d, q.element_size(), case), config)

    operands: tuple[Any, ...] = (q, k, v)
    if tma:
        blocks = config.block_m, config.block_n, config.block_n
        operands = tuple(descriptor(x, rows, block_d) for x, rows in zip(operands, blocks, strict=True))
    p: Any = probabilities
    if tma_p:
        p = TensorDescriptor.from_tensor(probabilities.flatten(0, 1), [1, config.block_m, config.block_n])
    args = (
        *operands, out, p, mask, alibi_slopes, sinks,
        *strides_of(q), *strides_of(k), *strides_of(v), *mask_strides,
        tokens, keys, heads, q_start, group_size or heads // kv_heads, kv_start, scale, softcap or 0.0,
        left or 0, right or 0,
    )  # fmt: skip
    constexprs = dict(
        D=q.shape[3], D_OUT=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d,
        ONE_BLOCK=keys <= config.block_n, MASK=kind, UNIT=unit, HAS_LEFT=left is not None, HAS_RIGHT=right is not None,
        HAS_SOFTCAP=softcap is not None, HAS_ALIBI=alibi_slopes is not None, HAS_SINKS=sinks is not None,
        RAW=softcap is None and alibi_slopes is None and kind != ADDITIVE_MASK.value and scale > 0,
        UPCAST=configs.interpreted(), TMA=tma, TMA_P=tma_p,
    )  # fmt: skip
    launch(
        softmax_context_kernel, (-(-tokens // config.block_m) * batch * heads,), q.device, args, constexprs,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, probabilities
