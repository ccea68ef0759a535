"""A Hugging Face folder of a few kilobytes whose weights are random bits, NaNs among them: only exact copies pass."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def model(heads=12, kv_heads=4, head_dim=4, hidden=16, intermediate=112, vocab=50, layers=2):
    """config.json's content, and the shapes of the tensors by name."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
    }
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (heads * head_dim, hidden),
                "self_attn.k_proj": (kv_heads * head_dim, hidden),
                "self_attn.v_proj": (kv_heads * head_dim, hidden),
                "self_attn.o_proj": (hidden, heads * head_dim),
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "mlp.down_proj": (hidden, intermediate),
            }.items()
        }
    return config, shapes


def write(folder, *, finite=False, **sizes):
    """Write the folder; its tensors by name, bf16."""
    config, shapes = model(**sizes)
    tensors = {
        name: torch.randn(shape).bfloat16()
        if finite
        else torch.randint(-(2**15), 2**15, shape).short().view(torch.bfloat16)
        for name, shape in shapes.items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def bits(tensors):
    """Name -> dtype, shape and bytes of every tensor, to compare bit for bit."""
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, tensor in dict(tensors).items()
    }


def files_of(folder):
    """Path -> SHA-256 of every file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }
