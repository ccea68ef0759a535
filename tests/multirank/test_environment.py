"""The environment table: what each launcher sets, what is missing, which launcher counts, and what SLURM implies."""

import os
import sys

import pytest

from tp_attention import cli, launch
from tp_attention.launch import environment, slurm
from tp_attention.launch import world as world_module
from tp_attention.launch.environment import Environment

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
DEEPSPEED = TORCHRUN | {"LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
del DEEPSPEED["LOCAL_WORLD_SIZE"]
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_JOB_ID": "100",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
MEETING = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def place(launcher, address="", port=0):
    return Environment(launcher, 3, 4, 1, 2, address, port)


@pytest.mark.parametrize(
    "env, expected",
    [
        (TORCHRUN, place("torchrun", "node0", 29500)),
        (DEEPSPEED, place("deepspeed", "node0", 29500)),
        (OPENMPI, place("openmpi")),
        (OPENMPI | MEETING, place("openmpi", "node0", 29500)),
        (MPICH, place("mpich")),
        (MPICH | MEETING, place("mpich", "node0", 29500)),
        (SRUN, place("srun", "node07", 13102)),
        (SRUN | MEETING, place("srun", "node0", 29500)),
        (SRUN | {"MASTER_PORT": "29500"}, place("srun", "node07", 29500)),
        # Several: the innermost.
        (TORCHRUN | SRUN, place("torchrun", "node0", 29500)),
        (DEEPSPEED | SRUN | OPENMPI, place("deepspeed", "node0", 29500)),
        (OPENMPI | SRUN | {"SLURM_PROCID": "0"}, place("openmpi")),
        (MPICH | SRUN | {"SLURM_PROCID": "0"}, place("mpich")),
        # Others' names beside one's own: by deepspeed.init_distributed under mpirun, by srun --mpi=pmi2, by a script.
        (OPENMPI | MEETING | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, place("openmpi", "node0", 29500)),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, place("srun", "node07", 13102)),
        (SRUN | MEETING | {"RANK": "3", "WORLD_SIZE": "4"}, place("srun", "node0", 29500)),
    ],
)
def test_place(env, expected):
    assert environment.read(env) == expected
    assert launch.launched(env)
    ours = Environment("torchrun", 1, 2, 1, 2, "127.0.0.1", 5000, hosted=True)
    assert environment.read(env | ours.variables()) == ours, "spawn within it"


SHELL = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"MASTER_ADDR": "left over"},
        SHELL | {"SLURM_PROCID": "0"},  # of sbatch
        SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_ID": str(0xFFFFFFFA)},  # of salloc, where that starts a step
        SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1"},  # of srun --pty
        {name: value for name, value in SRUN.items() if name != "SLURM_PROCID"},
    ],
)
def test_launched_by_nothing(env):
    assert environment.read(env) == Environment()
    assert not launch.launched(env)


def partial():
    for name, env in (("torchrun", TORCHRUN), ("deepspeed", DEEPSPEED)):
        for missing in env:
            if not missing.startswith("CROSS"):
                yield name, env, missing
    for name, env in (("openmpi", OPENMPI), ("mpich", MPICH)):
        for missing in env | MEETING:
            yield name, env | MEETING, missing
    for missing in ("SLURM_NTASKS", "SLURM_LOCALID"):
        yield "srun", SRUN, missing


@pytest.mark.parametrize("launcher, env, missing", list(partial()))
def test_partial_environment_names_the_launcher_and_what_is_missing(launcher, env, missing):
    for rest in ({name: value for name, value in env.items() if name != missing}, env | {missing: ""}):
        with pytest.raises(
            ValueError, match=f"^{launcher} environment is partial: .* set but {missing} missing; "
        ) as caught:
            environment.read(rest)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source, missing",
    [
        ("SLURM_STEP_NODELIST", "MASTER_ADDR"),
        ("SLURM_JOB_ID", "MASTER_PORT"),
        ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
    ],
)
def test_what_srun_does_not_imply(source, missing):
    with pytest.raises(ValueError, match=f"srun environment is partial: .* {missing} missing"):
        environment.read({name: value for name, value in SRUN.items() if name != source})


