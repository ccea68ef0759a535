"""Sizes and layouts come from config.json alone: transformers' own configs, and the published ones of the others."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from tp_attention.checkpoint.dimensions import from_config, layout_of

# layout; heads, kv heads, head dim; hidden, intermediate, vocabulary; layers
Expected = tuple[str, tuple[int, int, int], tuple[int, int, int], int]

OWN_CONFIGS: dict[str, tuple[str, dict[str, Any], Expected]] = {  # transformers' defaults, and what is set
    "llama": ("LlamaConfig", {}, ("llama", (32, 32, 128), (4096, 11008, 32000), 32)),
    "llama-gqa": ("LlamaConfig", {"num_key_value_heads": 8}, ("llama", (32, 8, 128), (4096, 11008, 32000), 32)),
    "mistral": ("MistralConfig", {}, ("llama", (32, 8, 128), (4096, 14336, 32000), 32)),
    "qwen2": ("Qwen2Config", {}, ("llama", (32, 32, 128), (4096, 22016, 151936), 32)),
    "qwen3": ("Qwen3Config", {"hidden_size": 1024}, ("llama", (32, 32, 128), (1024, 22016, 151936), 32)),
    "gemma": ("GemmaConfig", {}, ("llama", (16, 16, 256), (3072, 24576, 256000), 28)),
    "gemma2": ("Gemma2Config", {}, ("gemma2", (8, 4, 256), (2304, 9216, 256000), 26)),
    "gemma3": ("Gemma3TextConfig", {}, ("gemma2", (8, 4, 256), (2304, 9216, 262208), 26)),
    "phi3": ("Phi3Config", {}, ("phi3", (32, 32, 96), (3072, 8192, 32064), 32)),
    "bert": ("BertConfig", {}, ("bert", (12, 12, 64), (768, 3072, 30522), 12)),
    "gpt2": ("GPT2Config", {}, ("gpt2", (12, 12, 64), (768, 3072, 50257), 12)),
    "gpt2-inner": ("GPT2Config", {"n_inner": 100}, ("gpt2", (12, 12, 64), (768, 100, 50257), 12)),
    "gpt-neox": ("GPTNeoXConfig", {}, ("gpt-neox", (64, 64, 96), (6144, 24576, 50432), 44)),
    "bloom": ("BloomConfig", {"hidden_size": 64}, ("bloom", (8, 8, 8), (64, 256, 250880), 2)),
    "falcon-mqa": ("FalconConfig", {}, ("falcon-mqa", (71, 1, 64), (4544, 18176, 65024), 32)),
    "falcon-mha": ("FalconConfig", {"multi_query": False}, ("falcon-mha", (71, 71, 64), (4544, 18176, 65024), 32)),
    "falcon-new": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_attention_heads": 64, "num_kv_heads": 8, "hidden_size": 4096},
        ("falcon-new-decoder", (64, 8, 64), (4096, 4 * 4096, 65024), 32),
    ),
    "falcon-ffn": (
        "FalconConfig",
        {"new_decoder_architecture": True, "ffn_hidden_size": 99},
        ("falcon-new-decoder", (71, 71, 64), (4544, 99, 65024), 32),
    ),
    "mpt": ("MptConfig", {"expansion_ratio": 3}, ("mpt", (16, 16, 128), (2048, 6144, 50368), 24)),
    "codegen": ("CodeGenConfig", {}, ("codegen", (16, 16, 256), (4096, 16384, 50400), 28)),
    "bigcode": ("GPTBigCodeConfig", {}, ("gpt-bigcode-mqa", (12, 1, 64), (768, 3072, 50257), 12)),
    "bigcode-mha": (
        "GPTBigCodeConfig",
        {"multi_query": False},
        ("gpt-bigcode-mha", (12, 12, 64), (768, 3072, 50257), 12),
    ),
    "dbrx": ("DbrxConfig", {"attn_config": {"kv_n_heads": 8}}, ("dbrx", (16, 8, 128), (2048, 0, 32000), 24)),
}

CHATGLM2 = {
    **{"model_type": "chatglm", "num_attention_heads": 32, "kv_channels": 128, "hidden_size": 4096, "num_layers": 28},
    **{"ffn_hidden_size": 13696, "padded_vocab_size": 65024, "multi_query_attention": True},
}
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 90}
FALCON_40B = {"hidden_size": 8192, "n_head": 128, "n_head_kv": 8, "n_layer": 60, "vocab_size": 65024}
PUBLISHED: dict[str, tuple[dict[str, Any], Expected]] = {  # remote code: what their config.json files say
    "chatglm2": (CHATGLM2 | {"multi_query_group_num": 2}, ("chatglm2", (32, 2, 128), (4096, 13696, 65024), 28)),
    "chatglm": (
        {"model_type": "chatglm", "hidden_size": 4096, "inner_hidden_size": 16384, "num_attention_heads": 32}
        | {"num_layers": 28, "vocab_size": 130528},
        ("chatglm", (32, 32, 128), (4096, 16384, 130528), 28),
    ),
    "internlm2": (
        SMALL | {"model_type": "internlm2", "num_key_value_heads": 2, "intermediate_size": 48},
        ("internlm2", (4, 2, 8), (32, 48, 90), 2),
    ),
    "baichuan": (
        SMALL | {"model_type": "baichuan", "intermediate_size": 48},
        ("baichuan", (4, 4, 8), (32, 48, 90), 2),
    ),
    "qwen-1": (
        SMALL | {"model_type": "qwen", "intermediate_size": 96, "kv_channels": 16},
        ("qwen-1", (4, 4, 16), (32, 48, 90), 2),
    ),
    "falcon-40b": (
        {"model_type": "RefinedWeb"} | FALCON_40B,
        ("falcon-new-decoder", (128, 8, 64), (8192, 32768, 65024), 60),
    ),
    "falcon-7b": (
        {"model_type": "RefinedWebModel", "multi_query": True} | FALCON_40B,
        ("falcon-mqa", (128, 1, 64), (8192, 32768, 65024), 60),
    ),
    "mpt-gqa": (
        {"model_type": "mpt", "d_model": 64, "n_heads": 8, "n_layers": 2, "vocab_size": 90}
        | {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}},
        ("mpt", (8, 2, 8), (64, 256, 90), 2),
    ),
    "mpt-mqa": (
        {"model_type": "mpt", "d_model": 64, "n_heads": 8, "n_layers": 2, "vocab_size": 90}
        | {"attn_config": {"attn_type": "multiquery_attention"}},
        ("mpt", (8, 1, 8), (64, 256, 90), 2),
    ),
}


def check(config: dict[str, Any], expected: Expected) -> None:
    layout, heads, sizes, layers = expected
    plan = from_config(config)
    assert layout_of(config).name == layout
    assert (plan.heads, plan.kv_heads, plan.head_dim) == heads
    assert (plan.hidden_size, plan.intermediate_size, plan.vocab_size) == sizes
    assert (plan.layers, plan.tp, plan.mlp_unit) == (layers, 1, 1)


@pytest.mark.parametrize("name", OWN_CONFIGS)
def test_configs_of_transformers(name: str) -> None:
    class_name, arguments, expected = OWN_CONFIGS[name]
    check(getattr(transformers, class_name)(**arguments).to_dict(), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_remote_code(name: str) -> None:
    check(*PUBLISHED[name])


@pytest.mark.parametrize("config", [{"model_type": "mixtral"}, {"model_type": "qwen3_moe"}, {"model_type": None}, {}])
def test_an_unknown_model_type_is_refused_with_the_known_ones(config: dict[str, Any]) -> None:
    for ask in (layout_of, from_config):
        with pytest.raises(
            ValueError, match=r"model_type .* has no layout here; known: llama, mistral.*name that layout"
        ):
            ask(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": None},
            "this baichuan lacks num_hidden_layers or num_layers or n_layer or n_layers",
        ),
        ({"vocab_size": None}, "lacks padded_vocab_size"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"hidden_size": 33}, "hidden size 33 is no multiple of 4 heads"),
        ({"num_key_value_heads": 3}, "heads=4 is no multiple of kv_heads=3"),
    ],
)
def test_a_size_that_lacks_or_does_not_fit_is_an_error(change: dict[str, Any], message: str) -> None:
    config = SMALL | {"model_type": "baichuan", "intermediate_size": 48} | change
    with pytest.raises(ValueError, match=message):
        from_config(config)


def test_chatglm_without_groups() -> None:
    with pytest.raises(ValueError, match="this chatglm lacks multi_query_group_num"):
        from_config(CHATGLM2)
    with pytest.raises(ValueError, match="multi_query_attention=false"):
        layout_of(CHATGLM2 | {"multi_query_attention": False})
