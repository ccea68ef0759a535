"""TritonSelfAttention on one rank: DeepSpeed's meaning, field by field, against the unsharded fp64 layer."""

from types import SimpleNamespace

import pytest
import torch

from tests import deepspeed_layer as layer
from tests.tolerances import assert_close
from tp_attention import AttentionConfig, TritonSelfAttention, reference
from tp_attention import triton_self_attention as module
from tp_attention.masks import alibi_slopes
from tp_attention.ops import LinearOp, QKVGemmOp, SoftmaxContextOp, VectorMatMulOp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("output", "key", "value", "context", "inp_norm", "probabilities")
CONFIGS = {
    "as it comes": {},
    "post-LN": {"pre_layer_norm": False},
    "RMSNorm": {"norm_type": "RMSNorm"},
    "not causal": {"triangular_masking": False},
    "post-LN, not causal": {"pre_layer_norm": False, "triangular_masking": False},
    "no scale": {"scale_attention": False},
    "mup": {"use_mup": True},
    "by layer": {"scale_attn_by_inverse_layer_idx": True, "layer_id": 3},
    "window": {"local_attention": True, "window_size": 3},
    "window, not causal": {"local_attention": True, "window_size": 3, "triangular_masking": False},
    "window not asked for": {"window_size": 3},
    "GQA": {"heads": 4, "num_kv": 2},
    "MQA": {"heads": 4, "num_kv": 1, "transposed_mode": True},
    "rotate_half": {"rotary_dim": 8, "rotate_half": True, "rotate_every_two": False},
    "rotate_every_two": {"rotary_dim": 4, "rope_theta": 100.0},
    "post-LN, rotary": {"pre_layer_norm": False, "rotary_dim": 8, "rotate_half": True},
    "transposed": {"transposed_mode": True},
    "bloom": {"bigscience_bloom": True},
    "bloom, rotary": {"bigscience_bloom": True, "rotary_dim": 8},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
}


def make(cfg, weights=None, **keywords):
    return TritonSelfAttention(cfg, **keywords).load_unsharded(
        {name: w.to(cfg.dtype).to(DEVICE) for name, w in (weights or layer.make_weights(cfg)).items()}
    )


def on_device(cfg, *tensors, **named):
    def move(x):
        return x if x is None else x.to(DEVICE, cfg.dtype if x.is_floating_point() else x.dtype)

    return *map(move, tensors), {name: move(x) for name, x in named.items()}


def check(cfg, mask=None, *, tokens=7, use_flash=True, use_triton=True, seed=1, **keywords):
    """Every result of one call on fresh data."""
    weights, norm = layer.make_weights(cfg, seed), layer.make_norm(cfg) if getattr(cfg, "pre_layer_norm", True) else {}
    weights = {name: w.to(cfg.dtype).float() for name, w in weights.items()}
    x = layer.make_input(cfg, tokens=tokens, seed=seed).to(cfg.dtype).float()
    norm = {name: w.to(cfg.dtype).float() for name, w in norm.items()}
    attention = make(cfg, weights)
    attention.use_flash = use_flash
    memory = keywords.pop("memory", None)
    given = {"encoder_hidden_states": memory} if memory is not None else {}
    if memory is not None:
        given["encoder_attention_mask"] = mask
    x_, mask_, named = on_device(cfg, x, None if memory is not None else mask, **norm, **given, **keywords)
    found = attention(x_, mask_, use_triton_attention=use_triton, output_attentions=True, **named)
    without = attention(x_, mask_, use_triton_attention=use_triton, **named)
    truth = layer.expected(cfg, weights, x, mask, **norm, memory=memory, layer=getattr(cfg, "layer_id", 0), **keywords)
    assert len(without) == 5
    for name, result in zip(NAMES, found, strict=True):
        assert_close(result.cpu(), truth[name], cfg.dtype)
    for name, result in zip(NAMES[:5], without, strict=True):
        assert_close(result.cpu(), truth[name], cfg.dtype)


