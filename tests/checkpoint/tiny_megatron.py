"""Megatron checkpoints of a few kilobytes whose weights are random bits, as Megatron's own save lays them out."""

import argparse
from pathlib import Path

import numpy as np
import torch


def write(folder, tp, version=3.0, *, core=False, heads=8, kv_heads=None, gated=False, says=True, flat=False, vocab=24):
    """Write mp_rank_XX/model_optim_rng.pt below `folder`; what each file holds, by rank.

    version: None leaves the key out. says: whether the arguments are in the files. flat: without nested dictionaries.
    """
    folder, head_dim, hidden, mlp = Path(folder), 4, 16, 48
    kv_heads = kv_heads or heads
    once = {}  # what every rank holds whole

    def shared(name, *shape):
        return once.setdefault(name, _bits(shape))

    def rank_weights():
        rows = (heads + 2 * kv_heads) * head_dim // tp
        layers = {}
        names = _CORE if core else _CLASSIC
        for layer in range(2):
            for name, shape in {
                "norm.weight": None,
                "norm.bias": None,
                "qkv.weight": (rows, hidden),
                "qkv.bias": (rows,),
                "out.weight": (hidden, heads * head_dim // tp),
                "out.bias": None,
                "mlp_norm.weight": None,
                "mlp_norm.bias": None,
                "in.weight": ((1 + gated) * mlp // tp, hidden),
                "in.bias": ((1 + gated) * mlp // tp,),
                "down.weight": (hidden, mlp // tp),
                "down.bias": None,
            }.items():
                module, kind = name.split(".")
                key = f"layers.{layer}.{names[module]}{kind}"
                layers[key] = shared(key, hidden) if shape is None else _bits(shape)
        layers |= {f"final_layernorm.{kind}": shared(kind, hidden) for kind in ("weight", "bias")}
        words, positions = _bits((vocab // tp, hidden)), shared("positions", 10, hidden)
        if core:
            decoder = {f"decoder.{name}": tensor for name, tensor in layers.items()}
            extra = {"decoder.layers.0.self_attention.linear_qkv._extra_state": None}
            return {"embedding.word_embeddings.weight": words, **decoder, **extra}
        embedding = {"word_embeddings": {"weight": words}, "position_embeddings": {"weight": positions}}
        model = {"language_model": {"embedding": embedding, "transformer": layers}}
        return dict(_flattened(model)) if flat else model

    states = []
    for rank in range(tp):
        state = {"model": rank_weights(), "iteration": 7}
        if version is not None:
            state["checkpoint_version"] = version
        if says:
            grouped = kv_heads != heads
            state["args"] = argparse.Namespace(
                num_attention_heads=heads,
                group_query_attention=grouped,
                num_query_groups=kv_heads if grouped else 1,
                swiglu=gated,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=1,
                seed=1234,
                lr=1e-4,
                params_dtype=torch.bfloat16,
            )
            state["rng_state"] = [{"np_rng_state": np.random.RandomState(rank).get_state()}]
            state["optimizer"] = {"step": 7, "exp_avg": torch.zeros(3)}
        path = folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(state, path)
        states.append(state)
    return states


def weights(state):
    """The weights of one file, by flat name."""
    return {name: tensor for name, tensor in _flattened(state["model"]) if tensor is not None}


def _flattened(nested, before=""):
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{before}{key}.")
        else:
            yield before + key, value


def _bits(shape):
    return torch.randint(-(2**15), 2**15, shape).short().view(torch.bfloat16)


_CLASSIC = {
    "norm": "input_layernorm.",
    "qkv": "attention.query_key_value.",
    "out": "attention.dense.",
    "mlp_norm": "post_attention_layernorm.",
    "in": "mlp.dense_h_to_4h.",
    "down": "mlp.dense_4h_to_h.",
}
_CORE = {
    "norm": "self_attention.linear_qkv.layer_norm_",
    "qkv": "self_attention.linear_qkv.",
    "out": "self_attention.linear_proj.",
    "mlp_norm": "mlp.linear_fc1.layer_norm_",
    "in": "mlp.linear_fc1.",
    "down": "mlp.linear_fc2.",
}
