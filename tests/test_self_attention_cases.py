"""TritonSelfAttention where it once was wrong, and what a wrong change would otherwise pass by unseen."""

import copy

import pytest
import torch

from tests import deepspeed_layer as layer
from tests.test_self_attention_weights import dequantized, parts_of
from tests.test_triton_self_attention import DEVICE, check, make, on_device
from tests.tolerances import assert_close
from tp_attention import TritonSelfAttention, deepspeed_ops
from tp_attention import triton_self_attention as module
from tp_attention.deepspeed_config import DEFAULTS, read


def spy(monkeypatch):
    calls = []
    for name in ("attention", "softmax_context"):
        real = getattr(deepspeed_ops.functional, name)
        monkeypatch.setattr(
            deepspeed_ops.functional,
            name,
            lambda *args, name=name, real=real, **kw: (calls.append((name, kw["backend"])), real(*args, **kw))[1],
        )
    return calls


@pytest.mark.parametrize(
    "use_flash, use_triton, expected",
    [
        (True, True, ("attention", "auto")),
        (False, True, ("softmax_context", "auto")),
        (True, False, ("attention", "torch")),
        (False, False, ("attention", "torch")),
    ],
)
def test_the_switches_choose_the_path(monkeypatch, use_flash, use_triton, expected):
    cfg = layer.config()
    attention, x, calls = make(cfg), layer.make_input(cfg).to(DEVICE), spy(monkeypatch)
    attention.use_flash = use_flash
    attention(x, None, use_triton_attention=use_triton)
    assert calls == [expected]


@pytest.mark.parametrize("switch", (None, "use_cuda_flash", "use_triton_flash", "use_ds_attention"))
def test_the_functions_switches_choose_the_path(monkeypatch, switch):
    calls, given = spy(monkeypatch), {} if switch is None else {switch: True}
    module._triton_attention(torch.randn(1, 3, 24, device=DEVICE), None, None, None, 1.0, 8, **given)
    assert calls == [("attention" if switch else "softmax_context", "auto")]


@pytest.mark.parametrize(
    "fields, tuned",
    [({"layer_id": 0}, True), ({"layer_id": 1}, False), ({"layer_id": 0, "triton_autotune": False}, False)],
)
def test_autotune_is_asked_for_this_layer(monkeypatch, fields, tuned):
    asked = []
    monkeypatch.setattr(module, "autotune", lambda *args, **kw: asked.append((args, kw)))
    cfg = layer.config(
        **{"heads": 4, "num_kv": 2, "triton_autotune": True, "max_out_tokens": 77, "use_mup": True, **fields}
    )
    attention = TritonSelfAttention(cfg)
    assert len(asked) == tuned
    if tuned:
        ((args, kw),) = asked
        assert args == (2, 77) and kw.pop("group") is attention.group
        assert kw == {
            "head_size": 10,
            "hidden_size": 40,
            "heads": 4,
            "kv_heads": 2,
            "qkv_rows": 80,
            "causal": True,
            "scale": attention.scale,
            "dtype": torch.float32,
            "transposed": True,
            "use_flash": True,
        }


def test_defaults_are_deepspeeds():
    config = pytest.importorskip("deepspeed.ops.transformer.inference.config").DeepSpeedInferenceConfig()
    theirs = {name: getattr(config, name) for name in DEFAULTS}
    theirs["norm_type"] = theirs["norm_type"].name
    assert theirs == DEFAULTS


def test_position_ids_of_bloom():
    check(
        layer.config(bigscience_bloom=True, rotary_dim=8),
        position_ids=torch.tensor([[0, 0, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]]),
    )


def test_layer_past_shapes():
    attention, past = make(layer.config()), torch.zeros(2, 5, 3, 8, device=DEVICE)
    with pytest.raises(ValueError, match="layer_past has shapes"):
        attention(torch.zeros(2, 7, 40, device=DEVICE), None, layer_past=(past, past[:, :, :2]))