@pytest.mark.parametrize("use_flash, use_triton", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_field(name, use_flash, use_triton):
    check(layer.config(**CONFIGS[name]), use_flash=use_flash, use_triton=use_triton)


def keep(*shape):
    kept = torch.rand(*shape, generator=torch.Generator().manual_seed(4)) > 0.4
    kept[..., 0] = False  # a causal first row keeps nothing
    return kept


MASKS = {
    "bool [B, S]": keep(2, 7),
    "int64 [B, S]": keep(2, 7).long(),
    "uint8 [B, 1, 1, S]": keep(2, 1, 1, 7).byte(),
    "int32 [B, 1, T, S]": keep(2, 1, 7, 7).int(),
    "bool [1, heads, T, S]": keep(1, 5, 7, 7),
    "added [B, S]": torch.randn(2, 7, generator=torch.Generator().manual_seed(5)) * 3,
    "added [B, 1, 1, S], -inf": torch.zeros(2, 1, 1, 7).masked_fill(~keep(2, 1, 1, 7), -torch.inf),
    "added [B, 1, T, S], 0 and 1": keep(2, 1, 7, 7).float(),
    "added [B, heads, T, S]": torch.randn(2, 5, 7, 7, generator=torch.Generator().manual_seed(6)),
}


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, causal):
    cfg = layer.config(triangular_masking=causal)
    check(cfg, MASKS[name])
    check(cfg, MASKS[name], use_flash=False)
    alibi = torch.randn(2 * 5, 1, 7, generator=torch.Generator().manual_seed(7))
    check(cfg, MASKS[name], alibi=alibi)
    check(layer.config(triangular_masking=causal, local_attention=True, window_size=2), MASKS[name], alibi=alibi)


@pytest.mark.parametrize("dtype", (torch.bool, torch.int64))
def test_inverted_mask(dtype):
    check(layer.config(invert_mask=False), MASKS["bool [B, S]"].to(dtype))
    check(layer.config(invert_mask=False), MASKS["added [B, S]"])


def test_false_is_no_mask():
    cfg = layer.config()
    attention, x = make(cfg), layer.make_input(cfg).to(DEVICE)
    assert torch.equal(attention(x, False)[0], attention(x, None)[0])


@pytest.mark.parametrize("use_flash", (True, False))
@pytest.mark.parametrize(
    "head_mask", (torch.tensor([1.0, 0, 0.5, 1, 0]), torch.rand(2, 5, 7, 7), torch.rand(1, 1, 7, 7))
)
def test_head_mask(head_mask, use_flash):
    check(layer.config(), MASKS["bool [B, S]"], head_mask=head_mask, use_flash=use_flash)


@pytest.mark.parametrize(
    "fields", ({}, {"heads": 4, "num_kv": 2}, {"transposed_mode": True}, {"pre_layer_norm": False})
)
def test_cross_attention(fields):
    cfg = layer.config(**fields)
    check(cfg, keep(2, 9), memory=torch.randn(2, 9, 40))
    check(cfg, None, memory=torch.randn(2, 3, 40))


def test_position_ids():
    cfg = layer.config(rotary_dim=8, rotate_half=True)
    check(cfg, position_ids=torch.tensor([[0, 0, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]]))
    check(cfg, position_ids=torch.arange(3, 10)[None])


# Token by token


def whole(cfg, attention, x, **keywords):
    attention.reset_cache()
    return attention(x, **keywords)


def steps(x, sizes):
    start = 0
    for size in sizes:
        yield x[:, start : start + size], start + size
        start += size


@pytest.mark.parametrize(
    "fields", ({}, {"rotary_dim": 8}, {"local_attention": True, "window_size": 4}, {"num_kv": 1, "heads": 4})
)
@pytest.mark.parametrize("own", (True, False))
def test_decode_equals_prefill(fields, own):
    cfg = layer.config(**fields)
    attention, norm = make(cfg), on_device(cfg, **layer.make_norm(cfg))[0]
    x = layer.make_input(cfg, tokens=12).to(DEVICE)
    mask = keep(2, 12).to(DEVICE)
    alibi = torch.randn(2 * cfg.heads, 1, 12, device=DEVICE)
    truth = layer.expected(cfg, layer.make_weights(cfg), x.cpu(), mask.cpu(), alibi=alibi.cpu(), **layer.make_norm(cfg))
    past, outputs, seen = None, [], []
    for part, stop in steps(x, (5, 1, 1, 3, 1, 1)):
        output, key, value, *_ = attention(
            part, mask[:, :stop], layer_past=None if own else past, alibi=alibi[..., :stop],
            first_token=None if stop == 5 or not own else False, **norm,
        )  # fmt: skip
        past = key, value
        outputs.append(output)
        seen.append((key, key.clone()))
    assert_close(torch.cat(outputs, 1).cpu(), truth["output"])
    assert_close(past[0].cpu(), truth["key"])
    assert_close(past[1].cpu(), truth["value"])
    for key, then in seen:
        assert torch.equal(key, then)  # later calls did not write to it


