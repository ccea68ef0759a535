"""Norms and projections: the fused norm + QKV projection, the output projection, RMSNorm and LayerNorm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tp_attention import eager
from tp_attention.config import NORMS
from tp_attention.functional.backends import choose_backend
from tp_attention.functional.checks import check_linear, check_norm


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
    backend: str = "auto",
) -> Any:  # a Tensor, or two with return_normed
    """norm(x) @ weightᵀ + bias: x [B, T, E], weight [rows, E], bias [rows] -> qkv [B, T, rows].

    norm: "rmsnorm", "layernorm", or None where x is already normed; norm_weight, norm_bias [E] and eps as in `norm`.
    return_normed: also return norm(x) [B, T, E]. Raises ValueError and RuntimeError as `attention` does.
    """
    if norm is not None:
        check_norm(x, norm_weight, norm_bias, norm)
    elif norm_weight is not None or norm_bias is not None:
        raise ValueError(f"norm_weight and norm_bias need a norm; pass norm as one of {', '.join(NORMS)}")
    check_linear(x, weight, bias)
    choose_backend(backend, x.device)
    return eager.norm_qkv(
        x,
        weight,
        bias,
        norm=norm,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
        return_normed=return_normed,
    )


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    kind: str = "rmsnorm",
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """RMSNorm or LayerNorm over the last dimension: x [..., E], weight and bias [E] or None -> [..., E] in x's dtype.

    kind: "rmsnorm", x / √(mean(x²) + eps), or "layernorm", (x − mean) / √(var + eps). Statistics are fp32. RMSNorm
    rounds to x's dtype before it multiplies by the weight, as Hugging Face's Llama does.
    """
    check_norm(x, weight, bias, kind)
    choose_backend(backend, x.device)
    return eager.norm(x, weight, bias, kind, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x @ weightᵀ + bias: x [..., in], weight [out, in], bias [out] -> [..., out]."""
    check_linear(x, weight, bias)
    choose_backend(backend, x.device)
    return eager.linear(x, weight, bias)
