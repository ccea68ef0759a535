"""The six families: where their projections lie, and in what their attention differs. A subclass of Adapter each."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.bert.modeling_bert import BertAttention, BertLayer, BertSelfAttention
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomMLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXMLP
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoderLayer
from transformers.pytorch_utils import Conv1D

from tp_attention.deepspeed_policy.adapters import Adapter
from tp_attention.models.bert import BertPolicy
from tp_attention.models.policy import rope_config


class TritonBertAttention(Adapter, BertSelfAttention):
    """Stands in for BertSelfAttention and the projection behind it."""

    replaces = BertAttention
    projections: ClassVar[dict[str, str]] = {
        "attn_q": "self.query",
        "attn_k": "self.key",
        "attn_v": "self.value",
        "attn_o": "output.dense",
    }
    mlp, mlp_out = BertLayer, "output.dense"  # its attention has an output.dense too, which `install` has emptied

    def check(self, config: PreTrainedConfig) -> None:
        BertPolicy().check(config)

    def special(self, source: Any, config: PreTrainedConfig) -> dict[str, Any]:
        return {"causal": False}

    @staticmethod
    def recorded(source: Any) -> Any:
        return source.self

    def install(self, parent: nn.Module, name: str) -> None:
        attention: Any = getattr(parent, name)
        super().install(attention, "self")
        attention.output.dense = nn.Identity()


class TritonGPT2Attention(Adapter, GPT2Attention):
    replaces = GPT2Attention
    projections: ClassVar[dict[str, str]] = {"attn_qkv": "c_attn", "attn_o": "c_proj"}
    mlp, mlp_out = GPT2MLP, ".c_proj"

    def special(self, source: Any, config: PreTrainedConfig) -> dict[str, Any]:
        return {"scale": source.scaling}  # by the layer's number, in some

    @staticmethod
    def prepare_mlp(mlp: Any) -> None:
        for name in ("c_fc", "c_proj"):  # DeepSpeed cuts a Conv1D's weight along the wrong dimension
            conv: Conv1D = getattr(mlp, name)
            linear = nn.Linear(conv.nx, conv.nf, device="meta")
            linear.weight, linear.bias = nn.Parameter(conv.weight.t(), requires_grad=False), conv.bias
            setattr(mlp, name, linear)


class TritonGPTNeoXAttention(Adapter, GPTNeoXAttention):
    replaces = GPTNeoXAttention
    projections: ClassVar[dict[str, str]] = {"attn_qkv": "query_key_value", "attn_o": "dense"}
    per_head = True
    mlp, mlp_out = GPTNeoXMLP, ".dense_4h_to_h"

    def special(self, source: Any, config: PreTrainedConfig) -> dict[str, Any]:
        rope = rope_config(config, source.head_size)
        return {"rope": dataclasses.replace(rope, dim=source.rotary_ndims)}


class TritonBloomAttention(Adapter, BloomAttention):
    replaces = BloomAttention
    projections: ClassVar[dict[str, str]] = TritonGPTNeoXAttention.projections
    per_head = True
    mlp, mlp_out = BloomMLP, ".dense_4h_to_h"

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        if config.slow_but_exact and config.pretraining_tp > 1:
            raise ValueError("slow_but_exact=True sums projections by parts that are cut otherwise here; set it False")

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, residual: Tensor, **rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, probabilities = super().forward(hidden_states, **rest)
        return output + residual, probabilities


class TritonOPTAttention(Adapter, OPTAttention):
    replaces = OPTAttention
    projections: ClassVar[dict[str, str]] = {
        "attn_q": "q_proj",
        "attn_k": "k_proj",
        "attn_v": "v_proj",
        "attn_o": "out_proj",
    }
    mlp, mlp_out = OPTDecoderLayer, ".fc2"


class TritonLlamaAttention(Adapter, LlamaAttention):
    replaces = LlamaAttention
    projections: ClassVar[dict[str, str]] = TritonOPTAttention.projections | {"attn_o": "o_proj"}
    mlp, mlp_out = LlamaMLP, ".down_proj"

    def special(self, source: Any, config: PreTrainedConfig) -> dict[str, Any]:
        head_dim = source.head_dim
        return {"kv_heads": config.num_key_value_heads, "head_dim": head_dim, "rope": rope_config(config, head_dim)}


FAMILIES: dict[type[nn.Module], type[Adapter]] = {
    family.replaces: family
    for family in (
        TritonBertAttention,
        TritonGPT2Attention,
        TritonGPTNeoXAttention,
        TritonBloomAttention,
        TritonOPTAttention,
        TritonLlamaAttention,
    )
}
