"""TPGroup: the ranks that share one model, and the transfers that collectives.py is written on.

A transport other than torch.distributed (MPI) is a subclass that overrides the underscored transfers; argument checks
and the order of sums stay in collectives.py. Limit: gloo for CPU tensors, NCCL for CUDA, where floats are summed
through symmetric memory instead if all ranks can.

No collective waits for ever: `transfer`, around each of them, names what failed, and a group that failed once is over.
gloo ends a transfer after `timeout` and when a rank dies; on CUDA heartbeat.py does both, by ending the process.
"""

from __future__ import annotations

import logging
import time
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _abort_process_group

from tp_attention.comm import checks, stores
from tp_attention.comm.heartbeat import PERIOD, Heartbeat

if TYPE_CHECKING:
    from tp_attention.comm.symmetric.sums import SymmetricSums

log = logging.getLogger("tp_attention")

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
RING_BYTES = 256 * 1024  # gloo's gather is a ring of size - 1 turns; for smaller parts the turns are what costs


class CollectiveError(RuntimeError):
    """A transfer or a meeting of ranks failed: another rank died, is late or called something else.

    Names group, rank, operation, shape, dtype and the number that the call has among the group's collectives.
    """


class TPGroup:
    """`size` ranks, of which this process is number `rank`, with tensors on `device`.

    Made by `alone`, `from_process_group` or `from_mesh`; `launch.init` makes those of a whole world. `process_group`
    is None when alone. `ordered`: sums run in fp32 and rank order, the same bits on every rank and in every run.
    `timeout`: seconds that a collective may wait for the other ranks. `checked`: TP_ATTENTION_CHECK was set.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        *,
        name: str,
        backend: str,
        ordered: bool = True,
        timeout: float = 120.0,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.name, self.backend, self.ordered = name, backend, ordered
        self.timeout, self.checked = timeout, checks.wanted()
        self.process_group: Any = None  # dist.ProcessGroup; None when alone or destroyed
        self._owned = False
        self._call = checks.Call()  # the latest
        self._failure = ""  # what ended this group
        self._store: dist.Store | None = None
        self._heartbeat: Heartbeat | None = None
        self.symmetric: SymmetricSums | None = None  # how floats are summed on GPUs of one host

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> TPGroup:
        """The group of one rank: collectives return at once and there is no process group."""
        return cls(0, 1, _indexed(torch.device(device)), name="alone", backend="none")

    @classmethod
    def from_process_group(
        cls,
        process_group: dist.ProcessGroup,
        device: torch.device | str | None = None,
        *,
        name: str | None = None,
        owned: bool = False,
        timeout: float | None = None,
        heartbeat: float | None = None,
        symmetric: bool = True,
    ) -> TPGroup:
        """Wraps a torch process group: gloo for CPU tensors, NCCL for CUDA tensors, or one that has both.

        Every rank of it must call this.

        device: None is this process's current CUDA device where the group has NCCL, else the CPU. owned: destroy()
        destroys the process group too; after a failed collective only that wakes ranks that wait for this one. timeout:
        None is the process group's own, and gloo keeps to that. heartbeat: seconds from beat to beat, 0 for none; None
        is 1 on CUDA, where a rank missed for 7 beats ends the others, and none on the CPU. symmetric: on CUDA, sum
        through symmetric memory where all ranks can (symmetric/agreement.py), which takes 192 MiB of each GPU.

        Raises CollectiveError where a rank does not come, ValueError where this process is no member or the backend
        does not fit, and as agreement.agree.
        """
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise ValueError("this process is not a member of the process group; only its ranks can wrap it")
        # "cuda:nccl", "cpu:gloo,cuda:gloo", "cpu:gloo,cuda:nccl": what moves tensors of each device type
        backends = dict(item.split(":") for item in dist.get_backend_config(process_group).split(","))
        if device is None:
            device = "cuda" if backends.get("cuda") == "nccl" and torch.cuda.is_available() else "cpu"
        device = _indexed(torch.device(device))
        backend = BACKENDS.get(device.type)
        if backend is None or backends.get(device.type) != backend:
            raise ValueError(f"a process group with {backends} cannot serve {device}; use gloo on cpu, nccl on cuda")
        size = dist.get_world_size(process_group)
        name = name or process_group.group_desc or process_group.group_name
        if timeout is None:
            timeout = process_group._get_backend(device).options._timeout.total_seconds()
        group = cls(rank, size, device, name=name, backend=backend, ordered=backend == "gloo", timeout=timeout)
        group.process_group, group._owned = process_group, owned
        if heartbeat is None:
            heartbeat = PERIOD if device.type == "cuda" else 0
        if size > 1 and (heartbeat or device.type == "cuda"):
            store = group._store = stores.private(process_group)
            if heartbeat:
                group._heartbeat = Heartbeat(
                    store, rank, size, name, lambda: group._call, period=heartbeat, timeout=timeout
                )
            if symmetric and device.type == "cuda":
                group._agree(dist.PrefixStore("symmetric", store))
        if not group.ordered and group.symmetric is None and rank == 0 and size > 1:
            log.info("group %s: NCCL's sums over %d ranks are in its own order, not in rank order", name, size)
        return group

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, dim: str | int) -> TPGroup:
        """The ranks with which this process shares one dimension of a DeviceMesh, given by name or index."""
        return cls.from_process_group(mesh.get_group(dim), mesh.device_type, name=f"mesh {dim}")

    def destroy(self, *, abort: bool = False) -> None:
        """Gives back what this group owns. Safe to call twice, and after the default process group is gone.

        abort: after an error, when the other ranks may never come: do not wait for them.
        """
        process_group, self.process_group = self.process_group, None
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat:
            heartbeat.leave(failed=abort)
        symmetric, self.symmetric = self.symmetric, None
        if symmetric is not None:
            symmetric.close(wait=not abort)
        if self._owned and process_group is not None and dist.is_initialized():
            with suppress(ValueError):  # it went with an earlier default group, and this is another
                destroy_process_group(process_group, self.backend, abort)
        if heartbeat:
            heartbeat.stop()  # only now: NCCL waits for the other ranks

    def __enter__(self) -> TPGroup:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        self.destroy(abort=error_type is not None)

    def __repr__(self) -> str:
        state = ", destroyed" if self.size > 1 and self.process_group is None else ""
        return f"TPGroup({self.name}: rank {self.rank} of {self.size} on {self.device}, {self.backend}{state})"

    def _agree(self, store: dist.Store) -> None:
        from tp_attention.comm.symmetric.agreement import agree

        try:
            self.symmetric = agree(self.process_group, store, self.device, self.name, self.timeout)
        except BaseException as error:
            self.destroy(abort=True)
            if isinstance(error, TimeoutError):
                raise CollectiveError(f"rank {self.rank} of {self.size} of group {self.name}: {error}") from error
            raise

    @contextmanager
    def transfer(
        self, operation: str, x: Tensor | None = None, *, free: int | None = None, **arguments: Any
    ) -> Iterator[None]:
        """Around every collective: numbers it, compares it with the other ranks' where checked, and names what fails.

        x: what is sent, of one dtype and shape on all ranks but for dimension `free`. arguments: what else the ranks
        must agree on. Any error inside becomes a CollectiveError and ends the group: its ranks can no longer know which
        bytes belong to which call. Ranks that only disagree may go on.
        """
        if self.size == 1:
            yield
            return
        dtype, shape = (None, ()) if x is None else (x.dtype, x.shape)
        call = checks.Call(self._call.number + 1, operation, dtype, shape, free, arguments)
        if self.process_group is None:
            if self._failure:
                raise CollectiveError(self._named(call, f"the group failed earlier: {self._failure}"))
            raise RuntimeError(f"{operation} on the destroyed group {self.name}; make a new World or TPGroup")
        self._call = call
        start = time.monotonic()
        try:
            difference = checks.difference(self._meet(checks.record(call))) if self.checked else None
            if difference is None:
                yield
        except Exception as error:  # of a compiler too, which may fail on one rank alone
            waited = f"after {time.monotonic() - start:.1f} s of at most {self.timeout:g} s"
            self._failure = self._named(call, f"{waited}: {error}")
            traceback.clear_frames(error.__traceback__)  # torch's own hold the process group, and so its connections
            self.destroy(abort=True)
            raise CollectiveError(self._failure) from error
        if difference is not None:
            raise CollectiveError(self._named(call, f"the ranks disagree: {difference}"))

    def _named(self, call: checks.Call, reason: str) -> str:
        return f"{call} failed on rank {self.rank} of {self.size} of group {self.name}: call {call.number}, {reason}"

    def _meet(self, record: bytes) -> list[bytes]:
        """Every rank's record, all of one length. On CUDA through the store: nothing interrupts a wait in a kernel."""
        if self._store is not None and self.device.type == "cuda":
            key, number = "call {}", self._call.number
            records = stores.exchange(self._store, key.format(number), record, self.rank, self.size, self.timeout)
            self._store.delete_key(f"{key.format(number - 1)}/{self.rank}")  # who came to this call has read the last
            return records
        parts = torch.empty(self.size * len(record), dtype=torch.uint8)
        self._gather(parts, torch.frombuffer(bytearray(record), dtype=torch.uint8))
        return [bytes(part.tolist()) for part in parts.chunk(self.size)]

    # Transfers, for contiguous tensors, size > 1 and inside `transfer`. Frequent ones use the process group itself: the
    # functions of torch.distributed add tens of microseconds, and the gather's name there differs by version.

    def _gather(self, out: Tensor, part: Tensor) -> None:
        """out [size * n] <- part [n] of every rank."""
        if self.backend == "gloo" and self.size > 2 and part.numel() * part.element_size() < RING_BYTES:
            self._exchange(out, part.repeat(self.size))
        else:
            self.process_group._allgather_base(out, part).wait()

    def _exchange(self, out: Tensor, parts: Tensor) -> None:
        """out [size * n] <- chunk `rank` of every rank's parts [size * n]."""
        self.process_group.alltoall_base(out, parts, [], []).wait()

    def _sum(self, x: Tensor) -> None:
        """x <- sum over the ranks, in the backend's own order."""
        self.process_group.allreduce([x]).wait()

    def _broadcast(self, x: Tensor, src: int) -> None:
        dist.broadcast(x, group=self.process_group, group_src=src)

    def _barrier(self) -> None:
        dist.barrier(self.process_group, device_ids=[self.device.index] if self.device.type == "cuda" else None)


