"""Write new keys and values into a cache, RoPE and quantisation included, and turn the queries: one launch for all.

Between the QKV projection and attention a decode step would otherwise run four small kernels. Every program does a few
heads of one token; it is bound by latency, and reads and writes each element once. Long prompts take the same way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_attention.kernels import configs
from tp_attention.kernels.flash_decode import HEAD_SCALE, TOKEN_SCALE, scale_kind, scale_strides
from tp_attention.kernels.launch import launch
from tp_attention.kernels.operands import unit_last

HEADS = 4  # of a program: one warp's worth of 16-byte loads at D = 64


@triton.jit
def _turned(p_x, o_d, m, p_cos, p_sin, angles, INTERLEAVED: tl.constexpr):
    """x [H, BLOCK_D], its first 2 · angles columns rotated in fp32; o_d: columns."""
    x = tl.load(p_x + o_d[None, :], mask=m, other=0).to(tl.float32)
    if p_cos is not None:
        if INTERLEAVED:
            o_partner, o_angle, first = o_d ^ 1, o_d // 2, o_d % 2 == 0
        else:
            first = o_d < angles
            o_partner, o_angle = tl.where(first, o_d + angles, o_d - angles), tl.where(first, o_d, o_d - angles)
        turns = o_d < 2 * angles
        partner = tl.load(p_x + o_partner[None, :], mask=m & turns[None, :], other=0).to(tl.float32)
        cos = tl.load(p_cos + o_angle, mask=turns, other=1.0)
        sin = tl.load(p_sin + o_angle, mask=turns, other=0.0)
        x = x * cos[None, :] + partner * tl.where(first, -sin, sin)[None, :]
    return x.to(p_x.dtype.element_ty)


@triton.jit
def _write(
    x,  # [H, BLOCK_D]
    p_cache,  # this row of the cache, first head
    stride_h,
    p_scale,  # likewise, with strides stride_sh
    stride_sh,
    o_h,
    o_d,
    m,
    LARGEST: tl.constexpr,
    SCALE: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    if LARGEST is not None:
        x = x.to(tl.float32)
        if SCALE == TOKEN_SCALE:
            step = tl.maximum(tl.max(tl.abs(x), 1), 1e-12) / LARGEST  # [H]
            x = x / step[:, None]
            tl.store(p_scale + o_h * stride_sh, step, mask=tl.max(m.to(tl.int32), 1) > 0)
        elif SCALE == HEAD_SCALE:
            x = x / tl.load(p_scale + o_h * stride_sh, mask=tl.max(m.to(tl.int32), 1) > 0, other=1.0)[:, None]
        if p_cache.dtype.element_ty == tl.int8:
            x = tl.floor(x + 0.5)
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    x = x.to(p_cache.dtype.element_ty, fp_downcast_rounding=ROUNDING)
    tl.store(p_cache + o_h[:, None] * stride_h + o_d[None, :], x, mask=m)


@triton.jit(do_not_specialize=["tokens", "capacity", "angles", "stride_tb", "stride_cb"])
def append_kv_kernel(
    p_q, p_k, p_v, p_out,  # [B, T, Hq, D], [B, T, Hkv, D] twice, [B, T, Hq, D]
    p_k_cache, p_v_cache,  # [B, S, Hkv, D] or [blocks, PAGE, Hkv, D]
    p_lengths, p_table, p_cos, p_sin, p_k_scale, p_v_scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_kcb, stride_kcs, stride_kch, stride_vcb, stride_vcs, stride_vch, stride_tb, stride_cb, stride_ct,
    stride_ksb, stride_kss, stride_ksh, stride_vsb, stride_vss, stride_vsh,
    tokens, capacity, heads, kv_heads, angles,
    D: tl.constexpr, PAGE: tl.constexpr, INTERLEAVED: tl.constexpr, LARGEST: tl.constexpr, K_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr, ROUNDING: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B · T, blocks of q heads, then of kv heads)."""
    if PDL:  # nothing is touched before every earlier launch is done: the last one may still read the cache
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_b, i_t = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    i_part, q_parts = tl.program_id(1), tl.cdiv(heads, HEADS)
    o_d = tl.arange(0, BLOCK_D)
    if p_cos is not None:
        p_cos += i_b * stride_cb + i_t * stride_ct
        p_sin += i_b * stride_cb + i_t * stride_ct
    if i_part < q_parts:
        o_h = (i_part * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        m = (o_h < heads)[:, None] & (o_d < D)[None, :]
        p_old = p_q + i_b * stride_qb + i_t * stride_qt + o_h[:, None] * stride_qh
        b_q = _turned(p_old, o_d, m, p_cos, p_sin, angles, INTERLEAVED)
        tl.store(p_out + ((i_b * tokens + i_t) * heads + o_h[:, None]) * D + o_d[None, :], b_q, mask=m)
    else:
        o_h = ((i_part - q_parts) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        at = tl.load(p_lengths + i_b) - tokens + i_t
        fits = (at >= 0) & (at < capacity)
        m = (o_h < kv_heads)[:, None] & (o_d < D)[None, :] & fits
        i_page = i_b
        if PAGE:
            i_page = tl.load(p_table + i_b * stride_tb + at // PAGE, mask=fits, other=0).to(tl.int64)
            at = at % PAGE
        p_old = p_k + i_b * stride_kb + i_t * stride_kt + o_h[:, None] * stride_kh
        b_k = _turned(p_old, o_d, m, p_cos, p_sin, angles, INTERLEAVED)
        p_old = p_v + i_b * stride_vb + i_t * stride_vt + o_h[:, None] * stride_vh
        b_v = tl.load(p_old + o_d[None, :], mask=m, other=0)
        if K_SCALE:
            p_k_scale += i_page * stride_ksb + at * stride_kss
        if V_SCALE:
            p_v_scale += i_page * stride_vsb + at * stride_vss
        p_k_row = p_k_cache + i_page * stride_kcb + at * stride_kcs
        _write(b_k, p_k_row, stride_kch, p_k_scale, stride_ksh, o_h, o_d, m, LARGEST, K_SCALE, ROUNDING)
        p_v_row = p_v_cache + i_page * stride_vcb + at * stride_vcs
        _write(b_v, p_v_row, stride_vch, p_v_scale, stride_vsh, o_h, o_d, m, LARGEST, V_SCALE, ROUNDING)


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
    """functional.append_kv unchecked."""
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    (batch, tokens, heads, head_dim), kv_heads = q.shape, k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not q.numel():
        return out
    page, capacity = 0, k_cache.shape[1]
    if block_table is not None:
        page, capacity = capacity, capacity * block_table.shape[1]
    cos, sin, cos_strides = None, None, (0, 0)
    if rope is not None:
        cos, sin = (x.contiguous() for x in rope)
        cos_strides = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
    largest = None
    if k_cache.dtype != k.dtype:
        largest = 127.0 if k_cache.dtype == torch.int8 else torch.finfo(k_cache.dtype).max
    # the interpreter's rounding to fp8 loses carries
    rounding = "rtz" if configs.interpreted() and largest not in (None, 127.0) else None
    args = (
        q, k, v, out, k_cache, v_cache, lengths, block_table, cos, sin, k_scale, v_scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        0 if block_table is None else block_table.stride(0), *cos_strides,
        *scale_strides(k_scale), *scale_strides(v_scale),
        tokens, capacity, heads, kv_heads, 0 if cos is None else cos.shape[2],
    )  # fmt: skip
    pdl = configs.architecture(q.device) == 90
    constexprs = dict(
        D=head_dim, PAGE=page, INTERLEAVED=interleaved, LARGEST=largest, K_SCALE=scale_kind(k_scale),
        V_SCALE=scale_kind(v_scale), ROUNDING=rounding, HEADS=HEADS, BLOCK_D=1 << (head_dim - 1).bit_length(),
        PDL=pdl,
    )  # fmt: skip
    grid = (batch * tokens, -(-heads // HEADS) - (-kv_heads // HEADS))
    launch(append_kv_kernel, grid, q.device, args, constexprs, num_warps=1, launch_pdl=pdl)
    return out
