"""Megatron-LM: the classic GPT model in its four checkpoint versions, and the model of Megatron-core.

Names begin below the checkpoint's "model", or "module", with a dot between the keys of nested dictionaries. These
layouts are cut as Megatron cuts: every rank's file is packed like the layout says, with the rank's own heads.
"""

from __future__ import annotations

from typing import Any

from tp_attention.checkpoint.families.build import Rules, column, embedding, head, per_layer, row, whole
from tp_attention.checkpoint.families.gpt import NORMS
from tp_attention.checkpoint.families.llama import INV_FREQ
from tp_attention.checkpoint.layouts import Layout, Rule
from tp_attention.checkpoint.packing import Packing

_EXTRA = (
    INV_FREQ,
    r".*\._extra_state",  # of Transformer Engine
    r"(language_model\.pooler\.dense|lm_head\.(dense|layernorm)|binary_head)\.(weight|bias)",  # BERT's heads
)


def _classic(name: str, gated: bool = False, **qkv: Any) -> Layout:
    """Layers are the "transformer" in old files and the "encoder" in new ones, their attention "self_attention"."""
    mlp = ("gate", "up") if gated else ("up",)

    def layers(root: str, attention: str) -> Rules:
        return per_layer(
            f"[language_model.]{root}.layers.",
            NORMS,
            column(f"{attention}.query_key_value", "attention.qkv", "q", "k", "v", **qkv),
            row(f"{attention}.dense", "attention.out", "out"),
            column("mlp.dense_h_to_4h", "mlp.in", *mlp),
            row("mlp.dense_4h_to_h", "mlp.out", "down"),
        )

    return Layout(
        name,
        (
            *embedding("[language_model.]embedding.word_embeddings"),
            Rule("[language_model.]embedding.position_embeddings.weight", "position_embedding.weight"),
            Rule("[language_model.]embedding.tokentype_embeddings.weight", "token_type_embedding.weight"),
            *layers("encoder", "self_attention"),
            *whole("[language_model.]encoder.final_layernorm", "norm"),
            *layers("transformer", "attention"),
            *whole("[language_model.]transformer.final_layernorm", "norm"),
            *head("[language_model.]output_layer"),
            Rule("word_embeddings_for_head.weight", "head.weight", Packing(("head",)), alias=True),  # a last stage's
            Rule("lm_head.bias", "head.bias", Packing(("head",)), alias=True),  # BERT's
        ),
        _EXTRA,
    )


MEGATRON_0 = _classic("megatron-0")  # no version key: q, k and v of the rank one after another
MEGATRON_1 = _classic("megatron-1.0", order="elements")
MEGATRON_2 = _classic("megatron-2.0", order="groups")
MEGATRON_3 = _classic("megatron-3.0", order="groups")  # grouped-query attention came with it
MEGATRON_3_GATED = _classic("megatron-3.0-gated", gated=True, order="groups")


def _core(name: str, gated: bool, output_gate: bool = False) -> Layout:
    parts = ("q", "query_gate", "k", "v") if output_gate else ("q", "k", "v")
    mlp = ("gate", "up") if gated else ("up",)
    return Layout(
        name,
        (
            *embedding("embedding.word_embeddings"),
            Rule("embedding.position_embeddings.weight", "position_embedding.weight"),
            *whole("decoder.final_layernorm", "norm"),
            *head("output_layer"),
            *per_layer(
                "decoder.layers.",
                # Transformer Engine keeps a norm in the projection behind it, the local layers beside it.
                (Rule("self_attention.linear_qkv.layer_norm_{kind}", "attention_norm.{kind}"),),
                whole("input_layernorm", "attention_norm"),
                column("self_attention.linear_qkv", "attention.qkv", *parts, order="groups"),
                (
                    Rule("self_attention.q_layernorm.weight", "attention.q_norm_weight"),
                    Rule("self_attention.k_layernorm.weight", "attention.k_norm_weight"),
                    Rule("self_attention.core_attention.softmax_offset", "attention.sinks", Packing(("sinks",))),
                ),
                row("self_attention.linear_proj", "attention.out", "out"),
                (Rule("mlp.linear_fc1.layer_norm_{kind}", "mlp_norm.{kind}"),),
                whole("pre_mlp_layernorm", "mlp_norm"),
                column("mlp.linear_fc1", "mlp.in", *mlp),
                row("mlp.linear_fc2", "mlp.out", "down"),
            ),
        ),
        _EXTRA,
    )


MEGATRON_CORE = _core("megatron-core", gated=False)
MEGATRON_CORE_GATED = _core("megatron-core-gated", gated=True)
MEGATRON_CORE_OUTPUT_GATE = _core("megatron-core-output-gate", gated=True, output_gate=True)
