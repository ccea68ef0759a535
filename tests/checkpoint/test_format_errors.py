"""What is wrong with a checkpoint is one line that names the file and the way out, before anything else happens."""

import argparse
import json
import os
import random
import re
import shutil

import pytest
import tiny_llama
import tiny_megatron
import torch
from safetensors.torch import load_file, save_file

from tp_attention.checkpoint import reshard
from tp_attention.checkpoint.formats import open_checkpoint
from tp_attention.checkpoint.formats.native import MANIFEST
from tp_attention.checkpoint.logical import LogicalTensors


def refused(path, match, **options):
    """Opening `path` fails with one line that matches."""
    with pytest.raises(ValueError, match=match) as error:
        LogicalTensors(open_checkpoint(path, **options))
    assert "\n" not in str(error.value)


def truncate(path, by):
    os.truncate(path, path.stat().st_size - by)


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    said = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def resave(path, change):
    """Change what a file of torch.save holds."""
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


@pytest.fixture
def folder(tmp_path):
    tiny_llama.write(tmp_path / "in")
    return tmp_path / "in"


def test_no_path():
    refused("", "an empty path names no checkpoint")
    for source, destination in (("", "out"), ("in", "")):
        with pytest.raises(ValueError, match=r"source '.*' and destination '.*' must both be paths, not empty"):
            reshard(source, destination, 2)


def test_no_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist; pass a checkpoint's folder")
    refused(tmp_path, "is no checkpoint: it has none of tp_attention.json, model.safetensors, .* mp_rank_")
    (tmp_path / "notes.json").write_text("{}")
    refused(tmp_path / "notes.json", "neither a GGUF file nor a JSON file of DeepSpeed's")
    (tmp_path / "a.gguf").write_bytes(b"PK")
    refused(tmp_path / "a.gguf", r"a\.gguf is no GGUF file: it starts with b'PK'")
    (tmp_path / "b.gguf").write_bytes(b"PK")
    refused(tmp_path, "has 2 GGUF files; pass one: a.gguf, b.gguf")


# Hugging Face


@pytest.mark.parametrize("by", [1, 100_000_000])
def test_truncated_safetensors(folder, by):
    file = folder / "model.safetensors"
    os.truncate(file, max(file.stat().st_size - by, 5))
    refused(folder, r"model\.safetensors (has .* bytes, its header promises|is truncated: 5 bytes)")


def test_broken_sizes_in_a_config(folder):
    for changes in (
        {"num_key_value_heads": "4x"},
        {"head_dim": [4]},
        {"num_attention_heads": [12]},
        {"model_type": []},
    ):
        before = (folder / "config.json").read_text()
        edit(folder / "config.json", **changes)
        refused(folder, r"config\.json: ")
        (folder / "config.json").write_text(before)
    (folder / "config.json").unlink()
    refused(folder, "heads=0 must be a number, at least 1", layout="llama", heads=0)


@pytest.mark.parametrize(
    "header",
    [b"[1]", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": [0, "x"]}}', b'{"a": {"data_offsets": [0, 0]}}'],
)
def test_broken_safetensors_headers(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, r"model\.safetensors is no safetensors file: ")


def test_tensors_that_are_not_just_numbers(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file, name = folder / "pytorch_model.bin", "model.norm.weight"
    torch.save({key: torch.nn.Parameter(tensor) for key, tensor in tensors.items()}, file)
    reshard(folder, folder.with_name("out"), 2, verify=True)
    for value in (torch.eye(16).to_sparse(), torch.ones(16, device="meta")):
        torch.save({**tensors, name: value}, file)
        refused(folder, rf"pytorch_model\.bin: {name} is .*save it as a dense tensor")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "config.json is no JSON"),
        ("[]", "config.json holds a JSON list, not an object"),
        ("{}", "model_type None"),
    ],
)
def test_broken_config(folder, content, match):
    (folder / "config.json").write_text(content)
    refused(folder, match)


def test_config_that_does_not_fit(folder):
    edit(folder / "config.json", hidden_size=None)
    refused(folder, r"config\.json: .*hidden_size")
    refused(folder, "unknown layout 'lama'; known: .*llama", layout="lama")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing; copy it here, or say what the weights are with --layout")
    refused(folder, "does not say how many heads it has; pass --heads N", layout="llama")
    refused(
        folder,
        "q_proj.weight has 48 rows over 1 ranks; heads=4, kv_heads=4 of 12 make 48|k_proj",
        layout="llama",
        heads=4,
    )


