"""Makes and unmakes torch process groups for launch, which decides what world this is and on which device."""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from tp_attention.comm import checks, stores
from tp_attention.comm.group import BACKENDS, CollectiveError, TPGroup, destroy_process_group
from tp_attention.comm.heartbeat import MARGIN


def initialised() -> bool:
    """Whether this process has a default process group."""
    return dist.is_initialized()


def default_place() -> tuple[int, int]:
    """(rank, size) in the default process group."""
    return dist.get_rank(), dist.get_world_size()


def default_device() -> torch.device:
    """What the default process group serves: this process's current GPU where it has NCCL, else the CPU."""
    has_nccl = "cuda:nccl" in dist.get_backend_config() and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if has_nccl else torch.device("cpu")


def connect(rank: int, size: int, address: str, port: int, *, hosted: bool, timeout: float) -> dist.Store:
    """The store at which the ranks meet. hosted: the launcher runs it; otherwise rank 0 does, until its process ends.

    Raises CollectiveError where none answers in time.
    """
    limit = timedelta(seconds=timeout)
    with _meeting(rank, size, timeout):
        if rank == 0 and not hosted:
            store = _store_on(address, port)
        else:
            store = dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
        store.set_timeout(limit)
        # A rank's n-th world meets the others' n-th: under an older prefix it would find stale addresses.
        turn = store.add(f"tp_attention/turns/{rank}", 1)
    return dist.PrefixStore(f"tp_attention/{turn}", store)


def initialise(rank: int, size: int, device: torch.device, store: dist.Store, *, plan: str, timeout: float) -> None:
    """Makes the default process group. plan: what all ranks must have decided alike, beside TP_ATTENTION_CHECK.

    Raises ValueError where a rank's plan is not rank 0's, and CollectiveError where the ranks do not meet in time.
    """
    if checks.wanted():
        plan += f" with {checks.SWITCH}"
    with _meeting(rank, size, timeout):
        if rank == 0:
            store.set("plan", plan)
        elif (first := store.get("plan").decode()) != plan:
            raise ValueError(f"rank {rank} wants {plan}, but rank 0 wants {first}; all ranks must want the same")
        dist.init_process_group(
            BACKENDS[device.type],
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
        )


@contextmanager
def _meeting(rank: int, size: int, timeout: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CollectiveError(f"rank {rank} of {size} did not meet the others in {timeout:g} s: {reason}") from error


def destroy(*, abort: bool = False) -> None:
    """Unmakes the default process group and with it all others, if there is one. abort: like TPGroup.destroy."""
    if dist.is_initialized():
        destroy_process_group(None, dist.get_backend_config(), abort)


def check_tp(tp: int, size: int) -> None:
    """Raises ValueError where a world of `size` ranks does not divide into models of `tp` ranks."""
    if tp < 1 or size % tp:
        legal = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ValueError(f"tp={tp} does not divide the world of {size} ranks; use tp = {legal}")


def make_mesh(
    tp: int, rank: int, size: int, device: torch.device, timeout: float, heartbeat: float | None = None
) -> tuple[TPGroup, TPGroup]:
    """This rank's tp and dp groups in the mesh rank = dp_rank * tp + tp_rank. Every rank of the world must call it.

    heartbeat: like TPGroup.from_process_group.
    """
    check_tp(tp, size)
    mine: dict[str, TPGroup] = {}
    rows = [("tp", list(range(first, first + tp))) for first in range(0, size, tp)]
    columns = [("dp", list(range(first, size, tp))) for first in range(tp)]
    backend = BACKENDS[device.type]
    limit = timedelta(seconds=timeout + (MARGIN if backend == "nccl" else 0))
    for kind, ranks in rows + columns:  # every rank makes every group, in this order
        process_group, name = None, f"{kind} {ranks}"
        if len(ranks) > 1:
            process_group = dist.new_group(ranks, limit, backend, group_desc=name)
        if rank in ranks:
            mine[kind] = (
                TPGroup.from_process_group(
                    process_group, device, owned=True, timeout=timeout, heartbeat=heartbeat, symmetric=kind == "tp"
                )
                if process_group
                else TPGroup.alone(device)
            )
    return mine["tp"], mine["dp"]


def exchange(key: str, value: bytes, timeout: float) -> list[bytes]:
    """Every rank's value under a key that is used once, through the default group's store: works where groups broke.

    Raises TimeoutError naming the ranks that did not come.
    """
    return stores.exchange(stores.default(), key, value, *default_place(), timeout)


@contextmanager
def hosted_store(listener: socket.socket) -> Iterator[None]:
    """Runs a store on a socket that listens already, so that nobody can take its port in between."""
    port, descriptor = listener.getsockname()[1], listener.detach()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)
    try:
        yield
    finally:
        del store  # ends its thread now: a traceback that keeps this frame would keep the store


def serve(address: str) -> int:
    """Runs a store until this process ends; its port, a free one, and the same one at every call."""
    return _store_on(address, 0).port


@functools.cache  # for the life of the process: a second default group could not listen on the same port at once
def _store_on(address: str, port: int) -> dist.TCPStore:
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False)