def test_a_new_prompt_starts_anew():
    cfg = layer.config()
    attention, x = make(cfg), layer.make_input(cfg, tokens=6).to(DEVICE)
    attention(x, None)
    first = attention(x, None)
    assert first[1].shape[2] == 6
    assert attention(x[:, :1], None, first_token=True)[1].shape[2] == 1
    assert attention(x[:, :3], None, first_token=False)[1].shape[2] == 4
    attention.reset_cache()
    assert attention(x[:, :1], None)[1].shape[2] == 1


def test_token_idx():
    cfg = layer.config(rotary_dim=8)
    attention, x = make(cfg), layer.make_input(cfg, tokens=8).to(DEVICE)
    truth = layer.expected(cfg, layer.make_weights(cfg), x.cpu())
    padded = x.clone()
    padded[:, 5:] = 7.0
    key = attention(padded, None, token_idx=torch.tensor(5))[1]
    attention(x[:, 5:6] + 1, None, token_idx=6)  # a draft that is replaced
    again = attention(x[:, 5:6], None, token_idx=6)
    assert key.shape[2] == 8 and again[1].shape[2] == 6
    last = attention(x[:, 6:8], None, token_idx=8, first_token=False)
    assert_close(torch.cat((again[0], last[0]), 1).cpu(), truth["output"][:, 5:])
    for wrong in (11, 1):
        with pytest.raises(ValueError, match=f"token_idx={wrong} does not fit 8 tokens so far and 2"):
            attention(x[:, :2], None, token_idx=wrong, first_token=False)
    with pytest.raises(ValueError, match="token_idx=9 does not fit 0 tokens so far and 8"):
        attention(x, None, token_idx=9)


def test_overrun_raises_and_nothing_is_lost():
    cfg = layer.config(max_out_tokens=6)
    attention, x = make(cfg), layer.make_input(cfg, tokens=7).to(DEVICE)
    with pytest.raises(ValueError, match=r"0 \+ 7 tokens exceed max_out_tokens=6"):
        attention(x, None)
    attention(x[:, :5], None)
    with pytest.raises(ValueError, match=r"5 \+ 2 tokens exceed max_out_tokens=6"):
        attention(x[:, 5:], None, first_token=False)
    assert attention(x[:, 5:6], None)[1].shape[2] == 6
    with pytest.raises(ValueError, match=r"6 \+ 1 tokens exceed max_out_tokens=6"):
        attention(x[:, 6:], None)


@pytest.mark.parametrize("name", ("as it comes", "post-LN, not causal", "rotate_half", "GQA", "bloom", "transposed"))
@torch.no_grad()
def test_the_same_call_again_and_again(name):
    """A GPU makes the launches alone from the third on; every result is fresh, and its keys can be continued."""
    cfg = layer.config(**{**CONFIGS[name], "dtype": torch.float16, "hidden_size": 128, "heads": 4})
    attention, weights = make(cfg), {n: w.half().float() for n, w in layer.make_weights(cfg).items()}
    norm = layer.make_norm(cfg) if getattr(cfg, "pre_layer_norm", True) else {}
    norm = {n: w.half().float() for n, w in norm.items()}
    ours = on_device(cfg, **norm)[0]
    kept, found = keep(2, 70), []
    for seed in range(6 if DEVICE == "cuda" else 2):
        x = layer.make_input(cfg, tokens=70, seed=seed).half().float()
        x_, mask = on_device(cfg, x, kept)[:2]
        results = attention(x_[:, :69], mask[:, :69], **ours)
        found.append((results, [each.clone() for each in results]))
        truth = layer.expected(cfg, weights, x[:, :69], kept[:, :69], **norm)
        for what, result in zip(NAMES[:5], results, strict=True):
            assert_close(result.cpu(), truth[what], torch.float16)
        if attention.triangular_masking:
            last = attention(x_[:, 69:], mask, **ours)[0]
            assert_close(last.cpu(), layer.expected(cfg, weights, x, kept, **norm)["output"][:, 69:], torch.float16)
    for results, then in found:
        assert all(torch.equal(*pair) for pair in zip(results, then, strict=True))


