"""What a model family has to say to be sharded; one small subclass each. And the glue to transformers they share."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from tp_attention.attention import TPSelfAttention
from tp_attention.cache import KVCache, LayerCache
from tp_attention.checkpoint.layouts import Layout
from tp_attention.comm import TPGroup
from tp_attention.config import RopeConfig, RopeScaling
from tp_attention.rope import RotaryEmbedding
from tp_attention.sharding import ShardPlan

MASKS = "tp_attention"


class Policy(ABC):
    """How one family's Hugging Face model is cut. Stateless: every method takes what it needs."""

    architectures: ClassVar[tuple[str, ...]]
    command: ClassVar[str]  # the command that such a model is for: generate or embed
    layout: ClassVar[Layout]  # of the model's own state dict
    modules: ClassVar[dict[str, str]]  # our name of a module -> the sharded model's, {} for its layer

    def check(self, config: PreTrainedConfig) -> None:
        """Raises ValueError for a config that the family allows and we do not."""
        if getattr(config, "quantization_config", None) is not None:
            method = config.quantization_config.get("quant_method", "an unknown method")
            raise ValueError(f"the checkpoint is quantised ({method}); only fp32, fp16 and bf16 weights are loaded")

    def place(self, native: str) -> str:
        """The sharded model's name for the parameter that checkpoints call `native`; "" where it has none."""
        module, _, attribute = native.rpartition(".")
        template = self.modules.get(re.sub(r"\d+", "{}", module))
        return "" if template is None else f"{template.format(*re.findall(r'[0-9]+', module))}.{attribute}"

    @abstractmethod
    def plan(self, config: PreTrainedConfig, tp: int, dtype: torch.dtype) -> ShardPlan:
        """Who owns what, with the exact bytes. Raises ValueError where tp does not fit."""

    @abstractmethod
    def build(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """The Hugging Face model, on torch's current default device."""

    @abstractmethod
    def shard(self, model: PreTrainedModel, plan: ShardPlan, group: TPGroup, dtype: torch.dtype) -> None:
        """Replace attention, MLP, embedding and head by ours, with weights still to be loaded."""


class ShardedAttention(nn.Module):
    """TPSelfAttention behind the forward that Hugging Face's decoder and encoder layers call."""

    def __init__(self, attention: TPSelfAttention, layer: int) -> None:
        super().__init__()
        self.attention, self.layer = attention, layer

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        cache = layer_cache(past_key_values, self.layer)
        final = attention_mask is not None and attention_mask.dim() == 4  # transformers' rule: 4-D masks are complete
        y = self.attention(
            hidden_states, mask=attention_mask, mask_is_final=final, rope=position_embeddings, cache=cache
        )
        return y, None


class ShardedRotary(nn.Module):
    """Our cos and sin, computed once a forward pass for all layers, in place of the model's `rotary_emb`."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.rotary = RotaryEmbedding(rope, head_dim)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotary(position_ids)


class HuggingFaceLayerCache:
    """One layer of a transformers cache (heads before tokens), as TPSelfAttention wants it."""

    def __init__(self, cache: Any, layer: int) -> None:
        self.cache, self.layer = cache, layer

    @property
    def length(self) -> int:
        return self.cache.get_seq_length(self.layer)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer)
        return keys.transpose(1, 2), values.transpose(1, 2)


def layer_cache(past: Any, layer: int) -> LayerCache | HuggingFaceLayerCache | None:
    """`layer`'s cache of our KVCache, of a transformers Cache (what `model.generate` passes), or none."""
    if past is None:
        return None
    if getattr(past, "is_compileable", False):  # its keys come padded to the full length: causality would shift
        raise ValueError(
            "static transformers caches are not supported; pass a KVCache or cache_implementation='dynamic'"
        )
    return past.layers[layer] if isinstance(past, KVCache) else HuggingFaceLayerCache(past, layer)


def padding_mask(*, kv_length: int, attention_mask: Tensor | None = None, **request: Any) -> Tensor | None:
    """Hugging Face's mask hook: hands the [B, S] padding mask through, since our layers do causal and window alone.

    A request for anything beyond those (packed sequences, overlays) gets the 4-D mask that transformers itself builds.
    """
    skippable = request.get("allow_is_causal_skip", True) or request.get("allow_is_bidirectional_skip", False)
    if not skippable:
        return sdpa_mask(kv_length=kv_length, attention_mask=attention_mask, **request)
    if attention_mask is None or attention_mask.all():
        return None
    return attention_mask[:, -kv_length:]


def rope_config(config: PreTrainedConfig, head_dim: int) -> RopeConfig:
    """RopeConfig of a Hugging Face config's `rope_parameters`. Raises ValueError for a scaling that is not known."""
    parameters = dict(config.rope_parameters)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return RopeConfig(theta=parameters["rope_theta"])
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))  # these families read it with a scaling only
    trained = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "dynamic":
        trained = config.max_position_embeddings
    names = {"low_freq_factor", "high_freq_factor", "attention_factor", "mscale", "mscale_all_dim", "truncate"}
    names |= {"beta_fast", "beta_slow"}
    given: dict[str, Any] = {name: value for name, value in parameters.items() if name in names and value is not None}
    given |= {name: tuple(parameters[name]) for name in ("short_factor", "long_factor") if name in parameters}
    factor = parameters.get("factor") or config.max_position_embeddings / trained
    scaling = RopeScaling(kind=kind, factor=factor, original_max_positions=trained, **given)
    return RopeConfig(theta=parameters["rope_theta"], dim=dim, scaling=scaling)


ALL_MASK_ATTENTION_FUNCTIONS.register(MASKS, padding_mask)
