"""KVCache: the keys and values of past tokens, contiguous, holding only this rank's kv heads.

Each layer's part is one [B, max_length, local_kv_heads, D] pair. All sequences of a batch have the same number of
tokens; padding is the mask's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tp_attention.sharding import ShardPlan


class LayerCache:
    """One layer's keys and values; what TPSelfAttention takes as `cache`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, T, local_kv_heads, D] behind what is there; views of all keys and values so far.

        Raises ValueError, with nothing written, when they do not fit.
        """
        tokens = k.shape[1]
        stop = self.length + tokens
        if stop > self.keys.shape[1]:
            raise ValueError(
                f"KV cache is full: {self.length} + {tokens} tokens exceed max_length={self.keys.shape[1]}; "
                "make it larger or generate fewer tokens"
            )
        if k.shape[0] != self.keys.shape[0] or k.shape[2:] != self.keys.shape[2:]:
            raise ValueError(
                f"keys {list(k.shape)} do not fit a cache of batch {self.keys.shape[0]} and "
                f"heads x dim {list(self.keys.shape[2:])}"
            )
        if k.dtype != self.keys.dtype or k.device != self.keys.device:
            raise ValueError(
                f"keys are {k.dtype} on {k.device}, the cache {self.keys.dtype} on {self.keys.device}; "
                "make it with that dtype= and device="
            )
        self.keys[:, self.length : stop] = k
        self.values[:, self.length : stop] = v
        self.length = stop
        return self.keys[:, :stop], self.values[:, :stop]


class KVCache:
    """The caches of all layers of one model on one rank.

    plan: whose kv heads and how many layers. rank: this rank within the tensor-parallel group.
    max_length: tokens a sequence may reach, prompt included. Raises ValueError when batch or max_length is below 1.
    """

    def __init__(
        self,
        plan: ShardPlan,
        rank: int,
        *,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or max_length < 1:
            raise ValueError(f"batch={batch} and max_length={max_length} must be at least 1")
        shape = (batch, max_length, plan.local_kv_heads(rank), plan.head_dim)
        self.layers = [
            LayerCache(*(torch.empty(shape, dtype=dtype, device=device) for _ in ("keys", "values")))
            for _ in range(plan.layers)
        ]
        self.max_length = max_length

    @property
    def length(self) -> int:
        """Tokens stored so far (of the first layer: within a forward pass later layers lag behind)."""
        return self.layers[0].length

    def nbytes(self) -> int:
        """Bytes that keys and values take on this rank."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        for layer in self.layers:
            layer.length = 0

    # What Hugging Face's model classes ask of a `past_key_values`.
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].length

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.layers[layer_idx].length + query_length, 0