def test_heads_against_config(folder):
    refused(folder, "heads=6 given, but .*config.json says 12; leave it out", heads=6)


def test_index(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = load_file(folder / "a.safetensors").keys()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(names, "a.safetensors"), "more": "a.safetensors"}}))
    refused(folder, "1 tensors of model.safetensors.index.json are in no file of .*: more")
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(names, "a.safetensors"), "more": "b.safetensors"}}))
    refused(folder, "b.safetensors is missing; download or copy the checkpoint again")
    save_file({"model.norm.weight": torch.ones(16)}, folder / "b.safetensors")
    refused(folder, "'model.norm.weight' is both in a.safetensors and in b.safetensors")
    for name in ("../in/a.safetensors", str(folder / "a.safetensors"), 3, None, ["a.safetensors"], ""):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused(folder, r"model\.safetensors\.index\.json names a file .* it should be one in its own folder")
    index.write_text("{}")
    refused(folder, "index.json has no weight_map")


def test_missing_unknown_and_duplicate_tensors(folder):
    tensors = load_file(folder / "model.safetensors")
    lost = tensors.pop("model.layers.1.self_attn.k_proj.weight")
    save_file({**tensors, "model.layers.1.self_attn.key.weight": lost}, folder / "model.safetensors")
    refused(folder, "/in: layout 'llama' does not know the tensor 'model.layers.1.self_attn.key.weight'")
    tensors["model.layers.1.self_attn.k_proj.weight"] = lost
    save_file({**tensors, "lm_head.bias": torch.ones(3)}, folder / "model.safetensors")
    refused(folder, r"lm_head\.bias of rank 0 .*should measure 50")
    save_file({**tensors, "norm.weight": torch.ones(16)}, folder / "model.safetensors")
    refused(folder, "/in: .*norm.weight is in the checkpoint twice, or under two names")
    tensors["model.layers.1.self_attn.k_proj.weight"] = lost.float()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"qkv_weight of .*/in is torch\.bfloat16 and torch\.float32 on different"):
        reshard(folder, folder.with_name("out"), 2)


def test_pickles_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({**tensors, "evil": Unpickled()}, file)
    refused(folder, r"pytorch_model\.bin holds more than tensors and plain data \(.*_unpickle\); .*--allow-pickle")
    assert Unpickled.ran == 0
    assert "evil" not in open_checkpoint(folder, allow_pickle=True).names(0)
    assert Unpickled.ran == 1
    torch.save(tensors, file)
    truncate(file, 40)
    refused(folder, r"pytorch_model\.bin is truncated or no file of torch.save")
    torch.save(list(tensors.values()), file)
    refused(folder, "holds a list, not a dictionary of tensors")
    file.write_bytes(b"\x80\x02garbage")
    refused(folder, r"pytorch_model\.bin is (broken|truncated)")


class Unpickled:
    """Counts how often a file ran its code."""

    ran = 0

    def __reduce__(self):
        return _unpickle, ()


def _unpickle():
    Unpickled.ran += 1
    return "evil"


# Native


@pytest.fixture
def cut(folder):
    reshard(folder, folder.with_name("cut"), 3)
    return folder.with_name("cut")


def test_native_files(cut):
    ranks = [cut / f"rank-0000{rank}-of-00003.safetensors" for rank in range(3)]
    truncate(ranks[2], 8)
    refused(cut, "rank-00002-of-00003.safetensors has .* bytes, the manifest says .*; copy it again")
    shutil.copy(ranks[1], ranks[2])
    refused(cut, "rank-00002.* (its rank is '1', not '2'|bytes, the manifest says)")
    ranks[2].unlink()
    refused(cut, "rank-00002-of-00003.safetensors is missing")
    (cut / MANIFEST).unlink()
    refused(cut, "has rank files but no tp_attention.json: its writing was cut off; reshard again")


def test_native_files_of_another_checkpoint(cut, tmp_path):
    """The same sizes and names, other weights: what a file's header says of its source tells them apart."""
    tiny_llama.write(tmp_path / "other")
    reshard(tmp_path / "other", tmp_path / "other cut", 3)
    name = "rank-00001-of-00003.safetensors"
    shutil.copy(tmp_path / "other cut" / name, cut / name)
    refused(cut, f"{name} is not the file that the manifest means: its source is")


