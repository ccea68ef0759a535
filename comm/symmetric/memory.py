"""Memory of one rank that all ranks of a host can write: torch's symmetric memory on GPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def allocate(nbytes: int, process_group: dist.ProcessGroup, device: torch.device) -> tuple[list[Tensor], Any]:
    """Every rank's `nbytes` bytes in rank order, mapped here and all bits set, and what keeps them mapped.

    Every rank must call it, and nobody may write to another's before all have returned. Raises RuntimeError where the
    GPUs cannot map each other's memory.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    mine = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
    mine.fill_(255)
    handle = symmetric_memory.rendezvous(mine, process_group.group_name)
    inboxes = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(handle.world_size)]
    torch.cuda.synchronize(device)
    return inboxes, (mine, handle)
