"""TritonSelfAttention's weights: parts that are merged, what does not fit, and int8 with DeepSpeed's groups."""

import pytest
import torch

from tests import deepspeed_layer as layer
from tests.test_triton_self_attention import DEVICE, NAMES, make
from tests.tolerances import assert_close
from tp_attention import TritonSelfAttention


def parts_of(cfg, weights):
    whole = weights["attn_qkvw"] if getattr(cfg, "transposed_mode", False) else weights["attn_qkvw"].T
    head, kv = cfg.hidden_size // cfg.heads, layer.kv_heads(cfg)
    rows = [cfg.heads * head, kv * head, kv * head]
    names = ("attn_qw", "attn_kw", "attn_vw"), ("attn_qb", "attn_kb", "attn_vb")
    return dict(zip(names[0], whole.split(rows), strict=True)) | dict(
        zip(names[1], weights["attn_qkvb"].split(rows), strict=True)
    )


@pytest.mark.parametrize("how", ("load_state_dict", "attributes", "load_unsharded"))
@pytest.mark.parametrize("merging", (True, False))
@pytest.mark.parametrize("fields", ({}, {"transposed_mode": True}, {"heads": 4, "num_kv": 2}))
def test_qkv_merging(fields, merging, how):
    cfg = layer.config(**fields)
    weights = {name: w.to(DEVICE) for name, w in layer.make_weights(cfg).items()}
    x = layer.make_input(cfg).to(DEVICE)
    expected = make(cfg)(x, None)[0]
    parts, rest = parts_of(cfg, weights), {name: weights[name] for name in ("attn_ow", "attn_ob")}
    attention = TritonSelfAttention(layer.config(set_empty_params=True, **fields), qkv_merging=merging)
    assert all(getattr(attention, name) is None for name in (*parts, "attn_qkvw", "attn_qkvb", "attn_ow", "attn_ob"))
    if how == "load_state_dict":
        attention.load_state_dict(parts | rest)
    elif how == "load_unsharded":
        attention.load_unsharded(parts | rest)
    else:
        for name, tensor in (parts | rest).items():
            setattr(attention, name, tensor if merging else torch.nn.Parameter(tensor, requires_grad=False))
    assert torch.equal(attention(x, None)[0], expected)
    merged = merging or how == "load_unsharded"
    assert (attention.attn_qw is None) == merged and (attention.attn_qkvw is not None) == merged
    if not merged:  # they stay what is computed with
        attention.attn_qb += 1
        assert not torch.equal(attention(x, None)[0], expected)


def test_merging_without_some_biases():
    cfg = layer.config(set_empty_params=True)
    weights = layer.make_weights(cfg)
    parts = parts_of(cfg, weights)
    del parts["attn_kb"]
    weights["attn_qkvb"][40:80] = 0
    attention = TritonSelfAttention(cfg, qkv_merging=True)
    attention.load_unsharded({**parts, "attn_ow": weights["attn_ow"]})
    assert attention.attn_ob is None
    x = layer.make_input(cfg)
    assert_close(attention(x.to(DEVICE), None)[0].cpu(), layer.expected(cfg, weights, x)["output"])


@pytest.mark.parametrize("mlp_after_attn", (True, False))
def test_add_attn_ob(mlp_after_attn):
    cfg = layer.config(mlp_after_attn=mlp_after_attn)
    attention, x = make(cfg), layer.make_input(cfg).to(DEVICE)
    torch.testing.assert_close(attention(x, None, add_attn_ob=True)[0], attention(x, None)[0] + attention.attn_ob)


def test_weights_that_do_not_fit():
    cfg = layer.config()
    weights = layer.make_weights(cfg)
    attention = TritonSelfAttention(cfg)
    before = {name: w.clone() for name, w in attention.state_dict().items()}
    for wrong, match in (
        ({"attn_ow": weights["attn_ow"][:3]}, r"attn_ow has shape \[3, 40\]; expected the whole layer's \[40, 40\]"),
        ({"attn_x": weights["attn_ow"]}, r"unknown: \['attn_x'\]"),
    ):
        with pytest.raises(ValueError, match=match):
            attention.load_unsharded({**weights, **wrong})
    with pytest.raises(ValueError, match=r"missing: \['attn_qkvw'\]"):
        attention.load_unsharded({name: w for name, w in weights.items() if name != "attn_qkvw"})
    assert all(torch.equal(w.nan_to_num(), before[name].nan_to_num()) for name, w in attention.state_dict().items())
    empty = TritonSelfAttention(layer.config(set_empty_params=True))
    with pytest.raises(ValueError, match="no weights yet: set attn_qkvw, or attn_qw, attn_kw and attn_vw"):
        empty(torch.zeros(1, 1, 40, device=DEVICE), None)


# int8


