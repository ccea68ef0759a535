"""The launchers we know and the variables in which each tells a process its place: one table, a row each.

Limit: reading asks nobody. mpirun's ranks may find no address here; launch.init then lets them settle on one over MPI.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tp_attention.launch import slurm

Variables = Mapping[str, str]
MEETING = ("MASTER_ADDR", "MASTER_PORT")
HOSTED = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun's: True where its agent runs the store at which the ranks meet


def _any_of(*names: str) -> Callable[[Variables], bool]:
    return lambda env: any(name in env for name in names)


@dataclass(frozen=True)
class Launcher:
    """Names of a launcher's variables, and when they mean that it started this process.

    started: by what no other launcher sets. hinted: by what others set too, so that it counts where no row is sure.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    started: Callable[[Variables], bool]
    hinted: Callable[[Variables], bool] = lambda env: False
    implied: Callable[[Variables], dict[str, str]] = lambda env: {}  # variables that follow from others
    names_meeting: bool = True  # False: where the ranks meet is the user's to say, or theirs to settle

    @property
    def place(self) -> tuple[str, str, str, str]:
        return self.rank, self.size, self.local_rank, self.local_size


TORCHRUN = Launcher(
    name="torchrun",
    rank="RANK",
    size="WORLD_SIZE",
    local_rank="LOCAL_RANK",
    local_size="LOCAL_WORLD_SIZE",
    started=_any_of("LOCAL_WORLD_SIZE"),
    hinted=_any_of("RANK", "WORLD_SIZE", "LOCAL_RANK"),
)
DEEPSPEED = Launcher(
    name="deepspeed",
    rank="RANK",
    size="WORLD_SIZE",
    local_rank="LOCAL_RANK",
    local_size="LOCAL_SIZE",
    started=_any_of("LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
)
OPENMPI = Launcher(
    name="openmpi",
    rank="OMPI_COMM_WORLD_RANK",
    size="OMPI_COMM_WORLD_SIZE",
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    started=_any_of("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    names_meeting=False,
)
MPICH = Launcher(
    name="mpich",
    rank="PMI_RANK",
    size="PMI_SIZE",
    local_rank="MPI_LOCALRANKID",
    local_size="MPI_LOCALNRANKS",
    started=_any_of("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    hinted=lambda env: env.get("PMI_SIZE", "1") != "1",  # srun --mpi=pmi2 sets it too: 1 for `--pty bash`
    names_meeting=False,
)
SRUN = Launcher(
    name="srun",
    rank="SLURM_PROCID",
    size="SLURM_NTASKS",
    local_rank="SLURM_LOCALID",
    local_size="SLURM_NTASKS_PER_NODE",
    started=slurm.is_task,
    implied=slurm.implied,
)
# From the inside out, for a process inherits the variables of all. torchrun, deepspeed and our own spawn, which sets
# torchrun's, start ranks within jobs of the others, hardly ever the other way round; mpirun runs within what SLURM
# allocated, and reaches other hosts by srun.
LAUNCHERS = (TORCHRUN, DEEPSPEED, OPENMPI, MPICH, SRUN)


@dataclass(frozen=True)
class Environment:
    """This process's place. `launcher` is "none" for a process that nobody launched: rank 0 of 1.

    address: "" where the launcher names none.
    """

    launcher: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0
    hosted: bool = False

    def variables(self) -> dict[str, str]:
        """The inverse of `read`: what torchrun would have set."""
        values = (self.rank, self.size, self.local_rank, self.local_size, self.address, self.port, self.hosted)
        return dict(zip((*TORCHRUN.place, *MEETING, HOSTED), map(str, values), strict=True))


def launched(env: Variables = os.environ) -> bool:
    """Whether a launcher started this process."""
    return _launcher(env) is not None


def read(env: Variables = os.environ) -> Environment:
    """This process's place. Raises ValueError naming what a partial or contradictory environment lacks."""
    launcher = _launcher(env)
    if launcher is None:
        return Environment()
    env = {**env, **launcher.implied(env)}
    meets = launcher.names_meeting or any(env.get(name) for name in MEETING)
    required = launcher.place + (MEETING if meets else ())
    if missing := [name for name in required if not env.get(name)]:
        present = [name for name in required if env.get(name)]
        raise ValueError(
            f"{launcher.name} environment is partial: {', '.join(present)} set but {', '.join(missing)} missing; "
            "set what is missing or unset the rest"
        )
    numbers = {}
    for name in required:
        if name != "MASTER_ADDR":
            if not env[name].isdecimal():
                raise ValueError(f"{name}={env[name]!r} of the {launcher.name} environment is not a number")
            numbers[name] = int(env[name])
    rank, size, local_rank, local_size = (numbers[name] for name in launcher.place)
    if rank >= size or local_rank >= local_size:
        raise ValueError(
            f"{launcher.name} environment: rank {rank} of {size}, local rank {local_rank} of {local_size}; "
            "a rank must be smaller than its world"
        )
    for name, value in ((TORCHRUN.rank, rank), (TORCHRUN.size, size)):
        if env.get(name, str(value)) != str(value):
            raise ValueError(
                f"{launcher.name} environment: rank {rank} of {size}, but {name}={env[name]} is set too; unset it"
            )
    address, port = (env["MASTER_ADDR"], numbers["MASTER_PORT"]) if meets else ("", 0)
    hosted = launcher is TORCHRUN and env.get(HOSTED) == "True"
    return Environment(launcher.name, rank, size, local_rank, local_size, address, port, hosted)


def _launcher(env: Variables) -> Launcher | None:
    sure = [row for row in LAUNCHERS if row.started(env)]
    return next(iter(sure or [row for row in LAUNCHERS if row.hinted(env)]), None)
