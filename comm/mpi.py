"""MPIGroup: TPGroup's collectives over mpi4py, for CPU tensors on clusters whose only fabric is MPI.

MPI moves bytes, straight from and to the tensors' memory, and never adds: collectives.py sums what was gathered, in
fp32 and rank order (OpenMPI's own sum of bf16 is inf). Nothing here imports mpi4py, and so initialises MPI, before the
first group is made; mpi4py finalises it at exit.

A rank that dies ends the whole job: mpirun says which, and why. One that never comes is a CollectiveError after the
group's time limit; a process that leaves with a transfer still under way ends the job, since MPI would wait for it for
ever. Start scripts with `mpirun -n 4 python -m mpi4py script.py`, and an error that nobody catches ends it at once.
Limit: all hosts of one byte order, and one thread at a time per group.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tp_attention.comm.collectives import all_gather, barrier
from tp_attention.comm.group import TPGroup
from tp_attention.comm.process_groups import check_tp

CHUNK_BYTES = 1 << 30  # of a rank's part, in one call: most MPI libraries count in 32 bits
TIMEOUT = 120.0  # seconds, as of launch.init

# Transfers that took too long, with their tensors: MPI may yet read and write these.
_unfinished: list[tuple[Any, tuple[Tensor, ...]]] = []


class MPIGroup(TPGroup):
    """A TPGroup of CPU tensors on an MPI communicator. Made by `world`, `mesh` or `from_comm`; always ordered."""

    _mpi: Any  # the module mpi4py.MPI

    @classmethod
    def from_comm(
        cls, comm: Any, *, name: str | None = None, owned: bool = False, timeout: float = TIMEOUT
    ) -> MPIGroup:
        """Wraps an mpi4py intracommunicator that this process is in. Meets nobody, so that it cannot wait.

        owned: destroy() frees the communicator. timeout: seconds for every collective. Collectives of the caller's own
        on the same communicator are well as long as all ranks call them in the same order.
        """
        mpi = load()
        if not isinstance(comm, mpi.Intracomm):
            raise ValueError(f"from_comm takes an mpi4py intracommunicator that this process is in, not {comm!r}")
        name = name or comm.name or "MPI"
        group = cls(comm.rank, comm.size, torch.device("cpu"), name=name, backend="mpi", timeout=timeout)
        group.process_group, group._owned, group._mpi = comm, owned, mpi
        return group

    @classmethod
    def world(cls, *, timeout: float = TIMEOUT) -> MPIGroup:
        """All ranks that mpirun started, on a communicator of their own; without mpirun a world of one.

        All of them must call it. Raises RuntimeError where mpi4py or MPI is missing, CollectiveError where the ranks do
        not meet within timeout.
        """
        comm = load().COMM_WORLD
        barrier(cls.from_comm(comm, name="MPI world", timeout=timeout))  # Dup has no time limit
        return cls.from_comm(comm.Dup(), name="MPI world", owned=True, timeout=timeout)

    @classmethod
    def mesh(cls, tp: int, *, comm: Any = None, timeout: float = TIMEOUT) -> tuple[MPIGroup, MPIGroup]:
        """This rank's tp and dp groups in the mesh rank = dp_rank * tp + tp_rank of comm, None for all ranks.

        All ranks of comm must call it. Raises like `world`, ValueError also for a tp that does not divide the ranks or
        is not every rank's.
        """
        comm = load().COMM_WORLD if comm is None else comm
        whole = cls.from_comm(comm, name="MPI mesh", timeout=timeout)
        asked = all_gather(torch.tensor([tp]), whole, sizes=[1] * whole.size).tolist()
        if len(set(asked)) > 1:
            raise ValueError(f"the ranks want tp={asked}; all must want the same")
        check_tp(tp, whole.size)
        row, column = divmod(whole.rank, tp)
        rows = comm.Split(row, whole.rank), f"tp {list(range(row * tp, (row + 1) * tp))}"
        columns = comm.Split(column, whole.rank), f"dp {list(range(column, whole.size, tp))}"
        tp_group, dp_group = (cls.from_comm(c, name=n, owned=True, timeout=timeout) for c, n in (rows, columns))
        return tp_group, dp_group

    def destroy(self, *, abort: bool = False) -> None:
        """Frees an owned communicator. Safe to call twice and in any order; waits for no other rank."""
        comm, owned, self._owned = self.process_group, self._owned, False
        super().destroy(abort=abort)  # lets go of what it does not own
        if owned and comm is not None and not abort and not self._mpi.Is_finalized():
            comm.Free()

    def _gather(self, out: Tensor, part: Tensor) -> None:
        for start, count, block in self._chunks(part.nbytes):
            sent = [self._memory(part, start), count, self._mpi.BYTE]
            self._finish(self._comm().Iallgather(sent, [self._memory(out, start), *block]), out, part)

    def _exchange(self, out: Tensor, parts: Tensor) -> None:
        for start, _, block in self._chunks(parts.nbytes // self.size):
            sent, received = ([self._memory(x, start), *block] for x in (parts, out))
            self._finish(self._comm().Ialltoall(sent, received), out, parts)

    def _broadcast(self, x: Tensor, src: int) -> None:
        for start, count, _ in self._chunks(x.nbytes):
            self._finish(self._comm().Ibcast([self._memory(x, start), count, self._mpi.BYTE], src), x)

    def _barrier(self) -> None:
        self._finish(self._comm().Ibarrier())

    def _comm(self) -> Any:
        if not self.process_group:
            raise RuntimeError("its communicator was freed")  # where OpenMPI would crash
        return self.process_group

    def _chunks(self, size: int) -> Iterator[tuple[int, int, tuple[int, Any]]]:
        """Cuts a part of `size` bytes for several calls: (start, bytes, the chunk among parts that lie `size` apart).

        The last is a count and an MPI datatype.
        """
        if size <= CHUNK_BYTES:
            yield 0, size, (size, self._mpi.BYTE)
            return
        for start in range(0, size, CHUNK_BYTES):
            count = min(CHUNK_BYTES, size - start)
            plain = self._mpi.BYTE.Create_contiguous(count)
            spaced = plain.Create_resized(0, size).Commit()
            plain.Free()
            try:
                yield start, count, (1, spaced)
            finally:
                spaced.Free()  # MPI keeps it for as long as a transfer needs it

    def _memory(self, x: Tensor, start: int) -> Any:
        """The tensor's own memory from byte `start` on; with its whole length, which mpi4py wants of spaced parts."""
        return self._mpi.buffer.fromaddress(x.data_ptr() + start, x.nbytes)

    def _finish(self, request: Any, *tensors: Tensor) -> None:
        """Waits, with a limit, which MPI's own calls do not have."""
        deadline = time.monotonic() + self.timeout
        while not request.Test():  # like MPI's wait; a sleep in between costs 50 us
            if time.monotonic() > deadline:
                if not _unfinished:
                    atexit.register(_leave, self._mpi)
                _unfinished.append((request, tensors))
                self._owned = False  # not to be freed any more
                raise TimeoutError("not all ranks came")


def _leave(mpi: Any) -> None:
    """Runs before mpi4py finalises MPI, which would wait for ranks that may never come."""
    if not mpi.Is_finalized() and not all(request.Test() for request, _ in _unfinished):
        sys.stdout.flush()
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(1)


def load(who: str = "MPIGroup", instead: str = "", *, start: bool = True) -> Any:
    """The module mpi4py.MPI. start=False: MPI need not run yet. Raises RuntimeError where that is not to be had."""
    try:
        import mpi4py

        if not start:
            mpi4py.rc(initialize=False, finalize=True)  # without effect where MPI runs already
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library
        hint = f"pip install 'tp_attention[mpi]' brings both{instead}"
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"{who} needs mpi4py and an MPI library; {hint} ({reason})") from error
    if MPI.Is_finalized() or (start and not MPI.Is_initialized()):
        state = "finalised" if MPI.Is_finalized() else "not initialised (mpi4py.rc.initialize is False)"
        raise RuntimeError(f"MPI is {state}; {who} needs it between MPI.Init() and MPI.Finalize()")
    return MPI
