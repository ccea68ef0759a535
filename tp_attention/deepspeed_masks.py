"""Masks, biases and packed projections as DeepSpeed's users hand them over, as functional.attention takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_attention.sharding import Range


def attention_mask(mask: Tensor | bool | None, keep: bool = True) -> Tensor | None:
    """A mask of DeepSpeed's conventions as functional.attention's: bool (True = kept) or float (added to the scores).

    Integers and bools say which keys to keep: those that are not 0, or with keep=False those that are. Floats are
    added, whatever they are. None and False are no mask.
    """
    if mask is None or mask is False:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(f"input_mask={mask!r} is no mask; pass a tensor, None or False")
    if mask.is_floating_point():
        return mask
    kept = mask if mask.dtype == torch.bool else mask != 0
    return kept if keep else ~kept


def with_bias(mask: Tensor | None, alibi: Tensor | None, batch: int, heads: int, local: Range) -> Tensor | None:
    """The mask and ALiBi's bias [B·heads, 1 or T, S] as one mask of this rank's heads.

    heads: of the whole layer; local: those of this rank. A mask with a heads dimension has all heads.
    Raises ValueError where mask or alibi have another number of them.
    """
    start, stop = local
    if mask is not None and mask.dim() == 4:
        mask = local_heads("mask", mask, heads, local)
    if alibi is None:
        return mask
    if alibi.dim() != 3 or alibi.shape[0] != batch * heads:
        raise ValueError(
            f"alibi has shape {list(alibi.shape)}; expected [B * heads, 1, S] with all {heads} heads of {batch} "
            f"sequences, so {batch * heads} rows, on every rank"
        )
    bias = alibi.unflatten(0, (batch, heads))[:, start:stop].float()
    if mask is None:
        return bias
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask
    return bias + mask if mask.is_floating_point() else bias.masked_fill(~mask, -torch.inf)


def local_heads(what: str, x: Tensor, heads: int, local: Range) -> Tensor:
    """This rank's part of x [heads] or [B, heads or 1, T, S]. Raises ValueError on another number of heads."""
    dim = 0 if x.dim() == 1 else 1
    if x.dim() not in (1, 4) or x.shape[dim] not in ((heads,) if dim == 0 else (1, heads)):
        raise ValueError(
            f"{what} has shape {list(x.shape)}; expected all {heads} heads on every rank: [{heads}], or 4-D with 1 or "
            f"{heads} of them"
        )
    return x if x.shape[dim] == 1 and dim == 1 else x.narrow(dim, local[0], local[1] - local[0])


def split_qkv(
    qkv: Tensor, heads: int, kv_heads: int, head_dim: int, per_head: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, (heads + 2·kv_heads)·D] -> views q [B, T, heads, D], k and v [B, T, kv_heads, D].

    per_head: the columns are each head's q, k, v in turn, and not all q, all k, all v.
    """
    columns = (heads + 2 * kv_heads) * head_dim
    if qkv.dim() != 3 or qkv.shape[2] != columns:
        raise ValueError(
            f"qkv has shape {list(qkv.shape)}; expected [B, T, {columns}] for {heads} + 2·{kv_heads} heads"
        )
    if per_head:
        q, k, v = qkv.unflatten(2, (heads, 3, head_dim)).unbind(3)
    else:
        by_head = qkv.view(*qkv.shape[:2], heads + 2 * kv_heads, head_dim)  # unflatten is slower, in Python
        q, k, v = by_head.split_with_sizes([heads, kv_heads, kv_heads], dim=2)
    return q, k, v
