"""Llama-architecture causal language models: Llama, Mistral, Qwen2, Qwen3, SmolLM2."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from tp_attention.attention import TPSelfAttention
from tp_attention.checkpoint.families import LAYOUTS
from tp_attention.comm import TPGroup
from tp_attention.config import AttentionConfig
from tp_attention.models.layers import TPMLP, VocabParallelEmbedding, VocabParallelHead, empty_parameter
from tp_attention.models.policy import MASKS, Policy, ShardedAttention, ShardedRotary, rope_config
from tp_attention.sharding import ShardPlan


class LlamaPolicy(Policy):
    architectures = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    command = "generate"
    layout = LAYOUTS["llama"]
    modules: ClassVar[dict[str, str]] = {
        "embedding": "model.embed_tokens",
        "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
        "layers.{}.attention": "model.layers.{}.self_attn.attention",
        "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "layers.{}.mlp": "model.layers.{}.mlp",
        "norm": "model.norm",
        "head": "lm_head",
    }

    def plan(self, config: PreTrainedConfig, tp: int, dtype: torch.dtype) -> ShardPlan:
        layer = attention_config(config, 0, dtype)
        mlp_bias = getattr(config, "mlp_bias", False)
        norms = 2 * config.hidden_size + (2 * layer.head_dim if layer.qk_norm else 0)
        return ShardPlan(
            tp=tp,
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            layers=config.num_hidden_layers,
            qkv_bias=layer.qkv_bias,
            out_bias=layer.out_bias,
            mlp_in_bias=mlp_bias,
            mlp_out_bias=mlp_bias,
            vocab_matrices=1 if config.tie_word_embeddings else 2,
            whole_elements=config.num_hidden_layers * norms + config.hidden_size,
            element_bytes=dtype.itemsize,
        )

    def build(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)

    def shard(self, model: PreTrainedModel, plan: ShardPlan, group: TPGroup, dtype: torch.dtype) -> None:
        config, decoder = model.config, model.model
        config._attn_implementation = MASKS
        for index, layer in enumerate(decoder.layers):
            attention = TPSelfAttention(attention_config(config, index, dtype), group, device="meta")
            layer.self_attn = ShardedAttention(attention, index)
            layer.mlp = TPMLP(plan, group, ACT2FN[config.hidden_act], dtype)
        first = attention_config(config, 0, dtype)
        if first.rope is not None:
            decoder.rotary_emb = ShardedRotary(first.rope, first.head_dim)
        decoder.embed_tokens = embedding = VocabParallelEmbedding(plan, group, dtype)
        head: nn.Parameter = embedding.weight
        if not config.tie_word_embeddings:
            head = empty_parameter(*embedding.weight.shape, dtype=dtype)
        model.lm_head = VocabParallelHead(plan, group, head)


def attention_config(config: PreTrainedConfig, layer: int, dtype: torch.dtype) -> AttentionConfig:
    """AttentionConfig of one layer; what differs between the four families is all here."""
    family = config.model_type
    bias = getattr(config, "attention_bias", False)
    layer_types = getattr(config, "layer_types", None)
    slides = config.sliding_window if getattr(config, "sliding_window", None) else None
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        slides = None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return AttentionConfig(
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        causal=True,
        norm_eps=config.rms_norm_eps,
        qk_norm="rmsnorm" if family == "qwen3" else None,
        qkv_bias=family == "qwen2" or bias,
        out_bias=family != "qwen2" and bias,
        rope=rope_config(config, head_dim),
        window=(slides - 1, 0) if slides else None,
        dtype=dtype,
    )
