"""Our layer and MLP, fed from the state dict of a transformers model, compute what the model does, cut or uncut."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear

from tests.checkpoint.simulated_ranks import ours
from tests.tolerances import assert_close
from tp_attention.checkpoint.dimensions import from_config, layout_of
from tp_attention.checkpoint.logical import Checkpoint, LogicalTensors, StateDict
from tp_attention.config import AttentionConfig, RopeConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 7


SIZES: dict[str, Any] = {"vocab_size": 31, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NEW = SIZES | {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 40}
GQA = NEW | {"num_key_value_heads": 2}
OLD = SIZES | {"n_embd": 24, "n_layer": 1, "n_head": 6}
FALCON = {name: value for name, value in NEW.items() if name != "intermediate_size"}


@dataclass(frozen=True)
class Family:
    """A transformers model class and its config; what our layer adds to its sizes; where it projects in and out.

    mlp: its first and last projection and its activation; None for experts.
    """

    model: str
    config: dict[str, Any]
    layer: dict[str, Any]
    projections: tuple[str, str]
    mlp: tuple[str, str, str] | None


BIASES = {"qkv_bias": True, "out_bias": True}
ROPE = {"rope": RopeConfig()}
SPLIT_QKV = ("self_attn.q_proj", "self_attn.o_proj")
FUSED = ("self_attention.query_key_value", "self_attention.dense")
CONV = ("attn.c_attn", "attn.c_proj")
SILU = ("mlp.gate_proj", "mlp.down_proj", "silu")
GELU = ("mlp.gate_proj", "mlp.down_proj", "gelu_pytorch_tanh")
WIDE = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "gelu")
CONV_MLP = ("mlp.c_fc", "mlp.c_proj", "gelu_pytorch_tanh")
DBRX = {
    **SIZES,
    **{"d_model": 24, "n_heads": 6, "n_layers": 1},
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 1e6},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
}
MPT = SIZES | {"d_model": 32, "n_heads": 8, "n_layers": 1}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", GQA, ROPE, SPLIT_QKV, SILU),
    "llama-biases": Family(
        "LlamaForCausalLM",
        GQA | {"attention_bias": True, "mlp_bias": True, "head_dim": 6},
        ROPE | BIASES,
        SPLIT_QKV,
        SILU,
    ),
    "mistral": Family(
        "MistralForCausalLM", GQA | {"num_key_value_heads": 3}, ROPE | {"window": (4095, 0)}, SPLIT_QKV, SILU
    ),
    "qwen2": Family("Qwen2ForCausalLM", GQA, ROPE | {"qkv_bias": True}, SPLIT_QKV, SILU),
    "qwen3": Family(
        "Qwen3ForCausalLM", GQA | {"head_dim": 8}, ROPE | {"qk_norm": "rmsnorm", "norm_eps": 1e-6}, SPLIT_QKV, SILU
    ),
    "gemma": Family("GemmaForCausalLM", GQA | {"head_dim": 8}, ROPE, SPLIT_QKV, GELU),
    "gemma2": Family(
        "Gemma2ForCausalLM", GQA | {"head_dim": 4}, ROPE | {"softcap": 50.0, "scale": 256**-0.5}, SPLIT_QKV, GELU
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        GQA,
        ROPE,
        ("self_attn.qkv_proj", "self_attn.o_proj"),
        ("mlp.gate_up_proj", "mlp.down_proj", "silu"),
    ),
    "gpt2": Family("GPT2LMHeadModel", OLD, BIASES, CONV, CONV_MLP),
    "gpt-bigcode-mqa": Family("GPTBigCodeForCausalLM", OLD, BIASES, CONV, CONV_MLP),
    "gpt-bigcode-mha": Family("GPTBigCodeForCausalLM", OLD | {"multi_query": False}, BIASES, CONV, CONV_MLP),
    "gpt-neox": Family(
        "GPTNeoXForCausalLM",
        NEW | {"hidden_size": 48},
        BIASES | {"rope": RopeConfig(dim=2)},
        ("attention.query_key_value", "attention.dense"),
        WIDE,
    ),
    "bloom": Family(
        "BloomForCausalLM",
        OLD | {"hidden_size": 24},
        BIASES | {"alibi": True},
        FUSED,
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "gelu_pytorch_tanh"),
    ),
    "falcon-mqa": Family("FalconForCausalLM", FALCON, ROPE, FUSED, WIDE),
    "falcon-mha": Family(
        "FalconForCausalLM", FALCON | {"multi_query": False, "bias": True}, ROPE | BIASES, FUSED, WIDE
    ),
    "falcon-new-decoder": Family(
        "FalconForCausalLM", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, ROPE, FUSED, WIDE
    ),
    "mpt": Family(
        "MptForCausalLM",
        MPT,
        {"alibi": True},
        ("attn.Wqkv", "attn.out_proj"),
        ("ffn.up_proj", "ffn.down_proj", "gelu"),
    ),
    "codegen": Family(
        "CodeGenForCausalLM",
        OLD | {"n_embd": 32, "n_head": 8, "rotary_dim": 2},
        {"rope": RopeConfig(dim=2, interleaved=True)},
        ("attn.qkv_proj", "attn.out_proj"),
        ("mlp.fc_in", "mlp.fc_out", "gelu_new"),
    ),
    "dbrx": Family("DbrxForCausalLM", DBRX, ROPE, ("norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj"), None),
    "bert": Family(
        "BertModel",
        NEW,
        BIASES | {"causal": False},
        ("attention.self.query", "attention.output.dense"),
        ("intermediate.dense", "output.dense", "gelu"),
    ),
}


def our_mlp(checkpoint: Checkpoint, activation: str, x: Tensor, tp: int) -> Tensor:
    """An MLP of the checkpoint's weights on tp ranks: the sum of what the ranks return."""
    logical, plan = LogicalTensors(checkpoint), replace(checkpoint.plan, tp=tp, mlp_unit=16)
    total, act = torch.zeros_like(x), transformers.activations.ACT2FN[activation]
    for rank in range(tp):
        shares = {name: logical.share(name, plan, rank) for name in logical.names() if ".mlp." in name}
        inner = linear(x, shares["layers.0.mlp.in_weight"], shares.get("layers.0.mlp.in_bias"))
        if "gate" in logical.parts("layers.0.mlp.in_weight"):
            gate, up = inner.chunk(2, dim=-1)
            inner = act(gate) * up
        else:
            inner = act(inner)
        total += linear(inner, shares["layers.0.mlp.out_weight"])
    bias = shares.get("layers.0.mlp.out_bias")
    return total if bias is None else total + bias