def dequantized(weight, scales, groups, merge_count, parallel):
    """By the definition: each of merge_count checkpoints had `groups` runs of its part, flattened row by row."""
    out = torch.empty(weight.shape, dtype=torch.float64)
    rows, columns = weight.shape
    for o in range(rows):
        for i in range(columns):
            if parallel == "column":
                part, inside = divmod(o * columns + i, rows * columns // merge_count)
                run = inside // (rows * columns // merge_count // groups)
                index = part * groups + run
            else:
                width = columns // merge_count
                part, j = divmod(i, width)
                index = (o * width + j) // (rows * width // groups) * merge_count + part
            out[o, i] = weight[o, i].double() * scales[index].double()
    return out


@pytest.mark.parametrize("transposed", (True, False))
@pytest.mark.parametrize("groups, merge_count", [(1, 1), (8, 1), (4, 2), (8, 4), (32, 1)])
def test_int8_groups(groups, merge_count, transposed):
    cfg = layer.config(dtype=torch.int8, hidden_size=32, heads=4, transposed_mode=transposed)
    qkv, out = (torch.randint(-127, 128, (rows, 32), dtype=torch.int8) for rows in (96, 32))
    scales = torch.rand(4, groups * merge_count) / 400 + 1e-4  # weights of some 0.1: scores that fp16 can tell apart
    weights = layer.make_weights(cfg)
    attention = TritonSelfAttention(cfg, q_scales=scales.to(DEVICE), q_groups=groups, merge_count=merge_count)
    for name, weight in (("attn_qkvw", qkv), ("attn_ow", out)):
        getattr(attention, name).data.copy_(weight if transposed else weight.T)
    for name in ("attn_qkvb", "attn_ob"):
        getattr(attention, name).data.copy_(weights[name])
    for name, weight, row, parallel in (("attn_qkvw", qkv, 0, "column"), ("attn_ow", out, 1, "row")):
        real = dequantized(weight, scales[row], groups, merge_count, parallel)
        weights[name] = real if transposed else real.T
    x = layer.make_input(cfg).half()
    norm = {name: w.half() for name, w in layer.make_norm(cfg).items()}
    half = {name: w if name in ("attn_qkvw", "attn_ow") else w.half() for name, w in weights.items()}
    truth = layer.expected(cfg, half, x.float(), **norm)
    found = attention(x.to(DEVICE), None, **{name: w.to(DEVICE) for name, w in norm.items()})
    for name, result in zip(NAMES, found, strict=False):
        assert_close(result.cpu(), truth[name])
    again = attention(x.to(DEVICE), None, **{name: w.to(DEVICE) for name, w in norm.items()})
    assert torch.equal(again[0], found[0])


def test_int8_parts_keep_their_scales():
    cfg = layer.config(dtype=torch.int8, set_empty_params=True, hidden_size=32, heads=4)
    whole = torch.randint(-127, 128, (96, 32), dtype=torch.int8, device=DEVICE)
    scale, bias = torch.rand(96, 4, device=DEVICE) / 100, torch.randn(96, device=DEVICE).half()
    out = torch.randint(-127, 128, (32, 32), dtype=torch.int8, device=DEVICE)
    found = []
    for merging in (True, False, None):
        attention = TritonSelfAttention(cfg, qkv_merging=bool(merging))
        attention.attn_ow = out.T
        attention.attn_ow.scale = torch.ones(32, 1, device=DEVICE) / 100
        if merging is None:
            attention.attn_qkvw, attention.attn_qkvb = whole.T, bias
            attention.attn_qkvw.scale = scale
        else:
            for i, letter in enumerate("qkv"):
                rows = slice(32 * i, 32 * i + 32)
                setattr(attention, f"attn_{letter}w", torch.nn.Parameter(whole[rows], requires_grad=False))
                getattr(attention, f"attn_{letter}w").scale = scale[rows]
                setattr(attention, f"attn_{letter}b", bias[rows])
        found.append(attention(layer.make_input(cfg).half().to(DEVICE), None)[0])
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


def test_int8_that_is_refused():
    cfg = layer.config(dtype=torch.int8)
    with pytest.raises(ValueError, match=r"q_scales belong to dtype=torch\.int8, the config has torch.float32"):
        TritonSelfAttention(layer.config(), q_scales=torch.ones(4, 1))
    attention, x = TritonSelfAttention(cfg), torch.zeros(1, 2, 40, device=DEVICE).half()
    with pytest.raises(ValueError, match=r"needs an attribute `scale`.*has none"):
        attention(x, None)
    attention.attn_qkvw.scale = torch.ones(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"has a scale \[3\]"):
        attention(x, None)
    with pytest.raises(ValueError, match="int8 weights have no unsharded form"):
        attention.load_unsharded(layer.make_weights(cfg))
