"""BERT encoders."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BertModel, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from tp_attention.attention import TPSelfAttention
from tp_attention.checkpoint.families import LAYOUTS
from tp_attention.comm import TPGroup
from tp_attention.config import AttentionConfig
from tp_attention.models.layers import TPMLP, VocabParallelEmbedding
from tp_attention.models.policy import MASKS, Policy
from tp_attention.sharding import ShardPlan


class BertPolicy(Policy):
    """The encoder alone: a pooler or another task's head in the checkpoint is left out."""

    architectures = ("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification")
    command = "embed"
    layout = LAYOUTS["bert"]
    modules: ClassVar[dict[str, str]] = {
        "embedding": "embeddings.word_embeddings",
        "position_embedding": "embeddings.position_embeddings",
        "token_type_embedding": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
        "layers.{}.attention": "encoder.layer.{}.attention.attention",
        "layers.{}.attention_norm": "encoder.layer.{}.attention.norm",
        "layers.{}.mlp": "encoder.layer.{}.output.mlp",
        "layers.{}.mlp_norm": "encoder.layer.{}.output.norm",
    }

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        if config.is_decoder or config.add_cross_attention:
            raise ValueError("BERT as a decoder (is_decoder or add_cross_attention) is not supported; encoders are")
        kind = getattr(config, "position_embedding_type", "absolute")
        if kind != "absolute":
            raise ValueError(f"BERT position_embedding_type={kind!r} is not supported; 'absolute' is")

    def plan(self, config: PreTrainedConfig, tp: int, dtype: torch.dtype) -> ShardPlan:
        layer, hidden = attention_config(config, dtype), config.hidden_size
        embeddings = (config.max_position_embeddings + config.type_vocab_size + 2) * hidden
        return ShardPlan(
            tp=tp,
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            hidden_size=hidden,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            layers=config.num_hidden_layers,
            qkv_bias=True,
            out_bias=True,
            mlp_in_matrices=1,
            mlp_in_bias=True,
            mlp_out_bias=True,
            whole_elements=config.num_hidden_layers * 4 * hidden + embeddings,
            element_bytes=dtype.itemsize,
        )

    def build(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        return BertModel._from_config(config, dtype=dtype, add_pooling_layer=False)

    def shard(self, model: PreTrainedModel, plan: ShardPlan, group: TPGroup, dtype: torch.dtype) -> None:
        if not isinstance(model, BertModel):
            raise ValueError(
                f"{type(model).__name__} is more than an encoder; shard that: models.shard(model.bert, group)"
            )
        config = model.config
        config._attn_implementation = MASKS
        model.pooler = None
        for layer in model.encoder.layer:
            attention = TPSelfAttention(attention_config(config, dtype), group, device="meta")
            layer.attention = BertAttention(attention, layer.attention.output.LayerNorm)
            mlp = TPMLP(plan, group, ACT2FN[config.hidden_act], dtype)
            layer.output = BertMLP(mlp, layer.output.LayerNorm)
            layer.intermediate = nn.Identity()
        embeddings = model.embeddings
        embeddings.word_embeddings = VocabParallelEmbedding(plan, group, dtype)
        # Buffers of integers, not weights: no checkpoint holds them, so they are made here, on the real device.
        positions = torch.arange(config.max_position_embeddings, device=group.device)[None]
        embeddings.position_ids, embeddings.token_type_ids = positions, torch.zeros_like(positions)


class BertAttention(nn.Module):
    """norm(attention(x) + x), in place of Hugging Face's BertAttention."""

    def __init__(self, attention: TPSelfAttention, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.attention, self.norm = attention, norm

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        return self.norm(self.attention(hidden_states, mask=attention_mask) + hidden_states), None


class BertMLP(nn.Module):
    """norm(mlp(x) + x), in place of BertOutput; BertIntermediate before it becomes the identity."""

    def __init__(self, mlp: TPMLP, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.mlp, self.norm = mlp, norm

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.mlp(hidden_states) + residual)


def attention_config(config: PreTrainedConfig, dtype: torch.dtype) -> AttentionConfig:
    """AttentionConfig of every layer."""
    return AttentionConfig(
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        causal=False,
        qkv_bias=True,
        out_bias=True,
        dtype=dtype,
    )
