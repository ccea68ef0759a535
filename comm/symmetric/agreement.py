"""Whether a group sums through symmetric memory: every rank can, has tried it and got the right sums, or none does.

TP_ATTENTION_ALL_REDUCE=auto|nccl|one_shot|two_shot, the same on all ranks, chooses; what cannot be done then is an
error, while "auto" says in the log why NCCL is used instead.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from tp_attention.comm import stores
from tp_attention.comm.collectives import add_up
from tp_attention.comm.heartbeat import MARGIN
from tp_attention.comm.symmetric import AUTO, NCCL, ONE_SHOT, WAYS, memory
from tp_attention.comm.symmetric.memory import MOST_RANKS

if TYPE_CHECKING:
    from tp_attention.comm.symmetric.sums import SymmetricSums

log = logging.getLogger("tp_attention")

SWITCH = "TP_ATTENTION_ALL_REDUCE"
TRIALS = (64, 70_002, 70_002, 6)  # values of a rank in the trial: both halves of the inboxes are used by every kernel
TRIAL_SECONDS = 60.0  # a rank may have to compile first
LOOKS_A_SECOND = 4_000_000  # at most: so patience is never less than it should be
MOST_LOOKS = 2**31 - 16  # what a kernel counts to, some 10 minutes at least


def wanted() -> str:
    """The way that the environment asks for. Raises ValueError for an unknown one."""
    way = _asked()
    if way not in WAYS:
        raise ValueError(f"{SWITCH}={way} is none of {', '.join(WAYS)}")
    return way


def _asked() -> str:
    return os.environ.get(SWITCH, "") or AUTO


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

    # Whether the way is known is checked later: a rank that raised here would be waited for.
    said = exchange("who", json.dumps((_asked(), _host(), _gpu(device))))
    ways, hosts, gpus = (list(each) for each in zip(*map(json.loads, said), strict=True))
    if len(set(ways)) > 1:
        raise ValueError(f"the ranks of group {name} have {SWITCH}={', '.join(ways)}; all must have the same")
    way = wanted()
    if way == NCCL:
        return None
    obstacle = _obstacle(hosts, gpus)
    mine: Any = None
    sums: SymmetricSums | None = None

    def all_can(step: str, attempt: Callable[[], Any]) -> Any:
        """What attempt() returns, where no rank's raises; else None, and there is an obstacle."""
        nonlocal obstacle
        trouble, result = "", None
        try:
            result = attempt()
        except Exception as failure:
            trouble = f"rank {rank}: {type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
        obstacle = next(filter(None, exchange(step, trouble)), "")
        return None if obstacle else result

    if not obstacle:
        mine = all_can("memory", lambda: _reserved(device, way))
    if not obstacle:  # only now: the ranks meet in it
        sums = all_can("sharing", lambda: _shared(mine, process_group, rank, size, way))
    if not obstacle and sums is not None:
        sums.inboxes.patience = -_looks(min(timeout, TRIAL_SECONDS))
        all_can("trial", functools.partial(_try, sums))
        sums.inboxes.patience = _looks(timeout + MARGIN)
    if obstacle and way != AUTO:
        raise RuntimeError(f"{SWITCH}={way} cannot be in group {name}: {obstacle}; unset it to use NCCL")
    if rank == 0:
        how = f"by NCCL: {obstacle}" if obstacle else f"of floats through symmetric memory, {_table(way, size)}"
        log.info("group %s: all-reduce %s", name, how)
    return None if obstacle else sums


def _obstacle(hosts: list[str], gpus: list[str]) -> str:
    """gpus: for each rank "uuid, what it is"."""
    kinds = {gpu.partition(",")[2] for gpu in gpus}
    if len(set(hosts)) > 1:
        return f"its ranks are on {len(set(hosts))} hosts"
    if len(hosts) > MOST_RANKS:
        return f"it has {len(hosts)} ranks, more than {MOST_RANKS}"
    if len(set(gpus)) < len(gpus):
        return "two ranks share a GPU"
    if len(kinds) > 1:  # how a product is cut follows from the GPU
        return f"its GPUs differ:{' and'.join(sorted(kinds))}"
    return ""


def _looks(seconds: float) -> int:
    return min(int(seconds * LOOKS_A_SECOND), MOST_LOOKS)


def _reserved(device: torch.device, way: str) -> Tensor:
    from tp_attention.comm.symmetric.inbox import INBOX_BYTES
    from tp_attention.comm.symmetric.overlap import STAGE_BYTES

    return memory.reserve(INBOX_BYTES + (0 if way == ONE_SHOT else STAGE_BYTES), device)


def _shared(mine: Tensor, process_group: dist.ProcessGroup, rank: int, size: int, way: str) -> SymmetricSums:
    from tp_attention.comm.symmetric.inbox import INBOX_BYTES, Inboxes
    from tp_attention.comm.symmetric.sums import SymmetricSums

    whole, keep = memory.share(mine, process_group)
    inboxes = Inboxes(rank, [each[:INBOX_BYTES] for each in whole], patience=-1)
    stages = [each[INBOX_BYTES:] for each in whole]
    return SymmetricSums(inboxes, stages if stages[0].numel() else [], way, keep)


def _try(sums: SymmetricSums) -> None:
    """Raises RuntimeError unless every kernel gives this rank the right values, twice over."""
    inboxes = sums.inboxes

    def check(name: str, got: Tensor, expected: Tensor) -> None:
        if inboxes.failed():
            raise RuntimeError(f"another rank's values did not come ({name} of {expected.shape[-1]} values)")
        if not torch.equal(got, expected):
            raise RuntimeError(f"{name} of {expected.shape[-1]} values is wrong")

    for turn, numel in enumerate(TRIALS):
        generators = [torch.Generator().manual_seed(100 * turn + rank) for rank in range(sums.size)]
        parts = torch.stack([torch.randn(numel, generator=one).to(sums.device, torch.bfloat16) for one in generators])
        total = add_up(parts)
        for kernel in (inboxes.one_shot, inboxes.two_shot):
            out = torch.full_like(total, torch.nan)
            kernel(parts[sums.rank], out)
            check(kernel.__name__, out, total)
        rows = torch.full_like(parts, torch.nan)
        rows[sums.rank] = parts[sums.rank]
        inboxes.gather(rows, 1, 1)
        check("gather", rows, parts)


def _table(way: str, size: int) -> str:
    from tp_attention.comm.symmetric.sums import ONE_SHOT_BYTES

    if way != AUTO:
        return f"{way} because of {SWITCH}"
    most = ONE_SHOT_BYTES[size]
    return f"one shot{'' if most is None else f' up to {most >> 10} KiB, then two'} as the table says for {size} GPUs"


def _host() -> str:
    """What ranks of one running host have in common, also where several containers have one name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _gpu(device: torch.device) -> str:
    about = torch.cuda.get_device_properties(device)
    return f"{about.uuid}, {about.name} of {about.multi_processor_count} SMs"