@pytest.mark.parametrize(
    "env, match",
    [
        (TORCHRUN | {"RANK": "4"}, "torchrun environment: rank 4 of 4"),
        (DEEPSPEED | {"LOCAL_RANK": "2"}, "deepspeed environment: .* local rank 2 of 2"),
        (TORCHRUN | {"WORLD_SIZE": "x"}, "WORLD_SIZE='x' of the torchrun environment is not a number"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(y2)"}, r"SLURM_NTASKS_PER_NODE='2\(y2\)' of the srun environment"),
        (OPENMPI | {"RANK": "0"}, "openmpi environment: rank 3 of 4, but RANK=0 is set too; unset it"),
        (SRUN | {"WORLD_SIZE": "2"}, "srun environment: rank 3 of 4, but WORLD_SIZE=2 is set too; unset it"),
    ],
)
def test_contradictory_environment(env, match):
    with pytest.raises(ValueError, match=match) as caught:
        environment.read(env)
    assert "\n" not in str(caught.value)


def test_torchruns_own_store():
    assert environment.read(TORCHRUN | {environment.HOSTED: "True"}).hosted
    assert not environment.read(DEEPSPEED | {environment.HOSTED: "True"}).hosted  # of a torchrun around it


# SLURM's own forms


@pytest.mark.parametrize(
    "hosts, first",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-005,9],gpu1", "node003"),
        ("gpu1,node[003-005,9]", "gpu1"),
        ("r[1-2]n[3,5-7]-ib.cluster", "r1n3-ib.cluster"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_first_host(hosts, first):
    assert slurm.first_host(hosts) == first


@pytest.mark.parametrize(
    "tasks, node, here",
    [
        ("4", "0", 4),
        ("4", "", 4),
        ("2(x3),1", "0", 2),
        ("2(x3),1", "2", 2),
        ("2(x3),1", "3", 1),
        ("3,1(x2),5", "3", 5),
        ("2(x3)", "", 2),
        ("2(x3),1", "", None),
        ("2(x3),1", "4", None),
        ("2x3", "0", None),
    ],
)
def test_tasks_on_host(tasks, node, here):
    assert slurm.tasks_on_host(tasks, node) == here


def test_a_steps_variables_count_before_the_jobs():
    job = {"SLURM_JOB_NODELIST": "other[1-9]", "SLURM_TASKS_PER_NODE": "8(x9)", "SLURM_NTASKS_PER_NODE": "8"}
    assert environment.read(SRUN | job) == environment.read(SRUN)
    without = {
        name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP_") or name == "SLURM_STEP_ID"
    }
    assert environment.read(without | job) == Environment("srun", 3, 4, 1, 8, "other1", 13102)
    del job["SLURM_TASKS_PER_NODE"]
    assert environment.read(without | job).local_size == 8


def test_ports_of_jobs_and_steps_side_by_side_differ():
    ports = {
        slurm.implied({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in range(9_999_990, 10_000_010)
        for step in range(10)
    }
    assert len(ports) == 200
    assert all(10_000 <= int(port) < 30_000 for port in ports)


# The local rank on the command line


@pytest.mark.parametrize(
    "given, kept, local_rank",
    [
        (["--local_rank=1", "generate", "--tp", "2"], ["generate", "--tp", "2"], "1"),
        (["--local-rank=0"], [], "0"),
        (["--local_rank", "1", "generate"], ["generate"], "1"),
        (["generate", "--prompt", "--local_rank=1"], ["generate", "--prompt", "--local_rank=1"], None),
        (["--local_ranks=1"], ["--local_ranks=1"], None),
        (["--local_rank=x"], ["--local_rank=x"], None),
        (["--local_rank"], ["--local_rank"], None),
        ([], [], None),
    ],
)
def test_local_rank_before_the_arguments(given, kept, local_rank, monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: None)
    for before, after in (({}, local_rank), ({"LOCAL_RANK": "7"}, "7")):
        monkeypatch.setattr(sys, "argv", ["tp-attention", *given])
        monkeypatch.setattr(os, "environ", before)
        cli.main()
        assert sys.argv == ["tp-attention", *kept]
        assert os.environ.get("LOCAL_RANK") == after


@pytest.mark.parametrize(
    "launcher, local_size, variables, threads",
    [
        ("openmpi", 2, {}, 4),
        ("deepspeed", 3, {}, 2),
        ("mpich", 20, {}, 1),
        ("srun", 1, {}, None),
        ("torchrun", 2, {}, None),
        ("openmpi", 2, {"OMP_NUM_THREADS": "3"}, None),
    ],
)
def test_ranks_of_a_host_share_its_cores(monkeypatch, launcher, local_size, variables, threads):
    asked = []
    monkeypatch.setattr(world_module.torch, "set_num_threads", asked.append)
    monkeypatch.setattr(world_module.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(world_module.os, "environ", variables)
    world_module._share_cores(Environment(launcher, 0, local_size, 0, local_size))
    assert asked == ([] if threads is None else [threads])
