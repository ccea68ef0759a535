"""Where mpirun's ranks meet. Other launchers name an address and a port; here rank 0 finds them and tells by MPI.

Limit: of a host with several networks the address is that of its default route; MASTER_ADDR and MASTER_PORT overrule.
"""

from __future__ import annotations

import functools
import socket
import sys
from typing import Any

import torch

from tp_attention.comm import process_groups as groups
from tp_attention.comm.collectives import broadcast
from tp_attention.comm.mpi import MPIGroup, load

INSTEAD = ", or set MASTER_ADDR and MASTER_PORT"


def settle(rank: int, size: int, *, open_mpi: bool, one_host: bool, timeout: float) -> tuple[str, int]:
    """Address and port of a store that rank 0 runs from now until it ends. All ranks must call it.

    open_mpi: whether it was that MPI's mpirun that started us. one_host: whether all ranks are on this one. Raises
    RuntimeError where mpi4py or MPI is missing or is not this mpirun's, CollectiveError where the ranks do not come
    within timeout.
    """
    note = torch.zeros(300, dtype=torch.uint8)  # a host's name has at most 253 characters
    if rank == 0:  # before MPI runs: what fails until then ends the job at once
        address = "127.0.0.1" if one_host else own_address()
        text = f"{address} {groups.serve(address)}".encode()
        note[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    mpi = load("launch.init under mpirun", INSTEAD, start=False)
    foreign = (mpi.get_vendor()[0] == "Open MPI") != open_mpi  # asked first: MPICH ends a process of OpenMPI's mpirun
    if not foreign and not mpi.Is_initialized():
        mpi.Init_thread()
    if foreign or mpi.COMM_WORLD.size != size:  # of its kind, but of another version: each rank finds itself alone
        library = " ".join(mpi.Get_library_version().replace("\n", ",").split(",")[0].split())
        raise RuntimeError(
            f"this mpirun started {size} ranks, which mpi4py cannot see: it uses {library}; start with the "
            f"mpirun of that MPI{INSTEAD}"
        )
    group = MPIGroup.from_comm(mpi.COMM_WORLD, name="MPI world", timeout=timeout)
    _end_all_on_error()
    address, port = bytes(broadcast(note, group).tolist()).decode().rstrip("\0").split()
    return address, int(port)


def own_address() -> str:
    """This host's address on the interface of its default route; its name where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks for the route to somewhere else
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


@functools.cache  # once
def _end_all_on_error() -> None:
    """Lets an error that nobody catches end the whole job, as `python -m mpi4py` does: MPI's end, at exit, would wait
    for the other ranks, and they for this one."""
    from mpi4py.run import set_abort_status

    report = sys.excepthook

    def report_and_abort(*error: Any) -> None:
        report(*error)
        set_abort_status(1)  # at exit

    sys.excepthook = report_and_abort
