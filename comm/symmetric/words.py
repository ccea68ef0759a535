"""What the words that ranks send each other hold: a float, or two halves.

PTX: whether this runs on a GPU, where halves are rounded, added and multiplied two at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Two values at a time: ptxas, left to pair them, swaps the halves of every word to and fro. sm_80 adds and multiplies
# bf16 as a * 1 + b and a * b - 0 alone.
_ROUND_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
_ROUND_FP16 = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
_ADD_BF16 = tl.constexpr("{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2; }")
_MULTIPLY_BF16 = tl.constexpr("{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }")
_ADD_FP16, _MULTIPLY_FP16 = tl.constexpr("add.rn.f16x2 $0, $1, $2;"), tl.constexpr("mul.rn.f16x2 $0, $1, $2;")


@triton.jit
def unpack(b_words, DTYPE: tl.constexpr):
    """[...] words -> [..., values in a word] fp32."""
    if DTYPE.primitive_bitwidth == 32:
        return tl.expand_dims(b_words.to(DTYPE, bitcast=True), -1)
    elif DTYPE.is_bf16():  # the upper half of a float
        return tl.join((b_words << 16).to(tl.float32, bitcast=True), (b_words & -65536).to(tl.float32, bitcast=True))
    else:
        b_low = b_words.to(tl.int16).to(DTYPE, bitcast=True)
        b_high = (b_words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return tl.join(b_low, b_high).to(tl.float32)


@triton.jit
def pack(b_values, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """[BLOCK, values in a word] fp32 -> [BLOCK] words, rounded to DTYPE."""
    if DTYPE.primitive_bitwidth == 32:
        return tl.reshape(b_values, (b_values.shape[0],)).to(tl.int32, bitcast=True)
    elif PTX:
        ROUND: tl.constexpr = _ROUND_BF16 if DTYPE.is_bf16() else _ROUND_FP16
        return tl.inline_asm_elementwise(ROUND, "=r,r,r", b_values.split(), tl.int32, is_pure=True, pack=1)
    else:
        b_low, b_high = tl.split(b_values.to(DTYPE))
        b_low, b_high = b_low.to(tl.int16, bitcast=True).to(tl.int32), b_high.to(tl.int16, bitcast=True).to(tl.int32)
        return b_low & 0xFFFF | b_high << 16


@triton.jit
def add(b_a, b_b, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """[BLOCK] words, value by value, rounded to DTYPE."""
    if PTX and DTYPE.primitive_bitwidth == 16:
        ADD: tl.constexpr = _ADD_BF16 if DTYPE.is_bf16() else _ADD_FP16
        return tl.inline_asm_elementwise(ADD, "=r,r,r", [b_a, b_b], tl.int32, is_pure=True, pack=1)
    else:
        return pack(unpack(b_a, DTYPE) + unpack(b_b, DTYPE), PTX, DTYPE)


@triton.jit
def multiply(b_a, b_b, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """As add."""
    if PTX and DTYPE.primitive_bitwidth == 16:
        MULTIPLY: tl.constexpr = _MULTIPLY_BF16 if DTYPE.is_bf16() else _MULTIPLY_FP16
        return tl.inline_asm_elementwise(MULTIPLY, "=r,r,r", [b_a, b_b], tl.int32, is_pure=True, pack=1)
    else:
        return pack(unpack(b_a, DTYPE) * unpack(b_b, DTYPE), PTX, DTYPE)