def test_native_files_of_another_training(tmp_path):
    """Of one base model: the first bytes would not tell them apart."""
    for name in "ab":
        tiny_llama.write(tmp_path / name, layers=1, vocab=50_000)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.randn(50_000, 16).bfloat16()  # lies past the first MiB
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    for name in "ab":
        reshard(tmp_path / name, tmp_path / f"{name} cut", 2)
    shutil.copy(*(tmp_path / f"{name} cut" / "rank-00001-of-00002.safetensors" for name in "ba"))
    refused(tmp_path / "a cut", "is not the file that the manifest means: its source is")


def test_what_a_native_checkpoint_says_itself_is_not_said_again(cut):
    for name, value in (("layout", "llama"), ("heads", 12), ("kv_heads", 4)):
        refused(cut, f"says itself what it is; leave {name} out", **{name: value})


def test_native_manifest(cut):
    manifest = cut / MANIFEST
    before = manifest.read_text()
    for changes, match in (
        ({"version": 2}, "is of format 'tp_attention' version 2; this program reads 'tp_attention' version 1"),
        ({"plan": None}, "is no manifest of this version: .*'plan'"),
        ({"files": {}}, "names no file of rank 0 of 3; reshard again"),
        ({"files": {"../cut/rank": {"rank": 0}}}, "names a file '../cut/rank'; it should be one in its own folder"),
        ({"files": []}, "is no manifest of this version"),
        ({"tensors": []}, "is no manifest of this version"),
        ({"plan": {**json.loads(before)["plan"], "tp": 0}}, "tp_attention.json: tp=0 must be at least 1"),
        ({"plan": {**json.loads(before)["plan"], "layers": 7}}, "lacks .* parts of its model: layers.2."),
        ({"plan": {**json.loads(before)["plan"], "hidden_size": 15}}, "does not fit hidden_size=15"),
    ):
        edit(manifest, **changes)
        refused(cut, match)
        manifest.write_text(before)
    tensors = json.loads(before)["tensors"]
    del tensors["norm.weight"]
    edit(manifest, tensors=tensors)
    refused(cut, "tensor 'norm.weight' is in the file alone")
    edit(manifest, tensors={**tensors, "norm.scale": json.loads(before)["tensors"]["norm.weight"]})
    refused(cut, "tensor 'norm.scale' is in the manifest alone")


# Megatron


