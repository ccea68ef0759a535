"""Memory of one rank that all ranks of a host can write: torch's symmetric memory on GPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOST_RANKS = 8  # that the kernels take memory of


def reserve(nbytes: int, device: torch.device) -> Tensor:
    """`nbytes` bytes that may be shared, all bits set. Raises RuntimeError where there is no room."""
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device).fill_(255)


def share(mine: Tensor, process_group: dist.ProcessGroup) -> tuple[list[Tensor], Any]:
    """Every rank's memory in rank order, mapped here, and what keeps it mapped.

    Every rank of the group must call it, with as many bytes, and nobody may write to another's before all have
    returned. Raises RuntimeError where the GPUs cannot map each other's memory.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    handle = symmetric_memory.rendezvous(mine, process_group.group_name)
    everyones = [handle.get_buffer(rank, (mine.numel(),), torch.uint8) for rank in range(handle.world_size)]
    torch.cuda.synchronize(mine.device)
    return everyones, (mine, handle)
