"""Flash attention of many query tokens: fp32 online softmax over key blocks, scores never written out.

One program per (query block, head). Key blocks that every row of the block sees take no masking cost; those at the edge
of causal, window or the sequence's end go through loops of their own. On Hopper q, k and v come by TMA from whatever
strided view they are, elsewhere by pointers. Sequences packed without padding (cu_seqlens) run in the
same kernel: a program finds its sequence by itself, so that no length is read on the host.
flash_prefill_hopper.py is faster on Hopper for what it takes. Few query tokens over many keys: flash_decode.py.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_attention.kernels import configs
from tp_attention.kernels.launch import launch
from tp_attention.kernels.operands import aligned, descriptor, load_rows, strides_of
from tp_attention.kernels.scores import (
    ADDITIVE_MASK,
    LN2,
    LOG2E,
    as_kernels_read,
    in_units,
    masked_scores,
    reach_mask,
    shape_scores,
)

log = logging.getLogger("tp_attention")


@dataclass(frozen=True)
class Config:
    """block_m query rows by block_n keys a step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (architecture, padded head dim, bytes per element, what is masked: nothing, the edges or, by a mask, everything)
KINDS = ("full", "edge", "mask")
CONFIGS = {
    **{(90, d, 2, kind): Config(64, 128, 4, 2) for d in (16, 32, 64) for kind in ("full", "edge")},
    # (128, 64, 4, 2) is 7% faster at S >= 16384, but spills at the edge
    **{(90, 128, 2, kind): Config(64, 64, 4, 3) for kind in ("full", "edge")},
    **{(90, d, 2, "mask"): Config(128, 64, 8, 2) for d in (16, 32, 64, 128)},
    **{(90, 256, 2, kind): Config(128, 64, 8, 2) for kind in ("full", "edge")},
    (90, 256, 2, "mask"): Config(128, 32, 8, 2),
    **{(80, d, 2, kind): Config(128, 64, 8, 3) for d in (16, 32, 64) for kind in KINDS},
    (80, 128, 2, "full"): Config(128, 64, 8, 3),
    **{(80, 128, 2, kind): Config(128, 32, 8, 3) for kind in ("edge", "mask")},
    **{(80, 256, 2, kind): Config(64, 32, 8, 2) for kind in ("full", "edge")},
    (80, 256, 2, "mask"): Config(64, 16, 8, 2),
    **{(0, d, 2, kind): Config(64, 64, 8, 2) for d in (16, 32, 64) for kind in KINDS},
    **{(0, 128, 2, kind): Config(64, 32, 8, 2) for kind in KINDS},
    **{(0, 256, 2, kind): Config(64, 16, 8, 1) for kind in KINDS},
    # fp32 products take no tensor cores, and hold whole operands in registers
    **{(0, d, 4, kind): Config(32, 32, 8, 1) for d in (16, 32, 64, 128) for kind in KINDS},
    **{(0, 256, 4, kind): Config(16, 16, 8, 1) for kind in KINDS},
}


