"""Attention with its probabilities, in one go or step by step through scores and probabilities [B, Hq, T, S].

softmax_context is the fast one; the steps are for callers who change scores or probabilities in between. Where
probabilities are not wanted use attention, which needs no T×S memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tp_attention import eager, masks
from tp_attention.config import DTYPES
from tp_attention.functional.backends import choose_backend, refuse_grad
from tp_attention.functional.checks import check_device, check_features, check_groups
from tp_attention.functional.library import traceable
from tp_attention.functional.prefill import check_attention, kernel_obstacle
from tp_attention.masks import Window


def _fake_softmax_context(q: Tensor, k: Tensor, **_: Any) -> list[Tensor]:
    return [q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1], k.shape[1]))]


def _fake_scores(q: Tensor, k: Tensor, dtype: torch.dtype, **_: Any) -> list[Tensor]:
    return [q.new_empty((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dtype=dtype)]


def _fake_softmax(scores: Tensor, dtype: torch.dtype | None, **_: Any) -> list[Tensor]:
    return [scores.new_empty(scores.shape, dtype=dtype or scores.dtype)]


def _fake_context(probabilities: Tensor, v: Tensor, **_: Any) -> list[Tensor]:
    batch, heads, queries, _keys = probabilities.shape
    return [v.new_empty((batch, queries, heads, v.shape[3]))]


def _check_scores(q: Tensor, k: Tensor, *, dtype: torch.dtype, **keywords: Any) -> None:
    check_attention(q, k, k, **keywords)
    _check_dtype(dtype)


def _check_softmax(
    scores: Tensor,
    *,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    window: Window | None,
    sinks: Tensor | None,
    dtype: torch.dtype | None,
    out: Tensor | None,
    **_: Any,
) -> None:
    if scores.dim() != 4 or scores.dtype not in DTYPES:
        raise ValueError(
            f"scores are {scores.dtype} {list(scores.shape)}; expected [B, Hq, T, S] in one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    check_features(scores.transpose(1, 2), scores.shape[3], mask, alibi_slopes, window, None, sinks)
    _check_dtype(dtype or scores.dtype)
    if out is not None:
        if out.shape != scores.shape or dtype not in (None, out.dtype) or (out.stride(3) != 1 and out.shape[3] > 1):
            raise ValueError(
                f"out is {out.dtype} {list(out.shape)}, last stride {out.stride()[-1:]}; expected "
                f"{dtype or 'floats'} {list(scores.shape)}, last stride 1"
            )
        _check_dtype(out.dtype)
        check_device("out", out, scores)


def _check_context(
    probabilities: Tensor, v: Tensor, *, q_start: int, group_size: int | None, kv_start: int, **_: Any
) -> None:
    if (
        probabilities.dim() != 4
        or v.dim() != 4
        or probabilities.shape[::3] != v.shape[:2]
        or not v.shape[3]
        or not probabilities.is_floating_point()
    ):
        raise ValueError(
            f"probabilities {probabilities.dtype} {list(probabilities.shape)} and v {list(v.shape)} do not fit; "
            "expected floats [B, Hq, T, S] and [B, S, Hkv, D] with D >= 1"
        )
    _check_dtype(v.dtype)
    check_groups(probabilities.shape[1], v.shape[2], q_start, group_size, kv_start)
    check_device("probabilities", probabilities, v)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")


@traceable(_fake_softmax_context, check=check_attention)
def softmax_context(
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`attention` that also returns its probabilities: -> out [B, T, Hq, D] and [B, Hq, T, S], both in q's dtype.

    Arguments and errors as in `attention`. A row that keeps no key is 0 in both; with sinks a row sums to less than 1.
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
    }
    check_attention(q, k, v, window=window, **features)
    if choose_backend(backend, q.device, kernel_obstacle(q)) == "torch" or k.shape[1] == 0 or q.numel() == 0:
        return eager.softmax_context(q, k, v, causal=causal, window=window, **features)
    refuse_grad(q=q, k=k, v=v, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks)
    from tp_attention.kernels.softmax_context import softmax_context as kernel

    return kernel(q, k, v, reach=masks.effective_window(q.shape[1], k.shape[1], causal, window), **features)


@traceable(_fake_scores, check=_check_scores)
def score_4d_matmul(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    mask: Tensor | None = None,
    q_start: int = 0,
    group_size: int | None = None,
    kv_start: int = 0,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Attention's scores: q [B, T, Hq, D], k [B, S, Hkv, D] -> [B, Hq, T, S] in dtype, −inf where a key is not kept.

    Keywords and errors as in `attention`. dtype is fp32 for a reason: fp16 ends at 65504, bf16 has 8 bits of a score.
    """
    features: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "mask": mask,
        "q_start": q_start,
        "group_size": group_size,
        "kv_start": kv_start,
        "dtype": dtype,
    }
    _check_scores(q, k, window=window, **features)
    obstacle = kernel_obstacle(q) or _no_kernels_for(dtype)
    if choose_backend(backend, q.device, obstacle) == "torch" or k.shape[1] == 0 or q.numel() == 0:
        return eager.score_4d_matmul(q, k, causal=causal, window=window, **features)
    refuse_grad(q=q, k=k, mask=mask, alibi_slopes=alibi_slopes)
    from tp_attention.kernels import materialised

    reach = masks.effective_window(q.shape[1], k.shape[1], causal, window)
    return materialised.score_4d_matmul(q, k, reach=reach, **features)


