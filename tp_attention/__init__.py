"""Tensor-parallel attention: heads sharded over ranks, one all-reduce after the output projection."""

from tp_attention.attention import TPSelfAttention
from tp_attention.cache import KVCache
from tp_attention.config import AttentionConfig, RopeConfig, RopeScaling
from tp_attention.sharding import ShardPlan

__all__ = ["AttentionConfig", "KVCache", "RopeConfig", "RopeScaling", "ShardPlan", "TPSelfAttention"]
__version__ = "0.1.0"