def listen(model: nn.Module, modules: tuple[str, str]) -> dict[str, Tensor]:
    """Where the first layer's first module leaves its input, as x, and its second its output, as y.

    Copies: models add to both in place.
    """
    seen: dict[str, Tensor] = {}
    into, out_of = (f"layers.0.{name}" for name in modules)
    for name, module in model.named_modules():
        name = re.sub(r"^.*?(layers?|h|blocks)\.0\.", "layers.0.", name)
        if name == into:
            module.register_forward_hook(lambda module, args, output: seen.update(x=args[0].clone()))
        if name == out_of:
            module.register_forward_hook(lambda module, args, output: seen.update(y=output.clone()))
    return seen


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_our_layer_agrees_with_the_model_class(name: str) -> None:
    family = FAMILIES[name]
    model_class = getattr(transformers, family.model)
    model_config = model_class.config_class(**family.config, attn_implementation="eager")
    model = model_class(model_config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases start as zeros, norms as ones: both would hide mistakes
    attention = listen(model, family.projections)
    mlp = listen(model, family.mlp[:2]) if family.mlp else {}
    model(torch.randint(3, 31, (2, TOKENS)))
    plan, layout = from_config(model_config.to_dict()), layout_of(model_config.to_dict())
    checkpoint = StateDict(model.state_dict(), layout, plan)
    layer = AttentionConfig(plan.hidden_size, plan.heads, plan.kv_heads, plan.head_dim, **family.layer)
    for tp in (1, 2, 3):
        assert_close(ours(checkpoint, layer, attention["x"], tp), attention["y"].double())
        if family.mlp:
            y = our_mlp(checkpoint, family.mlp[2], mlp["x"], tp)
            assert_close(y.reshape(mlp["y"].shape), mlp["y"].double())
