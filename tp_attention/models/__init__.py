"""Hugging Face models, sharded: find them, load a rank's slices, run them.

model = models.load("path/or/name", world.tp)      # each rank reads only its slices
models.shard(model, world.tp)                      # or cut a model that is already in memory
"""

from tp_attention.models.folders import resolve
from tp_attention.models.generation import Sampling, stream
from tp_attention.models.loading import load, shard

__all__ = ["Sampling", "load", "resolve", "shard", "stream"]
