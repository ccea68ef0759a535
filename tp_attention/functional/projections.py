"""Norms and projections: the fused norm + QKV projection, the output projection, RMSNorm and LayerNorm.

With kernels, products of at most 64 rows and those of more take different ones, which add up in different orders.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tp_attention import eager
from tp_attention.config import NORMS
from tp_attention.functional.backends import choose_backend, refuse_grad
from tp_attention.functional.checks import check_like, check_norm, check_qkv_heads, check_weight
from tp_attention.functional.library import traceable


def _fake_norm_qkv(x: Tensor, weight: Tensor, transposed: bool, return_normed: bool, **_: Any) -> list[Tensor]:
    qkv = x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))
    return [qkv, x.new_empty(x.shape)] if return_normed else [qkv]


def _fake_norm(x: Tensor, **_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape)]


def _fake_linear(x: Tensor, weight: Tensor, transposed: bool, **_: Any) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))]


def _check_norm_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    transposed: bool,
    weight_scale: Tensor | None,
    heads: int | None,
    kv_heads: int | None,
    qk_norm: str | None,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    **_: Any,
) -> tuple[int, tuple[int, int, int] | None]:
    """The rows of qkv, and heads, kv_heads and head_dim where something is done to heads."""
    if norm is not None:
        check_norm(x, norm_weight, norm_bias, norm)
    elif norm_weight is not None or norm_bias is not None:
        raise ValueError(f"norm_weight and norm_bias need a norm; pass norm as one of {', '.join(NORMS)}")
    rows = check_weight(x, weight, bias, transposed, weight_scale)
    if qk_norm is None and rope is None and q_norm_weight is None and k_norm_weight is None:
        return rows, None
    return rows, check_qkv_heads(x, rows, heads, kv_heads, qk_norm, q_norm_weight, k_norm_weight, rope)


def _check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    weight_scale: Tensor | None,
    out: Tensor | None,
    **_: Any,
) -> int:
    """The columns of the result."""
    columns = check_weight(x, weight, bias, transposed, weight_scale)
    if out is not None:
        check_like("out", out, "x", x)
        if out.shape != (*x.shape[:-1], columns) or not out.is_contiguous():
            raise ValueError(
                f"out is {list(out.shape)} with strides {list(out.stride())}; expected a contiguous "
                f"{[*x.shape[:-1], columns]}"
            )
    return columns


def _check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, **_: Any) -> None:
    check_norm(x, weight, bias, kind)


@traceable(_fake_norm_qkv, check=_check_norm_qkv)
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
    backend: str = "auto",
) -> Any:  # a Tensor, or two with return_normed
    """norm(x) @ weightᵀ + bias, then q/k norm and RoPE: x [..., E], weight [rows, E] -> qkv [..., rows].

    norm: "rmsnorm", "layernorm", or None where x is already normed; norm_weight, norm_bias [E] and eps as in `norm`.
    return_normed: also return norm(x) [..., E]. weight, bias [rows], transposed, weight_scale: as in `linear`.
    heads, kv_heads: rows are `heads` q heads, `kv_heads` k heads and as many v heads; needed by what follows.
    qk_norm: a norm over each q and k head, with the same eps; q_norm_weight, k_norm_weight [head_dim] or None.
    rope: cos and sin, fp32 [B or 1, T, n], turn the first 2n elements of each q and k head, after qk_norm; x must be
    [B, T, E] then. interleaved: the pairs are (2i, 2i + 1) instead of (i, i + n).

    Raises ValueError and RuntimeError as `attention` does.
    """
    keywords: dict[str, Any] = {
        "norm": norm,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "eps": eps,
        "return_normed": return_normed,
        "transposed": transposed,
        "weight_scale": weight_scale,
        "heads": heads,
        "kv_heads": kv_heads,
        "qk_norm": qk_norm,
        "q_norm_weight": q_norm_weight,
        "k_norm_weight": k_norm_weight,
        "rope": rope,
        "interleaved": interleaved,
    }
    rows, split = _check_norm_qkv(x, weight, bias, **keywords)
    if not _use_kernels(x, weight, weight_scale, backend):
        return eager.norm_qkv(x, weight, bias, **keywords)

    cos, sin = rope or (None, None)
    refuse_grad(
        x=x,
        weight=weight,
        bias=bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        cos=cos,
        sin=sin,
    )
    from tp_attention.kernels import skinny_gemm

    flat = x.reshape(-1, x.shape[-1])
    skinny = flat.shape[0] <= skinny_gemm.MAX_ROWS
    # fp16: x · norm_weight may overflow before the row is scaled
    deferred = skinny and norm == "rmsnorm" and norm_bias is None and not return_normed and x.dtype != torch.float16
    if norm is not None and not deferred:
        from tp_attention.kernels.norm import norm as norm_rows

        # a normed x that is handed out has the bits of functional.norm's
        flat = norm_rows(flat, norm_weight, norm_bias, norm, eps, round_once=not return_normed)
    cos, sin = (None if angles is None else angles.flatten(0, 1).contiguous() for angles in (cos, sin))
    if skinny:
        follows = None
        if split is not None:
            q_weight, k_weight = _contiguous(q_norm_weight), _contiguous(k_norm_weight)
            follows = skinny_gemm.Heads(*split, qk_norm, q_weight, k_weight, eps, cos, sin, interleaved)
        qkv = skinny_gemm.skinny_gemm(
            flat,
            weight,
            _contiguous(bias),
            norm_weight=_contiguous(norm_weight) if deferred else None,
            rms_eps=eps if deferred else None,
            weight_scale=weight_scale,
            transposed=transposed,
            heads=follows,
        )
    else:
        from tp_attention.kernels.gemm import gemm

        qkv = gemm(flat, weight, bias, weight_scale=weight_scale, transposed=transposed)
        if split is not None:
            from tp_attention.kernels.rope import qk_norm_rope_

            qk_norm_rope_(
                qkv,
                *split,
                qk_norm=qk_norm,
                q_norm_weight=q_norm_weight,
                k_norm_weight=k_norm_weight,
                eps=eps,
                cos=cos,
                sin=sin,
                interleaved=interleaved,
            )
    qkv = qkv.view(*x.shape[:-1], rows)
    return (qkv, x if norm is None else flat.view(x.shape)) if return_normed else qkv


@traceable(_fake_norm, check=_check_norm)
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
    if not _use_kernels(x, x, None, backend):
        return eager.norm(x, weight, bias, kind, eps)
    refuse_grad(x=x, weight=weight, bias=bias)
    from tp_attention.kernels.norm import norm as norm_rows

    return norm_rows(x.reshape(-1, x.shape[-1]), weight, bias, kind, eps).view(x.shape)


@traceable(_fake_linear, check=_check_linear)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    weight_scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x @ weightᵀ + bias: x [..., in], weight [out, in], bias [out] -> [..., out].

    transposed: weight is [in, out]. weight_scale: fp32 [out, in / group] of an int8 weight [out, in], which stands for
    weight · scale; group is any divisor of `in`. out: a contiguous buffer [..., out], written and returned.

    Raises ValueError and RuntimeError as `attention` does.
    """
    columns = _check_linear(x, weight, bias, transposed, weight_scale, out)
    if not _use_kernels(x, weight, weight_scale, backend):
        return eager.linear(x, weight, bias, transposed=transposed, weight_scale=weight_scale, out=out)

    refuse_grad(x=x, weight=weight, bias=bias, out=out)
    from tp_attention.kernels.skinny_gemm import MAX_ROWS, skinny_gemm

    flat, flat_out = x.reshape(-1, x.shape[-1]), None if out is None else out.view(-1, columns)
    if flat.shape[0] <= MAX_ROWS:
        y = skinny_gemm(flat, weight, _contiguous(bias), weight_scale=weight_scale, transposed=transposed, out=flat_out)
    else:
        from tp_attention.kernels.gemm import gemm

        y = gemm(flat, weight, bias, weight_scale=weight_scale, transposed=transposed, out=flat_out)
    return y.view(*x.shape[:-1], columns) if out is None else out


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None else vector.contiguous()


def _use_kernels(x: Tensor, weight: Tensor, weight_scale: Tensor | None, backend: str) -> bool:
    obstacle = None
    if x.dtype == torch.float64:
        obstacle = "no kernel for torch.float64"
    elif weight_scale is not None and x.dtype == torch.float32:
        obstacle = "int8 weights need float16 or bfloat16 activations"
    # nothing to do for a kernel where a dimension is 0
    return choose_backend(backend, x.device, obstacle) == "triton" and bool(x.numel() and weight.numel())
