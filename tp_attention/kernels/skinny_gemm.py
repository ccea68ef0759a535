"""y = norm(x) @ weightᵀ for at most 64 rows, with what follows a QKV projection: bias, q/k norm and RoPE.

Decoding reads every weight for a few rows of x, so the floor is the time to stream the weights once. The product is
made transposed, [BLOCK_N, BLOCK_K] of the weight times xᵀ: the rows of the weight fill the tensor cores' tall side and
x is padded to 16, 32 or 64 rows only. K is split so that every SM has weights in flight; a second kernel adds the
partial sums, always in the same order, and does all the rest while they are still in fp32. RMSNorm costs one multiply
in the loop (x by its weight) and a factor per row at the end. int8 weights are widened in registers, their scales
applied to the partial sums of a group, where they are exact.

Wins over a norm and cuBLAS for M <= 64, where those are bound by launches and by too few blocks. Limit: past that x is
read too often; gemm.py takes over. RMSNorm of fp16 is left to norm.py: x · weight may pass 65504 before it is scaled.
Weights whose rows do not start at multiples of 16 bytes, and int8 groups not of 16s, are right but slow. fp32 is exact
and runs without tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tp_attention.kernels import configs
from tp_attention.kernels.launch import launch

MAX_ROWS = 64


@dataclass(frozen=True)
class Config:
    """blocks: how many of them an SM holds at once, which is what K is split for. tma: weights by tile loads.

    prefetch: bytes of each of its rows of the weight that a program asks for while the kernel before it is ending.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    blocks: int
    tma: bool = False
    prefetch: int = 0


# (architecture, rows of x padded, what the weights are)
CONFIGS = {
    (90, 16, "half"): Config(128, 64, 4, 6, 1, tma=True),
    (90, 32, "half"): Config(128, 64, 4, 6, 1, tma=True, prefetch=256),
    (90, 64, "half"): Config(128, 64, 4, 6, 1, tma=True, prefetch=256),
    (90, 16, "int8"): Config(128, 128, 8, 3, 3, tma=True),
    (90, 32, "int8"): Config(128, 128, 8, 3, 2, tma=True, prefetch=256),
    (90, 64, "int8"): Config(128, 128, 8, 3, 2, tma=True, prefetch=256),
    (90, 16, "float32"): Config(64, 32, 8, 4, 2),
    (90, 32, "float32"): Config(64, 16, 4, 6, 2),
    (90, 64, "float32"): Config(64, 16, 8, 6, 2),
    (80, 16, "half"): Config(64, 64, 4, 5, 3),
    (80, 32, "half"): Config(64, 64, 4, 4, 2),
    (80, 64, "half"): Config(64, 64, 4, 4, 2),
    (80, 16, "int8"): Config(128, 128, 8, 4, 1),
    (80, 32, "int8"): Config(128, 128, 8, 3, 1),
    (80, 64, "int8"): Config(128, 64, 8, 4, 1),
    (80, 16, "float32"): Config(64, 32, 8, 4, 2),
    (80, 32, "float32"): Config(64, 16, 4, 6, 2),
    (80, 64, "float32"): Config(64, 16, 8, 6, 2),
    (0, 16, "half"): Config(64, 64, 4, 4, 1),
    (0, 32, "half"): Config(64, 64, 4, 4, 1),
    (0, 64, "half"): Config(64, 64, 4, 3, 1),
    (0, 16, "int8"): Config(64, 64, 4, 4, 1),
    (0, 32, "int8"): Config(64, 64, 4, 4, 1),
    (0, 64, "int8"): Config(64, 64, 4, 3, 1),
    (0, 16, "float32"): Config(64, 16, 4, 4, 1),
    (0, 32, "float32"): Config(64, 16, 4, 4, 1),
    (0, 64, "float32"): Config(64, 16, 8, 4, 1),
}
MIN_STEPS = 4  # of the loop over K in a block: fewer do not fill its pipeline
MAX_SPLITS = 32
NORMS = {None: 0, "rmsnorm": 1, "layernorm": 2}  # a kernel's constexpr QK_NORM or NORM
MERGE_COLUMNS = 512  # a program of the second kernel makes about so many columns of one row


