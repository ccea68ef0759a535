"""reshard end to end on real files: every cut and format and back bit for bit, the public API, and the report."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_llama
import torch
from safetensors.torch import load_file

from tp_attention.checkpoint import inspect, iter_tensors, load_rank, open_checkpoint, reshard
from tp_attention.sharding import ShardPlan


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    tiny_llama.write(folder)
    return folder


@pytest.mark.parametrize("kv_heads", [12, 4, 1])
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6, 8])
def test_native_and_back(tmp_path, tp, kv_heads):
    tensors = tiny_llama.write(tmp_path / "source", kv_heads=kv_heads, layers=1)
    before = tiny_llama.files_of(tmp_path / "source")
    reshard(tmp_path / "source", tmp_path / "cut", tp, verify=True)
    reshard(tmp_path / "cut", tmp_path / "other", 5, verify=True)
    reshard(tmp_path / "other", tmp_path / "back", 1, format="hf", verify=True)
    assert tiny_llama.bits(load_file(tmp_path / "back" / "model.safetensors")) == tiny_llama.bits(tensors)
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "source" / "config.json").read_bytes()
    assert tiny_llama.files_of(tmp_path / "source") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "cut", "other", "source"]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("format", ["megatron", "deepspeed"])
def test_foreign_formats_and_back(source, tmp_path, format, tp):
    tensors = dict(iter_tensors(source))
    reshard(source, tmp_path / "cut", tp, format=format, verify=True)
    reshard(tmp_path / "cut", tmp_path / "native", 3, verify=True)
    reshard(tmp_path / "native", tmp_path / "back", 1, format="hf", target_layout="llama", verify=True)
    assert tiny_llama.bits(load_file(tmp_path / "back" / "model.safetensors")) == tiny_llama.bits(tensors)
    assert not list(tmp_path.rglob("*.gathering")) and not list(tmp_path.rglob("journal*"))


def test_manifest_has_the_hash_of_every_tensor(source, tmp_path):
    reshard(source, tmp_path / "cut", 3)
    manifest = json.loads((tmp_path / "cut" / "tp_attention.json").read_text())
    assert len(manifest["files"]) == 3
    for file, entry in manifest["files"].items():
        path = tmp_path / "cut" / file
        assert path.stat().st_size == entry["bytes"]
        tensors = load_file(path)
        assert entry["sha256"] == {
            name: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in tensors.items()
        }


def test_verify_records_the_source_too(source, tmp_path):
    reshard(source, tmp_path / "cut", 2, verify=True)
    manifest = json.loads((tmp_path / "cut" / "tp_attention.json").read_text())
    assert manifest["source_sha256"] == {
        "rank 0": {
            name: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in load_file(source / "model.safetensors").items()
        }
    }


def test_dry_run_says_what_a_run_writes(source, tmp_path):
    said = reshard(source, tmp_path / "cut", 5, dry_run=True)
    assert not said.written and list(tmp_path.iterdir()) == [source]
    done = reshard(source, tmp_path / "cut", 5)
    assert done.written and said.files == done.files and said.tensors == done.tensors
    assert said.legal_tp == list(range(1, 13))
    assert said.total_bytes == sum(path.stat().st_size for path in (tmp_path / "cut").glob("rank-*"))


def test_max_memory_bounds_the_workers(source, tmp_path):
    largest = 112 * 2 * 16 * 2  # gate and up, bf16
    report = reshard(source, tmp_path / "cut", 1, max_memory=2 * largest + 100, workers=4, dry_run=True)
    assert report.workers == 2 and report.peak_memory == 2 * largest
    with pytest.raises(
        ValueError, match=f"max_memory={largest - 1:,} bytes is less than the largest tensor, {largest:,}"
    ):
        reshard(source, tmp_path / "cut", 1, max_memory=largest - 1)
    assert list(tmp_path.iterdir()) == [source]


def test_progress_counts_every_byte_of_the_tensors(source, tmp_path):
    calls = []
    reshard(source, tmp_path / "cut", 2, progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for rank in range(2) for tensor in _rank(tmp_path / "cut", rank).values())
    assert calls[0] == (0, total) and calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_quantize_gives_int8_and_scales(tmp_path):
    tensors = tiny_llama.write(tmp_path / "source", finite=True)
    reshard(tmp_path / "source", tmp_path / "int8", 3, quantize=True, group_size=16, verify=True)
    reshard(tmp_path / "int8", tmp_path / "joined", 1, verify=True)
    joined = _rank(tmp_path / "joined", 0)
    weight, scale = (joined[f"layers.0.mlp.out_weight{suffix}"] for suffix in ("", "_scale"))
    assert weight.dtype == torch.int8 and scale.shape == (16, 112 // 16)
    original = tensors["model.layers.0.mlp.down_proj.weight"].float()
    assert (weight.float() * scale.repeat_interleave(16, 1) - original).abs().max() <= scale.max() / 2 * 1.001
    reshard(tmp_path / "source", tmp_path / "direct", 1, quantize=True, group_size=16)
    assert tiny_llama.bits(joined) == tiny_llama.bits(_rank(tmp_path / "direct", 0))
    reshard(tmp_path / "int8", tmp_path / "other", 2, requantize=True, group_size=8, verify=True)
    assert _rank(tmp_path / "other", 0)["layers.0.mlp.out_weight_scale"].shape == (16, 56 // 8)


def test_verify_forward_says_what_it_compared(tmp_path):
    tiny_llama.write(tmp_path / "source", finite=True)
    report = reshard(tmp_path / "source", tmp_path / "cut", 5, verify=True, verify_forward=True)
    assert len(report.notes) == 2 and "verified" in report.notes[0]


def test_an_empty_destination_folder_is_used(source, tmp_path):
    (tmp_path / "cut").mkdir()
    reshard(source, tmp_path / "cut", 2)
    assert open_checkpoint(tmp_path / "cut").plan.tp == 2


@pytest.mark.parametrize("cut", [None, 3])
def test_load_rank_gives_what_the_rank_file_holds(source, tmp_path, cut):
    path = source
    if cut:
        reshard(source, path := tmp_path / "cut", cut)
    reshard(source, tmp_path / "wanted", 5)
    plan = open_checkpoint(tmp_path / "wanted").plan
    for rank in range(5):
        assert tiny_llama.bits(load_rank(path, plan, rank)) == tiny_llama.bits(_rank(tmp_path / "wanted", rank))


def test_the_readmes_lines(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source.rename("IN")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = {"name": None, "tensor": None}
    blocks = [block.split("```")[0] for block in readme.split("```python\n")[1:]]
    exec(next(block for block in blocks if "load_rank" in block), lines)
    reshard("IN", "wanted", 3)
    assert tiny_llama.bits(lines["tensors"]) == tiny_llama.bits(_rank(tmp_path / "wanted", 0))
    assert lines["name"] in dict(iter_tensors("OUT"))


def test_load_rank_refuses_a_plan_of_another_model(source):
    plan = open_checkpoint(source).plan
    with pytest.raises(ValueError, match=r"heads is 12 in .*source, 8 in the plan; open_checkpoint"):
        load_rank(source, replace(plan, heads=8), 0)
    with pytest.raises(ValueError, match=r"vocab_size is 50 in .*, 0 in the plan"):
        load_rank(source, ShardPlan(2, 12, 4, 4, 16, intermediate_size=112), 0)


def test_iter_tensors_joins_what_ranks_share(source, tmp_path):
    reshard(source, tmp_path / "one", 1)
    reshard(source, tmp_path / "five", 5)
    assert tiny_llama.bits(iter_tensors(tmp_path / "five")) == tiny_llama.bits(iter_tensors(tmp_path / "one"))
    assert tiny_llama.bits(iter_tensors(source)) == tiny_llama.bits(load_file(source / "model.safetensors"))


def test_inspect_says_what_a_checkpoint_is(source, tmp_path):
    reshard(source, tmp_path / "cut", 5)
    found, cut = inspect(source), inspect(tmp_path / "cut")
    assert (found.format, found.layout, found.plan.tp) == ("hf", "llama", 1)
    assert (cut.format, cut.plan.tp) == ("native", 5)
    assert found.legal_tp["native"] == list(range(1, 13)) and found.legal_tp["hf"] == [1]
    assert found.legal_tp["megatron"] == [1, 2, 4]
    assert found.bytes_by_dtype == {"bfloat16": sum(t.nbytes for _, t in iter_tensors(source))}
    assert {info.name for info in found.tensors} == set(dict(iter_tensors(source)))
    assert inspect(source, 5).owners.sizes("mlp_columns") == cut.plan.sizes("mlp_columns")
    tiny_llama.write(tmp_path / "finite", finite=True)
    reshard(tmp_path / "finite", tmp_path / "int8", 2, quantize=True, group_size=8)
    int8 = inspect(tmp_path / "int8")
    assert int8.legal_tp == {"native": list(range(1, 13)), "hf": [], "megatron": [], "deepspeed": []}


def _rank(folder, rank):
    (file,) = folder.glob(f"rank-{rank:05d}-of-*.safetensors")
    return load_file(file)
