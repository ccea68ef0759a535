"""Attention over tensors that are all there: prefill, and sequences of different lengths packed into one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tp_attention import eager
from tp_attention.functional.backends import choose_backend
from tp_attention.functional.checks import check_features, check_heads
from tp_attention.masks import Window


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
    check_heads(q, k, v, q_start, group_size, kv_start)
    check_features(q, k.shape[1], mask, alibi_slopes, window, softcap, sinks)
    choose_backend(backend, q.device)
    return eager.attention(
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        mask=mask,
        alibi_slopes=alibi_slopes,
        window=window,
        softcap=softcap,
        sinks=sinks,
        q_start=q_start,
        group_size=group_size,
        kv_start=kv_start,
        return_lse=return_lse,
    )