def test_megatron_ranks(tmp_path):
    tiny_megatron.write(tmp_path / "in", 4)
    (tmp_path / "in" / "mp_rank_02").rename(tmp_path / "away")
    refused(tmp_path / "in", "has 3 mp_rank files but none of rank 2; copy it again")
    (tmp_path / "in" / "mp_rank_03").rename(tmp_path / "away 3")
    refused(tmp_path / "in", "has the files of 2 ranks, its tensor_model_parallel_size is 4; copy the others too")
    (tmp_path / "in" / "mp_rank_00_000").mkdir()
    (tmp_path / "in" / "latest_checkpointed_iteration.txt").write_text("5")
    refused(tmp_path / "in", "iter_0000005 is missing, which latest_checkpointed_iteration.txt says is the newest")
    for said in (b"", b"../..", b"/"):
        (tmp_path / "in" / "latest_checkpointed_iteration.txt").write_bytes(said)
        refused(tmp_path / "in", r"in/latest_checkpointed_iteration\.txt says '.*'; it should be the newest iteration")
    (tmp_path / "in" / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe")
    refused(tmp_path / "in", "is missing, which latest_checkpointed_iteration.txt says is the newest")
    (tmp_path / "in" / "latest_checkpointed_iteration.txt").unlink()
    refused(tmp_path / "in", "mp_rank_00_000 is a part of a model cut over pipeline stages or experts")


def test_megatron_versions(tmp_path):
    files = [tmp_path / "in" / f"mp_rank_0{rank}" / "model_optim_rng.pt" for rank in range(2)]
    tiny_megatron.write(tmp_path / "in", 2, 4.0)
    refused(tmp_path / "in", r"checkpoint version 4\.0; known: 0, 1\.0, 2\.0, 3\.0 \(0: no version in it\)")
    resave(files[1], lambda state: state.update(checkpoint_version=2.0))
    refused(tmp_path / "in", r"has ranks of checkpoint versions \[2\.0, 4\.0\]")
    for version in ("3.0", True, None, [3]):
        resave(files[1], lambda state, version=version: state.update(checkpoint_version=version))
        refused(tmp_path / "in", f"/in: checkpoint_version is {re.escape(repr(version))}; known: 0, 1.0")
    for file in files:
        resave(file, lambda state: state.update(checkpoint_version=1.0, args=argparse.Namespace(swiglu=True)))
    refused(tmp_path / "in", "no layout 'megatron-1.0-gated' ships for checkpoint version 1.0")


def test_megatron_heads(tmp_path):
    tiny_megatron.write(tmp_path / "in", 2, says=False, kv_heads=4)
    refused(tmp_path / "in", "does not say how many heads it has; pass --heads N")
    refused(
        tmp_path / "in", "has 64 rows over 2 ranks; heads=8, kv_heads=8 of 4 make 96: other .* --kv-heads N", heads=8
    )
    assert open_checkpoint(tmp_path / "in", heads=8, kv_heads=4).plan.kv_heads == 4


def test_megatrons_own_numbers(tmp_path):
    states = tiny_megatron.write(tmp_path / "in", 2)
    right = {"kv_channels": 4, "hidden_size": 16, "ffn_hidden_size": 48, "num_layers": 2, "padded_vocab_size": 24}
    for name in [None, *right]:
        said = {**right, **({name: right[name] + 1} if name else {})}
        for rank, state in enumerate(states):
            args = argparse.Namespace(**{**vars(state["args"]), **said})
            torch.save({**state, "args": args}, tmp_path / "in" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
        if name is None:
            open_checkpoint(tmp_path / "in")
            refused(tmp_path / "in", "says kv_channels=4, its tensors have 2 if they are of heads=16", heads=16)
        else:
            refused(tmp_path / "in", f"says {name}={said[name]}, its tensors have {right[name]} if")
    for real in (22, 25, "24"):
        torch.save({**states[0], "tp_attention": {"vocab_size": real}}, tmp_path / "in/mp_rank_00/model_optim_rng.pt")
        refused(tmp_path / "in", f"24 rows of vocabulary on 2 ranks; {real!r} cannot be real")


def test_a_copy_of_another_rank(folder, tmp_path):
    tiny_megatron.write(tmp_path / "megatron", 4)
    ranks = [tmp_path / "megatron" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt" for rank in range(4)]
    shutil.copy(ranks[1], ranks[3])
    refused(tmp_path / "megatron", "/megatron has the same weights on ranks 1 and 3, .* copy the right one again")
    reshard(folder, tmp_path / "ds", 2, format="deepspeed")
    shutil.copy(tmp_path / "ds" / "tp_00_00.pt", tmp_path / "ds" / "tp_01_00.pt")
    refused(tmp_path / "ds", "has the same weights on ranks 0 and 1")


def test_weights_that_were_never_trained(folder, tmp_path):
    tensors = {name: torch.ones_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reshard(folder, tmp_path / "constant", 2)
    assert open_checkpoint(tmp_path / "constant").plan.tp == 2


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_of_torch(folder):
    """Whatever torch's reading makes of them, the error is one line with the file's name, and no other kind."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({name: tensors[name] for name in tensors if ".0." not in name}, file)
    content = file.read_bytes()
    generator = random.Random()
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[generator.randrange(600)] = generator.randrange(256)
        file.write_bytes(damaged)
        refused(folder, r"/in[/: ]")


def test_megatron_contents(tmp_path):
    tiny_megatron.write(tmp_path / "in", 2)
    file = tmp_path / "in" / "mp_rank_01" / "model_optim_rng.pt"
    before = file.read_bytes()
    layers = ("model", "language_model", "transformer")

    def inside(state):
        for key in layers:
            state = state[key]
        return state

    for change, match in (
        (lambda state: state.update(module={}), None),
        (lambda state: state.update(model0=state.pop("model")), "lacks 'model', which the file of rank 0 has"),
        (
            lambda state: inside(state).pop("layers.1.mlp.dense_4h_to_h.weight"),
            r"mlp\.out_weight .* missing on ranks \[1\]",
        ),
        (lambda state: inside(state).update({"layers.0.extra": torch.ones(1)}), "does not know .*layers.0.extra"),
        (
            lambda state: state["model"].update({"language_model.transformer.final_layernorm.bias": torch.ones(16)}),
            "twice",
        ),
        (lambda state: state.update(args=Unpickled()), "holds more than tensors and plain data"),
    ):
        resave(file, change)
        if match is None:
            open_checkpoint(tmp_path / "in")
        else:
            refused(tmp_path / "in", match)
        file.write_bytes(before)
    truncate(file, 100)
    refused(tmp_path / "in", r"mp_rank_01/model_optim_rng\.pt is truncated")
    resave(file.parents[1] / "mp_rank_00" / "model_optim_rng.pt", lambda state: state.pop("model"))
    file.write_bytes(before)
    refused(tmp_path / "in", "should hold its weights under one of 'model' and 'module'; it holds: iteration")


# DeepSpeed


def test_deepspeed_json(folder):
    reshard(folder, folder.with_name("ds"), 2, format="deepspeed")
    ds = folder.with_name("ds")
    file = ds / "ds_inference_config.json"
    before = file.read_text()
    for changes, match in (
        ({"type": "OPT"}, "is of type 'OPT'; known: Megatron, ds_model, BLOOM"),
        ({"type": "BLOOM", "layout": None}, "BLOOM's own order .* --layout"),
        ({"checkpoints": 3}, "its checkpoints are 3, neither files nor tp and non_tp files"),
        ({"checkpoints": []}, "lists no files"),
        ({"checkpoints": "tp_00_00.pt"}, "its checkpoints are 'tp_00_00.pt', neither files nor"),
        ({"checkpoints": ["tp_00_00.pt", "tp_00_00.pt"]}, "tp_00_00.pt twice; each rank has its own"),
        ({"tp_size": "2"}, "is for '2' ranks"),
        ({"tp_size": -1}, "is for -1 ranks"),
        ({"tp_size": True}, "is for True ranks"),
        ({"base_dir": 3}, r"ds_inference_config\.json has base_dir 3, which is no folder's name"),
        ({"layout": 3}, r"ds_inference_config\.json: the checkpoint's own layout is no layout: it is no JSON object"),
        ({"layout": {"rules": []}}, r"ds_inference_config\.json: the checkpoint's own layout .* lacks 'name'"),
        ({"layout": "zz"}, r"ds_inference_config\.json: unknown layout 'zz'; known: llama"),
        ({"type": "Megatron", "checkpoints": ["non-tp.pt"], "tp_size": 1, "version": [3]}, r"is of version \[3\]; kn"),
        ({"parallelization": "zz"}, "parallelization 'zz'; known: pp, tp"),
        ({"tp_size": 3}, "lists 2 files for 3 ranks"),
        ({"layout": "deepspeed-merged"}, r"inter_w .*should measure|mlp\.in_weight"),
        ({"checkpoints": {"tp": ["tp_00_00.pt", "tp_07_00.pt"]}}, "tp_07_00.pt is missing"),
        ({"type": "Megatron", "checkpoints": ["non-tp.pt"]}, "lists 1 files for mp_size=2"),
        ({"type": "Megatron", "checkpoints": ["non-tp.pt"], "tp_size": 1}, "weights under one of 'model' and 'module'"),
    ):
        edit(file, **changes)
        if changes.get("layout") == "deepspeed-merged":
            with pytest.raises(ValueError, match=match):
                reshard(ds, folder.with_name("out"), 1)
        else:
            refused(ds, match)
        file.write_text(before)
    (ds / "config.json").unlink()
    edit(file, layout=None)
    refused(ds, "no config.json says what model it is; .*--layout deepspeed-merged or deepspeed-merged-gated")
    file.write_text(before)
    resave(ds / "tp_00_00.pt", lambda state: state.update({name: [tensor, 1] for name, tensor in state.items()}))
    refused(ds, r"tp_00_00\.pt: .* is a list, not a tensor; save the weights alone, by name")


def test_hugging_face_target_of_a_model_that_is_not_known(tmp_path):
    tiny_megatron.write(tmp_path / "in", 2)
    with pytest.raises(ValueError, match=r"layout 'megatron-3\.0' and no config\.json .* --target-layout"):
        reshard(tmp_path / "in", tmp_path / "out", 1, format="hf")
