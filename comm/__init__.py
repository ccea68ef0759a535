"""Tensor-parallel groups and their collectives.

The one place of the package that calls torch.distributed and MPI. Every collective takes its group; there is no
default group here, so tp x dp meshes and several models in one process do not meet. Limit: one collective at a time
per group.
"""

from tp_attention.comm.collectives import all_gather, all_reduce, barrier, broadcast
from tp_attention.comm.group import CollectiveError, TPGroup, as_group
from tp_attention.comm.mpi import MPIGroup

__all__ = ["CollectiveError", "MPIGroup", "TPGroup", "all_gather", "all_reduce", "as_group", "barrier", "broadcast"]