@triton.jit
def _attend(
    acc, total, top,  # [M, BLOCK_D], [M], [M]: so far, relative to exp2(top)
    first, last, b_q, k, v, i_b, i_kv, k_start, keys, stride_k, stride_v,
    p_mask, stride_mask, o_t, o_i, rows, scale, softcap, b_slope, left, right,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, VARLEN: tl.constexpr,
    MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, RAW: tl.constexpr, EDGE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Take in the keys first..last, in blocks. EDGE: some row may not see some key of them."""
    for j in tl.range(first, last, BLOCK_N):
        o_j = j + tl.arange(0, BLOCK_N)
        b_k = load_rows(k, i_b, i_kv, k_start + j, k_start + keys, stride_k, D, BLOCK_N, BLOCK_D, TMA, EDGE)
        if UPCAST:
            b_k = b_k.to(tl.float32)
        b_s = tl.dot(b_q, b_k.T, input_precision="ieee")  # [M, N]
        if not RAW:
            b_s = shape_scores(b_s, scale, softcap, b_slope, o_i, o_j, HAS_SOFTCAP, HAS_ALIBI)
        if MASK:
            p_block = p_mask + tl.cast(j, tl.int64) * stride_mask + tl.arange(0, BLOCK_N)[None, :] * stride_mask
            b_s = masked_scores(b_s, p_block, (o_t < rows)[:, None] & (o_j < keys)[None, :], MASK)
        if EDGE:
            b_s = tl.where(reach_mask(o_i, o_j, keys, left, right, HAS_LEFT, HAS_RIGHT), b_s, -float("inf"))
        # RAW scores are scaled only here: max(s)·c and the s·c − top of exp2 cost one instruction an element
        factor = scale * LOG2E if RAW else 1.0
        top_new = tl.maximum(top, tl.max(b_s, 1) * factor)
        b_p = tl.exp2(b_s * factor - top_new[:, None])
        shrink = tl.exp2(top - top_new)
        total = total * shrink + tl.sum(b_p, 1)
        acc = acc * shrink[:, None]
        b_v = load_rows(v, i_b, i_kv, k_start + j, k_start + keys, stride_v, D, BLOCK_N, BLOCK_D, TMA, EDGE)
        if EDGE and TMA and VARLEN:  # rows of the next sequence: 0 · NaN would be NaN
            b_v = tl.where((o_j < keys)[:, None], b_v, 0.0)
        if UPCAST:
            b_v = b_v.to(tl.float32)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc, input_precision="ieee")
        top = top_new
    return acc, total, top


# Nothing that grows with a sequence is specialised on: it would be compiled again and again.
_GROWING = ["tokens", "keys", "sequences", "left", "right", "tiles", "heads_together"]
_GROWING += ["stride_qb", "stride_kb", "stride_vb", "stride_ob"]
_GROWING += ["stride_lb", "stride_lh", "stride_mb", "stride_mh", "stride_mt"]


@triton.jit(do_not_specialize=_GROWING)
def flash_prefill_kernel(
    p_q, p_k, p_v,  # [B, T, Hq, D], [B, S, Hkv, D]: pointers, or descriptors of [B, H, tokens, D] where TMA
    p_out, p_lse,  # [B, T, Hq, D], [B, Hq, T]; lse only where HAS_LSE
    p_mask, p_slopes, p_sinks, p_cu_q, p_cu_k,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lh, stride_mb, stride_mh, stride_mt, stride_ms,
    tokens, keys, sequences, heads, tiles, heads_together, q_start, group_size, kv_start, scale, softcap, left, right,
    D: tl.constexpr, D_OUT: tl.constexpr, ALIGN: tl.constexpr, MASK_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    TMA: tl.constexpr, VARLEN: tl.constexpr, MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    RAW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: tiles · heads (· B unless VARLEN). Few heads at a time, so that their keys stay in L2, longest first."""
    pid = tl.program_id(0)
    together = tiles * heads_together  # programs of one set of heads
    i_set = pid // together
    in_set = tl.minimum(heads_together, tl.num_programs(0) // tiles - i_set * heads_together)  # the last set has fewer
    i_head = i_set * heads_together + pid % together % in_set
    i_tile = pid % together // in_set
    i_b = i_head // heads
    i_h = i_head % heads
    i_kv = (q_start + i_h) // group_size - kv_start
    q_base = 0
    k_base = 0
    if VARLEN:  # tiles of all sequences in a row: find the one that this tile is in
        o_b = tl.arange(0, BLOCK_B)
        starts = tl.load(p_cu_q + o_b, mask=o_b < sequences, other=0)
        counts = tl.cdiv(tl.load(p_cu_q + o_b + 1, mask=o_b < sequences, other=0) - starts, BLOCK_M)
        ends = tl.cumsum(counts, 0)
        i_seq = tl.sum((ends <= i_tile).to(tl.int32))
        if i_seq >= sequences:
            return
        i_tile = tl.sum(tl.where(o_b == i_seq, ends, 0)) - 1 - i_tile
        q_base = tl.load(p_cu_q + i_seq)
        k_base = tl.load(p_cu_k + i_seq)
        tokens = tl.load(p_cu_q + i_seq + 1) - q_base
        keys = tl.load(p_cu_k + i_seq + 1) - k_base
    else:
        i_tile = tiles - 1 - i_tile

    row = i_tile * BLOCK_M
    o_t = row + tl.arange(0, BLOCK_M)  # [M] query tokens
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_t < tokens
    offset = keys - tokens
    o_i = o_t + offset  # [M] their key positions
    b64, h64, kv64 = i_b.to(tl.int64), i_h.to(tl.int64), i_kv.to(tl.int64)
    if TMA:
        k, v = p_k, p_v
        b_q = p_q.load([i_b, i_h, q_base + row, 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        # strides came in units of 16 bytes: as a factor that is known the compiler loads that much at a time
        stride_ks *= ALIGN
        stride_vs *= ALIGN
        k = p_k + (b64 * stride_kb + kv64 * stride_kh) * ALIGN
        v = p_v + (b64 * stride_vb + kv64 * stride_vh) * ALIGN
        q = p_q + (b64 * stride_qb + h64 * stride_qh) * ALIGN
        b_q = load_rows(q, i_b, i_h, q_base + row, q_base + tokens, stride_qt * ALIGN, D, BLOCK_M, BLOCK_D, False, True)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_slope = tl.load(p_slopes + i_h).to(tl.float32) if HAS_ALIBI else 0.0
    if MASK:
        p_mask += (b64 * stride_mb + h64 * stride_mh + o_t.to(tl.int64)[:, None] * stride_mt) * MASK_UNIT

    # Keys first..last are seen by some row of the block, full_first..full_last by every one.
    first, last = 0, keys
    full_first, full_last = 0, keys
    if HAS_LEFT:
        first = tl.maximum(0, row + offset - left) // BLOCK_N * BLOCK_N
        full_first = tl.maximum(0, row + BLOCK_M - 1 + offset - left)
    if HAS_RIGHT:
        last = tl.minimum(keys, row + BLOCK_M + offset + right)
        full_last = tl.minimum(keys, row + offset + right + 1)
    full_first = tl.maximum(first, tl.minimum(tl.cdiv(full_first, BLOCK_N) * BLOCK_N, tl.cdiv(last, BLOCK_N) * BLOCK_N))
    full_last = tl.maximum(full_first, full_last // BLOCK_N * BLOCK_N)
    if MASK:  # a mask is read for every block anyway: one loop, all edge
        full_first, full_last = first, first

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # below every score that is kept, but finite: −inf − top stays −inf where a row has kept nothing yet
    top = tl.full((BLOCK_M,), -3e38, tl.float32)
    if HAS_LEFT:
        acc, total, top = _attend(
            acc, total, top, first, full_first, b_q, k, v, i_b, i_kv, k_base, keys, stride_ks, stride_vs,
            p_mask, stride_ms, o_t, o_i, tokens, scale, softcap, b_slope, left, right, D, BLOCK_N, BLOCK_D, TMA,
            VARLEN, MASK, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, RAW, True, UPCAST,
        )  # fmt: skip
    if not MASK:
        acc, total, top = _attend(
            acc, total, top, full_first, full_last, b_q, k, v, i_b, i_kv, k_base, keys, stride_ks, stride_vs,
            p_mask, stride_ms, o_t, o_i, tokens, scale, softcap, b_slope, left, right, D, BLOCK_N, BLOCK_D, TMA,
            VARLEN, MASK, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, RAW, False, UPCAST,
        )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, full_last, last, b_q, k, v, i_b, i_kv, k_base, keys, stride_ks, stride_vs,
        p_mask, stride_ms, o_t, o_i, tokens, scale, softcap, b_slope, left, right, D, BLOCK_N, BLOCK_D, TMA,
        VARLEN, MASK, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, RAW, True, UPCAST,
    )  # fmt: skip

    m_empty = total == 0  # rows that keep no key
    if HAS_SINKS:  # one more logit in the denominator
        b_sink = tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        top_new = tl.maximum(top, b_sink)
        shrink = tl.exp2(top - top_new)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.exp2(b_sink - top_new)
        top = top_new
    b_out = acc / tl.where(m_empty, 1.0, total)[:, None]
    row64 = tl.cast(q_base + row, tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    p_out += (b64 * stride_ob + h64 * stride_oh + row64 * stride_ot) * D_OUT
    p_rows = p_out + (o_m[:, None] * (stride_ot * D_OUT) + o_d[None, :])
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_t[:, None] & (o_d < D_OUT)[None, :])
    if HAS_LSE:
        b_lse = tl.where(m_empty, -float("inf"), (top + tl.log2(total)) * LN2)
        tl.store(p_lse + b64 * stride_lb + h64 * stride_lh + row64 + o_m, b_lse, mask=m_t)


HOPPER_KEYS, HOPPER_ROWS = 256, 64  # less is done sooner by small tiles
HOPPER_HEAD_DIMS = (64, 128, 256)


def hopper_obstacle(
    q: Tensor, k: Tensor, *, scale: float, reach: tuple[int | None, int | None], features: tuple[str, ...]
) -> str | None:
    """Why Hopper's own kernel does not take this call, or None. features: what else is asked for, by name.

    Without the call's lengths and scale: each reason is logged once, and there must be an end of them.
    """
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype}"
    if q.shape[3] not in HOPPER_HEAD_DIMS:
        return f"head_dim {q.shape[3]}, not one of {', '.join(map(str, HOPPER_HEAD_DIMS))}"
    if features or reach not in ((None, None), (None, 0)):
        return ", ".join(features) or "a window"
    if scale <= 0:
        return "a scale that is not positive"
    if k.shape[1] < HOPPER_KEYS or q.shape[1] < HOPPER_ROWS:
        return f"fewer than {HOPPER_ROWS} queries or {HOPPER_KEYS} keys"
    return None


@functools.cache
def _say_general(why: str) -> None:
    log.info("general prefill kernel, not Hopper's: %s", why)


L2_BYTES = 30 << 20  # of keys and values in use at a time: about half of the L2 of an A100 (40 MB) or H100 (50 MB)


def flash_attention(
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
    return_lse: bool = False,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """functional.attention by the kernel: q [B, T, Hq, D], k, v [B, S, Hkv, D] -> out [B, T, Hq, D], lse [B, Hq, T].

    reach: masks.effective_window's (left, right), causal included. mask: 2-D or 4-D. D <= 256.
    cu_seqlens: of queries and keys, int32 [sequences + 1]; B is 1 then, and T and S count the tokens of all of them.
    """
    (batch, tokens, heads, head_dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    group_size = group_size or heads // kv_heads
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    architecture = configs.architecture(q.device)
    if architecture == 90 and config is None:
        asked = {"a mask": mask, "ALiBi": alibi_slopes, "softcap": softcap, "sinks": sinks, "packed": cu_seqlens}
        features = tuple(name for name, value in asked.items() if value is not None)
        why = hopper_obstacle(q, k, scale=scale, reach=reach, features=features)
        if why is None:
            from tp_attention.kernels.flash_prefill_hopper import flash_attention_hopper  # Gluon: for Hopper alone

            return flash_attention_hopper(
                q, k, v, scale=scale, causal=reach == (None, 0), q_start=q_start, group_size=group_size,
                kv_start=kv_start, return_lse=return_lse,
            )  # fmt: skip
        _say_general(why)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device) if return_lse else None
    q, k, v = aligned(q), aligned(k), aligned(v)
    alibi_slopes, sinks = (None if x is None else x.contiguous() for x in (alibi_slopes, sinks))
    left, right = reach
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    mask, kind, mask_strides = as_kernels_read(mask)
    mask_strides, mask_unit = in_units(mask_strides)
    align = 16 // q.element_size()
    tma = architecture == 90 and q.element_size() == 2
    masked = "mask" if mask is not None else "full" if reach == (None, None) else "edge"
    config = configs.choose("flash_prefill", CONFIGS, (architecture, block_d, q.element_size(), masked), config)
    sequences = 1 if cu_seqlens is None else len(cu_seqlens[0]) - 1
    # tiles of packed sequences: each can waste a part of one
    tiles = -(-tokens // config.block_m) + (0 if cu_seqlens is None else sequences)
    kv_bytes = 2 * keys * head_dim * q.element_size()
    together = min(batch * heads, group_size * max(1, L2_BYTES // max(1, kv_bytes)))
    cu_q, cu_k = cu_seqlens or (None, None)

    qkv: tuple[Any, ...] = (q, k, v)
    if tma:
        blocks = config.block_m, config.block_n, config.block_n
        qkv = tuple(descriptor(x, rows, block_d) for x, rows in zip(qkv, blocks, strict=True))
    args = (
        *qkv, out, lse, mask, alibi_slopes, sinks, cu_q, cu_k,
        *[stride // align for x in (q, k, v) for stride in strides_of(x)],
        *[stride // head_dim for stride in strides_of(out)],
        *((0, 0) if lse is None else lse.stride()[:2]), *mask_strides,
        tokens, keys, sequences, heads, tiles, together, q_start, group_size, kv_start, scale, softcap or 0.0,
        left or 0, right or 0,
    )  # fmt: skip
    constexprs = dict(
        D=q.shape[3], D_OUT=head_dim, ALIGN=align, MASK_UNIT=mask_unit, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=block_d, BLOCK_B=max(64, 1 << (sequences - 1).bit_length()), TMA=tma,
        VARLEN=cu_seqlens is not None, MASK=kind, HAS_LEFT=left is not None, HAS_RIGHT=right is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_ALIBI=alibi_slopes is not None, HAS_SINKS=sinks is not None, HAS_LSE=return_lse,
        RAW=softcap is None and alibi_slopes is None and kind != ADDITIVE_MASK.value and scale > 0,
        UPCAST=configs.interpreted(),
    )  # fmt: skip
    launch(
        flash_prefill_kernel, (tiles * batch * heads,), q.device, args, constexprs,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse
