"""DeepSpeed's files of int8 weights, [weight, scales] each: read exactly where they say something, else refused."""

import json

import pytest
import tiny_llama
import torch

from tp_attention.checkpoint import inspect, load_rank, open_checkpoint, reshard
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.checkpoint.quantization import dequantize
from tp_attention.checkpoint.verify_forward import compare

SIZES = {"heads": 8, "kv_heads": 4, "intermediate": 48, "finite": True, "layers": 1}


def scales_of(weight, runs):
    """DeepSpeed's GroupQuantizer: [runs, 3], row by row the scales of `weight` and those of its two halves of rows."""
    halves = weight.chunk(2)
    return torch.cat([part.reshape(runs, -1).abs().amax(1) / 128 for part in (weight, *halves)]).reshape(runs, 3)


def quantized(weight, runs):
    scale = scales_of(weight, runs)
    flat = weight.reshape(runs, -1) / scale.reshape(-1)[:runs, None]
    return [flat.round().clamp(-128, 127).to(torch.int8).reshape(weight.shape), scale]


def write(folder, tp, change):
    """A checkpoint of DeepSpeed's, its layers' weights ([in, out] in the files) as `change` gives them."""
    tensors = tiny_llama.write(folder.with_name("whole"), **SIZES)
    reshard(folder.with_name("whole"), folder, tp, format="deepspeed")
    for rank in range(tp):
        file = folder / f"tp_{rank:02d}_00.pt"
        held = torch.load(file)
        torch.save({name: change(name, t, rank) if t.dim() == 2 else t for name, t in held.items()}, file)
    (folder / "tp_attention-manifest.json").unlink()
    return tensors


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("runs", ["one a row", "two a row", "one for two rows"])
def test_int8_weights_with_their_scales(tmp_path, tp, runs):
    expected = [{} for _ in range(tp)]

    def change(name, weight, rank):
        weight = weight.T.float().contiguous()
        count = {"one a row": len(weight), "two a row": 2 * len(weight), "one for two rows": len(weight) // 2}[runs]
        if tp > 1 and runs == "two a row" and not name.endswith(("attn_ow", "output_w")):
            count = len(weight)  # more than rows are those of other ranks, see below
        q, scale = quantized(weight, count)
        expected[rank][name] = (q.reshape(count, -1) * scale.reshape(-1)[:count, None]).reshape(weight.shape)
        return [q, scale]

    write(tmp_path / "ds", tp, change)
    source = open_checkpoint(tmp_path / "ds")
    for rank, weights in enumerate(expected):
        ours = load_rank(tmp_path / "ds", source.plan, rank)
        for name, native in (("attention.attn_qkvw", "attention.qkv"), ("mlp.output_w", "mlp.out")):
            weight, scale = (ours[f"layers.0.{native}_weight{suffix}"] for suffix in ("", "_scale"))
            assert weight.dtype == torch.int8
            assert torch.equal(dequantize(weight, scale, torch.float32), weights[f"model.layers.0.{name}"])
    legal = inspect(tmp_path / "ds").legal_tp
    assert legal["native"] == [n for n in (1, 2, 4) if n <= tp * (2 if runs == "two a row" else 1)]
    assert legal["hf"] == legal["megatron"] == legal["deepspeed"] == []
    reshard(tmp_path / "ds", tmp_path / "native", 1, verify=True, verify_forward=True)
    if tp == 2:
        reshard(tmp_path / "native", tmp_path / "again", 2, verify=True)
        for rank in range(2):
            plan = open_checkpoint(tmp_path / "again").plan
            old, new = (load_rank(tmp_path / name, plan, rank) for name in ("ds", "again"))
            assert tiny_llama.bits(new) == tiny_llama.bits(old)
    with pytest.raises(ValueError, match="'hf' has no place for int8 weights and their scales; only 'native' has"):
        reshard(tmp_path / "ds", tmp_path / "out", 1, format="hf")


def test_a_rank_without_mlp_columns(tmp_path):
    """Scales of a whole row leave the MLP of two ranks two units: the third and fourth of four have none."""
    write(tmp_path / "ds", 2, lambda _, weight, rank: quantized(weight.T.float().contiguous(), weight.shape[1]))
    source = LogicalTensors(open_checkpoint(tmp_path / "ds"))
    with pytest.raises(
        ValueError, match=r"tp=4 cuts layers\.0\.attention\.out_weight inside .* of 16; legal tp: 1, 2;"
    ):
        reshard(tmp_path / "ds", tmp_path / "out", 4)
    reshard(tmp_path / "ds", tmp_path / "four", 4, requantize=True, group_size=16)
    assert source.share("layers.0.mlp.out_weight", open_checkpoint(tmp_path / "four").plan, 3).shape == (16, 0)
    assert "equal" in compare(source, LogicalTensors(open_checkpoint(tmp_path / "four")))


def test_scales_of_other_ranks_too_are_refused(tmp_path):
    """It cuts a weight after quantising it, and leaves every rank the scales of all rows."""
    write(tmp_path / "ds", 2, lambda _, weight, rank: quantized(weight.T.float().contiguous(), 2 * weight.shape[1]))
    with pytest.raises(ValueError, match=r"inter_w: 96 scales for 48 rows .* other ranks.* fp16 .*--quantize"):
        open_checkpoint(tmp_path / "ds")


def test_scales_that_fit_no_rows_are_refused(tmp_path):
    write(tmp_path / "ds", 1, lambda _, weight, rank: [weight.T.to(torch.int8).contiguous(), torch.ones(5, 3)])
    with pytest.raises(ValueError, match=r"ds_inference_config\.json: .*5 scales .*--quantize that"):
        open_checkpoint(tmp_path / "ds")


def test_int8_beside_floats_is_refused(tmp_path):
    def change(name, weight, rank):
        return weight if name.endswith("attn_ow") else quantized(weight.T.float().contiguous(), weight.shape[1])

    write(tmp_path / "ds", 1, change)
    with pytest.raises(ValueError, match=r"attn_ow is torch\.bfloat16, other weights are int8; all must be, or none"):
        open_checkpoint(tmp_path / "ds")


def test_floats_come_in_pairs_too(tmp_path):
    """What it has loaded in fp16 it saves with one scale of no meaning."""
    tensors = write(tmp_path / "ds", 2, lambda _, weight, rank: [weight, torch.full((1,), float("nan"))])
    reshard(tmp_path / "ds", tmp_path / "back", 1, format="hf", target_layout="llama")
    back = open_checkpoint(tmp_path / "back")
    assert tiny_llama.bits({name: back.tensor(0, name) for name in back.names(0)}) == tiny_llama.bits(tensors)


def test_pairs_in_a_models_own_files_are_refused(tmp_path):
    write(tmp_path / "ds", 1, lambda _, weight, rank: quantized(weight.T.float().contiguous(), weight.shape[1]))
    file = tmp_path / "ds" / "ds_inference_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "parallelization": "pp"}))
    with pytest.raises(ValueError, match="is a list, not a tensor"):
        open_checkpoint(file)
