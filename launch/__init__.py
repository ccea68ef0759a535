"""Who am I? Rank, world and device: from a launcher's environment, from nothing at all, or from our own spawn."""

from tp_attention.launch.environment import launched
from tp_attention.launch.failure import RankError
from tp_attention.launch.spawn import spawn
from tp_attention.launch.world import World, init

__all__ = ["RankError", "World", "init", "launched", "spawn"]
