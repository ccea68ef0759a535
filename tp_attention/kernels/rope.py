"""q/k norm and RoPE on the q and k heads of a packed QKV product, in place: one pass over them instead of six.

The projection for few rows does this in its own last kernel (skinny_gemm.py); past that a tile of the product need not
hold whole heads, and a pass over q and k costs a few percent of the product.

Every element is loaded once, before the result that takes its place can be known, so nothing is read after it was
overwritten: heads come in parts, the pairs' first and second elements and the rest that RoPE leaves alone.
Limit: D <= 256.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from tp_attention.kernels import configs
from tp_attention.kernels.launch import launch


@dataclass(frozen=True)
class Config:
    """elements: of a program, whole heads of one row."""

    elements: int
    warps: int


# (architecture,)
CONFIGS = {(architecture,): Config(2048, 4) for architecture in (0, 80, 90)}


@triton.jit
def _normed(
    b_x, b_mean, b_rstd, p_q_weight, p_k_weight, o_d, m_d, is_q,
    QK_NORM: tl.constexpr, HAS_Q_WEIGHT: tl.constexpr, HAS_K_WEIGHT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rounded as torch does: RMSNorm before and after the weight, LayerNorm once."""
    b_y = (b_x - b_mean) * b_rstd
    if QK_NORM == 1:
        b_y = b_y.to(DTYPE).to(tl.float32)
    if HAS_Q_WEIGHT:
        b_weight = tl.load(p_q_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_y = tl.where(is_q, b_y * b_weight, b_y)
    if HAS_K_WEIGHT:
        b_weight = tl.load(p_k_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_y = tl.where(is_q, b_y, b_y * b_weight)
    return b_y.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["angle_rows"], do_not_specialize_on_alignment=["angle_rows"])
def qk_norm_rope_kernel(
    p_qkv,  # [M, (heads + kv heads)·D], of which heads are q's and k's
    p_q_weight,  # [D]
    p_k_weight,  # [D]
    p_cos,  # [angle_rows, PAIRS] fp32
    p_sin,
    q_heads, heads, angle_rows, stride, eps,
    QK_NORM: tl.constexpr,  # 0 none, 1 RMSNorm, 2 LayerNorm
    HAS_Q_WEIGHT: tl.constexpr, HAS_K_WEIGHT: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = p_qkv.dtype.element_ty
    REST: tl.constexpr = D - 2 * PAIRS if QK_NORM else 0  # without a norm the rest stays as it is
    i_m = tl.program_id(0).to(tl.int64)
    o_h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    p_heads, m_h, is_q = p_qkv + i_m * stride + o_h * D, o_h < heads, o_h < q_heads
    total = tl.zeros((HEADS,), tl.float32)
    if PAIRS:
        o_p = tl.arange(0, BLOCK_P)[None, :]
        m_p = o_p < PAIRS
        o_first = 2 * o_p if INTERLEAVED else o_p
        o_second = o_first + (1 if INTERLEAVED else PAIRS)
        if INTERLEAVED:  # side by side in memory: loaded together, then taken apart
            o_both = tl.arange(0, 2 * BLOCK_P)[None, :]
            m_both = m_h & (o_both < 2 * PAIRS)
            b_both = tl.load(p_heads + o_both, mask=m_both, other=0.0).to(tl.float32)
            b_first, b_second = b_both.reshape(HEADS, BLOCK_P, 2).split()
        else:
            b_first = tl.load(p_heads + o_first, mask=m_h & m_p, other=0.0).to(tl.float32)  # [HEADS, BLOCK_P]
            b_second = tl.load(p_heads + o_second, mask=m_h & m_p, other=0.0).to(tl.float32)
        total += tl.sum(b_first + b_second, 1)
    if REST:
        o_r = 2 * PAIRS + tl.arange(0, BLOCK_R)[None, :]
        m_r = o_r < D
        b_rest = tl.load(p_heads + o_r, mask=m_h & m_r, other=0.0).to(tl.float32)  # [HEADS, BLOCK_R]
        total += tl.sum(b_rest, 1)

    if QK_NORM:
        b_mean = total[:, None] / D if QK_NORM == 2 else tl.zeros((HEADS, 1), tl.float32)
        squares = tl.zeros((HEADS,), tl.float32)
        if PAIRS:
            b_a, b_b = tl.where(m_p, b_first - b_mean, 0.0), tl.where(m_p, b_second - b_mean, 0.0)
            squares += tl.sum(b_a * b_a + b_b * b_b, 1)
        if REST:
            b_c = tl.where(m_r, b_rest - b_mean, 0.0)
            squares += tl.sum(b_c * b_c, 1)
        b_rstd = tl.rsqrt(squares[:, None] / D + eps)
        if PAIRS:
            b_first = _normed(
                b_first, b_mean, b_rstd, p_q_weight, p_k_weight, o_first, m_p, is_q,
                QK_NORM, HAS_Q_WEIGHT, HAS_K_WEIGHT, DTYPE,
            )  # fmt: skip
            b_second = _normed(
                b_second, b_mean, b_rstd, p_q_weight, p_k_weight, o_second, m_p, is_q,
                QK_NORM, HAS_Q_WEIGHT, HAS_K_WEIGHT, DTYPE,
            )  # fmt: skip
        if REST:
            b_rest = _normed(
                b_rest, b_mean, b_rstd, p_q_weight, p_k_weight, o_r, m_r, is_q,
                QK_NORM, HAS_Q_WEIGHT, HAS_K_WEIGHT, DTYPE,
            )  # fmt: skip
            tl.store(p_heads + o_r, b_rest.to(DTYPE), mask=m_h & m_r)

    if PAIRS:
        o_angle = i_m % angle_rows * PAIRS + o_p
        b_cos = tl.load(p_cos + o_angle, mask=m_p, other=0.0)  # [1, BLOCK_P]
        b_sin = tl.load(p_sin + o_angle, mask=m_p, other=0.0)
        b_turned = (b_first * b_cos - b_second * b_sin).to(DTYPE)
        b_crossed = (b_second * b_cos + b_first * b_sin).to(DTYPE)
        if INTERLEAVED:
            tl.store(p_heads + o_both, tl.join(b_turned, b_crossed).reshape(HEADS, 2 * BLOCK_P), mask=m_both)
        else:
            tl.store(p_heads + o_first, b_turned, mask=m_h & m_p)
            tl.store(p_heads + o_second, b_crossed, mask=m_h & m_p)


def qk_norm_rope_(
    qkv: Tensor,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    qk_norm: str | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    config: Config | None = None,
) -> None:
    """Norm each q and k head of qkv [M, (q_heads + 2·kv_heads)·head_dim], rows of unit stride, then turn its pairs.

    qk_norm: "rmsnorm" or "layernorm" with q_norm_weight, k_norm_weight [head_dim] or None; None: no norm.
    cos, sin: fp32 [..., n], at most head_dim / 2 angles for each of M rows, or of T where row m = b·T + t takes t's.
    interleaved: the pairs are (2p, 2p + 1) instead of (p, p + n).
    """
    pairs = 0
    if cos is not None and sin is not None:
        pairs = cos.shape[-1]
        cos, sin = cos.reshape(-1, pairs).contiguous(), sin.reshape(-1, pairs).contiguous()
    if not pairs and qk_norm is None:
        return
    q_norm_weight, k_norm_weight = (None if w is None else w.contiguous() for w in (q_norm_weight, k_norm_weight))
    block_p, block_r = triton.next_power_of_2(max(1, pairs)), triton.next_power_of_2(max(1, head_dim - 2 * pairs))
    config = configs.choose("rope", CONFIGS, (configs.architecture(qkv.device),), config)
    heads = q_heads + kv_heads
    per_program = min(triton.next_power_of_2(heads), max(1, config.elements // triton.next_power_of_2(head_dim)))
    args = (
        qkv, q_norm_weight, k_norm_weight, cos, sin,
        q_heads, heads, cos.shape[0] if cos is not None else 1, qkv.stride(0), eps,
    )  # fmt: skip
    constexprs = dict(
        QK_NORM=0 if qk_norm is None else 1 if qk_norm == "rmsnorm" else 2,
        HAS_Q_WEIGHT=q_norm_weight is not None, HAS_K_WEIGHT=k_norm_weight is not None,
        D=head_dim, PAIRS=pairs, INTERLEAVED=interleaved, HEADS=per_program, BLOCK_P=block_p, BLOCK_R=block_r,
    )  # fmt: skip
    grid = (qkv.shape[0], -(-heads // per_program))
    launch(qk_norm_rope_kernel, grid, qkv.device, args, constexprs, num_warps=config.warps)
