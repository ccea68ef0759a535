"""Whether a group sums through symmetric memory: every rank can, has tried it and got the right sums, or none does.

TP_ATTENTION_ALL_REDUCE=auto|nccl|one_shot|two_shot, the same on all ranks, chooses; what cannot be done then is an
error, while "auto" says in the log why NCCL is used instead.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from tp_attention.comm import stores

if TYPE_CHECKING:
    from tp_attention.comm.symmetric.sums import SymmetricSums

log = logging.getLogger("tp_attention")

SWITCH = "TP_ATTENTION_ALL_REDUCE"
WAYS = ("auto", "nccl", "one_shot", "two_shot")
TRIALS = (64, 70_002, 70_002, 6)  # values summed in the trial, so that both halves of the inboxes are used
TRIAL_PATIENCE = 10_000_000  # looks, some seconds
LOOKS_A_SECOND = 2_000_000  # about; a look takes longer where many programs wait


def wanted() -> str:
    """The way that the environment asks for. Raises ValueError for an unknown one."""
    way = os.environ.get(SWITCH, "") or "auto"
    if way not in WAYS:
        raise ValueError(f"{SWITCH}={way} is none of {', '.join(WAYS)}")
    return way


def agree(
    process_group: dist.ProcessGroup, store: dist.Store, device: torch.device, name: str, timeout: float
) -> SymmetricSums | None:
    """The group's SymmetricSums, or None where it uses NCCL. Every rank of the group must call it.

    store: a corner for this call alone. Raises ValueError where the ranks want different ways, RuntimeError where a way
    was asked for and cannot be, TimeoutError where a rank does not come.
    """
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)

    def exchange(key: str, text: str) -> list[str]:
        return [item.decode().strip() for item in stores.exchange(store, key, f"{text} ".encode(), rank, size, timeout)]

    way = os.environ.get(SWITCH, "")  # checked when all have said theirs: a rank that raised would be waited for
    ways, hosts, gpus = exchange("ways", way), exchange("hosts", _host()), exchange("gpus", _gpu(device))
    if len(set(ways)) > 1:
        raise ValueError(f"the ranks of group {name} have {SWITCH}={', '.join(ways)}; all must have the same")
    way = wanted()
    if way == "nccl":
        return None
    obstacle, sums = _obstacle(hosts, gpus), None
    if not obstacle:
        trouble = ""
        try:
            sums = _allocated(process_group, rank, size, device, way)
        except Exception as failure:
            trouble = _said(failure, rank)
        obstacle = next(filter(None, exchange("memory", trouble)), "")
    if not obstacle and sums is not None:
        try:
            _try(sums)
        except Exception as failure:
            trouble = _said(failure, rank)
        obstacle = next(filter(None, exchange("trial", trouble)), "")
        sums.inboxes.patience = min(int(timeout * LOOKS_A_SECOND), 2**31 - 1)
    if obstacle and way != "auto":
        raise RuntimeError(f"{SWITCH}={way} cannot be in group {name}: {obstacle}; unset it to use NCCL")
    if rank == 0:
        how = f"by NCCL: {obstacle}" if obstacle else f"of floats through symmetric memory, {_table(way, size)}"
        log.info("group %s: all-reduce %s", name, how)
    return None if obstacle else sums


def _obstacle(hosts: list[str], gpus: list[str]) -> str:
    from tp_attention.comm.symmetric.inbox import MOST_RANKS

    if len(set(hosts)) > 1:
        return f"its ranks are on {len(set(hosts))} hosts"
    if len(hosts) > MOST_RANKS:
        return f"it has {len(hosts)} ranks, more than {MOST_RANKS}"
    if len(set(gpus)) < len(gpus):
        return "two ranks share a GPU"
    return ""


def _allocated(process_group: dist.ProcessGroup, rank: int, size: int, device: torch.device, way: str) -> SymmetricSums:
    from tp_attention.comm.symmetric import memory
    from tp_attention.comm.symmetric.inbox import INBOX_BYTES, Inboxes
    from tp_attention.comm.symmetric.overlap import STAGE_BYTES
    from tp_attention.comm.symmetric.sums import SymmetricSums

    whole, keep = memory.allocate(INBOX_BYTES + STAGE_BYTES, process_group, device)
    inboxes = Inboxes(rank, [each[:INBOX_BYTES] for each in whole], patience=-TRIAL_PATIENCE)
    return SymmetricSums(inboxes, [each[INBOX_BYTES:] for each in whole], way, keep)


def _try(sums: SymmetricSums) -> None:
    """Raises RuntimeError unless both kernels give this rank the right sums, twice over."""
    for turn, numel in enumerate(TRIALS):
        generators = [torch.Generator().manual_seed(100 * turn + rank) for rank in range(sums.size)]
        parts = [torch.randn(numel, generator=one).to(sums.device, torch.bfloat16) for one in generators]
        expected = parts[0].float()
        for part in parts[1:]:
            expected = expected + part.float()
        for kernel in (sums.inboxes.one_shot, sums.inboxes.two_shot):
            out = torch.full_like(parts[sums.rank], torch.nan)
            kernel(parts[sums.rank], out)
            if sums.inboxes.failed():
                raise RuntimeError(f"another rank's values did not come ({kernel.__name__}, {numel} values)")
            if not torch.equal(out, expected.to(torch.bfloat16)):
                raise RuntimeError(f"the sum of {numel} values by {kernel.__name__} is wrong")


def _table(way: str, size: int) -> str:
    from tp_attention.comm.symmetric.sums import ONE_SHOT_BYTES

    if way != "auto":
        return f"{way} because of {SWITCH}"
    most = ONE_SHOT_BYTES[size]
    return f"one shot{'' if most is None else f' up to {most >> 10} KiB, then two'} as the table says for {size} GPUs"


def _said(failure: Exception, rank: int) -> str:
    return f"rank {rank}: {type(failure).__name__}: {' '.join(str(failure).split())[:200]}"


def _host() -> str:
    """What ranks of one running host have in common, also where several containers have one name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