# Layers that are given the same process group share one TPGroup, and so one heartbeat.
_wrapped: weakref.WeakValueDictionary[int, TPGroup] = weakref.WeakValueDictionary()  # by the id of what is wrapped


def as_group(group: dist.ProcessGroup | TPGroup | None, device: torch.device | str | None = None) -> TPGroup:
    """A TPGroup for what callers have: one already, a torch (or deepspeed.comm) process group, or None for one rank.

    device: where a rank alone lives, the CPU if None. A process group that was wrapped before, by a TPGroup that is
    still in use, gives the same one. Raises ValueError for anything else, and as TPGroup.from_process_group does.
    """
    if group is None:
        return TPGroup.alone(device or "cpu")
    if isinstance(group, TPGroup):
        return group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{group!r} is no group of ranks; pass a ProcessGroup, a TPGroup, an MPIGroup or None")
    wrapped = _wrapped.get(id(group))
    if wrapped is None or wrapped.process_group is not group:  # None: it was destroyed, and another has its id
        wrapped = _wrapped[id(group)] = TPGroup.from_process_group(group)
    return wrapped


def check_group(group: object) -> None:
    """Raises ValueError for what callers have in a group's place."""
    if not isinstance(group, TPGroup):
        kind = type(group).__name__
        raise ValueError(
            f"a collective takes a TPGroup, not a {kind}; pass world.tp of a World, and comm.as_group(group) for a "
            "ProcessGroup or None"
        )


def destroy_process_group(process_group: dist.ProcessGroup | None, backend: str, abort: bool) -> None:
    """Destroys a process group; None is the default one and with it all others. Only NCCL waits for the other ranks."""
    if abort and "nccl" in backend:
        _abort_process_group(process_group)
    else:
        dist.destroy_process_group(process_group)


def echoes_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone, so that it is not where the trouble began."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CollectiveError | dist.DistError) or "closed by peer" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _indexed(device: torch.device) -> torch.device:
    """`cuda` as `cuda:<current>`, so that a group's device equals its tensors' devices."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
