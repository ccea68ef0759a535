"""The peers: each a function of its settings that returns a Prepare (bench/cases.py) for our inputs.

Every peer gets the layout that it likes best, made before the clock starts, and gives its result in ours. Libraries
that are not installed are Unavailable; what a library cannot do raises, and is written down as the reason.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tp_attention.bench.cases import Prepare, Unavailable

SCORES_BYTES = 8 << 30  # the torch formula holds all scores, also in fp32: past this it says no


def attention(causal: bool) -> Mapping[str, Prepare]:
    """Prefill peers: q [B, S, Hq, D], k and v [B, S, Hkv, D] -> [B, S, Hq, D]."""
    from torch.nn.attention import SDPBackend

    return {
        "flash": _sdpa(SDPBackend.FLASH_ATTENTION, causal),
        "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION, causal),
        "flex": _flex(causal),
        "formula": _formula(causal),
        "flash-attn-2": _flash_attn("flash_attn", causal),
        "flash-attn-3": _flash_attn("flash_attn_interface", causal),
        "flash-attn-4": _flash_attn("flash_attn.cute", causal),
        "deepspeed": _deepspeed_flash(causal),
        "ours general": _general(causal),
    }


def decode() -> Mapping[str, Prepare]:
    """Decode peers: q [B, 1, Hq, D], k and v [B, S, Hkv, D], lengths [B] all S -> [B, 1, Hq, D]."""
    every = attention(causal=False)  # one query sees every key
    chosen = ("flash", "cudnn", "flash-attn-2", "flash-attn-3", "flash-attn-4")
    return {who: _without_lengths(every[who]) for who in chosen}


def materialised(causal: bool) -> Mapping[str, Prepare]:
    """q [B, S, H, D], k, v -> the context, and the probabilities [B, H, S, S] where the peer hands them out."""
    return {"formula": _formula(causal, probabilities=True), "deepspeed": _deepspeed_materialised(causal)}


def norm_linear(eps: float | None) -> Mapping[str, Prepare]:
    """x [B, T, E], norm weight [E], weight [rows, E] -> [B, T, rows]: cuBLAS, after an RMSNorm unless eps is None."""

    def prepare(x: Tensor, norm_weight: Tensor, weight: Tensor, *_: Tensor) -> Callable[[], Tensor]:
        if eps is None:
            return lambda: F.linear(x, weight)
        return lambda: F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, eps), weight)

    return {"cublas": prepare}


def _without_lengths(prepare: Prepare) -> Prepare:
    return lambda q, k, v, lengths: prepare(q, k, v)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def _sdpa(backend: Any, causal: bool) -> Prepare:
    from torch.nn.attention import sdpa_kernel

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        qh, kh, vh = _heads_first(q, k, v)
        grouped = q.shape[2] != k.shape[2]

        def call() -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=causal, enable_gqa=grouped)
            return out.transpose(1, 2)

        return call

    return prepare


def _flex(causal: bool) -> Prepare:
    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        flex, block_mask = _compiled_flex(q.is_cuda), _causal_blocks(q.shape[1], q.device) if causal else None
        qh, kh, vh = _heads_first(q, k, v)
        grouped = q.shape[2] != k.shape[2]
        return lambda: flex(qh, kh, vh, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)

    return prepare


@functools.cache
def _compiled_flex(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    # Each shape compiled for itself is the fastest; past the limit, torch runs the unfused formula without a word.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=1)
def _causal_blocks(tokens: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    return create_block_mask(sees, None, None, tokens, tokens, device=str(device))


def _formula(causal: bool, probabilities: bool = False) -> Prepare:
    """softmax(q·kᵀ)·v in the inputs' dtype with an fp32 softmax, every step written out to memory."""

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
        batch, queries, heads, head_dim = q.shape
        keys, groups = k.shape[1], q.shape[2] // k.shape[2]
        needed = batch * heads * queries * keys * (2 * q.element_size() + 4)
        if needed > SCORES_BYTES:
            raise ValueError(f"its scores take {needed >> 30} GiB, more than {SCORES_BYTES >> 30}")
        qh, kh, vh = _heads_first(q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1) if causal else None

        def call() -> Any:
            scores = (qh / math.sqrt(head_dim)) @ kh.mT
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
            out = (weights @ vh).transpose(1, 2)
            return (out, weights) if probabilities else out

        return call

    return prepare


def _flash_attn(module: str, causal: bool) -> Prepare:
    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        flash_attn_func = _from(module, "flash_attn_func")

        def call() -> Tensor:
            out = flash_attn_func(q, k, v, causal=causal)
            return out[0] if isinstance(out, tuple) else out  # some versions add the log-sum-exp

        return call

    return prepare


def _general(causal: bool) -> Prepare:
    """Our own kernel for every GPU, also where `functional.attention` chooses Hopper's."""

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        if not q.is_cuda:
            raise Unavailable("ours general is left out: the tensors are on no GPU")
        from tp_attention.kernels import configs, flash_prefill

        block_d = 1 << (q.shape[3] - 1).bit_length()
        key = configs.architecture(q.device), block_d, q.element_size(), "edge" if causal else "full"
        config = configs.choose("flash_prefill", flash_prefill.CONFIGS, key)
        reach = (None, 0) if causal else (None, None)
        return lambda: flash_prefill.flash_attention(q, k, v, reach=reach, config=config)[0]

    return prepare


def _deepspeed_flash(causal: bool) -> Prepare:
    """Its packed flash kernel, fp16 whatever the inputs are: it knows no other dtype."""

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        module = "deepspeed.ops.transformer.inference.triton.attention"
        flash = _from(module, "_triton_packed_flash")
        constant = getattr(importlib.import_module(module), "minus_inf", None)
        if isinstance(constant, float):  # older kernels read this global, which Triton 3 wants as a constexpr
            importlib.import_module(module).minus_inf = importlib.import_module("triton.language").constexpr(constant)  # type: ignore[attr-defined]
        qkv, head_dim = _packed(q, k, v), q.shape[3]
        scale = 1 / math.sqrt(head_dim)
        return lambda: flash(qkv, head_dim, None, scale, causal=causal, add_mask=False).view(q.shape)

    return prepare


def _deepspeed_materialised(causal: bool) -> Prepare:
    """Its path without flash: scores, softmax and context, each a kernel. It has no causal mask there, so causal rows
    are its work on full ones, and its result is marked wrong."""

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        module = "deepspeed.ops.transformer.inference.triton"
        scores, softmax, context = (_from(module, name) for name in ("score_4d_matmul", "softmax", "context_4d_matmul"))
        qkv, head_dim = _packed(q, k, v), q.shape[3]
        scale = 1 / math.sqrt(head_dim)
        return lambda: context(softmax(scores(qkv, head_dim, causal, scale)), qkv, head_dim).view(q.shape)

    return prepare


def _packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, 3·H·D] in fp16, DeepSpeed's only layout."""
    if q.shape != k.shape:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must have as many heads")
    return torch.cat([x.flatten(2) for x in (q, k, v)], dim=2).half()


def _from(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as why:
        raise Unavailable(f"peer {module} is left out: {why}") from None