@pytest.mark.parametrize("transposed", (True, False))
def test_int8_cross_attention(transposed):
    cfg = layer.config(dtype=torch.int8, hidden_size=32, heads=4, transposed_mode=transposed)
    qkv, out = (torch.randint(-127, 128, (rows, 32), dtype=torch.int8) for rows in (96, 32))
    scales, weights = torch.rand(4, 8) / 400 + 1e-4, layer.make_weights(cfg)
    attention = TritonSelfAttention(cfg, q_scales=scales.to(DEVICE), q_groups=8)
    for name, weight, row, parallel in (("attn_qkvw", qkv, 0, "column"), ("attn_ow", out, 1, "row")):
        getattr(attention, name).data.copy_(weight if transposed else weight.T)
        real = dequantized(weight, scales[row], 8, 1, parallel)
        weights[name] = real if transposed else real.T
    for name in ("attn_qkvb", "attn_ob"):
        weights[name] = weights[name].half()
        getattr(attention, name).data.copy_(weights[name])
    x, memory = layer.make_input(cfg).half(), torch.randn(2, 9, 32).half()
    truth = layer.expected(cfg, weights, x.float(), memory=memory.float())
    assert_close(attention(x.to(DEVICE), None, encoder_hidden_states=memory.to(DEVICE))[0].cpu(), truth["output"])


# regressions


def test_a_call_that_fails_changes_nothing():
    cfg = layer.config(rotary_dim=8, max_out_tokens=9)
    attention, x = make(cfg), layer.make_input(cfg, tokens=9).to(DEVICE)
    truth = layer.expected(cfg, layer.make_weights(cfg), x.cpu())["output"]
    attention(x[:, :5], None)
    for start, stop in ((5, 6), (6, 8)):
        for wrong in (
            {"input_mask": torch.ones(2, 3, device=DEVICE)},
            {"alibi": torch.zeros(3, 1, 1, device=DEVICE)},
            {"head_mask": torch.ones(4, device=DEVICE)},
            {"input_mask": torch.ones(2, 3, device=DEVICE), "first_token": True},
            {"input": x[:1].expand(2, 10, 40) if False else torch.zeros(2, 10, 40, device=DEVICE), "first_token": True},
        ):
            with pytest.raises(ValueError):
                attention(**{"input": x[:, start:stop], "input_mask": None, "first_token": False, **wrong})
        found = attention(x[:, start:stop], None, first_token=False)
        assert found[1].shape[2] == stop
        assert_close(found[0].cpu(), truth[:, start:stop])


def test_post_ln_rotary_is_given_the_blocks_norm():
    cfg = layer.config(pre_layer_norm=False, rotary_dim=8)
    attention, x = make(cfg), layer.make_input(cfg).to(DEVICE)
    norm = on_device(cfg, **layer.make_norm(cfg))[0]
    assert torch.equal(attention(x, None, **norm)[0], attention(x, None)[0])


@pytest.mark.parametrize("empty", (True, False))
def test_merging_again(empty):
    cfg = layer.config(set_empty_params=empty)
    attention, x = TritonSelfAttention(cfg, qkv_merging=True), layer.make_input(cfg).to(DEVICE)
    for seed in (0, 1):
        weights = layer.make_weights(cfg, seed)
        for name, tensor in parts_of(cfg, weights).items():
            setattr(attention, name, tensor.to(DEVICE))
        attention.attn_ow = weights["attn_ow"].to(DEVICE)
        assert_close(attention(x, None)[0].cpu(), layer.expected(cfg, weights, x.cpu())["output"])
        assert attention.attn_qw is None and attention.attn_qb is None


def test_merging_of_parts_that_come_in_two_files():
    cfg = layer.config(set_empty_params=True)
    weights, x = layer.make_weights(cfg), layer.make_input(cfg)
    parts, attention = parts_of(cfg, weights), TritonSelfAttention(cfg, qkv_merging=True)
    attention.load_state_dict({"attn_qw": parts.pop("attn_qw"), "attn_ow": weights["attn_ow"]}, strict=False)
    attention.load_state_dict(parts, strict=False)
    assert_close(attention(x.to(DEVICE), None)[0].cpu(), layer.expected(cfg, weights, x)["output"])


def test_inference_mode_and_after():
    cfg = layer.config(set_empty_params=True)
    weights, x = layer.make_weights(cfg), layer.make_input(cfg, tokens=7).to(DEVICE)
    attention = TritonSelfAttention(cfg, qkv_merging=True)
    for name, tensor in {**parts_of(cfg, weights), "attn_ow": weights["attn_ow"]}.items():
        setattr(attention, name, tensor.to(DEVICE))
    with torch.inference_mode():
        attention(x[:, :5], None)
        attention(x[:, 5:6], None)
    assert attention(x[:, 6:], None)[1].shape[2] == 7
    attention.load_state_dict({name: w.clone() for name, w in attention.state_dict().items()})


