"""What a model's config.json says of its sizes and of how its weights are packed. Never guessed from shapes."""

from __future__ import annotations

from typing import Any

from tp_attention.checkpoint.families import LAYOUTS
from tp_attention.checkpoint.layouts import Layout
from tp_attention.sharding import ShardPlan

Config = dict[str, Any]

# model_type -> layout; None: its flags decide, in layout_of
_LAYOUT_OF = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), "llama"),
    **dict.fromkeys(("gemma2", "gemma3_text"), "gemma2"),
    "phi3": "phi3",
    "baichuan": "baichuan",
    "internlm2": "internlm2",
    "qwen": "qwen-1",
    "dbrx": "dbrx",
    "gpt2": "gpt2",
    "gpt_neox": "gpt-neox",
    "bloom": "bloom",
    "mpt": "mpt",
    "codegen": "codegen",
    "bert": "bert",
    **dict.fromkeys(("chatglm", "gpt_bigcode", "falcon", "RefinedWeb", "RefinedWebModel")),
}


def layout_of(config: Config) -> Layout:
    """The layout of the Hugging Face files that lie beside this config.json.

    Raises ValueError for a model type that is not known; mixtures of experts are not, but for DBRX.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _LAYOUT_OF:
        raise ValueError(
            f"model_type {kind!r} has no layout here; known: {', '.join(_LAYOUT_OF)}. "
            f"If its weights are packed like another's, name that layout: {', '.join(LAYOUTS)}"
        )
    if (name := _LAYOUT_OF[kind]) is None:
        if kind == "chatglm":
            name = _chatglm(config)
        elif kind == "gpt_bigcode":
            name = "gpt-bigcode-mqa" if config.get("multi_query", True) else "gpt-bigcode-mha"
        else:
            name = _falcon(config)
    return LAYOUTS[name]


def from_config(config: Config) -> ShardPlan:
    """The plan of the whole model, uncut (tp=1, mlp_unit=1), from its config.json.

    The plan's fields that only count bytes keep their defaults: the tensors themselves tell those.
    Raises ValueError for a model type that is not known, and for a size that the config lacks or that is no number.
    """
    try:
        return _plan(config, layout_of(config).name)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the config of this {config['model_type']} has a size of the wrong kind: {error}") from None


def _plan(config: Config, layout: str) -> ShardPlan:
    hidden = _size(config, "hidden_size", "n_embd", "n_embed", "d_model")
    heads = _size(config, "num_attention_heads", "n_head", "n_heads")
    return ShardPlan(
        tp=1,
        heads=heads,
        kv_heads=_kv_heads(config, layout, heads),
        head_dim=config.get("head_dim") or config.get("kv_channels") or _divided(hidden, heads),
        hidden_size=hidden,
        intermediate_size=_intermediate_size(config, layout, hidden),
        vocab_size=_size(config, "padded_vocab_size", "vocab_size"),
        layers=_size(config, "num_hidden_layers", "num_layers", "n_layer", "n_layers"),
        mlp_unit=1,
    )


def _chatglm(config: Config) -> str:
    if "inner_hidden_size" in config:  # the first ChatGLM
        return "chatglm"
    if not config.get("multi_query_attention"):
        raise ValueError(
            "this ChatGLM has multi_query_attention=false, which no published model has and no layout knows"
        )
    return "chatglm2"


def _falcon(config: Config) -> str:
    # RefinedWeb is what the first Falcon-40B called itself, RefinedWebModel the first 7B and 1B.
    if config.get("new_decoder_architecture", config["model_type"] == "RefinedWeb"):
        return "falcon-new-decoder"
    return "falcon-mqa" if config.get("multi_query", True) else "falcon-mha"


def _kv_heads(config: Config, layout: str, heads: int) -> int:
    if layout in ("falcon-mqa", "gpt-bigcode-mqa"):
        return 1
    if layout in ("falcon-mha", "gpt-bigcode-mha"):
        return heads
    if layout == "falcon-new-decoder":
        return config.get("num_kv_heads") or config.get("n_head_kv") or heads
    if layout == "chatglm2":
        return _size(config, "multi_query_group_num")
    if layout in ("dbrx", "mpt"):
        attention = config.get("attn_config") or {}
        single = layout == "dbrx" or attention.get("attn_type") == "multiquery_attention"
        return attention.get("kv_n_heads") or (1 if single else heads)
    return config.get("num_key_value_heads") or heads


def _intermediate_size(config: Config, layout: str, hidden: int) -> int:
    if layout == "dbrx":  # its experts are kept whole
        return 0
    if layout == "mpt":
        return int(config.get("expansion_ratio", 4) * hidden)
    if layout == "bloom":
        return 4 * hidden
    if layout == "qwen-1":  # the config counts gate and up together
        return _size(config, "intermediate_size") // 2
    if layout in ("gpt2", "gpt-bigcode-mqa", "gpt-bigcode-mha", "codegen"):
        return config.get("n_inner") or 4 * hidden
    if layout.startswith("falcon"):
        return config.get("ffn_hidden_size") or 4 * hidden
    return _size(config, "intermediate_size", "ffn_hidden_size", "inner_hidden_size")


def _size(config: Config, *names: str) -> int:
    """The first of `names` that the config has."""
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise ValueError(f"the config of this {config['model_type']} lacks {' or '.join(names)}")


def _divided(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ValueError(f"hidden size {hidden} is no multiple of {heads} heads, and the config has no head_dim")
    return hidden // heads
