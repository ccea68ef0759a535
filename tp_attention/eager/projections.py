"""Norms and projections without kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
) -> Tensor | tuple[Tensor, Tensor]:
    """functional.norm_qkv unchecked: x [B, T, E], weight [rows, E] -> qkv [B, T, rows] (and the normed x)."""
    normed = x if norm is None else _norm(x, norm_weight, norm_bias, norm, eps)
    qkv = F.linear(normed, weight, bias)
    return (qkv, normed) if return_normed else qkv


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """functional.linear unchecked: x [..., in], weight [out, in], bias [out] -> [..., out]."""
    return F.linear(x, weight, bias)
