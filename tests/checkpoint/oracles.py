"""How each layout packs q, k and v, written out with reshape and cat: what the packings are compared with.

Heads are [heads, D, E]; a packed tensor is [rows, E]. One entry per layout, or for split ones none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Heads = dict[str, Tensor]  # "q", "k", "v" and perhaps "query_gate"


def random_bits(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bits, NaNs with payloads too: a reshard moves bits, not numbers."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator).view(dtype).squeeze(-1)


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What an output starts as, so that an element never written shows."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else -77, dtype=dtype)


def bits(tensor: Tensor) -> Tensor:
    """The tensor as bytes, so that NaNs compare."""
    return tensor.contiguous().view(torch.uint8)


def one_after_another(heads: Heads) -> Tensor:
    return torch.cat([heads[part].flatten(0, 1) for part in ("q", "query_gate", "k", "v") if part in heads])


def head_by_head(heads: Heads) -> Tensor:
    """[heads, 3, D]"""
    return torch.stack([heads["q"], heads["k"], heads["v"]], dim=1).flatten(0, 2)


def element_by_element(heads: Heads) -> Tensor:
    """[heads, D, 3]"""
    return torch.stack([heads["q"], heads["k"], heads["v"]], dim=2).flatten(0, 2)


def group_by_group(heads: Heads) -> Tensor:
    """[kv_heads, q..q gate..gate k v, D]"""
    groups = len(heads["k"])
    wide = [heads[part].unflatten(0, (groups, -1)) for part in ("q", "query_gate") if part in heads]
    return torch.cat([*wide, heads["k"][:, None], heads["v"][:, None]], dim=1).flatten(0, 2)


def four_blocks(heads: Heads) -> Tensor:
    """Four blocks, in each q, v, k."""
    q, k, v = (heads[part].unflatten(0, (4, -1)) for part in "qkv")
    return torch.stack([q, v, k], dim=1).flatten(0, 3)


def neighbours(rows: Tensor) -> Tensor:
    """Meta's order of a head's rows from Hugging Face's: the two that RoPE turns together lie side by side."""
    first, second = rows.chunk(2, dim=1)  # [heads, D/2, E]
    return torch.stack([first, second], dim=2).flatten(1, 2)


PACKED: dict[str, Callable[[Heads], Tensor]] = {
    "megatron-0": one_after_another,
    "megatron-1.0": element_by_element,
    "megatron-2.0": head_by_head,
    "megatron-3.0": group_by_group,
    "megatron-3.0-gated": group_by_group,
    "megatron-core": group_by_group,
    "megatron-core-gated": group_by_group,
    "megatron-core-output-gate": group_by_group,
    "gpt2": one_after_another,
    "gpt-neox": head_by_head,
    "bloom": head_by_head,
    "falcon-mqa": one_after_another,
    "falcon-mha": head_by_head,
    "falcon-new-decoder": group_by_group,
    "chatglm": head_by_head,
    "chatglm2": one_after_another,
    "phi3": one_after_another,
    "internlm2": group_by_group,
    "mpt": one_after_another,
    "codegen": four_blocks,
    "gpt-bigcode-mqa": one_after_another,
    "gpt-bigcode-mha": head_by_head,
    "baichuan": one_after_another,
    "qwen-1": one_after_another,
    "dbrx": one_after_another,
    "deepspeed-merged": one_after_another,
    "deepspeed-merged-gated": one_after_another,
    "deepspeed-transposed": one_after_another,
}
SPLIT = ("llama", "gemma2", "llama-meta", "llama-gguf", "bert", "deepspeed-split", "deepspeed-split-gated")
PAIRED = ("llama-meta", "llama-gguf")  # their q and k rows lie pair by pair
GATED = (
    *("llama", "gemma2", "llama-meta", "llama-gguf", "phi3", "baichuan", "internlm2", "qwen-1", "chatglm2"),
    *("megatron-3.0-gated", "megatron-core-gated", "megatron-core-output-gate"),
    *("deepspeed-merged-gated", "deepspeed-split-gated"),
)
MULTI_HEAD = (
    "megatron-1.0",
    "megatron-2.0",
    "gpt-neox",
    "bloom",
    "falcon-mha",
    "chatglm",
    "codegen",
    "gpt-bigcode-mha",
)
MULTI_QUERY = ("falcon-mqa", "gpt-bigcode-mqa")


def head_counts(layout: str) -> list[tuple[int, int]]:
    """Query and kv heads that the layout admits: MHA, GQA, MQA."""
    if layout in MULTI_HEAD:
        return [(12, 12), (8, 8)]
    return [(12, 1), (8, 1)] if layout in MULTI_QUERY else [(12, 12), (12, 4), (12, 2), (9, 3), (8, 1)]
