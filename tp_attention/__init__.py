"""Tensor-parallel attention: heads sharded over ranks, one all-reduce after the output projection."""

from tp_attention.attention import TPSelfAttention
from tp_attention.cache import KVCache
from tp_attention.config import AttentionConfig, RopeConfig, RopeScaling
from tp_attention.sharding import ShardPlan
from tp_attention.triton_self_attention import TritonSelfAttention

__all__ = [
    "AttentionConfig",
    "KVCache",
    "RopeConfig",
    "RopeScaling",
    "ShardPlan",
    "TPSelfAttention",
    "TritonSelfAttention",
]
__version__ = "0.1.0"