# Refusals


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"mp_size": 2}, "config.mp_size=2 but mp_group has 1 ranks"),
        ({"enable_qkv_quantization": True}, "enable_qkv_quantization=True"),
        ({"norm_type": "GroupNorm"}, "norm_type=GroupNorm"),
        ({"min_out_tokens": 5, "max_out_tokens": 4}, "min_out_tokens=5 and max_out_tokens=4"),
        ({"local_attention": True, "window_size": 0}, "window_size=0"),
        ({"bigscience_bloom": True, "num_kv": 1}, "num_kv=1"),
        ({"num_kv": 0}, "kv_heads=0"),
        ({"num_kv": 3}, "heads=5 is no multiple of kv_heads=3"),
        ({"heads": 3}, "hidden_size=40 is no multiple of heads=3"),
        ({"rotary_dim": 4, "rotate_every_two": False}, "neither rotate_half nor rotate_every_two"),
        ({"rotary_dim": 16}, "rope dim=16 exceeds head_dim=8"),
        ({"hidden_size": -1}, "hidden_size=-1"),
    ],
)
def test_configs_that_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        TritonSelfAttention(layer.config(**fields))


def test_calls_that_are_refused():
    attention = make(layer.config())
    x, memory = torch.zeros(2, 7, 40, device=DEVICE), torch.zeros(2, 3, 40, device=DEVICE)
    past = torch.zeros(2, 5, 3, 8, device=DEVICE), torch.zeros(2, 5, 3, 8, device=DEVICE)
    for arguments, match in (
        ({"input": x[..., :39]}, r"input has shape \[2, 7, 39\]; expected \[B, T, 40\]"),
        ({"alibi": torch.zeros(5, 1, 7)}, r"alibi has shape \[5, 1, 7\].*10 rows"),
        ({"layer_past": past[:1]}, "layer_past has shapes"),
        ({"layer_past": past, "encoder_hidden_states": memory}, "layer_past does not go with encoder_hidden_states"),
        ({"head_mask": torch.ones(4)}, r"head_mask has shape \[4\]"),
        ({"input_mask": torch.ones(2, 6)}, r"mask has shape \[2, 6\]"),
        ({"input_mask": True}, "input_mask=True"),
    ):
        with pytest.raises(ValueError, match=match):
            attention(**{"input": x, "input_mask": None, **arguments})
    with pytest.raises(TypeError, match="cache_position"):
        attention(x, None, cache_position=3)
    encoder = make(layer.config(triangular_masking=False))
    with pytest.raises(ValueError, match="without triangular_masking"):
        encoder(x, None, first_token=False)


@pytest.mark.parametrize("count", (0, 3, 6))
def test_merge_count_must_be_a_power_of_two(count):
    with pytest.raises(ValueError, match=f"merge_count={count} is no power of two"):
        TritonSelfAttention(layer.config(), merge_count=count)


def test_merge_count_is_kept_as_its_logarithm():
    assert TritonSelfAttention(layer.config(), merge_count=4).merge_count == 2


# What else DeepSpeed's users know


def test_attributes():
    cfg = layer.config(heads=4, num_kv=2, use_mup=True)
    attention = TritonSelfAttention(cfg)
    assert attention.norm_factor == pytest.approx(10**0.5) and attention.scale == pytest.approx(0.1)
    assert TritonSelfAttention(layer.config()).norm_factor == pytest.approx(8**0.25)
    assert (attention.num_attention_heads_per_partition, attention.num_kv_partition) == (4, 2)
    assert (attention.hidden_size_per_partition, attention.hidden_size_per_attention_head) == (40, 10)
    assert attention.data_type == attention.data_type_fp == torch.float32
    assert attention.attn_qkvw.shape == (40, 80) and not attention.attn_qkvw.requires_grad
    int8 = TritonSelfAttention(layer.config(dtype=torch.int8))
    assert (int8.data_type, int8.data_type_fp) == (torch.int8, torch.float16)
    assert (int8.attn_ow.dtype, int8.attn_ob.dtype) == (torch.int8, torch.float16)


