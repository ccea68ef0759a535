"""Token by token generation of one prompt on all ranks of a sharded model, with our KVCache.

Rank 0 of the group chooses each token and broadcasts it, so ranks never diverge. For batches and beams use the
model's own `generate`, which works on a sharded model too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tp_attention.cache import KVCache
from tp_attention.comm import broadcast


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_p: smallest set of tokens whose probabilities reach it (nucleus sampling)."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1 keeps every token")


def check_length(config: PreTrainedConfig, prompt_tokens: int, new_tokens: int) -> None:
    """Raises ValueError when prompt and new tokens exceed the model's context, or either is empty."""
    context = config.max_position_embeddings
    if prompt_tokens < 1 or new_tokens < 1:
        raise ValueError(f"{prompt_tokens} prompt tokens and {new_tokens} new tokens: each must be at least 1")
    if prompt_tokens + new_tokens > context:
        raise ValueError(
            f"{prompt_tokens} prompt tokens + {new_tokens} new tokens exceed the context of {context}; "
            "shorten the prompt or lower --max-new-tokens"
        )


@torch.inference_mode()
def stream(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[tuple[int, Tensor]]:
    """Yields (token, its logits [vocabulary]) until a stop id, which is yielded too, or max_new_tokens.

    ids: [1, T], the same on every rank; every rank iterates. Raises ValueError as check_length does.
    """
    group, plan, sampling = model.tp_group, model.shard_plan, sampling or Sampling()
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"ids has shape {list(ids.shape)}; expected one prompt, [1, T]")
    check_length(model.config, ids.shape[1], max_new_tokens)
    cache = KVCache(
        plan,
        group.rank,
        batch=1,
        max_length=ids.shape[1] + max_new_tokens,
        dtype=model.dtype,
        device=group.device,
    )
    generator = torch.Generator(group.device).manual_seed(sampling.seed)
    tokens = ids.to(group.device)
    for _ in range(max_new_tokens):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[0, -1]
        tokens = broadcast(choose(logits, sampling, generator), group).view(1, 1)
        token = int(tokens)
        yield token, logits
        if token in stop_ids:
            return


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token, [1] int64, from logits [vocabulary]."""
    if sampling.temperature == 0:
        return logits.argmax(keepdim=True)
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    ordered, tokens = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < sampling.top_p, ordered, 0)  # the likeliest token always stays
    return tokens[torch.multinomial(kept, 1, generator=generator)]


def stop_ids(model: PreTrainedModel) -> set[int]:
    """End-of-sequence ids of the model's generation config."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    if eos is None:
        return set()
    return {eos} if isinstance(eos, int) else set(eos)
