"""Small random models of every family, saved as Hugging Face folders; and the bundled real ones."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from tp_attention.models import resolve

# Odd on purpose: 9 query heads over 3 kv heads, head_dim no quotient, an MLP of no whole units, a prime vocabulary.
COMMON = {
    "vocab_size": 131,
    "hidden_size": 36,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}

CONFIGS = {
    "llama": LlamaConfig(
        **COMMON, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "mistral": MistralConfig(**{**COMMON, "num_attention_heads": 4, "num_key_value_heads": 1}, sliding_window=5),
    "qwen2": Qwen2Config(
        **{name: value for name, value in COMMON.items() if name != "head_dim"},
        use_sliding_window=True, sliding_window=4, max_window_layers=1,
    ),
    "qwen3": Qwen3Config(**COMMON, rope_parameters=YARN, tie_word_embeddings=True),
    "bert": BertConfig(
        vocab_size=131, hidden_size=48, intermediate_size=53, num_hidden_layers=2, num_attention_heads=6,
        max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder. All weights random: fresh biases are zero and fresh norms one, which would hide mistakes."""
    folders = {}
    for name, config in CONFIGS.items():
        build = AutoModel if name == "bert" else AutoModelForCausalLM
        model = build.from_config(config)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in path.lower() and path.endswith("weight") else 0.0, 0.3)
        folders[name] = tmp_path_factory.mktemp(name)
        # Two files and an index for one of them, one file for the others.
        model.save_pretrained(folders[name], max_shard_size="40KB" if name == "qwen2" else "1GB")
    return folders


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M: 9 query heads, 3 kv heads, 30 layers."""
    return resolve("smollm2")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """MiniLM-L6: a BERT with 12 heads."""
    return resolve("minilm")
