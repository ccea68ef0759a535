"""What every attention kernel does to a block of scores: softcap, ALiBi, masks, in design order and base-2 units.

Base 2, because exp2 is the instruction a GPU has: scores are multiplied by log2(e) once, on their way through here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOT_KEPT = tl.constexpr(-1e30)  # masks.NOT_KEPT: an additive mask at or below it removes the key

# Kinds of mask, the kernels' constexpr MASK.
NO_MASK, BOOL_MASK, ADDITIVE_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def as_kernels_read(mask: Tensor | None) -> tuple[Tensor | None, int, tuple[int, ...]]:
    """A mask as masks.check_mask takes it -> (tensor, kind, its strides over B, Hq, T, S, 0 where it is broadcast)."""
    if mask is None:
        return None, NO_MASK.value, (0, 0, 0, 0)
    mask = mask[:, None, None] if mask.dim() == 2 else mask
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), BOOL_MASK.value, strides
    return mask, ADDITIVE_MASK.value, strides


def in_units(strides: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """A mask's strides, all but the last in units of 16 elements where possible, and the unit.

    Such a constant in a kernel lets it read 16 bytes at a time, and a mask's sizes need no kernel of their own.
    """
    unit = 16 if all(stride % 16 == 0 for stride in strides[:3]) else 1
    return (*(stride // unit for stride in strides[:3]), strides[3]), unit


@triton.jit
def softcapped(s, softcap):
    """softcap · tanh(s / softcap), by exp2: the interpreter has no tanh, and a GPU's is made of exp2 too.

    By its series near 0, where 1 − 2 / (1 + e²ˣ) would cancel: at |x| = 0.1 both are exact to 1e-7 of the result.
    """
    x = s / softcap
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    far = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E)))
    return softcap * tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit
def shape_scores(
    s,  # [M, N] fp32, products q·k
    scale,
    softcap,
    b_slope,  # this head's, natural-log units: a scalar or [M, 1]
    o_i,  # [M] key positions of the query rows
    o_j,  # [N] key positions
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """Scores in base-2 units, [M, N] fp32, before any mask."""
    s = softcapped(s * scale, softcap) * LOG2E if HAS_SOFTCAP else s * (scale * LOG2E)
    if HAS_ALIBI:
        distance = o_i[:, None] - o_j[None, :]
        s -= (b_slope * LOG2E) * tl.abs(distance).to(tl.float32)
    return s


@triton.jit
def masked_scores(
    s,  # [M, N] fp32, base-2 units
    p_mask,  # [M, N] pointers into the mask, or anything with NO_MASK
    m_mask,  # [M, N] which of them may be read
    MASK: tl.constexpr,
):
    """Adds an additive mask, and makes -inf what a mask of either kind does not keep."""
    if MASK == BOOL_MASK:
        s = tl.where(tl.load(p_mask, mask=m_mask, other=0) != 0, s, -float("inf"))
    elif MASK == ADDITIVE_MASK:
        added = tl.load(p_mask, mask=m_mask, other=-float("inf")).to(tl.float32)
        s = tl.where(added > NOT_KEPT, s + added * LOG2E, -float("inf"))
    return s


@triton.jit
def reach_mask(o_i, o_j, keys, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which keys these rows may see: [M, N] (or [1, N]) bool. o_i, o_j: positions; left, right: reach from o_i."""
    # one comparison for the end and the right: a block at the edge is short of registers
    end = tl.minimum(o_i + (right + 1), keys)[:, None] if HAS_RIGHT else keys
    keep = o_j[None, :] < end
    if HAS_LEFT:
        keep = keep & (o_j[None, :] >= o_i[:, None] - left)
    return keep