def test_layer_numbers_and_the_callers_config():
    cfg = layer.config(num_hidden_layers=2, scale_attn_by_inverse_layer_idx=True)
    before, made = vars(cfg).copy(), TritonSelfAttention.num_layers
    layers = [TritonSelfAttention(cfg) for _ in range(4)]  # two models of two layers
    assert [each.layer_id for each in layers] == [each.config.layer_id for each in layers] == [0, 1, 0, 1]
    assert vars(cfg) == before and TritonSelfAttention.num_layers == made + 4
    assert layers[1].scale == pytest.approx(layers[0].scale / 2)
    other = layer.config(num_hidden_layers=3, heads=4)
    assert [TritonSelfAttention(other).layer_id, TritonSelfAttention(layer.config(layer_id=7)).layer_id] == [0, 7]
    assert TritonSelfAttention(other).layer_id == 1


def test_our_own_config():
    cfg = AttentionConfig(40, 5, kv_heads=1, norm="rmsnorm", causal=True, softcap=3.0, alibi=True)
    attention, x = TritonSelfAttention(cfg), layer.make_input(layer.config()).to(DEVICE)
    assert attention.attn_qkvb is None and attention.attn_ob is None
    theirs = layer.config(num_kv=1)
    weights = {name: w.to(DEVICE) for name, w in layer.make_weights(theirs).items()}
    transposed = {name: weights[name].T for name in ("attn_qkvw", "attn_ow")}
    attention.load_unsharded(transposed)
    q, k, v = (
        reference.linear(reference.norm(x, None), weights["attn_qkvw"].T).unflatten(-1, (7, 8)).split([5, 1, 1], 2)
    )
    context, _ = reference.attention(q, k, v, causal=True, softcap=3.0, alibi_slopes=alibi_slopes(5, DEVICE))
    found = attention(x, None)[0]
    assert_close(found, reference.linear(context.flatten(2), weights["attn_ow"].T))
    long = torch.randn(1, 1500, 40, device=DEVICE)  # no max_out_tokens
    attention(long, None)
    assert attention(long[:, :1], None)[1].shape[2] == 1501
    with pytest.raises(ValueError, match="TritonSelfAttention has no weights for sinks"):
        TritonSelfAttention(AttentionConfig(40, 5, sinks=True))


def test_two_models_in_one_process():
    first, second = layer.config(), layer.config(heads=4, hidden_size=32, rotary_dim=8)
    ours = [(make(cfg), layer.make_input(cfg, tokens=6).to(DEVICE), cfg) for cfg in (first, second)]
    found = {id(attention): [] for attention, *_ in ours}
    for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
        for attention, x, _ in ours:
            found[id(attention)].append(attention(x[:, part], None)[0])
    for attention, x, cfg in ours:
        truth = layer.expected(cfg, layer.make_weights(cfg), x.cpu())["output"]
        assert_close(torch.cat(found[id(attention)], 1).cpu(), truth)


def test_ds_compute_attention_and_the_operations():
    cfg = layer.config()
    weights, norm = layer.make_weights(cfg), layer.make_norm(cfg)
    attention, x = make(cfg), layer.make_input(cfg)
    mask = MASKS["int64 [B, S]"]
    truth = layer.expected(cfg, weights, x, mask, **norm)
    x, mask, weights, norm = (
        x.to(DEVICE), mask.to(DEVICE), {n: w.to(DEVICE) for n, w in weights.items()},
        {n: w.to(DEVICE) for n, w in norm.items()},
    )  # fmt: skip
    qkv_gemm, softmax_context = QKVGemmOp(cfg), SoftmaxContextOp(cfg)
    qkv, normed = qkv_gemm(
        input=x, weight=weights["attn_qkvw"], bias=weights["attn_qkvb"], gamma=norm["norm_w"], beta=norm["norm_b"]
    )
    assert_close(normed.cpu(), truth["inp_norm"])
    for found in (
        attention.ds_compute_attention([qkv, normed], mask, None, None),
        attention.ds_compute_attention(qkv, mask, None, None, is_prompt=True, token_idx=None, position_ids=None),
        softmax_context(
            query_key_value=qkv, attn_mask=mask, heads=5, num_kv=-1, norm_factor=8**-0.25, no_masking=False, layer_id=0,
            num_layers=1, alibi=None, is_prompt=True, token_idx=None, position_ids=None,
        ),
    ):  # fmt: skip
        for name, result in zip(("context", "key", "value"), found, strict=True):
            assert_close(result.cpu(), truth[name])
    output = VectorMatMulOp(cfg)(input=found[0], weight=weights["attn_ow"])
    assert_close(output.cpu(), truth["output"])
    assert torch.equal(VectorMatMulOp(cfg)(found[0], weights["attn_ow"], False), output)
    linear = LinearOp(cfg)
    arguments = {"input": normed, "weight": weights["attn_qkvw"], "bias": weights["attn_qkvb"]}
    assert_close(
        linear(**arguments, add_bias=True, do_flash_attn=False, num_heads=5, num_layers=1).cpu(), qkv.double().cpu()
    )
    bare = linear(**arguments, add_bias=False, do_flash_attn=False, num_heads=5)
    assert_close((bare + weights["attn_qkvb"]).cpu(), qkv.double().cpu())
    unmasked = softmax_context(qkv, mask, 5, -1, 8**-0.25, True, 1, 1, None, True, None, None)[0]
    assert_close(
        unmasked.cpu(), layer.expected(cfg, layer.make_weights(cfg), x.cpu(), **layer.make_norm(cfg))["context"]
    )
    for call in (
        lambda: linear(**arguments, add_bias=True, do_flash_attn=True, num_heads=5),
        lambda: VectorMatMulOp(cfg)(found[0], weights["attn_ow"], True),
    ):
        with pytest.raises(ValueError, match=r"do_flash_attn|async_op"):
            call()


