"""Tensor-parallel groups and their collectives.

The one place of the package that calls torch.distributed and MPI. Every collective takes its group; there is no
default group here, so tp x dp meshes and several models in one process do not meet. Limit: one collective at a time
per group.
"""

from tp_attention.comm.collectives import all_gather, all_reduce, barrier, broadcast
from tp_attention.comm.group import CollectiveError, TPGroup, as_group
from tp_attention.comm.linear import linear_all_reduce
from tp_attention.comm.mpi import MPIGroup
from tp_attention.comm.norm import Norm

__all__ = [
    "CollectiveError",
    "MPIGroup",
    "Norm",
    "TPGroup",
    "all_gather",
    "all_reduce",
    "as_group",
    "barrier",
    "broadcast",
    "linear_all_reduce",
]
