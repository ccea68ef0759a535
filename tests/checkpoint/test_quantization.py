from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.checkpoint.in_memory import InMemory, native
from tp_attention import eager, functional
from tp_attention.checkpoint import quantization
from tp_attention.checkpoint.families import LAYOUTS
from tp_attention.checkpoint.layouts import Layout, Rule, native_packing
from tp_attention.checkpoint.logical import LogicalTensors, StateDict
from tp_attention.checkpoint.packing import Packing
from tp_attention.checkpoint.quantization import Quantized, check_cut, dequantize, legal_tp, native_plan, quantize
from tp_attention.sharding import ShardPlan

examples = settings(deadline=None, max_examples=25)
LAYER = "layers.0."


def poisoned(shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, -77, dtype=torch.int8)


@examples
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    group=st.sampled_from([1, 3, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1 << 30),
)
def test_quantize_is_the_nearest_int8_of_every_group(rows, groups, group, dtype, seed):
    weight = torch.randn(rows, groups * group * 2, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, ::2]
    weight[0, :group] = 0
    q, scale = quantize(weight, group)

    assert (
        q.dtype == torch.int8
        and q.shape == weight.shape
        and scale.shape == (rows, groups)
        and scale.dtype == torch.float32
    )
    cells = weight.float().numpy().reshape(rows, groups, group)
    largest = np.abs(cells).max(axis=2)
    expected_scale = np.where(largest == 0, np.float32(1), largest / np.float32(127))
    assert np.array_equal(scale.numpy(), expected_scale)
    assert np.array_equal(q.numpy().reshape(cells.shape), np.rint(cells / expected_scale[..., None]).astype(np.int8))
    error = (dequantize(q, scale, torch.float32) - weight.float()).abs().unflatten(1, (groups, group))
    assert (error <= scale[:, :, None] * (0.5 + 1e-4)).all()  # fp32 rounds the quotient and the product
    assert (q.abs().unflatten(1, (groups, group)).amax(dim=2).float()[largest > 0] == 127).all()


def test_halves_round_to_even_and_what_is_tiny_becomes_zero_with_scale_1():
    weight = torch.tensor([[127, 0.5, 1.5, -2.5], [0, 0, 0, 0], [1e-44, -3e-40, 0, 0]])
    q, scale = quantize(weight, 4)
    assert q.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert scale.tolist() == [[1.0], [1.0], [1.0]]


@pytest.mark.parametrize(
    ("weight", "group", "message"),
    [
        (torch.ones(2, 12), 5, r"groups of 5 do not divide rows of 12; use one of \[1, 2, 3, 4, 6, 12\]"),
        (torch.ones(2, 12), 0, "groups of 0 do not divide rows of 12"),
        (torch.tensor([[1.0, float("nan")]]), 2, r"a weight \[1, 2\] has values that are not finite"),
        (torch.tensor([[1.0, float("-inf")]]), 2, "not finite"),
        (torch.ones(2, 12, dtype=torch.int8), 4, r"cannot quantise torch.int8 \[2, 12\]"),
        (torch.ones(12), 4, r"cannot quantise torch.float32 \[12\]"),
    ],
)
def test_what_cannot_be_quantised_is_refused(weight, group, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, group)