def test_rotation_by_the_operation_alone():
    cfg = layer.config(rotary_dim=8, rotate_half=True, pre_layer_norm=False)
    weights, x = layer.make_weights(cfg), layer.make_input(cfg)
    at = torch.arange(2, 9)[None]
    truth = layer.expected(cfg, weights, x, position_ids=at)
    qkv = x @ weights["attn_qkvw"] + weights["attn_qkvb"]
    found = SoftmaxContextOp(cfg)(qkv.to(DEVICE), None, 5, -1, 8**-0.25, True, 0, 1, None, True, None, at.to(DEVICE))
    assert_close(found[0].cpu(), truth["context"])
    assert_close(found[1].cpu(), truth["key"])


@pytest.mark.parametrize("flash", (True, False))
@pytest.mark.parametrize("triangular", (True, False))
def test_triton_attention_function(triangular, flash):
    qkv = torch.randn(2, 7, 3 * 40)
    q, k, v = qkv.unflatten(2, (3, 5, 8)).unbind(2)
    mask, alibi, past = keep(2, 9), torch.randn(10, 1, 9), torch.randn(2, 2, 5, 2, 8)
    total = alibi.unflatten(0, (2, 5)).masked_fill(~mask[:, None, None], -torch.inf)
    keys, values = (torch.cat((before.transpose(1, 2), new), 1) for before, new in zip(past, (k, v), strict=True))
    expected, _ = reference.attention(q, keys, values, scale=0.3, causal=triangular, mask=total)
    found = module._triton_attention(
        qkv=[qkv.to(DEVICE)], input_mask=mask.to(DEVICE), layer_past=tuple(past.to(DEVICE)), alibi=alibi.to(DEVICE),
        scale=0.3, head_size=8, triangular=triangular, use_triton_flash=flash,
    )  # fmt: skip
    assert_close(found.cpu(), expected.flatten(2))
    with pytest.raises(ValueError, match="whole heads of 7"):
        module._triton_attention(qkv, None, None, None, 0.3, 7)


@pytest.mark.parametrize("triangular", (True, False))
def test_the_seeds_three_functions(triangular):
    qkv = torch.randn(2, 7, 3 * 40)
    q, k, v = qkv.unflatten(2, (3, 5, 8)).unbind(2)
    mask = torch.zeros(2, 1, 1, 7).masked_fill(~keep(2, 1, 1, 7), -torch.inf)
    scores = module.score_4d_matmul(qkv.to(DEVICE), 8, triangular, 0.3)
    probabilities = module.softmax(scores, mask.to(DEVICE))
    assert_close(probabilities.cpu(), reference.probabilities(q, k, scale=0.3, causal=triangular, mask=mask))
    context = module.context_4d_matmul(probabilities, qkv.to(DEVICE), 8)
    expected, _ = reference.attention(q, k, v, scale=0.3, causal=triangular, mask=mask)
    assert_close(context.cpu(), expected.flatten(2))
    with pytest.raises(ValueError, match="dim=1"):
        module.softmax(scores, dim=1)


def test_a_config_may_lack_what_has_a_default():
    assert TritonSelfAttention(SimpleNamespace(hidden_size=16, heads=2)).attn_qkvw.dtype == torch.float16