def test_deepspeeds_own_config():
    config = pytest.importorskip("deepspeed.ops.transformer.inference.config").DeepSpeedInferenceConfig
    norms = pytest.importorskip("deepspeed.utils.types").NormType
    fields = {"hidden_size": 40, "heads": 5, "dtype": torch.float32, "num_kv": 1, "rotary_dim": 8, "rotate_half": True}
    x = layer.make_input(layer.config()).to(DEVICE)
    for norm in (norms.RMSNorm, norms.LayerNorm):
        theirs, duck = config(**fields, norm_type=norm), layer.config(**fields, norm_type=norm.name, epsilon=1e-12)
        assert torch.equal(make(theirs)(x, None)[0], make(duck)(x, None)[0])
    with pytest.raises(ValueError, match="norm_type"):
        TritonSelfAttention(config(**fields, norm_type=norms.GroupNorm))


def test_epsilon():
    check(layer.config(epsilon=0.5))


def test_a_padded_prompt_goes_on_at_its_end():
    cfg = layer.config(rotary_dim=8)
    attention, x = make(cfg), layer.make_input(cfg, tokens=8).to(DEVICE)
    padded = x.clone()
    padded[:, 5:] = 7.0
    attention(padded, None, token_idx=5)
    found = attention(x[:, 5:6], None)
    assert found[1].shape[2] == 6
    assert_close(found[0].cpu(), layer.expected(cfg, layer.make_weights(cfg), x.cpu())["output"][:, 5:6])


@pytest.mark.parametrize("merging", (True, False))
def test_loading_inside_of_a_model(merging):
    cfg = layer.config(set_empty_params=True)
    weights, x = layer.make_weights(cfg), layer.make_input(cfg)
    rest = {name: weights[name] for name in ("attn_ow", "attn_ob")}
    model = torch.nn.ModuleDict({"attention": TritonSelfAttention(cfg, qkv_merging=merging)})
    model.load_state_dict({f"attention.{name}": w for name, w in (parts_of(cfg, weights) | rest).items()})
    assert ("attention.attn_qkvw" in model.state_dict()) == merging
    assert_close(model["attention"](x.to(DEVICE), None)[0].cpu(), layer.expected(cfg, weights, x)["output"])


def test_the_operation_by_itself():
    cfg = layer.config(heads=4, num_kv=2)
    weights, x = layer.make_weights(cfg), layer.make_input(cfg, tokens=4)
    truth = layer.expected(layer.config(heads=4, num_kv=2, pre_layer_norm=False), weights, x)
    qkv, op = (x @ weights["attn_qkvw"] + weights["attn_qkvb"]).to(DEVICE), deepspeed_ops.SoftmaxContextOp(cfg)
    assert_close(op(qkv, None)[0].cpu(), truth["context"])  # heads and scale are the config's
    op(qkv[:, :3], None, layer_id=1)
    op(qkv[:, :2], None, layer_id=2)  # each layer has its own keys
    assert_close(op(qkv[:, 3:], None, layer_id=1)[0].cpu(), truth["context"][:, 3:])
    with pytest.raises(ValueError, match="external_cache"):
        deepspeed_ops.LinearOp(cfg)(x, weights["attn_qkvw"], None, False, False, 4, True)


def test_one_token_of_an_encoder_and_window_with_memory():
    check(layer.config(triangular_masking=False), tokens=1)
    check(layer.config(local_attention=True, window_size=2), None, memory=torch.randn(2, 3, 40))


def test_alibi_in_half_precision():
    cfg = layer.config(dtype=torch.float16)
    attention, x = make(cfg), layer.make_input(cfg).half().to(DEVICE)
    alibi = 60000.0 * torch.rand(10, 1, 7, device=DEVICE)
    mask = torch.full((2, 7), -30000.0, device=DEVICE).half()
    assert torch.equal(
        attention(x, mask, alibi=-alibi.half())[0], attention(x, mask.float(), alibi=-alibi.half().float())[0]
    )


def int8_layer(**fields):
    cfg = layer.config(dtype=torch.int8, hidden_size=32, heads=4, **fields)
    attention = TritonSelfAttention(cfg, q_scales=torch.rand(4, 8).to(DEVICE) / 400 + 1e-4, q_groups=8)
    for name in ("attn_qkvw", "attn_ow"):
        weight = getattr(attention, name)
        weight.data.copy_(torch.randint(-127, 128, weight.shape))
    for name in ("attn_qkvb", "attn_ob"):
        getattr(attention, name).data.normal_()
    return cfg, attention


