"""init(): joins this process's world, picks its device and makes its tp x dp groups.

Limit: one kind of device for the whole world; a host with too few GPUs puts all of its ranks on the CPU.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

import torch

from tp_attention.comm import TPGroup, rendezvous
from tp_attention.comm import process_groups as groups
from tp_attention.launch import environment

log = logging.getLogger("tp_attention")


@dataclass(frozen=True)
class World:
    """This process's place among all: rank = dp.rank * tp.size + tp.rank. A context manager, or call close()."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    launcher: str
    tp: TPGroup
    dp: TPGroup
    _owner: bool = field(default=False, repr=False)  # of the default process group

    @classmethod
    def alone(cls, device: torch.device | str | None = None) -> World:
        """A world of this process only, whatever launched it: no process group, nothing to close."""
        place = environment.read()
        chosen = _pick_device(device, place.local_rank, place.local_size)
        return cls(0, 1, place.local_rank, chosen, "none", TPGroup.alone(chosen), TPGroup.alone(chosen))

    def close(self, *, abort: bool = False) -> None:
        """Destroys this World's groups and, where init made it, the default process group with all others in it.

        Safe to call twice and, with several Worlds in a process, in any order. abort: after an error, when the other
        ranks may never come: do not wait for them.
        """
        self.tp.destroy(abort=abort)
        self.dp.destroy(abort=abort)
        if self._owner:
            groups.destroy(abort=abort)

    def __enter__(self) -> World:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        self.close(abort=error_type is not None)


def init(
    tp: int | None = None,
    *,
    device: torch.device | str | None = None,
    timeout: float = 120.0,
    heartbeat: float | None = None,
) -> World:
    """Joins the world that the launcher's environment describes; all its ranks must call init, with the same tp.

    A process that nobody launched is a world of one. Where a default process group exists, the caller's or an earlier
    World's, that is the world, and closing this one leaves it in place.

    tp: ranks per model, None for all. device: None is CUDA where this host has a GPU for each of its ranks, else the
    CPU; in an existing process group, what its backend serves. timeout: seconds for the ranks to meet, and for every
    collective. heartbeat: seconds from beat to beat, by which ranks on CUDA notice within 10 s that another died; None
    is 1 on CUDA and 0, no heartbeat, on the CPU, where gloo notices by itself.

    Raises ValueError for a partial environment, a tp that does not divide the world, ranks that want different things
    and a device="cuda" without a GPU per rank; RuntimeError under an mpirun to which mpi4py does not belong;
    CollectiveError where the ranks do not meet in time.
    """
    place = environment.read()
    joins = groups.initialised()
    rank, size = groups.default_place() if joins else (place.rank, place.size)
    tp = size if tp is None else tp
    groups.check_tp(tp, size)
    if joins and device is None:
        device = groups.default_device()
    chosen = _pick_device(device, place.local_rank, place.local_size)
    _share_cores(place)
    owner = size > 1 and not joins
    if owner:
        address, port, hosted = place.address, place.port, place.hosted
        if not address:
            open_mpi, one_host = place.launcher == environment.OPENMPI.name, place.local_size == size
            address, port = rendezvous.settle(rank, size, open_mpi=open_mpi, one_host=one_host, timeout=timeout)
            hosted = True
        store = groups.connect(rank, size, address, port, hosted=hosted, timeout=timeout)
        groups.initialise(rank, size, chosen, store, plan=f"{chosen.type} and tp={tp}", timeout=timeout)
    try:
        tp_group, dp_group = groups.make_mesh(tp, rank, size, chosen, timeout, heartbeat)
    except BaseException:
        if owner:
            groups.destroy(abort=True)
        raise
    log.info("rank %d of %d on %s, tp=%d, launcher %s", rank, size, chosen, tp, place.launcher)
    return World(rank, size, place.local_rank, chosen, place.launcher, tp_group, dp_group, owner)


def _share_cores(place: environment.Environment) -> None:
    """torch threads of this rank where its launcher left them to it: as many on every rank as there are cores is slow.

    torchrun and our own spawn see to them.
    """
    if place.local_size > 1 and place.launcher != environment.TORCHRUN.name and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_size))


def _pick_device(device: torch.device | str | None, local_rank: int, local_size: int) -> torch.device:
    """This rank's device, made current if it is a GPU."""
    gpus = torch.cuda.device_count()
    if device is None:
        device = "cuda" if gpus >= local_size else "cpu"
        if 0 < gpus < local_size and local_rank == 0:
            log.warning("%d GPUs are too few for the %d ranks of this host: all run on the CPU", gpus, local_size)
    device = torch.device(device)
    if device.type == "cuda":
        if gpus < local_size:
            raise ValueError(f"{local_size} ranks on this host need a GPU each and it has {gpus}; use device='cpu'")
        if device.index is None:
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return device