@dataclass(frozen=True)
class Heads:
    """The q, k and v heads that the rows of a QKV weight are, and what is done to those of q and k.

    qk_norm: None, "rmsnorm" or "layernorm", with weights [head_dim] or None. cos, sin: None, or contiguous fp32
    [rows, n]; row m of x takes row m % rows and turns the first 2n elements of each head.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    qk_norm: str | None = None
    q_norm_weight: Tensor | None = None
    k_norm_weight: Tensor | None = None
    eps: float = 1e-5
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False


# A register with the bytes a0, a1, b0, b1 of two pairs -> (a0, b0) and (a1, b1). A byte under the right exponent is a
# number whose last bit is 1: in fp16, 1024 + (byte + 128), so subtract 1152; bf16 has room for 7 bits, 128 + them, and
# the sign is subtracted as 128 or 256.
_TO_FP16 = tl.constexpr("""{.reg .b32 odd, zero; shr.u32 odd, $2, 8; mov.b32 zero, 0x64806480;
    lop3.b32 $0, $2, 0x00ff00ff, zero, 0x6a; sub.f16x2 $0, $0, zero;
    lop3.b32 $1, odd, 0x00ff00ff, zero, 0x6a; sub.f16x2 $1, $1, zero;}""")
_TO_BF16 = tl.constexpr("""{.reg .b32 odd, sign, one; shr.u32 odd, $2, 8; mov.b32 one, 0x3f803f80;
    lop3.b32 sign, $2, 0x00800080, 0xc300c300, 0xea;
    lop3.b32 $0, $2, 0x007f007f, 0x43004300, 0xea; fma.rn.bf16x2 $0, $0, one, sign;
    lop3.b32 sign, odd, 0x00800080, 0xc300c300, 0xea;
    lop3.b32 $1, odd, 0x007f007f, 0x43004300, 0xea; fma.rn.bf16x2 $1, $1, one, sign;}""")


@triton.jit
def _widened(b_w, UPCAST: tl.constexpr, BF16: tl.constexpr):
    """[N, K / 2] int16, two int8 each -> the low ones and the high ones, two [N, K / 2] of x's type."""
    if UPCAST:
        return (b_w << 8 >> 8).to(tl.float32), (b_w >> 8).to(tl.float32)
    elif BF16:
        return tl.inline_asm_elementwise(_TO_BF16, "=&r,=&r,r", [b_w], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(_TO_FP16, "=&r,=&r,r", [b_w], (tl.float16, tl.float16), is_pure=True, pack=2)


_PREFETCH_L2 = tl.constexpr("cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;")


@triton.jit
def _prefetch(p_rows, nbytes):
    """Bring the first nbytes, a multiple of 16, of the rows [N] into the L2."""
    tl.inline_asm_elementwise(_PREFETCH_L2, "=r,l,r", [p_rows, nbytes], tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["M"])
def skinny_gemm_kernel(
    w,  # [N, K]: a descriptor where TMA ([K, N] where TRANSPOSED), else a pointer
    p_w,  # the pointer in either case
    p_x,  # [M, K]
    p_norm_weight,  # [K]
    p_scale,  # [N, K / GROUP] fp32
    p_bias,  # [N]
    p_out,  # [M, N], or fp32 [splits, M, N]
    M,
    N,
    K,
    steps,
    stride_wn,
    stride_wk,
    stride_x,
    GROUP: tl.constexpr,  # columns per scale; 0: w is of x's type
    PACKED: tl.constexpr,  # w is int16 [N, K / 2], two int8 each
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    o_m, o_n, o_k = tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    WORD: tl.constexpr = 2 if PACKED else 1  # weights in an element of w
    o_wk = tl.arange(0, BLOCK_K // WORD)
    m_m, m_n = o_m < M, o_n < N
    p_x += o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :]
    if not TMA:
        w += o_n.to(tl.int64)[:, None] * stride_wn + o_wk[None, :] * stride_wk

    # A step never crosses the end of a group: past it x is masked, and then it does not matter what w holds.
    SPAN: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K if GROUP else 1  # steps per group
    total = K // GROUP * SPAN if GROUP else tl.cdiv(K, BLOCK_K)
    first = i_s * steps
    if PDL:
        # Weights are no kernel's output, and the L2 has the newest bytes anyway: their way in need not wait.
        if PREFETCH and TMA and not TRANSPOSED:
            start = (first // SPAN * GROUP + first % SPAN * BLOCK_K if GROUP else first * BLOCK_K) // WORD
            nbytes = min(steps * (BLOCK_K // WORD), K // WORD - start) * (p_w.dtype.element_ty.primitive_bitwidth // 8)
            if nbytes > 0:
                _prefetch(p_w + tl.minimum(o_n, N - 1).to(tl.int64) * stride_wn + start, min(nbytes, PREFETCH))
        tl.extra.cuda.gdc_wait()
        # not sooner: the second kernel reads x before it waits for this one
        tl.extra.cuda.gdc_launch_dependents()
    if GROUP:
        p_scale += o_n.to(tl.int64) * (K // GROUP)
        b_next = tl.load(p_scale + first // SPAN, mask=m_n, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i_k in tl.range(first, min(first + steps, total)):
        if GROUP:
            start, end = i_k // SPAN * GROUP + i_k % SPAN * BLOCK_K, (i_k // SPAN + 1) * GROUP
            b_scale = b_next  # loaded a step ahead: the pipeliner leaves what feeds no dot alone
            b_next = tl.load(p_scale + min(i_k + 1, total - 1) // SPAN, mask=m_n, other=0.0)
        else:
            start, end = i_k * BLOCK_K, K
        m_k = start + o_k < end
        m_x = m_m[:, None] if EVEN_K else m_m[:, None] & m_k[None, :]
        b_x = tl.load(p_x + start, mask=m_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        start_w, end_w = start // WORD, end // WORD
        if TMA:
            b_w = w.load([start_w, i_n * BLOCK_N]).T if TRANSPOSED else w.load([i_n * BLOCK_N, start_w])
        else:
            m_w = m_n[:, None] if EVEN_K else m_n[:, None] & (start_w + o_wk < end_w)[None, :]
            b_w = tl.load(w + tl.cast(start_w, tl.int64) * stride_wk, mask=m_w, other=0.0)  # [BLOCK_N, BLOCK_K]
        if UPCAST:
            b_x = b_x.to(tl.float32)
        if HAS_NORM_WEIGHT:
            p_norm = p_norm_weight + start + o_k
            b_norm = tl.load(p_norm) if EVEN_K else tl.load(p_norm, mask=m_k, other=0.0)
            b_x = b_x * b_norm.to(b_x.dtype)[None, :]
        if PACKED:
            b_low, b_high = _widened(b_w, UPCAST, p_x.dtype.element_ty == tl.bfloat16)
            b_even, b_odd = b_x.reshape(BLOCK_M, BLOCK_K // 2, 2).split()
            part = tl.dot(b_low, b_even.T, input_precision="ieee")
            part = tl.dot(b_high, b_odd.T, part, input_precision="ieee")
            acc += part * b_scale[:, None]
        elif GROUP:
            acc += tl.dot(b_w.to(b_x.dtype), b_x.T, input_precision="ieee") * b_scale[:, None]
        else:
            acc = tl.dot(b_w.to(b_x.dtype), b_x.T, acc, input_precision="ieee")

    if HAS_BIAS:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    o_out = (i_s.to(tl.int64) * M + o_m[:, None]) * N + o_n[None, :]
    tl.store(p_out + o_out, acc.T.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _row_sums(p_parts, size, o_n, m_n, rstd, b_bias, SPLITS: tl.constexpr):
    """[HEADS, BLOCK_D] fp32: the splits added up, normed, biased; 0 where masked."""
    b_sum = tl.load(p_parts + o_n, mask=m_n, other=0.0)
    for i in tl.static_range(1, SPLITS):
        b_sum += tl.load(p_parts + i * size + o_n, mask=m_n, other=0.0)
    return b_sum * rstd + b_bias


@triton.jit
def _bias(p_bias, o_n, m_n, HAS_BIAS: tl.constexpr):
    return tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32) if HAS_BIAS else 0.0


@triton.jit
def _head_weight(p_q_weight, p_k_weight, o_d, m_q, m_k, HAS_Q: tl.constexpr, HAS_K: tl.constexpr):
    """[HEADS, BLOCK_D] fp32: the norm weight of q heads, of k heads, and 1 for the rest."""
    b_q = tl.load(p_q_weight + o_d, mask=m_q, other=1.0).to(tl.float32) if HAS_Q else 1.0
    b_k = tl.load(p_k_weight + o_d, mask=m_k, other=1.0).to(tl.float32) if HAS_K else 1.0
    return b_q * b_k


@triton.jit(do_not_specialize=["angle_rows"], do_not_specialize_on_alignment=["angle_rows"])
def merge_kernel(
    p_parts,  # [SPLITS, M, N] fp32
    p_x,  # [M, K]
    p_bias,  # [N]
    p_q_weight,  # [D]
    p_k_weight,  # [D]
    p_cos,  # [angle_rows, PAIRS] fp32
    p_sin,
    p_out,  # [M, N]
    N,
    K,
    stride_x,
    eps,
    qk_eps,
    q_heads,
    kv_heads,
    angle_rows,
    SPLITS: tl.constexpr,
    RMS: tl.constexpr,
    QK_NORM: tl.constexpr,  # 0 none, 1 RMSNorm, 2 LayerNorm
    PAIRS: tl.constexpr,  # turned per head; 0: no RoPE
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    PDL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_m, M = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_h, o_d = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None], tl.arange(0, BLOCK_D)[None, :]
    o_n = o_h * D + o_d  # [HEADS, BLOCK_D]
    m_n = (o_d < D) & (o_n < N)
    m_q, m_qk = m_n & (o_h < q_heads), m_n & (o_h < q_heads + kv_heads)

    # All that the first kernel does not write is read before the wait for it.
    b_bias = _bias(p_bias, o_n, m_n, HAS_BIAS)
    rstd = 1.0
    if RMS:
        o_k = tl.arange(0, BLOCK_K)
        b_squares = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, K, BLOCK_K):
            b_x = tl.load(p_x + i_m * stride_x + start + o_k, mask=start + o_k < K, other=0.0).to(tl.float32)
            b_squares += b_x * b_x
        rstd = tl.rsqrt(tl.sum(b_squares) / K + eps)
    if QK_NORM:
        b_weight = _head_weight(p_q_weight, p_k_weight, o_d, m_q, m_qk & ~m_q, HAS_Q_WEIGHT, HAS_K_WEIGHT)
    if PAIRS:
        m_turned = m_qk & (o_d < 2 * PAIRS)
        o_pair = o_d // 2 if INTERLEAVED else o_d % PAIRS
        is_first = o_d % 2 == 0 if INTERLEAVED else o_d < PAIRS
        o_other = tl.where(is_first, 1, -1) * (1 if INTERLEAVED else PAIRS)  # from an element to its pair's other
        o_angle = i_m % angle_rows * PAIRS + o_pair
        b_cos = tl.load(p_cos + o_angle, mask=m_turned, other=0.0)
        b_sin = tl.load(p_sin + o_angle, mask=m_turned, other=0.0)
        b_sin = tl.where(is_first, -b_sin, b_sin)
        b_other_bias = _bias(p_bias, o_n + o_other, m_turned, HAS_BIAS)
        if QK_NORM:
            b_other_weight = _head_weight(
                p_q_weight, p_k_weight, o_d + o_other, m_turned & m_q, m_turned & ~m_q, HAS_Q_WEIGHT, HAS_K_WEIGHT
            )
    if PDL:
        tl.extra.cuda.gdc_wait()

    size, p_parts = M.to(tl.int64) * N, p_parts + i_m * N
    b_y = _row_sums(p_parts, size, o_n, m_n, rstd, b_bias, SPLITS)
    if PAIRS:
        b_other = _row_sums(p_parts, size, o_n + o_other, m_turned, rstd, b_other_bias, SPLITS)
    if QK_NORM:
        b_mean = tl.sum(b_y, 1)[:, None] / D if QK_NORM == 2 else 0.0
        b_centred = tl.where(m_n, b_y - b_mean, 0.0)
        b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 1)[:, None] / D + qk_eps)
        b_y = tl.where(m_qk, b_centred * b_rstd * b_weight, b_y)
        if PAIRS:
            b_other = (b_other - b_mean) * b_rstd * b_other_weight
    if PAIRS:
        b_y = tl.where(m_turned, b_y * b_cos + b_other * b_sin, b_y)
    tl.store(p_out + i_m * N + o_n, b_y.to(p_out.dtype.element_ty), mask=m_n)


def splits_of(tiles: int, steps: int, slots: int) -> tuple[int, int]:
    """Into how many parts K is split, and the steps of each: as many as run at once, none of them empty."""
    splits = max(1, min(slots // tiles, steps // MIN_STEPS, MAX_SPLITS))
    each = -(-steps // splits)
    return -(-steps // each), each


def skinny_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    rms_eps: float | None = None,
    weight_scale: Tensor | None = None,
    transposed: bool = False,
    heads: Heads | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """x [M, K], M <= 64, weight [N, K] ([K, N] where transposed), bias [N] -> [M, N] in x's dtype.

    rms_eps: RMSNorm x first, with norm_weight [K] or none. weight_scale: fp32 [N, K / group] of an int8 weight, which
    is not transposed. heads: q/k norm and RoPE of the result. out: contiguous [M, N], written and returned.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    plan = _Product(x, weight, weight_scale, transposed, config)
    out = torch.empty((x.shape[0], plan.columns), dtype=x.dtype, device=x.device) if out is None else out
    if plan.splits == 1 and rms_eps is None and heads is None:
        plan.launch(out, norm_weight, bias)
        return out
    parts = torch.empty((plan.splits, *out.shape), dtype=torch.float32, device=x.device)
    plan.launch(parts, norm_weight, None)
    _merge(parts, x, bias, rms_eps, heads or Heads(0, 0, MERGE_COLUMNS), out, plan.pdl)
    return out


def partial_sums(
    x: Tensor, weight: Tensor, *, weight_scale: Tensor | None = None, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """The product as it is before its parts are added up, and where the sum would go: fp32 [splits, M, N], [M, N].

    Both are the same tensor where K is not split. Arguments as those of skinny_gemm.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    plan = _Product(x, weight, weight_scale, transposed, None)
    out = parts = torch.empty((x.shape[0], plan.columns), dtype=x.dtype, device=x.device)
    if plan.splits > 1:
        parts = torch.empty((plan.splits, *out.shape), dtype=torch.float32, device=x.device)
    plan.launch(parts, None, None)
    return parts, out


class _Product:
    """How one product is cut into programs, and its launch."""

    def __init__(
        self, x: Tensor, weight: Tensor, weight_scale: Tensor | None, transposed: bool, config: Config | None
    ) -> None:
        if weight.stride(1) != 1 == weight.stride(0) and weight_scale is None:  # the other layout, seen through a view
            weight, transposed = weight.T, not transposed
        (rows, depth), self.columns = x.shape, weight.shape[1 if transposed else 0]
        self.group = 0
        if weight_scale is not None:
            weight_scale = weight_scale.contiguous()
            self.group = depth // weight_scale.shape[1]
        group = self.group
        aligned = _rows_aligned(weight) and group % 16 == 0
        architecture = configs.architecture(x.device)
        self.block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
        kind = "int8" if group else "float32" if x.dtype == torch.float32 else "half"
        # what cannot be loaded by 16 bytes takes so many registers that only the smallest blocks do not spill
        self.config = configs.choose(
            "skinny_gemm", CONFIGS, (architecture if aligned else 0, self.block_m, kind), config
        )

        self.block_k, self.packed = self.config.block_k, False
        if group:
            self.block_k = max(64, min(self.block_k, triton.next_power_of_2(group)))
            self.packed = group % 2 == 0 and weight.stride(1) == 1 and (weight.stride(0) | weight.data_ptr()) % 2 == 0
            weight = weight.view(torch.int16) if self.packed else weight
        steps = depth // group * -(-group // self.block_k) if group else -(-depth // self.block_k)
        self.tiles = -(-self.columns // self.config.block_n)
        slots = self.config.blocks * configs.multiprocessors(x.device)
        self.splits, self.steps = splits_of(self.tiles, steps, slots)
        self.pdl, self.tma = architecture == 90, self.config.tma and aligned
        self.x, self.weight, self.weight_scale, self.transposed = x, weight, weight_scale, transposed

    def launch(self, out: Tensor, norm_weight: Tensor | None, bias: Tensor | None) -> None:
        """out: [M, N], or fp32 [splits, M, N]."""
        x, config, w = self.x, self.config, self.weight
        rows, depth = x.shape
        block_n, block_k, transposed, packed = config.block_n, self.block_k, self.transposed, self.packed
        stride_n, stride_k = w.stride()[::-1] if transposed else w.stride()
        source: Tensor | TensorDescriptor = w
        if self.tma:
            block = [block_k, block_n] if transposed else [block_n, block_k // 2 if packed else block_k]
            source = TensorDescriptor(w, list(w.shape), list(w.stride()), block)
        args = (
            source, w, x, norm_weight, self.weight_scale, bias, out,
            rows, self.columns, depth, self.steps, stride_n, stride_k, x.stride(0),
        )  # fmt: skip
        constexprs = dict(
            GROUP=self.group, PACKED=packed, HAS_NORM_WEIGHT=norm_weight is not None, HAS_BIAS=bias is not None,
            EVEN_K=(self.group or depth) % block_k == 0, TRANSPOSED=transposed, TMA=self.tma, PREFETCH=config.prefetch,
            PDL=self.pdl, UPCAST=configs.interpreted(), BLOCK_M=self.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        )  # fmt: skip
        options = dict(num_warps=config.warps, num_stages=config.stages, **({"launch_pdl": True} if self.pdl else {}))
        launch(skinny_gemm_kernel, (self.tiles, self.splits), x.device, args, constexprs, **options)


def _merge(
    parts: Tensor, x: Tensor, bias: Tensor | None, rms_eps: float | None, heads: Heads, out: Tensor, pdl: bool
) -> None:
    splits, rows, columns = parts.shape
    cos, sin, q_weight, k_weight = heads.cos, heads.sin, heads.q_norm_weight, heads.k_norm_weight
    block_d = triton.next_power_of_2(heads.head_dim)
    per_program = max(1, MERGE_COLUMNS // block_d)
    grid = rows, -(-columns // (heads.head_dim * per_program))
    args = (
        parts, x, bias, q_weight, k_weight, cos, sin, out, columns, x.shape[1], x.stride(0),
        0.0 if rms_eps is None else rms_eps, heads.eps, heads.q_heads, heads.kv_heads,
        1 if cos is None else cos.shape[0],
    )  # fmt: skip
    constexprs = dict(
        SPLITS=splits, RMS=rms_eps is not None, QK_NORM=NORMS[heads.qk_norm],
        PAIRS=0 if cos is None else cos.shape[1], INTERLEAVED=heads.interleaved, HAS_BIAS=bias is not None,
        HAS_Q_WEIGHT=q_weight is not None, HAS_K_WEIGHT=k_weight is not None, PDL=pdl,
        D=heads.head_dim, BLOCK_D=block_d, HEADS=per_program, BLOCK_K=1024,
    )  # fmt: skip
    options = {"launch_pdl": True} if pdl else {}
    launch(merge_kernel, grid, x.device, args, constexprs, num_warps=4, **options)


def _rows_aligned(weight: Tensor) -> bool:
    """Tile loads want unit stride within a row, and rows that start at multiples of 16 bytes."""
    row, column = weight.stride()
    return column == 1 and weight.data_ptr() % 16 == 0 and row * weight.element_size() % 16 == 0
