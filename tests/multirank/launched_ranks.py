"""What each rank of test_launchers.py runs: `mpirun -n 2 python -m tests.multirank.launched_ranks join`."""

import sys
import time

import torch

from tp_attention import launch
from tp_attention.comm import MPIGroup, all_reduce, barrier


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")  # at once: print would let the ranks' lines mix
    sys.stdout.flush()


def join():
    for turn in ("first", "second"):
        with launch.init(device="cpu", timeout=20) as world:
            total = all_reduce(torch.tensor([world.rank + 1]), world.tp).item()
        say(turn, world.launcher, "rank", world.rank, "of", world.size, "local", world.local_rank, "sum", total)


def mpi():
    with MPIGroup.world(timeout=20) as group:
        total = all_reduce(torch.tensor([group.rank + 1]), group).item()
    say("MPI rank", group.rank, "of", group.size, "sum", total)


def fail():
    """Leaves its world open, as a script does that knows nothing of `with`; the other rank would not notice."""
    world = launch.init(device="cpu", timeout=100)
    barrier(world.tp)
    if world.rank == 1:
        raise KeyError("head 7")
    time.sleep(100)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if not name.startswith("--local_rank="):  # deepspeed's
            globals()[name]()