@traceable(_fake_softmax, check=_check_softmax)
def softmax(
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax over the keys of scores [B, Hq, T, S], natural-log units -> [B, Hq, T, S]; sums are fp32.

    mask, causal, window, alibi_slopes and sinks as in `attention`, applied before the maximum is taken; leave out what
    score_4d_matmul applied. A row that keeps no key is 0. dtype: of the result, None = that of scores. out: where to
    put it, last stride 1; it may be scores. Raises ValueError and RuntimeError as `attention` does.
    """
    features: dict[str, Any] = {"mask": mask, "alibi_slopes": alibi_slopes, "sinks": sinks}
    _check_softmax(scores, window=window, dtype=dtype, out=out, **features)
    dtype = out.dtype if out is not None else dtype or scores.dtype
    obstacle = _no_kernels_for(scores.dtype) or _no_kernels_for(dtype)
    if choose_backend(backend, scores.device, obstacle) == "torch" or scores.numel() == 0:
        return eager.softmax(scores, causal=causal, window=window, dtype=dtype, out=out, **features)
    refuse_grad(scores=scores, out=out, **features)
    from tp_attention.kernels import materialised

    out = torch.empty(scores.shape, dtype=dtype, device=scores.device) if out is None else out
    reach = masks.effective_window(scores.shape[2], scores.shape[3], causal, window)
    return materialised.softmax(scores, out, reach=reach, **features)


@traceable(_fake_context, check=_check_context)
def context_4d_matmul(
    probabilities: Tensor,
    v: Tensor,
    *,
    q_start: int = 0,
    group_size: int | None = None,
    kv_start: int = 0,
    backend: str = "auto",
) -> Tensor:
    """probabilities [B, Hq, T, S] @ v [B, S, Hkv, D] per head -> [B, T, Hq, D] in v's dtype; sums are fp32.

    Probabilities of another dtype are rounded to v's. Other keywords and errors as in `attention`.
    """
    features: dict[str, Any] = {"q_start": q_start, "group_size": group_size, "kv_start": kv_start}
    _check_context(probabilities, v, **features)
    obstacle = kernel_obstacle(v) or _no_kernels_for(probabilities.dtype)
    if choose_backend(backend, v.device, obstacle) == "torch" or probabilities.numel() == 0:
        return eager.context_4d_matmul(probabilities, v, **features)
    refuse_grad(probabilities=probabilities, v=v)
    from tp_attention.kernels import materialised

    return materialised.context_4d_matmul(probabilities, v, **features)


def _no_kernels_for(dtype: torch.dtype) -> str | None:
    return f"there are no kernels for {dtype}" if dtype == torch.float64 else None
