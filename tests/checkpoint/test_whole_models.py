"""A checkpoint that lacks a part of its model, or has one of another size, is refused before anything is done."""

import json

import pytest
import tiny_llama
import tiny_megatron
import torch
from safetensors.torch import load_file, save_file

from tp_attention.checkpoint import inspect, load_rank, open_checkpoint, reshard
from tp_attention.checkpoint.formats.native import MANIFEST


@pytest.fixture
def folder(tmp_path):
    tiny_llama.write(tmp_path / "in")
    return tmp_path / "in"


def change(folder, **tensors):
    """Add or replace tensors; None removes them."""
    held = load_file(folder / "model.safetensors") | tensors
    save_file({name: t for name, t in held.items() if t is not None}, folder / "model.safetensors")


def refused(folder, match):
    plan = None
    for use in (inspect, lambda path: reshard(path, folder.with_name("out"), 2), lambda path: load_rank(path, plan, 0)):
        with pytest.raises(ValueError, match=match) as caught:
            use(folder)
        assert "\n" not in str(caught.value)
    assert not folder.with_name("out").exists() and not folder.with_name("out.partial").exists()


LACKING = {
    "model.layers.1.self_attn.q_proj.weight": r"layers\.1\.attention\.qkv_weight \(q\)",
    "model.layers.0.input_layernorm.weight": r"layers\.0\.attention_norm\.weight",
    "model.layers.1.mlp.gate_proj.weight": r"layers\.1\.mlp\.in_weight \(gate\)",
    "model.embed_tokens.weight": r"embedding\.weight \(vocab\)",
    "model.norm.weight": r"norm\.weight",
}


@pytest.mark.parametrize("name", LACKING)
def test_a_tensor_that_is_missing(folder, name):
    change(folder, **{name: None})
    refused(folder, rf"in lacks 1 parts of its model: {LACKING[name]}; download or copy it again")


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_a_tensor_that_all_layers_lack(folder, name):
    change(folder, **{f"model.layers.{layer}.{name}.weight": None for layer in range(2)})
    refused(folder, r"in lacks 2 parts of its model: layers\.0\..*, layers\.1\.")


def test_biases_of_one_layer_alone(folder):
    change(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(48).bfloat16()})
    refused(folder, r"lacks 1 parts of its model: layers\.1\.attention\.qkv_bias \(q\)")


@pytest.mark.parametrize(
    ("layers", "match"), [(1, "has a layer 1, counted from 0; its config says 1"), (9, "lacks 63")]
)
def test_as_many_layers_as_the_config_says(folder, layers, match):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    refused(folder, match)


def test_a_head_that_is_not_tied(folder):
    change(folder, **{"lm_head.weight": None})
    refused(folder, "lacks a head, and .*config.json does not tie it to the embedding")
    config = json.loads((folder / "config.json").read_text())
    for said in ({"tie_word_embeddings": True}, {"architectures": ["LlamaModel"]}):
        (folder / "config.json").write_text(json.dumps({**config, **said}))
        assert open_checkpoint(folder).plan.vocab_matrices == 1


def test_nothing_at_all(folder):
    save_file({}, folder / "model.safetensors")
    refused(folder, "lacks a head")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("false", "true"))
    refused(folder, "lacks .* parts of its model: embedding.weight")


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("model.norm.weight", (5,), r"has shape \[5\], which does not fit hidden_size=16"),
        ("model.norm.weight", (), r"has shape \[\], which does not fit hidden_size=16"),
        ("model.embed_tokens.weight", (50, 15), r"has shape \[50, 15\], which does not fit hidden_size=16"),
        ("model.embed_tokens.weight", (49, 16), "dimension 0 should measure 50"),
        ("model.layers.1.self_attn.o_proj.weight", (16, 47), "dimension 1 should measure 48"),
        ("model.layers.1.self_attn.o_proj.weight", (17, 48), r"\[17, 48\], which does not fit hidden_size=16"),
        ("model.layers.0.mlp.up_proj.weight", (112,), "has shape|does not fit"),
    ],
)
def test_other_sizes(folder, name, shape, match):
    change(folder, **{name: torch.ones(shape).bfloat16()})
    refused(folder, f"{name} of rank 0 of .*{match}")


def test_a_layer_that_every_rank_lacks(tmp_path):
    states = tiny_megatron.write(tmp_path / "in", 2)
    for rank, state in enumerate(states):
        layers = state["model"]["language_model"]["transformer"]
        del layers["layers.1.attention.dense.weight"]
        torch.save(state, tmp_path / "in" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
    refused(tmp_path / "in", r"lacks 1 parts of its model: layers\.1\.attention\.out_weight \(out\)")


def test_rows_past_the_configs_vocabulary_are_not_lost(folder, tmp_path):
    """Tokens added, config.json as before: nothing says that their rows are padding."""
    reshard(folder, tmp_path / "cut", 2)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    for said in (45, "50", -5):
        (tmp_path / "cut" / "config.json").write_text(json.dumps({**config, "vocab_size": said}))
        for format in ("hf", "deepspeed"):
            with pytest.raises(ValueError, match=f"cut has 50 rows of vocabulary, its config.json says {said!r}"):
                reshard(tmp_path / "cut", tmp_path / "out", 1, format=format)


def test_verify_needs_a_manifest_with_hashes(folder, tmp_path):
    reshard(folder, tmp_path / "cut", 2)
    manifest = json.loads((tmp_path / "cut" / MANIFEST).read_text())
    for entry in manifest["files"].values():
        del entry["sha256"]
    (tmp_path / "cut" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"tp_attention\.json does not say each tensor's SHA-256: KeyError"):
        reshard(tmp_path / "cut", tmp_path / "out", 3, verify=True)
