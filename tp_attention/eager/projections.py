"""Norms and projections without kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tp_attention.rope import apply_rope


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, kind: str = "rmsnorm", eps: float = 1e-5
) -> Tensor:
    """functional.norm unchecked: over the last dimension of x, with fp32 statistics."""
    if kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    # rounded to x's dtype before the weight, as in Hugging Face's LlamaRMSNorm
    normed = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], None, eps).to(x.dtype)
    normed = normed if weight is None else weight * normed
    return normed if bias is None else normed + bias


_norm = norm  # norm_qkv has an argument of that name


def norm_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    return_normed: bool = False,
    transposed: bool = False,
    weight_scale: Tensor | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    qk_norm: str | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """functional.norm_qkv unchecked: x [..., E], weight [rows, E] -> qkv [..., rows] (and the normed x)."""
    normed = x if norm is None else _norm(x, norm_weight, norm_bias, norm, eps)
    qkv = linear(normed, weight, bias, transposed=transposed, weight_scale=weight_scale)
    if heads is not None and kv_heads is not None and (qk_norm is not None or rope is not None):
        qk, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split_with_sizes([heads + kv_heads, kv_heads], dim=-2)
        if qk_norm is not None:
            q, k = qk.split_with_sizes([heads, kv_heads], dim=-2)
            q, k = _norm(q, q_norm_weight, None, qk_norm, eps), _norm(k, k_norm_weight, None, qk_norm, eps)
            qk = torch.cat((q, k), dim=-2)
        if rope is not None:  # q and k turn as one tensor: half the operations
            qk = apply_rope(qk, *rope, interleaved=interleaved)
        qkv = torch.cat((qk, v), dim=-2).flatten(-2)
    return (qkv, normed) if return_normed else qkv


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    weight_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """functional.linear unchecked: x [..., in], weight [out, in], bias [out] -> [..., out]."""
    if weight_scale is not None:
        weight = dequantize(weight, weight_scale, x.dtype)
    y = F.linear(x, weight.T if transposed else weight, bias)
    return y if out is None else out.copy_(y)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight int8 [out, in], scale [out, in / group] -> weight · scale in dtype, [out, in]; `in` may be 0."""
    count = scale.shape[1]
    groups = weight.to(scale.dtype).unflatten(1, (count, weight.shape[1] // max(count, 1)))
    return (groups * scale[:, :, None]).flatten(1).to(dtype)
