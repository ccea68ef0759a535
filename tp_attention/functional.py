"""Attention, norms and projections as functions on tensors: what ops.py and people who want one function call.

Each checks its arguments, picks a backend and says in the log why the faster one does not run. Nothing here knows of
ranks: head dimensions are those of the tensors given. This version has no Triton kernels, so every call takes the torch
path in eager.py.

`backend`, the same everywhere: "auto" takes the fastest path that can do the job, "torch" the torch path, and "triton"
raises RuntimeError where no kernel can. Arguments that do not fit raise ValueError before any work is done.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from tp_attention import eager
from tp_attention.config import DTYPES, NORMS
from tp_attention.masks import Window, check_mask

log = logging.getLogger("tp_attention")

BACKENDS = ("auto", "triton", "torch")


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
    _check_heads(q, k, v, q_start, group_size, kv_start)
    batch, queries, heads, _ = q.shape
    if mask is not None:
        check_mask(mask, batch, heads, queries, k.shape[1])
        _check_device("mask", mask, q)
    for name, per_head in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if per_head is not None:
            if per_head.shape != (heads,) or not per_head.is_floating_point():
                raise ValueError(
                    f"{name} is {per_head.dtype} {list(per_head.shape)}; expected floats [Hq] = [{heads}], q's heads"
                )
            _check_device(name, per_head, q)
    if window is not None and (len(window) != 2 or any(side is not None and side < -1 for side in window)):
        raise ValueError(f"window={window} must be (left, right), each >= 0, or None or -1 for unbounded")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive; None turns it off")
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
        _check_norm(x, norm_weight, norm_bias, norm)
    elif norm_weight is not None or norm_bias is not None:
        raise ValueError(f"norm_weight and norm_bias need a norm; pass norm as one of {', '.join(NORMS)}")
    _check_linear(x, weight, bias)
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
    _check_norm(x, weight, bias, kind)
    choose_backend(backend, x.device)
    return eager.norm(x, weight, bias, kind, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x @ weightᵀ + bias: x [..., in], weight [out, in], bias [out] -> [..., out]."""
    _check_linear(x, weight, bias)
    choose_backend(backend, x.device)
    return eager.linear(x, weight, bias)


@functools.cache
def choose_backend(requested: str, device: torch.device) -> str:
    """The backend that will run, "torch" in this version, saying once per reason why it is not Triton.

    Raises ValueError on an unknown name, RuntimeError where "triton" was asked for.
    """
    if requested == "torch":
        return "torch"
    if requested not in BACKENDS:
        raise ValueError(f"unknown backend {requested!r}; use one of {', '.join(BACKENDS)}")
    why = (
        "this version has no Triton kernels"
        if device.type == "cuda"
        else f"the tensors are on {device.type}, not a GPU"
    )
    if requested == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {why}; use backend='auto' or 'torch'")
    log.info("torch path: %s", why)  # once: the answer is cached
    return "torch"


def _check_heads(q: Tensor, k: Tensor, v: Tensor, q_start: int, group_size: int | None, kv_start: int) -> None:
    """q, k and v fit each other, and every query head finds its kv head."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3] or not q.shape[3]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; expected q [B, T, Hq, D], k and v "
            "[B, S, Hkv, D] with the same B and D >= 1"
        )
    _check_like("k", k, "q", q)
    _check_like("v", v, "q", q)
    heads, kv_heads = q.shape[2], k.shape[2]
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


def _check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str) -> None:
    if kind not in NORMS:
        raise ValueError(f"unknown norm {kind!r}; use one of {', '.join(NORMS)}")
    for name, vector in (("norm weight", weight), ("norm bias", bias)):
        if vector is not None:
            if vector.shape != x.shape[-1:]:
                raise ValueError(
                    f"{name} has shape {list(vector.shape)}; expected {list(x.shape[-1:])}, x's last dimension"
                )
            _check_like(name, vector, "x", x)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)} do not fit; expected [..., in] and [out, in]"
        )
    _check_like("weight", weight, "x", x)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {list(bias.shape)}; expected [out] = {list(weight.shape[:1])}")
        _check_like("bias", bias, "x", x)


def _check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype or other.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {tensor.dtype}, {other_name} is {other.dtype}; convert both to one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    _check_device(name, tensor, other)


def _check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the rest on {other.device}; move it with .to({str(other.device)!r})"
        )
