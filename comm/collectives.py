"""all_reduce, all_gather, broadcast, barrier: each takes its group.

On an `ordered` group (gloo) the parts are moved as they are and added here, in fp32 and rank order; floats on GPUs of
one host are added likewise by symmetric/. For inference only: no collective has a backward, so a tensor whose gradient
would be lost is refused. Limit: that ranks disagree about the call (shape, dtype, order) is certain to be noticed only
under TP_ATTENTION_CHECK=1, which costs a meeting per call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tp_attention.comm.group import TPGroup, check_group

ACCUMULATE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
}
SCATTER_BYTES = 256 * 1024  # from here on every rank sums a chunk: two meetings, but 2 tensors sent and not size - 1


def all_reduce(x: Tensor, group: TPGroup, *, out: Tensor | None = None) -> Tensor:
    """Sum of x over the ranks of the group.

    x: any shape, the same on every rank; fp16, bf16, fp32, fp64, int32 or int64. out: where the sum goes, None for a
    new tensor; x is untouched unless out is x. On an ordered group fp16 and bf16 are summed in fp32 and rounded once.

    Raises ValueError for a wrong device, dtype or out, RuntimeError where a gradient would be lost, and
    CollectiveError where the transfer fails, a rank stays away for longer than the group's timeout or ranks disagree;
    on CUDA a rank that stays away is the heartbeat's to name, and it ends the process.
    """
    _check(x, group)
    if x.dtype not in ACCUMULATE:
        raise ValueError(f"all_reduce cannot sum {x.dtype}; convert it to one of {', '.join(map(str, ACCUMULATE))}")
    if out is not None and out is not x:
        _check(out, group)
        if out.shape != x.shape or out.dtype != x.dtype:
            raise ValueError(f"out is {out.dtype} {list(out.shape)}, but x is {x.dtype} {list(x.shape)}")
    total = x
    with group.transfer("all_reduce", x):
        if group.size > 1 and x.numel():
            if group.symmetric is not None and group.symmetric.takes(x):
                total = group.symmetric.all_reduce(x, out)
            else:
                total = (_ordered_sum if group.ordered else _backend_sum)(x, group)
    if out is None:
        return x.clone() if total is x else total
    return out if out is total else out.copy_(total)


def all_gather(x: Tensor, group: TPGroup, *, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
    """The ranks' tensors joined along dim in rank order: a new, contiguous tensor on every rank.

    x: [..., n, ...], any dtype; n may differ by rank and be 0, the other sizes may not. sizes: n of every rank, where
    known; None asks them first, a transfer more.

    Raises ValueError for a wrong device or sizes, RuntimeError and CollectiveError like all_reduce.
    """
    _check(x, group)
    if x.dim() == 0:
        raise ValueError("all_gather joins along a dimension and x has 0; use x.reshape(1)")
    mine = x.size(dim)
    known = None if sizes is None else list(sizes)
    fits = known is None or (len(known) == group.size and known[group.rank] == mine)
    # A rank whose n is not what sizes say agrees with no other: then all of them raise, if they compare.
    with group.transfer("all_gather", x, free=dim if fits else None, sizes=known):
        if sizes is None:
            sizes = _gather(torch.tensor([mine], device=x.device), group).flatten().tolist()
        if fits:
            parts = _gather(_grown(x, dim, max(sizes)), group)
    if not fits:
        raise ValueError(f"sizes={list(sizes)}, but rank {group.rank} of {group.size} has x.size({dim})={mine}")
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts.unbind(0), sizes, strict=True)], dim)


def broadcast(x: Tensor, group: TPGroup, src: int = 0) -> Tensor:
    """Overwrites x with that of rank `src` of the group (not of the world) and returns x.

    x: any shape and dtype, the same on every rank. Raises like all_gather, ValueError also for a src outside the group.
    """
    _check(x, group)
    if not 0 <= src < group.size:
        raise ValueError(f"src={src} is not a rank of group {group.name}; use 0 to {group.size - 1}")
    with group.transfer("broadcast", x, src=src):
        if group.size > 1 and x.numel():
            flat = x.contiguous()
            group._broadcast(_flat(flat), src)
            if flat is not x:
                x.copy_(flat)
    return x


def barrier(group: TPGroup) -> None:
    """Returns once every rank of the group has called it."""
    check_group(group)
    with group.transfer("barrier"):
        if group.size > 1:
            group._barrier()


def _ordered_sum(x: Tensor, group: TPGroup) -> Tensor:
    if group.size == 2 or x.numel() * x.element_size() < SCATTER_BYTES:
        return add_up(_gather(x, group))
    # Every rank sums one chunk of all tensors, then the chunks are joined: the same additions in the same order.
    chunk = -(-x.numel() // group.size)
    sent = _grown(x.reshape(-1), 0, chunk * group.size)
    parts = torch.empty_like(sent)
    group._exchange(_flat(parts), _flat(sent))
    chunks = _gather(add_up(parts.view(group.size, chunk)), group)
    return chunks.view(-1)[: x.numel()].view(x.shape)


def _backend_sum(x: Tensor, group: TPGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    group._sum(total)
    return total


def add_up(parts: Tensor) -> Tensor:
    """[size, ...] -> [...], in fp32 (ACCUMULATE) and rank order: torch.sum promises no order."""
    first, *rest = parts.unbind(0)
    total = first.to(ACCUMULATE[parts.dtype], copy=True)
    for part in rest:
        total.add_(part)
    return total.to(parts.dtype)


def _gather(x: Tensor, group: TPGroup) -> Tensor:
    """[size, *x.shape], contiguous: every rank's x."""
    parts = x.new_empty((group.size, *x.shape))
    if group.size == 1:
        parts[0] = x
    elif x.numel():
        group._gather(_flat(parts), _flat(x.contiguous()))
    return parts


def _grown(x: Tensor, dim: int, size: int) -> Tensor:
    """x with `size` entries along dim, the new ones undefined."""
    if x.size(dim) == size:
        return x
    shape = list(x.shape)
    shape[dim] = size
    grown = x.new_empty(shape)
    grown.narrow(dim, 0, x.size(dim)).copy_(x)
    return grown


def _flat(x: Tensor) -> Tensor:
    """A contiguous tensor's memory as a vector; of bytes, unless fp32, since gloo does not know every dtype."""
    vector = x.view(-1)
    return vector if x.dtype is torch.float32 else vector.view(torch.uint8)


def _check(x: Tensor, group: TPGroup) -> None:
    check_group(group)
    if x.layout != torch.strided:
        raise ValueError(f"collectives take dense tensors, not {x.layout}; use x.to_dense()")
    if x.device != group.device:
        raise ValueError(f"tensor on {x.device}, but group {group.name} on {group.device}; move one of them")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("collectives have no backward; call them under torch.no_grad() or torch.inference_mode()")
