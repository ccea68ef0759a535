"""Rotary position embedding: frequencies (with every scaling of RopeScaling), cos/sin tables, and their application.

Angles are the fp32 product of an integer position and an fp32 frequency, as in the code the models were trained with:
computing them more exactly would move a model away from its own weights. Torch only; on a GPU the QKV kernel applies
the same tables.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tp_attention.config import RopeConfig, RopeScaling


def inverse_frequencies(rope: RopeConfig, head_dim: int, seq_len: int | None = None) -> tuple[Tensor, float]:
    """Frequencies [rotary_dim / 2], fp32 on the CPU, in radians per token, and the factor on cos and sin.

    seq_len: tokens so far; read by the scalings that depend on it ("dynamic", "longrope").
    """
    dim = rope.dim or head_dim
    exponents = torch.arange(0, dim, 2).float() / dim
    scaling = rope.scaling
    if scaling is None:
        return 1.0 / rope.theta**exponents, 1.0
    if scaling.kind == "linear":
        return 1.0 / rope.theta**exponents / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        stretch = max(seq_len or 0, scaling.original_max_positions) / scaling.original_max_positions
        theta = rope.theta * (scaling.factor * stretch - (scaling.factor - 1)) ** (dim / (dim - 2))
        return 1.0 / theta**exponents, 1.0
    if scaling.kind == "llama3":
        return _llama3(1.0 / rope.theta**exponents, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(rope.theta, exponents, dim, scaling)
    return _longrope(rope.theta, exponents, scaling, seq_len or 0)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a linear blend between."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    mixed = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slow = torch.where(turns < scaling.low_freq_factor, frequencies / scaling.factor, mixed)
    return torch.where(turns > scaling.high_freq_factor, frequencies, slow)


def _yarn(theta: float, exponents: Tensor, dim: int, scaling: RopeScaling) -> tuple[Tensor, float]:
    """YaRN, arXiv 2309.00071 section 3.2; the attention factor is its equation 22."""

    def dimension_of(turns: float) -> float:
        return dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def attention_scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / ((high - low) or 0.001)).clamp(0, 1)
    periods = theta**exponents
    frequencies = 1.0 / (scaling.factor * periods) * ramp + 1.0 / periods * (1 - ramp)
    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return frequencies, attention_scale(scaling.mscale) / attention_scale(scaling.mscale_all_dim)
    return frequencies, attention_scale(1.0)


def _longrope(theta: float, exponents: Tensor, scaling: RopeScaling, seq_len: int) -> tuple[Tensor, float]:
    """LongRoPE, arXiv 2402.13753: one factor per frequency, another set past the trained context."""
    factors = scaling.long_factor if seq_len > scaling.original_max_positions else scaling.short_factor
    if len(factors) != len(exponents):
        raise ValueError(f"longrope has {len(factors)} factors, the rotary half-dimension is {len(exponents)}")
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        ratio = math.log(scaling.factor) / math.log(scaling.original_max_positions) if scaling.factor > 1 else 0.0
        attention_factor = math.sqrt(1 + ratio)
    return 1.0 / (torch.tensor(factors) * theta**exponents), attention_factor


class RotaryEmbedding:
    """cos and sin of one RopeConfig; frequencies are kept per device where they do not depend on the length."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self.rope, self.head_dim = rope, head_dim
        self.follows_length = rope.scaling is not None and rope.scaling.kind in ("dynamic", "longrope")
        self._cache: dict[torch.device, tuple[Tensor, float]] = {}

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [B, T, rotary_dim / 2], fp32, of integer positions [B, T]."""
        frequencies, factor = self._frequencies(positions)
        angles = positions[..., None].float() * frequencies
        return angles.cos() * factor, angles.sin() * factor

    def _frequencies(self, positions: Tensor) -> tuple[Tensor, float]:
        if self.follows_length:  # reads the positions back to the host: unavoidable, these methods are defined so
            seq_len = int(positions.max()) + 1 if positions.numel() else 0
            frequencies, factor = inverse_frequencies(self.rope, self.head_dim, seq_len)
            return frequencies.to(positions.device), factor
        if positions.device not in self._cache:
            frequencies, factor = inverse_frequencies(self.rope, self.head_dim)
            self._cache[positions.device] = frequencies.to(positions.device), factor
        return self._cache[positions.device]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first 2·cos.shape[-1] elements of each head of x [B, T, H, D]; the rest passes through.

    cos, sin: [B or 1, T, rotary_dim / 2]. Computed in fp32 (fp64 for fp64 input), returned in x's dtype.
    """
    half = cos.shape[-1]
    if x.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    pair = -1 if interleaved else -2  # the dimension of (first, second)
    pairs = x[..., : 2 * half].to(cos.dtype).unflatten(-1, (half, 2) if interleaved else (2, half))
    cos, sin = cos[:, :, None].unsqueeze(pair), sin[:, :, None].unsqueeze(pair)  # one angle for all heads
    turned, crossed = pairs * cos, pairs.flip(pair) * sin
    turned.select(pair, 0).sub_(crossed.select(pair, 0))  # first · cos − second · sin
    turned.select(pair, 1).add_(crossed.select(pair, 1))  # second · cos + first · sin
    mixed = turned.flatten(-2).to(x.dtype)
    return mixed if x.shape[-1] == 2 * half else torch.cat((mixed, x[..., 2 * half :]), dim=-1)
