"""Attention over tensors that are all there: one batch, or sequences of different lengths packed into one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tp_attention import eager, masks
from tp_attention.functional.backends import choose_backend, refuse_grad
from tp_attention.functional.checks import check_device, check_features, check_heads
from tp_attention.functional.library import traceable
from tp_attention.masks import Window

FEW_QUERIES = 16  # at most so many query tokens share their reading of the keys, which are split over the GPU instead
MAX_HEAD_DIM = 256  # of the kernels: a block of wider heads no longer fits the registers


def _fake_attention(q: Tensor, return_lse: bool, **_: Any) -> list[Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return [out, lse] if return_lse else [out]


def _fake_attention_varlen(q: Tensor, return_lse: bool, **_: Any) -> list[Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return [out, lse] if return_lse else [out]


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_start: int,
    group_size: int | None,
    kv_start: int,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    window: Window | None,
    softcap: float | None,
    sinks: Tensor | None = None,
    **_: Any,
) -> None:
    """What `attention` is given fits together; more keywords are let pass."""
    check_heads(q, k, v, q_start, group_size, kv_start)
    check_features(q, k.shape[1], mask, alibi_slopes, window, softcap, sinks)


@traceable(_fake_attention, check=check_attention)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_start: int = 0,
    group_size: int | None = None,
    kv_start: int = 0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:  # a Tensor, or two with return_lse; as overloads this signature would stand here three times
    """softmax(scores) @ v per head, q [B, T, Hq, D], k and v [B, S, Hkv, D] -> [B, T, Hq, D] in q's dtype.

    Scores are in natural-log units and made in this order: q·k·scale, softcap·tanh(s/softcap), ALiBi −slope·|i − j|,
    additive mask, then −inf for every key not kept. Query i sits at key position S − T + i. Sums are fp32.

    scale: None = 1/√D. causal: keep j ≤ i. window: (left, right) keeps i − left ≤ j ≤ i + right; None or −1 unbounded.
    mask: [B, S], or 4-D and broadcastable to [B, Hq, T, S]; bool (True = keep) or float (added; ≤ −1e30: not kept).
    alibi_slopes [Hq]. softcap > 0. sinks [Hq]: one more logit in each head's denominator, with no value.
    q_start, group_size, kv_start: which heads these are of a sharded layer; query head h reads kv head
    (q_start + h) // group_size − kv_start. None, 0, 0: all heads, groups of Hq / Hkv.
    return_lse: also return log Σ exp(scores), fp32 [B, Hq, T], sinks included, −inf where no key is kept.

    A row that keeps no key is 0; so is everything when S = 0. Raises ValueError on shapes, dtypes, devices or values
    that do not fit, RuntimeError when backend="triton" cannot run.
    """
    features: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "mask": mask,
        "q_start": q_start,
        "group_size": group_size,
        "kv_start": kv_start,
        "return_lse": return_lse,
    }
    check_attention(q, k, v, window=window, **features)
    if choose_backend(backend, q.device, kernel_obstacle(q)) == "torch" or k.shape[1] == 0 or q.numel() == 0:
        return eager.attention(q, k, v, causal=causal, window=window, **features)
    refuse_grad(q=q, k=k, v=v, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks)
    if q.shape[1] <= FEW_QUERIES:
        from tp_attention.kernels.flash_decode import flash_decode

        return flash_decode(q, k, v, causal=causal, window=window, **features)
    from tp_attention.kernels.flash_prefill import flash_attention

    reach = masks.effective_window(q.shape[1], k.shape[1], causal, window)
    out, lse = flash_attention(q, k, v, reach=reach, **features)
    return (out, lse) if return_lse else out


@traceable(_fake_attention_varlen)
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    alibi_slopes: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_start: int = 0,
    group_size: int | None = None,
    kv_start: int = 0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:  # a Tensor, or two with return_lse
    """`attention` of sequences packed without padding: q [Nq, Hq, D], k and v [Nk, Hkv, D] -> [Nq, Hq, D] in q's dtype.

    cu_seqlens_q, cu_seqlens_k: int32 [B + 1] on q's device, where each sequence starts, with Nq and Nk at the end;
    sequence b has the queries cu_seqlens_q[b]:cu_seqlens_q[b + 1] and sees its own keys alone. They are not read on the
    host, so their values are not checked: they must not decrease. Tokens outside of every sequence are left undefined.
    Other keywords as in `attention`; with return_lse also fp32 [Hq, Nq].
    Raises ValueError and RuntimeError as `attention` does.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {list(x.shape)}; expected [tokens, heads, D], 3 dimensions")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dtype != torch.int32 or cu.dim() != 1 or len(cu) != len(cu_seqlens_q) or len(cu) < 2:
            raise ValueError(
                f"{name} is {cu.dtype} {list(cu.shape)}; expected int32 [B + 1] with B >= 1, both of one length"
            )
        check_device(name, cu, q)
    q, k, v = q[None], k[None], v[None]
    features: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "q_start": q_start,
        "group_size": group_size,
        "kv_start": kv_start,
        "return_lse": return_lse,
    }
    check_attention(q, k, v, window=window, mask=None, **features)
    if choose_backend(backend, q.device, kernel_obstacle(q)) == "torch" or k.shape[1] == 0 or q.numel() == 0:
        return eager.attention_varlen(
            q[0], k[0], v[0], cu_seqlens_q, cu_seqlens_k, causal=causal, window=window, **features
        )
    refuse_grad(q=q, k=k, v=v, alibi_slopes=alibi_slopes, sinks=sinks)
    from tp_attention.kernels.flash_prefill import flash_attention

    out, lse = flash_attention(
        q,
        k,
        v,
        reach=masks.effective_window(q.shape[1], k.shape[1], causal, window),  # no sequence is longer
        cu_seqlens=(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()),
        **features,
    )
    return out[0] if lse is None else (out[0], lse[0])


def kernel_obstacle(q: Tensor) -> str | None:
    """Why no attention kernel takes q [..., D], or None."""
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[-1]} > {MAX_HEAD_DIM}"
    return f"there are no kernels for {q.dtype}" if q.dtype == torch.float64 else None
