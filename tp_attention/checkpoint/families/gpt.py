"""GPT-2 and its descendants: LayerNorm, an MLP without a gate, and q, k, v packed into one tensor in many ways."""

from __future__ import annotations

from typing import Any

from tp_attention.checkpoint.families.build import Rules, column, embedding, head, per_layer, row, whole
from tp_attention.checkpoint.families.llama import INV_FREQ
from tp_attention.checkpoint.layouts import Layout, Rule

_CAUSAL_MASKS = r"(transformer\.|gpt_neox\.)?(h|layers)\.\d+\.(attn|attention)\.(bias|masked_bias|causal_mask)"
_EXTRA = (INV_FREQ, _CAUSAL_MASKS)


def _gpt2(name: str, transposed: bool, **qkv: Any) -> Layout:
    model = (
        *embedding("[transformer.]wte"),
        Rule("[transformer.]wpe.weight", "position_embedding.weight"),
        *whole("[transformer.]ln_f", "norm"),
        *head(),
    )
    layer = per_layer(
        "[transformer.]h.",
        whole("ln_1", "attention_norm"),
        column("attn.c_attn", "attention.qkv", "q", "k", "v", transposed=transposed, **qkv),
        row("attn.c_proj", "attention.out", "out", transposed=transposed),
        whole("ln_2", "mlp_norm"),
        column("mlp.c_fc", "mlp.in", "up", transposed=transposed),
        row("mlp.c_proj", "mlp.out", "down", transposed=transposed),
    )
    return Layout(name, (*model, *layer), _EXTRA)


GPT2 = _gpt2("gpt2", transposed=True)
GPT_BIGCODE_MQA = _gpt2("gpt-bigcode-mqa", transposed=False)
GPT_BIGCODE_MHA = _gpt2("gpt-bigcode-mha", transposed=False, order="groups")


def query_key_value(attention: str, **packing: Any) -> Rules:
    """Attention and MLP under the names that Megatron gave them; `attention` is what the former is called."""
    return (
        *column(f"{attention}.query_key_value", "attention.qkv", "q", "k", "v", **packing),
        *row(f"{attention}.dense", "attention.out", "out"),
        *column("mlp.dense_h_to_4h", "mlp.in", "up"),
        *row("mlp.dense_4h_to_h", "mlp.out", "down"),
    )


NORMS: Rules = (*whole("input_layernorm", "attention_norm"), *whole("post_attention_layernorm", "mlp_norm"))

GPT_NEOX = Layout(
    "gpt-neox",
    (
        *embedding("[gpt_neox.]embed_in"),
        *whole("[gpt_neox.]final_layer_norm", "norm"),
        *head("embed_out"),  # what the hub's files call it
        Rule("lm_head.weight", "head.weight", head()[0].packing, alias=True),  # transformers 5
        *per_layer("[gpt_neox.]layers.", NORMS, query_key_value("attention", order="groups")),
    ),
    _EXTRA,
)

BLOOM = Layout(
    "bloom",
    (
        *embedding("[transformer.]word_embeddings"),
        *whole("[transformer.]word_embeddings_layernorm", "embedding_norm"),
        *whole("[transformer.]ln_f", "norm"),
        *head(),
        *per_layer("[transformer.]h.", NORMS, query_key_value("self_attention", order="groups")),
    ),
    _EXTRA,
)


def _falcon(name: str, **packing: Any) -> Layout:
    two_norms = (*whole("ln_attn", "attention_norm", alias=True), *whole("ln_mlp", "mlp_norm", alias=True))
    return Layout(
        name,
        (
            *embedding("[transformer.]word_embeddings"),
            *whole("[transformer.]ln_f", "norm"),
            *head(),
            *per_layer("[transformer.]h.", NORMS, two_norms, query_key_value("self_attention", **packing)),
        ),
        _EXTRA,
    )


FALCON_MQA = _falcon("falcon-mqa")  # 7B
FALCON_MHA = _falcon("falcon-mha", order="groups")  # RW: kv groups of one query head
FALCON_GROUPS = _falcon("falcon-new-decoder", order="groups")  # 40B, 180B, 11B

CHATGLM = Layout(  # the first ChatGLM-6B
    "chatglm",
    (
        *embedding("[transformer.]word_embeddings"),
        *whole("[transformer.]final_layernorm", "norm"),
        *head(),
        *per_layer("[transformer.]layers.", NORMS, query_key_value("attention", order="groups")),
    ),
    (*_EXTRA, r"(transformer\.)?prefix_encoder\..+"),
)

MPT = Layout(
    "mpt",
    (
        *embedding("[transformer.]wte"),
        Rule("[transformer.]wpe.weight", "position_embedding.weight"),
        *whole("[transformer.]norm_f", "norm"),
        *head(),
        *per_layer(
            "[transformer.]blocks.",
            whole("norm_1", "attention_norm"),
            column("attn.Wqkv", "attention.qkv", "q", "k", "v"),
            row("attn.out_proj", "attention.out", "out"),
            whole("norm_2", "mlp_norm"),
            column("ffn.up_proj", "mlp.in", "up"),
            row("ffn.down_proj", "mlp.out", "down"),
        ),
    ),
)

CODEGEN = Layout(
    "codegen",
    (
        *embedding("[transformer.]wte"),
        *whole("[transformer.]ln_f", "norm"),
        *head(),
        *per_layer(
            "[transformer.]h.",
            whole("ln_1", "attention_norm"),
            column("attn.qkv_proj", "attention.qkv", "q", "v", "k", blocks=4),  # the 4 of the TPUs it was trained on
            row("attn.out_proj", "attention.out", "out"),
            column("mlp.fc_in", "mlp.in", "up"),
            row("mlp.fc_out", "mlp.out", "down"),
        ),
    ),
    _EXTRA,
)