def test_int8_scales_go_where_the_weights_go():
    cfg, attention = int8_layer()
    x = layer.make_input(cfg).half().to(DEVICE)
    expected = attention(x, None)[0]
    loaded = TritonSelfAttention(cfg)
    loaded.load_state_dict(attention.state_dict())
    for other in (loaded, copy.deepcopy(attention), attention.float().half()):
        assert other.attn_ow_scale.dtype == torch.float32
        assert torch.equal(other(x, None)[0], expected)
    assert attention.to("meta").attn_qkvw_scale.is_meta


def test_int8_and_floats_are_not_converted():
    cfg, attention = int8_layer()
    floats = make(layer.config(hidden_size=32, heads=4))
    for target, source in ((TritonSelfAttention(cfg), floats), (floats, attention)):
        with pytest.raises(ValueError, match=r"attn_qkvw is torch\.\w+, the layer's weights are torch\.\w+; nothing"):
            target.load_state_dict(source.state_dict())


def test_deepspeeds_scales_of_three_columns_are_not_taken_for_ours():
    cfg = layer.config(dtype=torch.int8, hidden_size=48, heads=4, transposed_mode=True)
    attention, x = TritonSelfAttention(cfg), layer.make_input(cfg).half().to(DEVICE)
    for weight in (attention.attn_qkvw, attention.attn_ow):
        weight.data.copy_(torch.randint(-127, 128, weight.shape))
        weight.scale = torch.ones(len(weight), 3, device=DEVICE) / 400
    with pytest.raises(ValueError, match=r"has a scale \[144, 3\]"):
        attention(x, None)
    attention.attn_qkvw_scale, attention.attn_ow_scale = attention.attn_qkvw.scale, attention.attn_ow.scale
    assert attention(x, None)[0].shape == x.shape


def test_scales_are_checked_when_a_layer_is_made():
    cfg = layer.config(dtype=torch.int8)
    with pytest.raises(ValueError, match="7 scales for each of 1 parts do not divide"):
        TritonSelfAttention(cfg, q_scales=torch.ones(4, 7), q_groups=7)
    with pytest.raises(ValueError, match="q_groups=4 says how q_scales are cut"):
        TritonSelfAttention(cfg, q_groups=4)


def test_what_would_not_be_read_is_refused():
    x, memory = torch.zeros(2, 7, 40, device=DEVICE), torch.zeros(2, 3, 40, device=DEVICE)
    past = torch.zeros(2, 5, 3, 8, device=DEVICE), torch.zeros(2, 5, 3, 8, device=DEVICE)
    attention, turned = make(layer.config()), make(layer.config(rotary_dim=8))
    for each, arguments, match in (
        (attention, {"encoder_attention_mask": torch.ones(2, 3)}, "goes with encoder_hidden_states"),
        (attention, {"layer_past": past, "token_idx": 9}, "leave token_idx and first_token out"),
        (attention, {"layer_past": past, "first_token": True}, "leave token_idx and first_token out"),
        (turned, {"encoder_hidden_states": memory}, "rotary_dim does not go with encoder_hidden_states"),
        (attention, {"input_mask": torch.zeros(2, 3, 7, 7)}, r"all 5 heads on every rank: \[5\], or 4-D with 1 or 5"),
        (attention, {"head_mask": torch.tensor(1.0)}, "all 5 heads on every rank"),
    ):
        with pytest.raises(ValueError, match=match):
            each(x, **arguments)


def test_configs_of_other_shapes():
    assert read(layer.config(rotary_dim=None)).attention.rope is None

    class Frozen:
        __slots__ = ("dtype", "heads", "hidden_size")

        def __init__(self):
            self.hidden_size, self.heads, self.dtype = 40, 5, torch.float32

    assert TritonSelfAttention(Frozen()).attn_ow.shape == (40, 40)


def test_scores_as_deepspeed_calls_them():
    qkv = torch.randn(2, 7, 3 * 40).to(DEVICE)
    whole = module.score_4d_matmul(qkv=qkv, head_size=8, triangular=False, scale=1.0)
    assert torch.equal(module.score_4d_matmul(qkv, 8), whole)  # its default, -1, is no scale
    with pytest.raises(ValueError, match="triangular is a Tensor"):
        module.score_4d_matmul(qkv, 8, torch.ones(2, 7))