def llama(plan: ShardPlan, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    hidden, columns, rows = plan.hidden_size, plan.intermediate_size, plan.head_dim
    shapes = {
        "model.embed_tokens.weight": (plan.vocab_size, hidden),
        "model.layers.0.input_layernorm.weight": (hidden,),
        "model.layers.0.self_attn.q_proj.weight": (plan.heads * rows, hidden),
        "model.layers.0.self_attn.q_proj.bias": (plan.heads * rows,),
        "model.layers.0.self_attn.k_proj.weight": (plan.kv_heads * rows, hidden),
        "model.layers.0.self_attn.k_proj.bias": (plan.kv_heads * rows,),
        "model.layers.0.self_attn.v_proj.weight": (plan.kv_heads * rows, hidden),
        "model.layers.0.self_attn.v_proj.bias": (plan.kv_heads * rows,),
        "model.layers.0.self_attn.o_proj.weight": (hidden, plan.heads * rows),
        "model.layers.0.mlp.gate_proj.weight": (columns, hidden),
        "model.layers.0.mlp.up_proj.weight": (columns, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, columns),
        "lm_head.weight": (plan.vocab_size, hidden),
    }
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return StateDict(tensors, LAYOUTS["llama"], plan)


PLAN = ShardPlan(1, heads=6, kv_heads=2, head_dim=4, hidden_size=24, intermediate_size=40, vocab_size=11)
WEIGHTS = ("attention.qkv_weight", "attention.out_weight", "mlp.in_weight", "mlp.out_weight")


def joined(logical: LogicalTensors) -> dict[str, Tensor]:
    """Every tensor whole, written over poison."""
    found = {}
    for name in logical.names():
        packing, plan = logical.packing(name), replace(logical.checkpoint.plan, tp=1)
        out = torch.full(logical.shape(name, packing, plan, 0), 77).to(logical.dtype(name))
        found[name] = logical.fill(out, name, packing, plan, 0)
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def test_attention_and_mlp_weights_are_quantised_and_nothing_else():
    plain, quantized = LogicalTensors(llama(PLAN)), Quantized(llama(PLAN), group_size=8)
    before, after = joined(plain), joined(quantized)
    scales = {LAYER + name + "_scale" for name in WEIGHTS}
    assert after.keys() == before.keys() | scales
    groups = {"attention.qkv_weight": 8, "attention.out_weight": 4, "mlp.in_weight": 8, "mlp.out_weight": 8}
    for name, group in groups.items():
        q, scale = quantize(before[LAYER + name], group)
        assert torch.equal(after[LAYER + name], q) and torch.equal(after[LAYER + name + "_scale"], scale)
    for name in before.keys() - {LAYER + name for name in WEIGHTS}:
        assert torch.equal(after[name], before[name])
    assert quantized.names()[quantized.names().index(LAYER + WEIGHTS[0]) + 1] == LAYER + WEIGHTS[0] + "_scale"
    for name in quantized.names():
        tensors = len(list(quantized.sources(name)))
        assert tensors == (len(list(plain.sources(name))) if name in before else 0)


@pytest.mark.parametrize(("group_size", "expected"), [(2, 2), (8, 4), (4, 4)])
def test_groups_of_the_output_projection_lie_within_a_head(group_size, expected):
    assert Quantized(llama(PLAN), group_size).groups[LAYER + "attention.out_weight"] == expected


@examples
@given(source=st.integers(1, 6), first=st.integers(1, 6), second=st.integers(1, 6), seed=st.integers(0, 1 << 30))
def test_any_cut_of_any_source_holds_the_same_bits(source, first, second, seed):
    whole = llama(PLAN, seed)
    expected = joined(Quantized(whole, 8))
    # a plain checkpoint cut for `source` ranks, in MLP units that divide the groups
    plain = native(LogicalTensors(whole), replace(PLAN, tp=source, mlp_unit=1))
    quantized = Quantized(plain, 8)
    assert same(joined(quantized), expected)
    for tp in (first, second):
        check_cut(quantized, native_plan(quantized, tp))
        at_tp = native(quantized, native_plan(quantized, tp))
        quantized = LogicalTensors(at_tp)
        assert same(joined(quantized), expected)
        assert native_plan(quantized, 1).mlp_unit == 8 and legal_tp(quantized) == [1, 2, 3, 4, 5, 6]


def forward(logical: LogicalTensors, tp: int, x: Tensor) -> Tensor:
    """The projections of a layer on `tp` ranks, partial outputs summed; no attention between them."""
    plan = native_plan(logical, tp)
    total = torch.zeros(x.shape[0], 2 * PLAN.hidden_size, dtype=x.dtype)
    for rank in range(tp):
        share = {name: logical.share(LAYER + name, plan, rank) for name in WEIGHTS}
        scale = {name: logical.share(LAYER + name + "_scale", plan, rank) for name in WEIGHTS}
        y = [eager.linear(x, share[name], weight_scale=scale[name]) for name in (WEIGHTS[0], WEIGHTS[2])]
        gate, up = y[1].chunk(2, dim=1)
        inner = {WEIGHTS[1]: y[0][:, : plan.local_heads(rank) * plan.head_dim], WEIGHTS[3]: gate * up}
        total += torch.cat([eager.linear(inner[n], share[n], weight_scale=scale[n]) for n in inner], dim=1)
    return total


@pytest.mark.parametrize("tp", [2, 3, 4, 5])
def test_a_forward_with_int8_weights_does_not_depend_on_the_cut(tp):
    quantized, x = Quantized(llama(PLAN), 8), torch.randn(5, PLAN.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(forward(quantized, tp, x), forward(quantized, 1, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_without_columns_gives_zeros_and_its_bias(bias):
    """What a rank that holds no MLP columns adds to the sum."""
    x, weight, scale = torch.randn(2, 3, 0), torch.empty(5, 0, dtype=torch.int8), torch.empty(5, 0)
    added = torch.randn(5) if bias else None
    y = functional.linear(x, weight, added, weight_scale=scale)
    assert torch.equal(y, torch.zeros(2, 3, 5) if added is None else added.expand(2, 3, 5))
    assert dequantize(weight, scale, torch.bfloat16).shape == (5, 0)
    with pytest.raises(ValueError, match=r"weight_scale \[5, 0\] does not fit weight \[5, 4\]"):
        functional.linear(torch.randn(2, 4), weight.new_ones(5, 4), weight_scale=scale)


def test_reading_in_small_runs_changes_nothing(monkeypatch):
    for checkpoint, requantize in (
        (llama(PLAN), False),
        (native(Quantized(llama(PLAN), 4), native_plan(Quantized(llama(PLAN), 4), 3)), True),
    ):
        quantized = Quantized(checkpoint, 8, requantize)
        monkeypatch.setattr(quantization, "_CHUNK", 1 << 20)
        at_once = joined(quantized)
        for size in (1, 200, 400):
            monkeypatch.setattr(quantization, "_CHUNK", size)
            assert same(joined(quantized), at_once)


def coarse(heads: int = 6, head_dim: int = 4, group: int = 8) -> InMemory:
    """An int8 checkpoint whose output projection has a scale for two heads."""
    plan = replace(PLAN, heads=heads, kv_heads=heads, head_dim=head_dim, mlp_unit=1)
    q, scale = quantize(torch.randn(PLAN.hidden_size, heads * head_dim), group)
    packing = native_packing({"out"})
    rules = (
        Rule("w", LAYER + "attention.out_weight", packing),
        Rule("w_scale", LAYER + "attention.out_weight_scale", replace(packing, divisor=group)),
    )
    return InMemory([{"w": q, "w_scale": scale}], Layout("coarse", rules), plan)


def test_a_cut_inside_a_group_is_refused_with_the_legal_values():
    logical = LogicalTensors(coarse())
    assert legal_tp(logical) == [1, 3]  # 6 heads: 3 + 3, 2 + 2 + 1 + 1, … put an odd number of heads on a rank
    for tp in (1, 3):
        check_cut(logical, native_plan(logical, tp))
        again = LogicalTensors(native(logical, native_plan(logical, tp)))
        assert same(joined(again), joined(logical))
    for tp in (2, 4, 5, 6):
        with pytest.raises(ValueError, match=rf"tp={tp} cuts .* group of 8; legal tp: 1, 3; or force .*--requantize"):
            check_cut(logical, native_plan(logical, tp))
        with pytest.raises(ValueError, match="inside a quantisation group of 8"):
            native(logical, native_plan(logical, tp))


def test_an_mlp_unit_that_cuts_groups_is_refused():
    quantized = Quantized(llama(PLAN), 8)
    uneven = replace(PLAN, tp=3, mlp_unit=1)
    with pytest.raises(ValueError, match=r"tp=3, mlp_unit=1 cuts layers.0.mlp.out_weight inside .* group of 8"):
        check_cut(quantized, uneven)
    for name in ("mlp.out_weight", "mlp.out_weight_scale"):
        packing = quantized.packing(LAYER + name)
        with pytest.raises(ValueError, match=r"layers.0.mlp.out_weight of .*: tp=3 cuts down .* group of 8"):
            quantized.fill(
                poisoned((24, 14)) if name == "mlp.out_weight" else torch.zeros(24, 1), LAYER + name, packing, uneven, 0
            )


def test_requantize_forces_a_cut_that_the_old_groups_do_not_allow():
    checkpoint = coarse()
    old = checkpoint.ranks[0]
    with pytest.raises(ValueError, match="is in int8 already; pass requantize"):
        Quantized(checkpoint, 4)
    quantized = Quantized(checkpoint, 4, requantize=True)
    expected, expected_scale = quantize(dequantize(old["w"], old["w_scale"], torch.float32), 4)
    assert legal_tp(quantized) == [1, 2, 3, 4, 5, 6]
    for tp in (1, 2, 4):
        again = joined(LogicalTensors(native(quantized, native_plan(quantized, tp))))
        assert torch.equal(again[LAYER + "attention.out_weight"], expected)
        assert torch.equal(again[LAYER + "attention.out_weight_scale"], expected_scale)


def test_requantizing_in_the_same_groups_changes_nothing():
    quantized = Quantized(llama(PLAN), 8)
    at_3 = native(quantized, native_plan(quantized, 3))
    again, before = joined(Quantized(at_3, 8, requantize=True)), joined(quantized)
    assert all(torch.equal(again[name], before[name]) for name in before if not name.endswith("_scale"))
    for name in WEIGHTS:  # 127 · (largest / 127) may be an ulp from largest
        torch.testing.assert_close(again[LAYER + name + "_scale"], before[LAYER + name + "_scale"], rtol=2e-7, atol=0)


def test_what_quantized_refuses():
    with pytest.raises(ValueError, match=r"groups of 16 do not divide .*rows of (24|40).*group size .* of 1, 2, 4, 8$"):
        Quantized(llama(PLAN), 16)
    norms = StateDict({"model.norm.weight": torch.ones(24)}, LAYOUTS["llama"], PLAN)
    with pytest.raises(ValueError, match="has no int8 weights to requantise; pass quantize"):
        Quantized(llama(PLAN), 8, requantize=True)
    mixed = llama(PLAN)
    mixed.tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(40, 24)
    with pytest.raises(ValueError, match=r"mlp.in_weight of .* is torch.bfloat16 and torch.float32"):
        Quantized(mixed, 8).dtype(LAYER + "mlp.in_weight_scale")
    with pytest.raises(ValueError, match="has no attention or MLP weights"):
        Quantized(norms, 8)
    broken = llama(PLAN)
    broken.tensors["model.layers.0.self_attn.o_proj.weight"][3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"layers.0.attention.out_weight of .* not finite"):
        joined(Quantized(broken, 8))
    quantized = Quantized(llama(PLAN), 8)
    with pytest.raises(ValueError, match=r"cannot be int8 and \[in, out\]"):
        quantized.shape(LAYER + "mlp.in_weight", Packing(("gate", "up"), transposed=True), PLAN, 0)
    with pytest.raises(ValueError, match=r"out_weight has shape \[24, 23\]; expected \[24, 24\]"):
        name = LAYER + "attention.out_weight"
        quantized.fill(poisoned((24, 23)), name, quantized.packing(name), PLAN, 0)
    with pytest.raises(ValueError, match=r"'llama' has no place for .*qkv_weight_scale"):
        LAYOUTS["llama"].tensors_for(LAYER + "attention.qkv_weight_scale", {"q", "k", "v"})
