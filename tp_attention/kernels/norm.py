"""RMSNorm and LayerNorm of rows, for what the projections' kernels cannot fold in: LayerNorm, and more than 64 rows.

x is read once and written once: a row of up to 16384 elements stays in registers between its statistics and its
result. Wider rows are read again, from the L2. On Hopper the kernel after this one may be let in before it ends
(programmatic dependent launch; gemm.py waits for it on the device), which hides that launch.

Limit: one program per row, so a few very long rows leave most SMs idle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_attention.kernels import configs
from tp_attention.kernels.launch import launch


@dataclass(frozen=True)
class Config:
    """A program makes `rows` rows, block_k columns of them at a time; wider rows are read in several passes."""

    rows: int
    block_k: int
    warps: int


# (architecture, columns padded to a power of two): 16 to 32 elements per thread
CONFIGS = {
    (0, 256): Config(8, 256, 4),
    (0, 512): Config(4, 512, 4),
    (0, 1024): Config(2, 1024, 4),
    (0, 2048): Config(1, 2048, 4),
    (0, 4096): Config(1, 4096, 4),
    (0, 8192): Config(1, 8192, 8),
    (0, 16384): Config(1, 16384, 16),
    (0, 32768): Config(1, 4096, 8),
}
CONFIGS |= {(architecture, size): config for (_, size), config in CONFIGS.items() for architecture in (80, 90)}


@triton.jit
def _columns(p, start, K, HAS: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[1, BLOCK_K] of a vector [K], if there is one."""
    o_k = start + tl.arange(0, BLOCK_K)[None, :]
    if HAS:
        return tl.load(p + o_k) if EVEN else tl.load(p + o_k, mask=o_k < K, other=0.0)
    else:
        return 0.0


@triton.jit
def _rows(p_rows, m_m, start, K, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[ROWS, BLOCK_K] fp32."""
    o_k = start + tl.arange(0, BLOCK_K)
    m = m_m[:, None] if EVEN else m_m[:, None] & (o_k < K)[None, :]
    return tl.load(p_rows[:, None] + o_k[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _centred(b_x, mean, start, K, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    b_x -= mean[:, None]
    return b_x if EVEN else tl.where((start + tl.arange(0, BLOCK_K) < K)[None, :], b_x, 0.0)


@triton.jit
def _result(
    b_x, rstd, b_weight, b_bias,
    ONCE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """ONCE: rounded at the end alone. Otherwise wherever torch rounds an RMSNorm: after norm, weight and bias."""
    b_y = b_x * rstd[:, None]
    if HAS_WEIGHT:
        b_y = (b_y if ONCE else b_y.to(DTYPE).to(tl.float32)) * b_weight.to(tl.float32)
    if HAS_BIAS:
        b_y = (b_y if ONCE else b_y.to(DTYPE).to(tl.float32)) + b_bias.to(tl.float32)
    return b_y.to(DTYPE)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["M"])
def norm_kernel(
    p_x,  # [M, K]
    p_weight,  # [K]
    p_bias,  # [K]
    p_out,  # [M, K]
    M, K, stride_x, stride_out, eps,
    LAYERNORM: tl.constexpr, ONCE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_m = o_m < M
    p_rows, p_out_rows = p_x + o_m * stride_x, p_out + o_m * stride_out
    o_k = tl.arange(0, BLOCK_K)
    mean = tl.zeros((ROWS,), tl.float32)
    if ONE_PASS:
        b_x = _rows(p_rows, m_m, 0, K, EVEN, BLOCK_K)
        # before the statistics, whose barriers no load is moved across
        b_weight = _columns(p_weight, 0, K, HAS_WEIGHT, EVEN, BLOCK_K)
        b_bias = _columns(p_bias, 0, K, HAS_BIAS, EVEN, BLOCK_K)
        if LAYERNORM:
            b_x = _centred(b_x, tl.sum(b_x, 1) / K, 0, K, EVEN, BLOCK_K)
        rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / K + eps)
        b_y = _result(b_x, rstd, b_weight, b_bias, ONCE, HAS_WEIGHT, HAS_BIAS, DTYPE)
        m = m_m[:, None] if EVEN else m_m[:, None] & (o_k < K)[None, :]
        tl.store(p_out_rows[:, None] + o_k[None, :], b_y, mask=m)
    else:
        b_sum = tl.zeros((ROWS, BLOCK_K), tl.float32)
        if LAYERNORM:
            for start in range(0, K, BLOCK_K):
                b_sum += _rows(p_rows, m_m, start, K, EVEN, BLOCK_K)
            mean = tl.sum(b_sum, 1) / K
            b_sum = tl.zeros((ROWS, BLOCK_K), tl.float32)
        for start in range(0, K, BLOCK_K):
            b_x = _centred(_rows(p_rows, m_m, start, K, EVEN, BLOCK_K), mean, start, K, EVEN, BLOCK_K)
            b_sum += b_x * b_x
        rstd = tl.rsqrt(tl.sum(b_sum, 1) / K + eps)
        for start in range(0, K, BLOCK_K):
            b_x = _centred(_rows(p_rows, m_m, start, K, EVEN, BLOCK_K), mean, start, K, EVEN, BLOCK_K)
            b_weight = _columns(p_weight, start, K, HAS_WEIGHT, EVEN, BLOCK_K)
            b_bias = _columns(p_bias, start, K, HAS_BIAS, EVEN, BLOCK_K)
            b_y = _result(b_x, rstd, b_weight, b_bias, ONCE, HAS_WEIGHT, HAS_BIAS, DTYPE)
            m = m_m[:, None] if EVEN else m_m[:, None] & (start + o_k < K)[None, :]
            tl.store(p_out_rows[:, None] + start + o_k[None, :], b_y, mask=m)


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    *,
    round_once: bool = False,
    config: Config | None = None,
) -> Tensor:
    """functional.norm by the kernel: x [M, K], weight and bias [K] or None -> [M, K] in x's dtype.

    kind: "rmsnorm" or "layernorm". round_once: an RMSNorm too is rounded at the end alone, which is more exact, but has
    not the bits of torch's.
    """
    rows, columns = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    architecture = configs.architecture(x.device)
    size = min(max(256, 1 << (columns - 1).bit_length()), 32768)
    config = configs.choose("norm", CONFIGS, (architecture, size), config)
    args = (x, weight, bias, out, rows, columns, x.stride(0), out.stride(0), eps)
    constexprs = dict(
        LAYERNORM=kind == "layernorm", ONCE=round_once or kind == "layernorm",
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        ONE_PASS=columns <= config.block_k, EVEN=columns % config.block_k == 0, PDL=architecture == 90,
        ROWS=config.rows, BLOCK_K=config.block_k,
    )  # fmt: skip
    options = {"launch_pdl": True} if architecture == 90 else {}
    launch(norm_kernel, (-(-rows // config.rows),), x.device, args, constexprs, num_warps=config.warps, **options)
    return out
