"""How attention kernels read q, k and v: any strided view [B, S, H, D], by the copy engine or by wide loads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def load_rows(
    x, i_b, i_h, row, end, stride,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Rows row..row+BLOCK of one head, [BLOCK, BLOCK_D]; 0 past D, and from `end` on where EDGE."""
    if TMA:  # the descriptor knows where the tensor ends, and fills with 0
        b_x = x.load([i_b, i_h, row, 0]).reshape(BLOCK, BLOCK_D)
    else:
        o_r, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        p_x = x + tl.cast(row, tl.int64) * stride + (o_r[:, None] * stride + o_d[None, :])
        if EDGE:
            b_x = tl.load(p_x, mask=(row + o_r < end)[:, None] & (o_d < D)[None, :], other=0)
        elif D < BLOCK_D:
            b_x = tl.load(p_x, mask=(o_d < D)[None, :], other=0)
        else:
            b_x = tl.load(p_x)
    return b_x


def aligned(x: Tensor) -> Tensor:
    """x [B, S, H, D] with 16-byte aligned base and strides, as the copy engine and wide loads want it.

    Views of a packed qkv tensor are, and are returned as they are; a copy with D padded by 0 otherwise (odd D, mostly).
    """
    unit = 16 // x.element_size()
    strides = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    fits = x.stride(3) == 1 and x.shape[3] % unit == 0 and x.data_ptr() % 16 == 0
    # past 2^23 a block of rows would take offsets of more than 32 bits
    fits = fits and (x.shape[1] == 1 or x.stride(1) < 1 << 23)
    if fits and all(stride > 0 and stride % unit == 0 for stride in strides):
        return x
    return F.pad(x, (0, -x.shape[3] % unit)).contiguous()


def unit_last(x: Tensor) -> Tensor:
    """x with its last stride 1; a copy only where it is not so."""
    return x if x.stride(-1) == 1 else x.contiguous()


def descriptor(x: Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """x [B, S, H, D] as [B, H, S, D], to be read `rows` tokens of one head at a time."""
    batch, tokens, heads, head_dim = x.shape
    stride_b, stride_t, stride_h = strides_of(x)
    return TensorDescriptor(
        x, [batch, heads, tokens, head_dim], [stride_b, stride_h, stride_t, 1], [1, 1, rows, block_d]
    )


def strides_of(x: Tensor) -> list[int]:
    """Strides of the first three dimensions; one that is never taken may be anything, so let it be an aligned one."""
    return [stride if size > 1 else 16 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
