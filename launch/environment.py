"""The launchers we know and the variables in which each tells a process its place: one table, a row each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """Names of a launcher's variables. Any of `markers` in the environment means that it started this process."""

    name: str
    markers: tuple[str, ...]
    rank: str
    size: str
    local_rank: str
    local_size: str
    address: str
    port: str
    hosted: str  # set to True where the launcher itself runs the store at address:port

    @property
    def required(self) -> tuple[str, ...]:
        return self.rank, self.size, self.local_rank, self.local_size, self.address, self.port


TORCHRUN = Launcher(
    name="torchrun",
    markers=("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    rank="RANK",
    size="WORLD_SIZE",
    local_rank="LOCAL_RANK",
    local_size="LOCAL_WORLD_SIZE",
    address="MASTER_ADDR",
    port="MASTER_PORT",
    hosted="TORCHELASTIC_USE_AGENT_STORE",
)
LAUNCHERS = (TORCHRUN,)


@dataclass(frozen=True)
class Environment:
    """This process's place. `launcher` is "none" for a process that nobody launched: rank 0 of 1."""

    launcher: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0
    hosted: bool = False

    def variables(self, launcher: Launcher = TORCHRUN) -> dict[str, str]:
        """The inverse of `read`: what the launcher would have set."""
        values = (self.rank, self.size, self.local_rank, self.local_size, self.address, self.port)
        return dict(zip(launcher.required, map(str, values), strict=True)) | {launcher.hosted: str(self.hosted)}


def launched(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process."""
    return _launcher(env) is not None


def read(env: Mapping[str, str] = os.environ) -> Environment:
    """This process's place. Raises ValueError naming what a partial or contradictory environment lacks."""
    launcher = _launcher(env)
    if launcher is None:
        return Environment()
    if missing := [name for name in launcher.required if name not in env]:
        present = [name for name in launcher.required if name in env]
        raise ValueError(
            f"{launcher.name} environment is partial: {', '.join(present)} set but {', '.join(missing)} missing; "
            "set all of them or none"
        )
    numbers = {}
    for name in launcher.required:
        if name != launcher.address:
            if not env[name].isdecimal():
                raise ValueError(f"{name}={env[name]!r} of the {launcher.name} environment is not a number")
            numbers[name] = int(env[name])
    found = Environment(
        launcher.name,
        numbers[launcher.rank],
        numbers[launcher.size],
        numbers[launcher.local_rank],
        numbers[launcher.local_size],
        env[launcher.address],
        numbers[launcher.port],
        env.get(launcher.hosted) == "True",
    )
    if found.rank >= found.size or found.local_rank >= found.local_size:
        raise ValueError(
            f"{launcher.name} environment: rank {found.rank} of {found.size}, local rank {found.local_rank} of "
            f"{found.local_size}; a rank must be smaller than its world"
        )
    return found


def _launcher(env: Mapping[str, str]) -> Launcher | None:
    return next((row for row in LAUNCHERS if any(marker in env for marker in row.markers)), None)
