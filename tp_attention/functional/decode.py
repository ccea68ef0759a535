"""Attention of a few new tokens against a cache of keys and values, and writing those tokens into it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tp_attention.eager import decode as eager
from tp_attention.functional.backends import choose_backend, refuse_grad
from tp_attention.functional.checks import check_device, check_features, check_groups, check_like, check_rope
from tp_attention.functional.library import traceable
from tp_attention.functional.prefill import kernel_obstacle
from tp_attention.masks import Window

QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)  # what a cache may hold besides q's dtype


def _fake_attention_decode(q: Tensor, return_lse: bool, **_: Any) -> list[Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return [q.new_empty(q.shape), lse] if return_lse else [q.new_empty(q.shape)]


def _fake_append_kv(q: Tensor, **_: Any) -> list[Tensor]:
    return [q.new_empty(q.shape)]


@traceable(_fake_attention_decode)
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
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
) -> Any:  # a Tensor, or two with return_lse
    """`attention` of q [B, T, Hq, D] against caches -> [B, T, Hq, D] in q's dtype; made for T up to 16, right for any.

    k_cache, v_cache: [B, S_max, Hkv, D], or with a block_table pages [blocks, block_size, Hkv, D]; strides are any but
    the last, which is 1. Sequence b has lengths[b] keys, int32 [B], the T new tokens included: query t sits at position
    lengths[b] − T + t, which may be negative. What lies behind a sequence's end is never used.
    block_table: int32 [B, n]; the keys of sequence b from i·block_size on are page block_table[b, i].

    The caches have q's dtype, or int8, float8_e4m3fn or float8_e5m2 with scales, fp32: [1], one per kv head [Hkv], or
    one per token and kv head, shaped as the cache less D. int8 needs both scales, float8 without scales means 1.

    mask: [B, S] or 4-D as in `attention`, S being S_max or n·block_size. Other keywords, results and errors as there.
    Lengths stay on the device: a CUDA graph replays with whatever they are then.
    """
    keys = _check_caches(q.shape[0] if q.dim() == 4 else 0, k_cache, v_cache, lengths, block_table, k_scale, v_scale, q)
    check_groups(q.shape[2], k_cache.shape[2], q_start, group_size, kv_start)
    check_features(q, keys, mask, alibi_slopes, window, softcap, sinks)
    run: Any = eager.attention_decode
    if choose_backend(backend, q.device, _obstacle(q, k_cache)) == "triton":
        from tp_attention.kernels.flash_decode import flash_decode as run

        refuse_grad(
            q=q, k_cache=k_cache, v_cache=v_cache, k_scale=k_scale, v_scale=v_scale, mask=mask, sinks=sinks,
            alibi_slopes=alibi_slopes,
        )  # fmt: skip
    return run(
        q,
        k_cache,
        v_cache,
        lengths,
        block_table=block_table,
        k_scale=k_scale,
        v_scale=v_scale,
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


@traceable(_fake_append_kv, mutates=("k_cache", "v_cache", "k_scale", "v_scale"))
def append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Write k, v [B, T, Hkv, D] into the caches as the last T of lengths[b] tokens; return q [B, T, Hq, D], rotated.

    Caches, lengths, block_table and scales as in `attention_decode`. rope: cos, sin fp32 [B or 1, T, n], which turn the
    first 2·n elements of each head of q and k, pairs (p, p + n), or (2p, 2p + 1) where interleaved; None turns nothing.

    A quantised cache is written with the scales given; those of one per token and kv head are themselves written: the
    largest element over the dtype's largest. Tokens at negative positions and behind the capacity are dropped.
    """
    if k.dim() != 4 or k.shape != v.shape or q.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; expected q [B, T, Hq, D], k and v "
            "[B, T, Hkv, D]"
        )
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    _check_caches(q.shape[0], k_cache, v_cache, lengths, block_table, k_scale, v_scale, q)
    if k_cache.shape[2] != k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, the cache {k_cache.shape[2]}; they must be the same kv heads")
    if rope is not None:
        check_rope(*rope, q.shape[0], q.shape[1], q.shape[3], q)
    run: Any = eager.append_kv
    if choose_backend(backend, q.device, _obstacle(q, k_cache)) == "triton":
        from tp_attention.kernels.append_kv import append_kv as run

        refuse_grad(q=q, k=k, v=v)
    return run(
        q,
        k,
        v,
        k_cache,
        v_cache,
        lengths,
        rope=rope,
        interleaved=interleaved,
        block_table=block_table,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _obstacle(q: Tensor, cache: Tensor) -> str | None:
    return kernel_obstacle(q) or (_e4m3_obstacle(q.device) if cache.dtype == torch.float8_e4m3fn else None)


@functools.cache
def _e4m3_obstacle(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 9)
    if (major, minor) >= (8, 9):
        return None
    return f"float8_e4m3fn needs compute capability 8.9, this GPU has {major}.{minor}"


def _check_caches(
    batch: int,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    q: Tensor,
) -> int:
    """The caches fit q, each other and what describes them; the number of keys a sequence has room for."""
    paged = block_table is not None
    fits = k_cache.dim() == q.dim() == 4 and k_cache.shape == v_cache.shape and k_cache.shape[3] == q.shape[3] > 0
    if not fits or not (paged or k_cache.shape[0] == batch):
        layout = "[blocks, block_size, Hkv, D]" if paged else "[B, S_max, Hkv, D]"
        raise ValueError(
            f"k_cache {list(k_cache.shape)} and v_cache {list(v_cache.shape)} do not fit q {list(q.shape)}; expected "
            f"both {layout} for q [B, T, Hq, D] with D >= 1"
        )
    if k_cache.dtype in QUANTIZED:
        check_like("q", q, "q", q)
        if v_cache.dtype != k_cache.dtype:
            raise ValueError(f"k_cache is {k_cache.dtype}, v_cache {v_cache.dtype}; they must be the same")
        check_device("k_cache", k_cache, q)
        check_device("v_cache", v_cache, q)
        if k_cache.dtype == torch.int8 and (k_scale is None or v_scale is None):
            raise ValueError("an int8 cache needs k_scale and v_scale; pass both")
    else:
        check_like("k_cache", k_cache, "q", q)
        check_like("v_cache", v_cache, "q", q)
        if k_scale is not None or v_scale is not None:
            raise ValueError(f"k_scale and v_scale belong to a quantised cache, these are {k_cache.dtype}; pass None")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(
            f"the last dimensions of k_cache and v_cache have strides {k_cache.stride(3)} and {v_cache.stride(3)}; "
            "both must be 1"
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            heads = k_cache.shape[2]
            if scale.dtype != torch.float32 or scale.shape not in ((1,), (heads,), k_cache.shape[:3]):
                raise ValueError(
                    f"{name} is {scale.dtype} {list(scale.shape)}; expected float32 [1], [Hkv] = [{heads}] or one per "
                    f"token and kv head, {list(k_cache.shape[:3])}"
                )
            check_device(name, scale, q)
    _check_index("lengths", lengths, (batch,), q)
    if block_table is None:
        return k_cache.shape[1]
    _check_index("block_table", block_table, (batch, block_table.shape[-1] if block_table.dim() else 0), q)
    return k_cache.shape[1] * block_table.shape[1]


def _check_index(name: str, index: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if index.dtype != torch.int32 or index.shape != shape or (shape[-1] > 1 and index.stride(-1) != 1):
        raise ValueError(
            f"{name} is {index.dtype} {list(index.shape)}; expected int32 {list(shape)}, its last stride 1"
        )
    check_device(name, index, q)
