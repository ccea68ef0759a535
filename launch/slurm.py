"""What srun tells its tasks in a form of its own: whether they are tasks, how many this host has, where they meet.

Limit: rank 0 is taken to be on the step's first host. `srun --distribution=arbitrary` may put it elsewhere, and wants
MASTER_ADDR set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_SPECIAL_STEP = 0xFFFFFFF0  # from here on step ids are SLURM's own: of the shells of sbatch and salloc, of ssh
PORTS = range(10_000, 30_000)  # below those from which systems give out free ones


def is_task(env: Mapping[str, str]) -> bool:
    """Whether srun started this process beside others.

    A shell has variables of SLURM's too: that of a job, which is no step or a special one; and that of `srun --pty`,
    a step of one task, which is as good as no launcher.
    """
    step = env.get("SLURM_STEP_ID", "")
    return (
        "SLURM_PROCID" in env and step.isdecimal() and int(step) < FIRST_SPECIAL_STEP and env.get("SLURM_NTASKS") != "1"
    )


def implied(env: Mapping[str, str]) -> dict[str, str]:
    """SLURM_NTASKS_PER_NODE as what this host has; MASTER_ADDR and MASTER_PORT where they are not set."""
    found = {}
    # What was started, and the step's before the job's: SLURM_NTASKS_PER_NODE itself is only what somebody asked for.
    if tasks := env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE"):
        here = tasks_on_host(tasks, env.get("SLURM_NODEID", ""))
        found["SLURM_NTASKS_PER_NODE"] = tasks if here is None else str(here)
    if hosts := env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST"):
        found["MASTER_ADDR"] = first_host(hosts)
    job, step = env.get("SLURM_JOB_ID", ""), env.get("SLURM_STEP_ID", "")
    if job.isdecimal() and step.isdecimal():  # all tasks find the same one; jobs and steps side by side differ
        found["MASTER_PORT"] = str(PORTS[(31 * int(job) + int(step)) % len(PORTS)])
    given = {name: env[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in env}
    return found | given


def first_host(hosts: str) -> str:
    """Of SLURM's compressed list: node003 of "node[003-005,9],gpu1"."""
    return re.sub(r"\[(\w+)[^]]*]", r"\1", hosts).split(",")[0]


def tasks_on_host(tasks: str, node: str) -> int | None:
    """The node's count in a list such as "2(x3),1": 2 for nodes "0" to "2". None where it has none.

    node: may be "" where all hosts have as many.
    """
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    if not node and len(set(counts)) == 1:
        return counts[0]
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None
