"""The keys and values that a layer remembers by itself between calls, as DeepSpeed's layers do.

A prompt's are kept as the projection made them; only when a token follows are they put into a cache. What callers were
given is never written again: tokens that are replaced go to new memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tp_attention.cache import LayerCache
from tp_attention.deepspeed_config import Settings

Past = tuple[Tensor, Tensor]  # keys and values [B, kv heads, S, D]
Kept = tuple[Past | LayerCache, int]  # what a layer remembers, and of how many tokens


class OwnKeys:
    """Keys and values by layer_id; a layer that is not causal has none, as its tokens see later ones too."""

    def __init__(self, settings: Settings) -> None:
        attention = settings.attention
        self.causal, self.most = attention.causal, settings.max_out_tokens
        self.grouped = attention.kv_heads < attention.heads
        self._past: dict[int, tuple[Tensor, Tensor] | LayerCache] = {}  # tensors [B, S, kv heads, D]

    def begin(
        self, layer: int, tokens: int, layer_past: Past | None, is_prompt: bool | None, token_idx: Tensor | int | None
    ) -> int:
        """At which position a call's first token sits. A prompt (None: more than one token) forgets what there is.

        token_idx: the tokens there will be, with the call's own. Raises ValueError where that leaves a gap or exceeds
        max_out_tokens, and where there cannot be anything to continue.
        """
        if layer_past is not None:
            return layer_past[0].shape[2]
        if is_prompt is None:
            is_prompt = tokens > 1 or not self.causal
        if not is_prompt and not self.causal:
            raise ValueError("a layer without triangular_masking keeps no keys; pass layer_past, or all tokens")
        have = 0 if is_prompt else self._length(layer)
        start = have if token_idx is None or is_prompt else int(token_idx) - tokens
        if not 0 <= start <= have or (is_prompt and token_idx is not None and not 0 < int(token_idx) <= tokens):
            raise ValueError(f"token_idx={int(token_idx or 0)} does not fit {have} tokens so far and {tokens} new ones")
        if self.causal and self.most is not None and start + tokens > self.most:
            raise ValueError(
                f"{start} + {tokens} tokens exceed max_out_tokens={self.most}; raise it in the config, or start anew "
                "with first_token=True"
            )
        return start

    def join(
        self, layer: int, start: int, k: Tensor, v: Tensor, layer_past: Past | None, token_idx: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Kept | None]:
        """k, v [B, T, kv heads, D], the first at `start`, behind those before them: all, [B, S, kv heads, D].

        And what `keep` is to remember of them once nothing can fail any more; until then nothing has changed.
        """
        if layer_past is not None:
            keys, values = (past.transpose(1, 2) for past in layer_past)
            return torch.cat((keys, k), dim=1), torch.cat((values, v), dim=1), None
        past, stop = self._past.get(layer), start + k.shape[1]
        if past is None or start == 0:
            if not self.causal:
                return k, v, None
            length = stop if token_idx is None else int(token_idx)
            first = k[:, :length], v[:, :length]
            if self.grouped:  # else these few would keep all of a wide projection in memory
                first = first[0].contiguous(), first[1].contiguous()
            return k, v, (first, length)
        cache = past if isinstance(past, LayerCache) else None
        if cache is None or cache.length != start or stop > cache.keys.shape[1]:
            keys, values = (past.keys, past.values) if isinstance(past, LayerCache) else past
            shape = keys.shape[0], self.most or 2 * stop, *keys.shape[2:]
            with torch.inference_mode(False):  # else nobody could append outside of inference_mode
                cache = LayerCache(keys.new_empty(shape), values.new_empty(shape))
            cache.append(keys[:, :start], values[:, :start])
        both = cache.append(k, v)
        cache.length = start
        return (*both, (cache, stop))

    def keep(self, layer: int, kept: Kept | None) -> None:
        """Remember what `join` said; None: the caller has it."""
        if kept is None:
            self._past.pop(layer, None)
            return
        past, length = kept
        if isinstance(past, LayerCache):
            past.length = length
        self._past[layer] = past

    def reset(self) -> None:
        """Forget all of them."""
        self._past.clear()

    def _length(self, layer: int) -> int:
        past = self._past.get(layer)
        if past is None:
            return 0
        return past.length if isinstance(past, LayerCache) else past[0].shape[1]
