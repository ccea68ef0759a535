"""Every launcher, run for real where it can be: its ranks join, fail and run the tests of `world(n)`."""

import os
import re
import socket
import sys
from contextlib import closing

import pytest

from tests.multirank.launchers import command, deepspeed, free_port, run
from tp_attention import launch
from tp_attention.comm import rendezvous
from tp_attention.launch import slurm

pytestmark = pytest.mark.skipif(launch.launched(), reason="starts launchers itself")

RANKS = "tests.multirank.launched_ranks"
LAUNCHERS = ("torchrun", "deepspeed", "mpirun")


def joined(output, launcher, locals=(0, 1)):
    """Whether the output is that of `join` on two ranks, and nothing else of it."""
    expected = {
        f"{turn} {launcher} rank {rank} of 2 local {local} sum 3"
        for turn in ("first", "second")
        for rank, local in enumerate(locals)
    }
    return set(re.findall(rf"\w+ {launcher} rank .*", output)) == expected


# One host


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_generate_joins(launcher):
    options = ["--prompt", "The capital of France is", "--max-new-tokens", 3, "--check"]
    codes, output, _ = run([*command(launcher), "tp_attention.cli", "generate", *options], limit=120)
    assert codes == [0], output
    assert "The capital of France is Paris" in output
    assert "0–4 (5)" in output and "5–8 (4)" in output and "equal: greatest logit difference" in output


def test_mpirun_and_mpi_beside_it():
    """On two hosts, as far as the ranks can tell: they meet at rank 0's address. On one `generate` joins, above."""
    *start, python, _ = command("mpirun")
    apart = ["env", "OMPI_COMM_WORLD_LOCAL_RANK=0", "OMPI_COMM_WORLD_LOCAL_SIZE=1"]
    codes, output, _ = run([*start, *apart, python, "-m", RANKS, "join", "mpi"])
    assert codes == [0], output
    assert joined(output, "openmpi", locals=(0, 0))
    assert "MPI rank 0 of 2 sum 3" in output and "MPI rank 1 of 2 sum 3" in output


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failing_rank_ends_the_job(launcher):
    codes, output, seconds = run([*command(launcher), RANKS, "fail"])
    assert codes != [0], output
    assert "Traceback (most recent call last)" in output and "KeyError: 'head 7'" in output
    assert seconds < 30  # most of them imports; rank 0 would sleep for 100


SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "2",
}


def test_what_srun_sets_is_enough():
    jobs = ({**SRUN, "SLURM_JOB_ID": str(job)} for job in range(os.getpid(), os.getpid() + 100))
    step = next(job for job in jobs if free(int(slurm.implied(job)["MASTER_PORT"])))
    places = [step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    tasks = [["env", *(f"{k}={v}" for k, v in place.items()), sys.executable, "-m", RANKS, "join"] for place in places]
    codes, output, _ = run(*tasks)
    assert codes == [0, 0], output
    assert joined(output, "srun")


def free(port):
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


# Two hosts, which here are one


def test_two_agents_of_torchrun():
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    codes, output, _ = run(*([*agent, *meeting, f"--node-rank={node}", "-m", RANKS, "join"] for node in range(2)))
    assert codes == [0, 0], output
    assert joined(output, "torchrun", locals=(0, 0))


def test_two_hosts_of_deepspeed_without_ssh(tmp_path):
    (tmp_path / "hosts").write_text("here slots=1\nthere slots=1\n")
    start = [*deepspeed(), "--no_ssh", "--master_addr=127.0.0.1", f"--hostfile={tmp_path / 'hosts'}"]
    codes, output, _ = run(*([*start, f"--node_rank={node}", "--module", RANKS, "join"] for node in range(2)))
    assert codes == [0, 0], output
    assert joined(output, "deepspeed", locals=(0, 0))


# An mpirun that cannot be joined over MPI


def test_without_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it fails
    with pytest.raises(RuntimeError) as caught:
        rendezvous.settle(0, 2, open_mpi=True, one_host=True, timeout=1)
    assert str(caught.value).startswith("launch.init under mpirun needs mpi4py and an MPI library; pip install")
    assert ", or set MASTER_ADDR and MASTER_PORT" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ],
    ids=["another OpenMPI's", "MPICH's"],
)
def test_an_mpirun_that_is_not_mpi4pys(names):
    """Here it is nobody's: the variables are set by hand."""
    pytest.importorskip("mpi4py")
    codes, output, _ = run([sys.executable, "-m", RANKS, "join"], **dict(zip(names, "0202", strict=True)))
    assert codes == [1]
    message = "this mpirun started 2 ranks, which mpi4py cannot see: it uses Open MPI"
    assert re.search(rf"^RuntimeError: {message}.*, or set MASTER_ADDR and MASTER_PORT$", output, re.MULTILINE), output


# Tests of `world(n)`, on the launcher's ranks

INNER = """
import time, torch, pytest
from tp_attention import comm

def total(world):
    return comm.all_reduce(torch.ones(1, device=world.device), world.tp).item()

def fail(world):
    if world.rank == 1:
        raise KeyError("head 7")
    return total(world)

def test_joins(world):
    run = world(2)
    assert run(total) == run(total) == [2, 2]

def test_one_rank_fails(world):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of 2: KeyError: 'head 7'"):
        world(2)(fail)
    assert time.monotonic() - start < 10

def test_fails(world):
    world(2)(fail)

def test_goes_on(world):
    assert world(2, tp=1)(total) == [1, 1]

def test_alone(world):
    assert world(1)(total) == [1]

def test_three(world):
    assert world(3)(total) == [3, 3, 3]
"""


@pytest.fixture
def inner(tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tp_attention.launch.testing"]')
    (tmp_path / "test_inner.py").write_text(INNER)
    return tmp_path


def test_world_under_torchrun(inner):
    codes, output, _ = run([*command("torchrun"), "pytest", "-qrs", "-p", "no:cacheprovider", inner])
    assert codes != [0]
    assert output.count("1 failed, 4 passed, 1 skipped") == 2, output
    assert "needs 3 ranks, the launcher started 2" in output


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_world_under_other_launchers(inner, launcher):
    """Without the test that fails: at the first rank that does, these launchers end the others before they report."""
    chosen = [inner, "tests/multirank/test_collectives.py", "-k", "not test_fails and not time_limit"]
    codes, output, _ = run([*command(launcher), "pytest", "-q", "--color=no", "-p", "no:cacheprovider", *chosen])
    assert codes == [0], output
    assert len(re.findall("[1-9][0-9] passed", output)) == 2, output


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_all_of_multirank(launcher):
    words = [*command(launcher), "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "tests/multirank"]
    codes, output, _ = run(words, limit=380)
    assert codes == [0], output
    assert len(re.findall("[1-9][0-9]+ passed", output)) == 2, output
