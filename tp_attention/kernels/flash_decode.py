"""Split-KV attention of few query tokens against a long cache: what generating a token costs beyond the weights.

The cache is read once per group of query heads: the group and its tokens are the rows of one tile. Memory is the limit,
so the keys of a sequence are split over as many programs as fill the GPU, each writing fp32 partial results that a
second small kernel combines. Where a split starts is worked out on the device from `lengths`: nothing is read on the
host, one CUDA graph serves all lengths, and a short sequence in a long cache still spreads over all splits.

Masking costs a compare and a select per score, hidden behind the loads; loops of their own for full blocks would drain
the load pipeline once more. Wins up to 64 or so query rows per kv head; beyond, flash_prefill.py has the better tiles.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_attention import masks
from tp_attention.kernels import configs
from tp_attention.kernels.launch import launch
from tp_attention.kernels.operands import unit_last
from tp_attention.kernels.scores import LN2, LOG2E, NO_MASK, as_kernels_read, masked_scores, reach_mask, shape_scores


@dataclass(frozen=True)
class Config:
    """block_m query rows by block_n keys a step; programs: how many of these a multiprocessor holds at once."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int


_DIMS = (16, 32, 64, 128, 256)
# (architecture, padded head dim, bytes per element of q, of the cache, more than 16 query rows, as many programs as
# multiprocessors without splits)
_ENTRIES = {
    **{(90, d, 2, 2, False): Config(16, min(64, 4096 // d), 4, 4, 2) for d in _DIMS},
    **{(90, d, 2, 1, False): Config(16, 128 if d == 64 else min(64, 8192 // d), 4, 4, 2) for d in _DIMS},
    **{(90, d, 2, 2, True): Config(64, min(64, 8192 // d), 4, 4, 1) for d in _DIMS},
    **{(90, d, 2, 1, True): Config(64, 64 if d < 128 else 32, 8 if d > 128 else 4, 3, 2) for d in _DIMS},
    **{(80, d, 2, 2, False): Config(16, min(128, 8192 // d), 4, 3, 2) for d in _DIMS},
    **{(80, d, 2, 1, False): Config(16, min(128, 8192 // d), 4, 3, 2) for d in _DIMS},
    **{(80, d, 2, 2, True): Config(64, min(64, 8192 // d), 8 if d > 128 else 4, 3, 2) for d in _DIMS},
    **{(80, d, 2, 1, True): Config(64, 32, 8 if d > 128 else 4, 3, 2) for d in _DIMS},
    **{(0, d, 2, size, wide): Config(16, min(32 * size, 4096 // d), 4, 3, 2)
       for d in _DIMS for size in (1, 2) for wide in (False, True)},
    # fp32 has no tensor cores: a taller tile would only wait longer
    **{(0, d, 4, 4, wide): Config(16, 16 if d > 64 else 32, 16 if d > 128 else 4, 2, 2)
       for d in _DIMS for wide in (False, True)},
    **{(0, d, 4, 1, wide): Config(16, 16, 8 if d > 64 else 4, 1 if d > 64 else 2, 2)
       for d in _DIMS for wide in (False, True)},
}  # fmt: skip
CONFIGS = {
    **{(*key, many): config for key, config in _ENTRIES.items() for many in (False, True)},
    (90, 64, 2, 2, False, True): Config(16, 32, 2, 3, 1),
    (90, 128, 2, 2, False, True): Config(16, 128, 4, 2, 4),
    (90, 128, 2, 2, False, False): Config(16, 128, 4, 3, 1),
    (90, 128, 2, 1, False, False): Config(16, 32, 4, 3, 2),
    (90, 128, 2, 2, True, False): Config(64, 32, 4, 4, 1),
}
MAX_SPLITS = 256
COMBINE_STEPS = 2  # what writing and combining partial results costs, in steps of the loop

# Strides that change while sequences grow: a variant of the kernel for each would be compiled.
_GROWING = ["stride_tb", "stride_mb", "stride_mh", "stride_mt"]

# How a cache's scales lie: one for all or one per kv head; one per token and kv head.
NO_SCALE, HEAD_SCALE, TOKEN_SCALE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _pages(p_table, j, last, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of the keys j..j+BLOCK_N, [BLOCK_N], or the one page that has them all."""
    if PAGE % BLOCK_N == 0:
        return tl.load(p_table + j // PAGE, mask=j < last, other=0)
    else:
        o_j = j + tl.arange(0, BLOCK_N)
        return tl.load(p_table + o_j // PAGE, mask=o_j < last, other=0)


@triton.jit
def _rows(stride_b, stride_s, i_page, j, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of the keys j..j+BLOCK_N: [BLOCK_N] int64. Without pages i_page is the sequence."""
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    if PAGE == 0:
        return i_page * stride_b + tl.cast(j, tl.int64) * stride_s + o_n * stride_s
    elif PAGE % BLOCK_N == 0:
        return i_page * stride_b + tl.cast(j % PAGE, tl.int64) * stride_s + o_n * stride_s
    else:
        return i_page * stride_b + ((j + tl.arange(0, BLOCK_N)) % PAGE).to(tl.int64) * stride_s


@triton.jit
def _converted(x, DTYPE: tl.constexpr):
    """What the cache holds, as an operand of the dots."""
    if x.dtype == tl.int8 and tl.float16 == DTYPE:  # 0x6480 is 1152 and 1 the next: adding beats the slow converter
        return (x.to(tl.int16) + 0x6480).to(tl.float16, bitcast=True) - 1152.0
    else:
        return x.to(DTYPE)


@triton.jit
def _closing(total, top, p_sinks, o_h, m_h):
    """What to multiply sums relative to exp2(top) with, and the base-2 lse, both 0 and -inf where nothing was kept."""
    kept = top > -float("inf")
    pivot = tl.where(kept, top, 0.0)
    shrink = 1.0
    if p_sinks is not None:
        b_sink = tl.load(p_sinks + o_h, mask=m_h, other=0).to(tl.float32) * LOG2E
        higher = tl.maximum(pivot, b_sink)
        shrink = tl.exp2(pivot - higher)
        total = total * shrink + tl.exp2(b_sink - higher)
        pivot = higher
    total = tl.where(kept, total, 1.0)
    return tl.where(kept, shrink / total, 0.0), tl.where(kept, pivot + tl.log2(total), -float("inf"))


@triton.jit(
    do_not_specialize=["tokens", "keys", "kv_first", "front", "left", "right", *_GROWING],
    do_not_specialize_on_alignment=["heads", "kv_heads", "tiles"],
)
def flash_decode_kernel(
    p_q, p_k, p_v,  # [B, T, Hq, D], [B, S, Hkv, D] or [blocks, PAGE, Hkv, D]
    p_out, p_lse,  # [B, T, Hq, D], [B, Hq, T] or None; where SPLIT parts [B, T, Hq, splits, D], [B, T, Hq, splits]
    p_lengths, p_table, p_mask, p_slopes, p_sinks, p_k_scale, p_v_scale,  # each None where there is none
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_tb,
    stride_ksb, stride_kss, stride_ksh, stride_vsb, stride_vss, stride_vsh, stride_mb, stride_mh, stride_mt, stride_ms,
    tokens, keys, heads, kv_heads, tiles, kv_first, front, scale, softcap, left, right,
    D: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, PAGE: tl.constexpr, MASK: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (B · kv_heads · tiles, splits). GROUP: query heads per kv head; SPAN: the most of them that are here."""
    if PDL:  # nothing is touched before every earlier launch is done: not read too soon, not overwritten while in use
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_b = tl.program_id(0) // tiles // kv_heads
    i_g = tl.program_id(0) // tiles % kv_heads  # of the kv heads that are read
    i_kv = (kv_first + i_g).to(tl.int64)
    i_split = tl.program_id(1)
    b64 = i_b.to(tl.int64)
    length = keys
    if p_lengths is not None:
        length = tl.load(p_lengths + i_b)  # may exceed what there is room for: positions still derive from it

    o_r = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_t = o_r // SPAN
    first_head = tl.maximum(i_g * GROUP - front, 0)
    o_h = first_head + o_r % SPAN
    m_r = (o_t < tokens) & (o_h < tl.minimum((i_g + 1) * GROUP - front, heads))
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    p_row = p_q + b64 * stride_qb + o_t.to(tl.int64)[:, None] * stride_qt + o_h.to(tl.int64)[:, None] * stride_qh
    p_row += o_d[None, :]
    b_q = tl.load(p_row, mask=m_r[:, None] & (o_d < D)[None, :], other=0)  # [M, D]

    # The keys that some row of this tile reaches, in blocks, and this split's share of them.
    o_i = length - tokens + o_t  # [M] positions
    start = 0
    stop = tl.minimum(length, keys)
    if left is not None:
        start = tl.maximum(length - tokens + tl.program_id(0) % tiles * BLOCK_M // SPAN - left, 0) // BLOCK_N * BLOCK_N
    if right is not None:
        last_token = (tl.program_id(0) % tiles * BLOCK_M + BLOCK_M - 1) // SPAN
        stop = tl.minimum(stop, length - tokens + last_token + right + 1)
    share = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), BLOCK_N), tl.num_programs(1)) * BLOCK_N
    first = start + i_split * share
    last = tl.minimum(first + share, stop)

    b_slope = 0.0
    if p_slopes is not None:
        b_slope = tl.load(p_slopes + o_h, mask=m_r, other=0).to(tl.float32)[:, None]
    if p_mask is not None:
        p_mask += b64 * stride_mb + o_h.to(tl.int64)[:, None] * stride_mh + o_t.to(tl.int64)[:, None] * stride_mt
    if K_SCALE == HEAD_SCALE:
        scale *= tl.load(p_k_scale + i_kv * stride_ksh)
    p_k += i_kv * stride_kh
    p_v += i_kv * stride_vh
    i_page = b64
    if PAGE:
        p_table += b64 * stride_tb
        i_page = _pages(p_table, first, last, PAGE, BLOCK_N).to(tl.int64)
        i_next = _pages(p_table, first + BLOCK_N, last, PAGE, BLOCK_N)

    if UPCAST:
        b_q = b_q.to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # A small tile lies across the warps: its sums meet once after the loop. In a tall one each row is one warp's.
    LANES: tl.constexpr = BLOCK_N if BLOCK_M == 16 else 1
    total = tl.zeros((BLOCK_M, LANES), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for j in tl.range(first, last, BLOCK_N):
        o_j = j + o_n
        m_kv = (o_j < last)[:, None] & (o_d < D)[None, :]
        o_k = _rows(stride_kb, stride_ks, i_page, j, PAGE, BLOCK_N)
        b_k = tl.load(p_k + (o_k[:, None] + o_d[None, :]), mask=m_kv, other=0.0)  # [N, D]
        b_s = tl.dot(b_q, _converted(b_k, b_q.dtype).T, input_precision="ieee")  # [M, N]
        if K_SCALE == TOKEN_SCALE:
            o_ks = _rows(stride_ksb, stride_kss, i_page, j, PAGE, BLOCK_N)
            b_s *= tl.load(p_k_scale + i_kv * stride_ksh + o_ks, mask=o_j < last, other=0)[None, :]
        b_s = shape_scores(b_s, scale, softcap, b_slope, o_i, o_j, softcap is not None, p_slopes is not None)
        if MASK != NO_MASK:
            p_block = p_mask + o_j.to(tl.int64)[None, :] * stride_ms
            b_s = masked_scores(b_s, p_block, m_r[:, None] & (o_j < last)[None, :], MASK)
        m_s = reach_mask(o_i, o_j, last, left, right, left is not None, right is not None)
        b_s = tl.where(m_s, b_s, -float("inf"))
        top_new = tl.maximum(top, tl.max(b_s, 1))
        pivot = tl.where(top_new == -float("inf"), 0.0, top_new)
        b_p = tl.exp2(b_s - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink[:, None] + (b_p if LANES > 1 else tl.sum(b_p, 1, keep_dims=True))
        acc *= shrink[:, None]
        top = top_new
        o_v = _rows(stride_vb, stride_vs, i_page, j, PAGE, BLOCK_N)
        b_v = tl.load(p_v + (o_v[:, None] + o_d[None, :]), mask=m_kv, other=0.0)
        b_v = _converted(b_v, b_q.dtype)  # [N, D]
        if V_SCALE == TOKEN_SCALE:
            o_vs = _rows(stride_vsb, stride_vss, i_page, j, PAGE, BLOCK_N)
            b_vs = tl.load(p_v_scale + i_kv * stride_vsh + o_vs, mask=o_j < last, other=0)  # [N]
            if p_q.dtype.element_ty == tl.float16:  # probabilities times small scales would leave fp16's range
                b_v = (b_v.to(tl.float32) * b_vs[:, None]).to(b_v.dtype)
            else:
                b_p *= b_vs[None, :]
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc, input_precision="ieee")
        if PAGE:  # two steps ahead: the loads of keys never wait for that of their page
            i_page = i_next.to(tl.int64)
            i_next = _pages(p_table, j + 2 * BLOCK_N, last, PAGE, BLOCK_N)

    factor, lse = _closing(tl.sum(total, 1), top, None if SPLIT else p_sinks, o_h, m_r)
    if V_SCALE == HEAD_SCALE:
        factor *= tl.load(p_v_scale + i_kv * stride_vsh)
    row = (b64 * tokens + o_t) * heads + o_h  # [M]
    if SPLIT:
        row = row * tl.num_programs(1) + i_split
        tl.store(p_lse + row, lse, mask=m_r)
    elif p_lse is not None:
        tl.store(p_lse + (b64 * heads + o_h) * tokens + o_t, lse * LN2, mask=m_r)
    p_out += row[:, None] * D + o_d[None, :]
    tl.store(p_out, (acc * factor[:, None]).to(p_out.dtype.element_ty), mask=m_r[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["tokens", "splits"], do_not_specialize_on_alignment=["heads"])
def combine_splits_kernel(
    p_parts, p_part_lse,  # [B, T, Hq, splits, D], [B, T, Hq, splits] in base 2
    p_out, p_lse, p_sinks,  # [B, T, Hq, D], [B, Hq, T] or None, [Hq] or None
    tokens, heads, splits,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B · T · Hq, blocks of D)."""
    i_row = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(0) % heads
    o_s, o_d = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if PDL:  # a next launch that waits, waits for this one and so for all before: it may come in early
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b_lse = tl.load(p_part_lse + i_row * splits + o_s, mask=o_s < splits, other=-float("inf"))
    p_parts += (i_row * splits + o_s)[:, None] * D + o_d[None, :]
    b_parts = tl.load(p_parts, mask=(o_s < splits)[:, None] & (o_d < D)[None, :], other=0)  # [S, D]
    top = tl.max(b_lse, 0)
    b_weight = tl.exp2(b_lse - tl.where(top == -float("inf"), 0.0, top))
    factor, lse = _closing(tl.sum(b_weight, 0), top, p_sinks, i_h, True)
    b_out = tl.sum(b_parts * b_weight[:, None], 0) * factor
    tl.store(p_out + i_row * D + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < D)
    if p_lse is not None:
        i_b, i_t = i_row // heads // tokens, i_row // heads % tokens
        tl.store(p_lse + (i_b * heads + i_h) * tokens + i_t, lse * LN2, mask=tl.program_id(1) == 0)


@functools.lru_cache(maxsize=4096)
def split_count(tiles: int, steps: int, slots: int) -> int:
    """Into how many splits `steps` loop steps finish first; of tiles · splits programs, `slots` run at once."""
    best, fastest = 1, -(-tiles // slots) * (steps + 1)
    for waves in range(1, 5):
        splits = min(waves * slots // tiles, steps, MAX_SPLITS)
        if splits > 1:
            share = -(-steps // splits)
            time = -(-tiles * splits // slots) * (share + 1) + COMBINE_STEPS
            if time < fastest:
                best, fastest = -(-steps // share), time  # not those that would stay empty
    return best


def flash_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: masks.Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_start: int = 0,
    group_size: int | None = None,
    kv_start: int = 0,
    return_lse: bool = False,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """functional.attention_decode unchecked; lengths=None: every sequence has as many keys as fit its cache."""
    q, k, v = unit_last(q), unit_last(k), unit_last(v)  # caches are already
    (batch, tokens, heads, head_dim), page = q.shape, 0
    keys = k.shape[1]
    if block_table is not None:
        page, keys = keys, keys * block_table.shape[1]
    group = group_size or heads // k.shape[2]
    first = q_start // group
    kv_heads = (q_start + heads - 1) // group - first + 1
    span = min(group, heads)
    rows = tokens * span
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device) if return_lse else None
    if not out.numel():
        return (out, lse) if lse is not None else out

    architecture, block_d = configs.architecture(q.device), max(16, 1 << (head_dim - 1).bit_length())
    # at most 16 rows take one tile, more at least one: the choice needs no more than that
    many = batch * kv_heads >= configs.multiprocessors(q.device)
    # loads of a part of a block take so many registers that only the smallest ones do not spill
    tuned = architecture if head_dim == block_d else 0
    key = (tuned, block_d, q.element_size(), k.element_size(), rows > 16, many)
    config = configs.choose("flash_decode", CONFIGS, key, config)
    block_n = config.block_n if mask is None else min(64, config.block_n)  # a mask takes registers, too
    tiles = -(-rows // config.block_m)
    left, right = masks.effective_window(tokens, keys, causal, window)
    if splits is None:
        steps = -(-(keys if left is None else min(keys, left + tokens)) // block_n)
        slots = configs.multiprocessors(q.device) * config.programs
        splits = split_count(batch * kv_heads * tiles, steps, slots)
    split = splits > 1
    parts, part_lse = out, lse
    if split:
        parts = torch.empty((batch, tokens, heads, splits, head_dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((batch, tokens, heads, splits), dtype=torch.float32, device=q.device)
    pdl = architecture == 90
    mask, mask_kind, mask_strides = as_kernels_read(mask)
    alibi_slopes, sinks = (None if x is None else x.contiguous() for x in (alibi_slopes, sinks))
    args = (
        q, k, v, parts, part_lse, lengths, block_table, mask, alibi_slopes, sinks, k_scale, v_scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 0 if block_table is None else block_table.stride(0),
        *scale_strides(k_scale), *scale_strides(v_scale), *mask_strides,
        tokens, keys, heads, kv_heads, tiles, first - kv_start, q_start - first * group,
        1 / math.sqrt(head_dim) if scale is None else scale, softcap, left, right,
    )  # fmt: skip
    constexprs = dict(
        D=head_dim, GROUP=group, SPAN=span, PAGE=page,
        MASK=mask_kind, K_SCALE=scale_kind(k_scale), V_SCALE=scale_kind(v_scale),
        BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_D=block_d, SPLIT=split, PDL=pdl,
        UPCAST=configs.interpreted(),
    )  # fmt: skip
    launch(
        flash_decode_kernel, (batch * kv_heads * tiles, splits), q.device, args, constexprs,
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    if split:
        block_s = max(16, 1 << (splits - 1).bit_length())
        # few rows: their columns over several programs, so that they fill the GPU
        block = min(block_d, 8192 // block_s, 32 if batch * tokens * heads < 128 else block_d)
        args = (parts, part_lse, out, lse, sinks, tokens, heads, splits)
        constexprs = dict(D=head_dim, BLOCK_S=block_s, BLOCK_D=block, PDL=pdl)
        grid = (batch * tokens * heads, -(-head_dim // block))
        launch(combine_splits_kernel, grid, q.device, args, constexprs, num_warps=4, launch_pdl=pdl)
    return (out, lse) if lse is not None else out


def scale_kind(scale: Tensor | None) -> int:
    return (NO_SCALE if scale is None else HEAD_SCALE if scale.dim() == 1 else TOKEN_SCALE).value


def scale_strides(scale: Tensor | None) -> tuple[int, ...]:
    """Of sequence or page, token, kv head."""
    if scale is None:
        return (0, 0, 0)
    if scale.dim() == 1:
        return (0, 0, 0 if scale.shape[0] == 1 else scale.stride(0))
    return scale.stride()
