"""Checks of arguments that several public functions share. Each raises ValueError with both numbers and a way out."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_attention.config import DTYPES, NORMS
from tp_attention.masks import Window, check_mask


def check_features(
    q: Tensor,
    keys: int,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    window: Window | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """What shapes the scores fits q [B, T, Hq, D] and `keys` keys."""
    batch, queries, heads, _ = q.shape
    if mask is not None:
        check_mask(mask, batch, heads, queries, keys)
        check_device("mask", mask, q)
    check_per_head(q, heads, alibi_slopes=alibi_slopes, sinks=sinks)
    if window is not None and (len(window) != 2 or any(side is not None and side < -1 for side in window)):
        raise ValueError(f"window={window} must be (left, right), each >= 0, or None or -1 for unbounded")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive; None turns it off")


def check_per_head(q: Tensor, heads: int, **tensors: Tensor | None) -> None:
    """Each tensor given is floating, [Hq] and on q's device."""
    for name, per_head in tensors.items():
        if per_head is not None:
            if per_head.shape != (heads,) or not per_head.is_floating_point():
                raise ValueError(
                    f"{name} is {per_head.dtype} {list(per_head.shape)}; expected floats [Hq] = [{heads}], q's heads"
                )
            check_device(name, per_head, q)


def check_heads(q: Tensor, k: Tensor, v: Tensor, q_start: int, group_size: int | None, kv_start: int) -> None:
    """q, k and v fit each other, and every query head finds its kv head."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3] or not q.shape[3]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; expected q [B, T, Hq, D], k and v "
            "[B, S, Hkv, D] with the same B and D >= 1"
        )
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    check_groups(q.shape[2], k.shape[2], q_start, group_size, kv_start)


def check_groups(heads: int, kv_heads: int, q_start: int, group_size: int | None, kv_start: int) -> None:
    """Every query head finds its kv head in k, or in the cache of keys."""
    if group_size is None:
        if q_start or kv_start:
            raise ValueError(
                f"q_start={q_start}, kv_start={kv_start} need group_size, query heads per kv head of the layer"
            )
        if not kv_heads or heads % kv_heads:
            raise ValueError(
                f"{heads} query heads are no multiple of {kv_heads} kv heads; pass q_start, group_size, kv_start"
            )
        return
    if group_size < 1 or q_start < 0 or kv_start < 0:
        raise ValueError(f"group_size={group_size} must be >= 1, q_start={q_start} and kv_start={kv_start} >= 0")
    first, last = q_start // group_size, (q_start + heads - 1) // group_size
    if first < kv_start or last >= kv_start + kv_heads:
        raise ValueError(
            f"query heads {q_start}..{q_start + heads - 1} in groups of {group_size} read kv heads {first}..{last}, k "
            f"holds {kv_start}..{kv_start + kv_heads - 1}; pass those it lacks or correct q_start, group_size, kv_start"
        )


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str) -> None:
    if kind not in NORMS:
        raise ValueError(f"unknown norm {kind!r}; use one of {', '.join(NORMS)}")
    for name, vector in (("norm weight", weight), ("norm bias", bias)):
        if vector is not None:
            if vector.shape != x.shape[-1:]:
                raise ValueError(
                    f"{name} has shape {list(vector.shape)}; expected {list(x.shape[-1:])}, x's last dimension"
                )
            check_like(name, vector, "x", x)


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype or other.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {tensor.dtype}, {other_name} is {other.dtype}; convert both to one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    check_device(name, tensor, other)


def check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the rest on {other.device}; move it with .to({str(other.device)!r})"
        )


def check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, weight_scale: Tensor | None) -> int:
    """The columns of x @ weightᵀ, where x, weight, bias and scales fit each other."""
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[0 if transposed else 1 :][:1]:
        expected = "[in, out] (transposed)" if transposed else "[out, in]"
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)} do not fit; expected [..., in] and {expected}"
        )
    columns = weight.shape[1 if transposed else 0]
    if weight_scale is None and weight.dtype != torch.int8:
        check_like("weight", weight, "x", x)
    else:
        check_scale(x, weight, transposed, weight_scale)
    if bias is not None:
        if bias.shape != (columns,):
            raise ValueError(f"bias has shape {list(bias.shape)}; expected [out] = [{columns}]")
        check_like("bias", bias, "x", x)
    return columns


def check_scale(x: Tensor, weight: Tensor, transposed: bool, scale: Tensor | None) -> None:
    if transposed:
        raise ValueError(f"an int8 weight {list(weight.shape)} must be [out, in]; pass weight.T and transposed=False")
    if scale is None or weight.dtype != torch.int8:
        raise ValueError(
            f"weight is {weight.dtype}, weight_scale {None if scale is None else list(scale.shape)}; an int8 weight "
            "needs weight_scale [out, in / group], and no other takes one"
        )
    out, depth = weight.shape
    # a rank that holds no columns of a row-parallel weight has no groups either
    if scale.dim() != 2 or scale.shape[0] != out or (depth % scale.shape[1] if scale.shape[1] else depth):
        raise ValueError(
            f"weight_scale {list(scale.shape)} does not fit weight {[out, depth]}; expected [{out}, {depth} / group] "
            f"with a group that divides {depth}"
        )
    if scale.dtype != torch.float32:
        raise ValueError(f"weight_scale is {scale.dtype}; convert it to torch.float32")
    check_like("x", x, "x", x)
    check_device("weight", weight, x)
    check_device("weight_scale", scale, x)


def check_qkv_heads(
    x: Tensor,
    rows: int,
    heads: int | None,
    kv_heads: int | None,
    qk_norm: str | None,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
) -> tuple[int, int, int]:
    """heads, kv_heads and head_dim, where q/k norm and RoPE fit qkv [B, T, rows]."""
    if heads is None or kv_heads is None:
        raise ValueError(f"qk_norm and rope need heads and kv_heads; heads={heads}, kv_heads={kv_heads}")
    if heads < 1 or kv_heads < 1 or rows % (heads + 2 * kv_heads):
        raise ValueError(
            f"weight has {rows} rows, no multiple of {heads} + 2·{kv_heads} heads (q, k and v); correct heads, kv_heads"
        )
    head_dim = rows // (heads + 2 * kv_heads)
    if qk_norm is None and (q_norm_weight is not None or k_norm_weight is not None):
        raise ValueError(f"q_norm_weight and k_norm_weight need qk_norm; pass it as one of {', '.join(NORMS)}")
    if qk_norm is not None and qk_norm not in NORMS:
        raise ValueError(f"unknown qk_norm {qk_norm!r}; use one of {', '.join(NORMS)}")
    for name, vector in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if vector is not None:
            if vector.shape != (head_dim,):
                raise ValueError(f"{name} has shape {list(vector.shape)}; expected [head_dim] = [{head_dim}]")
            check_like(name, vector, "x", x)
    if rope is not None:
        if x.dim() != 3:
            raise ValueError(f"x has shape {list(x.shape)}; with rope it must be [B, T, E]")
        check_rope(*rope, x.shape[0], x.shape[1], head_dim, x)
    return heads, kv_heads, head_dim


def check_rope(cos: Tensor, sin: Tensor, batch: int, tokens: int, head_dim: int, x: Tensor) -> None:
    """cos and sin turn `tokens` tokens of `batch` sequences, at most all head_dim elements of each head of x."""
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens:
        raise ValueError(
            f"rope's cos {list(cos.shape)} and sin {list(sin.shape)} do not fit {batch} sequences of {tokens} tokens; "
            f"expected both [{batch} or 1, {tokens}, n]"
        )
    if not 0 < 2 * cos.shape[2] <= head_dim:
        raise ValueError(f"rope turns {2 * cos.shape[2]} elements of a head of {head_dim}; cut cos and sin")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.dtype != torch.float32:
            raise ValueError(f"rope's {name} is {angles.dtype}; convert it to torch.float32")
        check_device(name, angles, x)
