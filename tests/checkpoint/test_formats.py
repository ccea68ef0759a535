"""Every format, written and read back: the same bits, names, nesting and versions, from memory maps."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny_llama
import tiny_megatron
import torch
from safetensors.torch import load_file, save_file

from tp_attention.checkpoint import iter_tensors, load_rank, reshard
from tp_attention.checkpoint.families import find
from tp_attention.checkpoint.formats import hugging_face, lay_out, legal_tp, open_checkpoint
from tp_attention.checkpoint.formats.native import MANIFEST
from tp_attention.checkpoint.layouts import to_json
from tp_attention.checkpoint.logical import LogicalTensors


def whole(path, **options):
    """The bits of an uncut checkpoint, by its own names."""
    checkpoint = open_checkpoint(path, **options)
    assert checkpoint.plan.tp == 1
    return tiny_llama.bits({name: checkpoint.tensor(0, name) for name in checkpoint.names(0)})


def megatron_states(folder):
    """What the files of a Megatron checkpoint hold, by rank."""
    (step,) = (path for path in folder.iterdir() if path.is_dir())
    return [torch.load(path / "model_optim_rng.pt", weights_only=False) for path in sorted(step.iterdir())]


def maps(path):
    """Whether this process has `path` memory-mapped."""
    return str(path) in {entry.path for entry in psutil.Process().memory_maps()}


# Hugging Face


def test_parameters_and_lazy_conjugates(tmp_path):
    """What a .bin may hold beside tensors that are simply their bits."""
    tensors = tiny_llama.write(tmp_path / "in")
    frequencies = torch.randn(2, dtype=torch.complex64)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    held = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    torch.save({**held, name: frequencies.conj()}, tmp_path / "in" / "pytorch_model.bin")
    (tmp_path / "in" / "model.safetensors").unlink()
    reshard(tmp_path / "in", tmp_path / "out", 2, verify=True)
    (ours,) = (tensor for key, tensor in iter_tensors(tmp_path / "out") if key.endswith("inv_freq"))
    assert torch.equal(torch.view_as_real(ours), torch.view_as_real(frequencies.conj().resolve_conj()))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_files(tmp_path, pickled, shards):
    tensors = tiny_llama.write(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    files = [f"{stem}.{ending}"] if shards == 1 else [f"{stem}-{n}-of-3.{ending}" for n in range(1, 4)]
    names = list(tensors)
    weight_map = {name: files[index % shards] for index, name in enumerate(names)}
    for file in files:
        held = {name: tensors[name] for name in names if weight_map[name] == file}
        if pickled:
            torch.save(held, tmp_path / "in" / file)
        else:
            save_file(held, tmp_path / "in" / file)
    if shards > 1:
        (tmp_path / "in" / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path / "in")
    assert (checkpoint.format, checkpoint.layout.name, checkpoint.plan.heads) == ("hf", "llama", 12)
    assert {path.name for path in checkpoint.files} == {"config.json", *files}
    assert whole(tmp_path / "in") == tiny_llama.bits(tensors)
    checkpoint.tensor(0, names[0])
    assert maps((tmp_path / "in" / weight_map[names[0]]).resolve())


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    tensors = tiny_llama.write(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    largest = max(tensor.nbytes for tensor in tensors.values())
    monkeypatch.setattr(hugging_face, "SHARD_BYTES", 2 * largest)
    reshard(tmp_path / "in", tmp_path / "out", 1, format="hf")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / "out" / file)
        assert sum(tensor.nbytes for tensor in held.values()) <= 2 * largest
        assert {name for name, where in index["weight_map"].items() if where == file} == held.keys()
    assert whole(tmp_path / "out") == tiny_llama.bits(tensors)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_the_prefix_stays_as_it_was(tmp_path, prefix):
    """GPT-2's own files have no "transformer.", those of fine-tuned ones do. Its Conv1D weights are [in, out]."""
    shapes = {"wte.weight": (11, 8), "wpe.weight": (6, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for name, shape in {
        "attn.c_attn": (8, 24),
        "attn.c_proj": (8, 8),
        "mlp.c_fc": (8, 32),
        "mlp.c_proj": (32, 8),
    }.items():
        shapes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[1:]}
    shapes |= {f"h.0.{name}.{kind}": (8,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    tensors = {prefix + name: torch.randn(shape) for name, shape in shapes.items()}
    config = {"model_type": "gpt2", "n_embd": 8, "n_head": 4, "n_layer": 1, "vocab_size": 11, "n_positions": 6}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    for format, tp in (("native", 3), ("deepspeed", 2)):
        reshard(tmp_path / "in", tmp_path / format, tp, format=format)
        reshard(tmp_path / format, tmp_path / f"{format} back", 1, format="hf")
        assert whole(tmp_path / f"{format} back") == tiny_llama.bits(tensors)
    held = torch.load(tmp_path / "deepspeed" / "tp_01_00.pt")
    assert f"{prefix}h.0.attention.attn_qkvw" in held
    q, k, v = tensors[f"{prefix}h.0.attn.c_attn.weight"].chunk(3, dim=1)  # rank 1 has heads 2 and 3 of each
    assert torch.equal(held[f"{prefix}h.0.attention.attn_qkvw"], torch.cat([q[:, 4:], k[:, 4:], v[:, 4:]], dim=1))


@pytest.mark.parametrize("config", [None, {"model_type": "new", "vocab_size": 50, "num_attention_heads": 12}])
def test_a_layout_of_the_users_own(tmp_path, config):
    """For weights alone, and for models that are not known: the sizes are measured."""
    tensors = tiny_llama.write(tmp_path / "in")
    (tmp_path / "in" / "config.json").unlink()
    if config:
        (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    own = tmp_path / "own.json"
    own.write_text(json.dumps({**to_json(find("llama")), "name": "own"}))
    options = {"layout": own, "heads": None if config else 12, "kv_heads": 4}
    plan = open_checkpoint(tmp_path / "in", **options).plan
    assert (plan.head_dim, plan.hidden_size, plan.intermediate_size, plan.vocab_size, plan.layers) == (
        4,
        16,
        112,
        50,
        2,
    )
    reshard(tmp_path / "in", tmp_path / "cut", 5, **options)
    reshard(tmp_path / "cut", tmp_path / "out", 1, format="hf")  # the layout travels in the manifest
    assert tiny_llama.bits(load_file(tmp_path / "out" / "model.safetensors")) == tiny_llama.bits(tensors)


def test_a_sentence_encoders_files_come_along(tmp_path):
    tiny_llama.write(tmp_path / "in")
    files = {
        "modules.json": "[1]",
        "config_sentence_transformers.json": "[2]",
        "sentence_bert_config.json": "[3]",
        "1_Pooling/config.json": '{"vocab_size": 7}',  # not the model's
        "2_Dense/config.json": "[5]",
        "spiece.model": "6",
        "README.md": "stays behind",
    }
    for name, text in files.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    del files["README.md"]
    reshard(tmp_path / "in", tmp_path / "cut", 3)
    reshard(tmp_path / "cut", tmp_path / "out", 1, format="hf")
    for folder in ("cut", "out"):
        assert {name: (tmp_path / folder / name).read_text() for name in files} == files
        assert not (tmp_path / folder / "README.md").exists()
    assert open_checkpoint(tmp_path / "out").plan.vocab_size == 50


def test_a_single_file_goes_before_an_index(tmp_path):
    """As transformers reads such a folder."""
    tensors = tiny_llama.write(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert whole(tmp_path / "in") == tiny_llama.bits(tensors)


# Native


def test_native_says_what_it_is(tmp_path):
    tiny_llama.write(tmp_path / "in")
    reshard(tmp_path / "in", tmp_path / "cut", 8)
    source, cut = open_checkpoint(tmp_path / "in"), open_checkpoint(tmp_path / "cut")
    assert cut.plan == replace(source.plan, tp=8, mlp_unit=cut.plan.mlp_unit)
    assert cut.plan.mlp_unit == 16
    header = cut.ranks[7].header
    assert {key: header[key] for key in ("layout", "heads", "kv_heads", "head_dim", "tp", "rank", "version")} == {
        "layout": "llama",
        "heads": "12",
        "kv_heads": "4",
        "head_dim": "4",
        "tp": "8",
        "rank": "7",
        "version": "1",
    }
    manifest = json.loads((tmp_path / "cut" / MANIFEST).read_text())
    assert manifest["source"] == {"format": "hf", "layout": "llama", "prefixed": True, "hash": header["source"]}
    assert manifest["tensors"]["layers.1.attention.qkv_weight"]["shape"] == [20 * 4, 16]
    logical = LogicalTensors(source)
    for rank in range(8):
        for name in logical.names():
            share = logical.share(name, cut.plan, rank)
            assert tiny_llama.bits({name: share}) == tiny_llama.bits({name: cut.tensor(rank, name)})


# Megatron


@pytest.mark.parametrize(
    ("version", "layout", "options"),
    [
        (None, "megatron-0", {}),
        (1.0, "megatron-1.0", {}),
        (2.0, "megatron-2.0", {}),
        (3.0, "megatron-3.0", {"kv_heads": 4}),
        (3.0, "megatron-3.0-gated", {"gated": True}),
        (3.0, "megatron-core", {"core": True, "kv_heads": 4}),
        (3.0, "megatron-core-gated", {"core": True, "kv_heads": 2, "gated": True}),
    ],
)
def test_megatron_and_back(tmp_path, version, layout, options):
    """Through the finest cut, an uneven native one and one rank, to the bits, nesting and words it came with."""
    before = tiny_megatron.write(tmp_path / "in", 2, version, **options)
    checkpoint = open_checkpoint(tmp_path / "in")
    assert (checkpoint.layout.name, checkpoint.plan.kv_heads) == (layout, options.get("kv_heads", 8))
    legal = legal_tp("megatron", LogicalTensors(checkpoint))
    assert legal == [tp for tp in (1, 2, 4, 8) if tp <= checkpoint.plan.kv_heads]
    names = iter("abcdefgh")
    here = tmp_path / "in"
    for format, tp in [("megatron", legal[-1]), ("native", 3), ("deepspeed", 1), ("megatron", 2)]:
        reshard(here, here := tmp_path / next(names), tp, format=format)
    after = megatron_states(here)
    assert (here / "latest_checkpointed_iteration.txt").read_text().strip() == "7"
    assert len(after) == 2
    for old, new in zip(before, after, strict=True):
        assert tiny_llama.bits(tiny_megatron.weights(new)) == tiny_llama.bits(tiny_megatron.weights(old))
        assert new["model"].keys() == {name for name in old["model"] if not name.endswith("_extra_state")}
        assert (new.get("checkpoint_version"), new["iteration"]) == (version, 7)
        assert (new["args"].seed, new["args"].lr, new["args"].tensor_model_parallel_size) == (1234, 1e-4, 2)


def test_megatron_ranks_are_mapped(tmp_path):
    tiny_megatron.write(tmp_path / "in", 4)
    checkpoint = open_checkpoint(tmp_path / "in")
    assert all(maps(file.resolve()) for file in checkpoint.files)


def test_megatron_flat_files_of_deepspeed(tmp_path):
    states = tiny_megatron.write(tmp_path / "in", 2, None)
    (tmp_path / "flat").mkdir()
    for rank, state in enumerate(states):
        renamed = {"module": state["model"], "mp_world_size": 2}
        torch.save(renamed, tmp_path / "flat" / f"mp_rank_{rank:02d}_model_states.pt")
    reshard(tmp_path / "flat", tmp_path / "a", 4, format="megatron", heads=8)
    reshard(tmp_path / "a", tmp_path / "b", 2, format="megatron")  # ours say how many heads there are
    for old, new in zip(states, megatron_states(tmp_path / "b"), strict=True):
        assert tiny_llama.bits(tiny_megatron.weights({"model": new["module"]})) == tiny_llama.bits(
            tiny_megatron.weights(old)
        )


def test_the_newest_iteration_is_read(tmp_path):
    tiny_megatron.write(tmp_path / "in" / "iter_0000003", 1)
    newest = tiny_megatron.write(tmp_path / "in" / "iter_0000012", 1)
    (tmp_path / "in" / "latest_checkpointed_iteration.txt").write_text("12\n")
    assert whole(tmp_path / "in") == tiny_llama.bits(tiny_megatron.weights(newest[0]))


def test_vocabulary_is_padded_for_megatron_and_trimmed_again(tmp_path):
    tensors = tiny_llama.write(tmp_path / "in")  # 50 rows
    reshard(tmp_path / "in", tmp_path / "four", 4, format="megatron")
    states = megatron_states(tmp_path / "four")
    rows = torch.cat([tiny_megatron.weights(s)["language_model.embedding.word_embeddings.weight"] for s in states])
    assert rows.shape[0] == 52
    assert not rows[50:].view(torch.int16).any()
    assert states[0]["args"].padded_vocab_size == 52
    assert open_checkpoint(tmp_path / "four").metadata["vocab_size"] == 50
    plan = open_checkpoint(tmp_path / "in").plan  # of 50 rows
    held = load_rank(tmp_path / "four", replace(plan, tp=3), 2)
    assert tiny_llama.bits(held) == tiny_llama.bits(load_rank(tmp_path / "in", replace(plan, tp=3), 2))
    reshard(tmp_path / "four", tmp_path / "one", 1, format="megatron")
    assert megatron_states(tmp_path / "one")[0]["args"].padded_vocab_size == 50
    reshard(tmp_path / "four", tmp_path / "native", 3)
    assert open_checkpoint(tmp_path / "native").plan.vocab_size == 50
    for path in ("one", "four", "native"):
        reshard(tmp_path / path, tmp_path / f"{path} back", 1, format="hf")
        assert whole(tmp_path / f"{path} back") == tiny_llama.bits(tensors)


EVEN_CUTS = [
    (gated, format, f"{format}-{name}", kv_heads)
    for gated, format, names in (
        (True, "megatron", ("3.0-gated", "core-gated")),
        (True, "deepspeed", ("merged-gated", "split-gated")),
        (False, "megatron", ("0", "1.0", "2.0", "3.0", "core")),
        (False, "deepspeed", ("merged", "transposed", "split")),
    )
    for name in names
    for kv_heads in ((4,) if name in ("1.0", "2.0") else (4, 2, 1))  # those know no groups
]


@pytest.mark.parametrize(("gated", "format", "layout", "kv_heads"), EVEN_CUTS)
def test_every_even_cut_to_every_other(tmp_path, gated, format, layout, kv_heads):
    """p -> p' gives what 1 -> p' gives, for all legal p and p': so p -> p' -> p is the identity too."""
    source = tmp_path / "source"
    if gated:
        tiny_llama.write(source, heads=4, kv_heads=kv_heads, intermediate=8, layers=1)
    else:
        tiny_megatron.write(source, 1, 3.0, heads=4, kv_heads=kv_heads)
    options = {"layout": layout, "heads": 4, "kv_heads": kv_heads} if format == "deepspeed" else {}
    legal = legal_tp(format, LogicalTensors(open_checkpoint(source)))
    assert legal == [tp for tp in (1, 2, 4) if tp <= kv_heads]
    for tp in legal:
        reshard(source, tmp_path / str(tp), tp, format=format, target_layout=layout)
    wanted = {tp: ranks_of(tmp_path / str(tp), options) for tp in legal}
    for before in legal[1:]:
        for after in legal:
            out = tmp_path / f"{before} to {after}"
            reshard(tmp_path / str(before), out, after, format=format, target_layout=layout, **options)
            assert ranks_of(out, options) == wanted[after]
    plan = open_checkpoint(source).plan
    finest = load_rank(tmp_path / str(legal[-1]), plan, 0, **options)
    assert tiny_llama.bits(finest) == tiny_llama.bits(load_rank(source, plan, 0))


def ranks_of(path, options):
    """The bits of each rank's tensors."""
    checkpoint = open_checkpoint(path, **options)
    return [
        tiny_llama.bits({name: checkpoint.tensor(rank, name) for name in checkpoint.names(rank)})
        for rank in range(checkpoint.plan.tp)
    ]


# DeepSpeed


def test_deepspeed_files_of_parts_and_of_whole_models(tmp_path):
    """Several files a rank, with the rest in non-tp files; and the model's own files, listed."""
    tensors = tiny_llama.write(tmp_path / "in")
    reshard(tmp_path / "in", tmp_path / "out", 2, format="deepspeed")
    said = json.loads((tmp_path / "out" / "ds_inference_config.json").read_text())
    assert (said["type"], said["parallelization"], said["tp_size"]) == ("ds_model", "tp", 2)
    shared = torch.load(tmp_path / "out" / "non-tp.pt")
    assert tiny_llama.bits(shared) == tiny_llama.bits({name: tensors[name] for name in shared})
    assert shared.keys() == {name for name in tensors if ".layers." not in name}
    (tmp_path / "parts").mkdir()
    for rank in range(2):
        held = torch.load(tmp_path / "out" / f"tp_{rank:02d}_00.pt")
        for part in range(2):
            torch.save(dict(list(held.items())[part::2]), tmp_path / "parts" / f"tp_{rank:02d}_{part:02d}.pt")
    torch.save(shared, tmp_path / "parts" / "non-tp.pt")
    files = ["tp_00_00.pt", "tp_01_00.pt", "tp_00_01.pt", "tp_01_01.pt"]  # as DeepSpeed lists them
    config = {
        "type": "ds_model",
        "base_dir": str(tmp_path / "parts"),
        "checkpoints": {"non_tp": ["non-tp.pt"], "tp": files},
        "version": 1.0,
        "parallelization": "tp",
        "tp_size": 2,
        "dtype": "bfloat16",
    }
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps(config))
    options = {"layout": "deepspeed-merged-gated", "heads": 12, "kv_heads": 4}
    reshard(elsewhere, tmp_path / "back", 1, format="hf", target_layout="llama", **options)
    assert tiny_llama.bits(load_file(tmp_path / "back" / "model.safetensors")) == tiny_llama.bits(tensors)

    torch.save(tensors, tmp_path / "in" / "all.bin")
    listing = {"type": "BLOOM", "checkpoints": ["all.bin"], "version": 1.0}
    (tmp_path / "in" / "listing.json").write_text(json.dumps(listing))
    assert whole(tmp_path / "in" / "listing.json") == tiny_llama.bits(tensors)


# GGUF


def test_gguf(tmp_path):
    """Names and RoPE order are Hugging Face's once read; q's and k's rows lie pairwise in the file."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab", "c"])
    writer.add_token_types([3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (6, 32), "output_norm": (32,), "output": (6, 32)}
    sizes = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    sizes |= {"ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes |= {f"blk.0.{name}": shape for name, shape in sizes.items()}
    random = np.random.default_rng()
    tensors = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint = open_checkpoint(file)
    assert (checkpoint.format, checkpoint.layout.name, checkpoint.plan.kv_heads) == ("gguf", "llama", 2)
    share = LogicalTensors(checkpoint).share("layers.0.attention.qkv_weight", replace(checkpoint.plan, tp=2), 1)
    q, k, v = (torch.from_numpy(tensors[f"blk.0.attn_{part}"]) for part in "qkv")
    halves = [rows.view(-1, 4, 2, 32).transpose(1, 2).reshape(-1, 32) for rows in (q, k)]  # pairs -> halves, by heads
    assert torch.equal(share, torch.cat([halves[0][16:], halves[1][8:], v[8:]]))
    logical = LogicalTensors(checkpoint)
    output = lay_out("hf", logical, checkpoint.plan)
    assert json.loads(output.texts["config.json"])["architectures"] == ["LlamaForCausalLM"]
    assert "tokenizer.json" in output.texts
    assert {tensor.name for tensor in output.files[0].tensors} == set(checkpoint.names(0))

    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(file).read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"broken\.gguf cannot be read as GGUF"):
        open_checkpoint(broken)


# Cuts


@pytest.mark.parametrize(
    ("format", "tp", "legal"),
    [("hf", 2, "1"), ("megatron", 3, "1, 2, 4"), ("megatron", 8, "1, 2, 4"), ("deepspeed", 6, "1, 2, 4")],
)
def test_uneven_and_replicated_cuts_are_refused(tmp_path, format, tp, legal):
    tiny_llama.write(tmp_path / "in")
    with pytest.raises(ValueError, match=f"tp={tp} .*heads=12, kv_heads=4.* use tp {legal}, or --format native$"):
        reshard(tmp_path / "in", tmp_path / "out", tp, format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_a_layout_has_no_place_for_is_refused(tmp_path):
    tiny_llama.write(tmp_path / "in")
    with pytest.raises(ValueError, match="layout 'bert' has no place for head of head"):
        reshard(tmp_path / "in", tmp_path / "out", 1, format="hf", target_layout="bert")
    with pytest.raises(ValueError, match="unknown format 'onnx'; known: native, hf, megatron, deepspeed"):
        reshard(tmp_path / "in", tmp_path / "out", 1, format="onnx")
    with pytest.raises(ValueError, match="native form has one layout"):
        reshard(tmp_path / "in", tmp_path / "out", 1, target_layout="bert")
