"""Merged checkpoints and their int8 scales: DeepSpeed's loader where it is right, its kernel's formula, dequantised."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.checkpoint.in_memory import InMemory, native
from tp_attention.checkpoint.deepspeed_int8 import to_deepspeed
from tp_attention.checkpoint.families import LAYOUTS
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.checkpoint.quantization import (
    DeepSpeedInt8,
    Quantized,
    check_cut,
    dequantize,
    group_scales,
    legal_tp,
    merge_for_deepspeed,
    merge_qkv,
    native_plan,
)
from tp_attention.sharding import ShardPlan

HEADS, DIM, HIDDEN, VOCAB, LAYERS = 8, 2, 16, 24, 2
LAYOUT_OF = {0: "megatron-0", 1.0: "megatron-1.0", 2.0: "megatron-2.0"}
NAMES = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def shards(tp: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Megatron's tensors of `tp` ranks, random by rank except for what all hold."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    common: dict[str, Tensor] = {}
    ranks: list[dict[str, Tensor]] = [
        {"embedding.word_embeddings.weight": random(VOCAB // tp, HIDDEN)} for _ in range(tp)
    ]
    for layer in range(LAYERS):
        root = f"transformer.layers.{layer}."
        for tensors in ranks:
            tensors[root + NAMES[0] + ".weight"] = random(3 * HEADS * DIM // tp, HIDDEN)
            tensors[root + NAMES[0] + ".bias"] = random(3 * HEADS * DIM // tp)
            tensors[root + NAMES[1] + ".weight"] = random(HIDDEN, HEADS * DIM // tp)
            tensors[root + NAMES[2] + ".weight"] = random(4 * HIDDEN // tp, HIDDEN)
            tensors[root + NAMES[2] + ".bias"] = random(4 * HIDDEN // tp)
            tensors[root + NAMES[3] + ".weight"] = random(HIDDEN, 4 * HIDDEN // tp)
        for name in (NAMES[1], NAMES[3]):
            common[root + name + ".bias"] = random(HIDDEN)
        common[root + "input_layernorm.weight"] = random(HIDDEN)
    return [tensors | {name: tensor.clone() for name, tensor in common.items()} for tensors in ranks]


def plan_of(tp: int) -> ShardPlan:
    return ShardPlan(tp, HEADS, HEADS, DIM, HIDDEN, 4 * HIDDEN, VOCAB, mlp_unit=1, layers=LAYERS)


def megatron(tp: int, version: float) -> InMemory:
    return InMemory(shards(tp), LAYOUTS[LAYOUT_OF[version]], plan_of(tp))


class Engine:
    """Stands for DeepSpeed's checkpoint engine: its files are indices here."""

    def __init__(self, ranks: list[dict[str, Tensor]], version: float) -> None:
        self.ranks = [{"module": dict(rank), "checkpoint_version": version} for rank in ranks]

    def load(self, path: int, map_location: object) -> dict[str, object]:
        return self.ranks[path]


def deepspeed(checkpoint: InMemory, version: float, tp: int, rank: int, q_groups: int | None, extra: bool):
    factory = pytest.importorskip("deepspeed.runtime.state_dict_factory")
    loader = factory.MegatronSDLoader(list(range(checkpoint.plan.tp)), None, Engine(checkpoint.ranks, version))
    _, state, (scales, merge_count) = loader.load(
        tp, rank, quantize=q_groups is not None, quantize_groups=q_groups, mlp_extra_grouping=extra
    )
    return state["module"], scales, merge_count


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
@pytest.mark.parametrize(("parts", "tp"), [(2, 1), (4, 1), (4, 2), (8, 2)])
def test_unquantised_merges_are_deepspeeds(version, parts, tp):
    for rank in range(tp):
        checkpoint = megatron(parts, version)
        expected, scales, count = deepspeed(checkpoint, version, tp, rank, None, True)
        tensors, ours, merge_count = merge_for_deepspeed(checkpoint, tp=tp, rank=rank)
        assert list(tensors) == list(expected) and scales is ours is None and merge_count == count == parts // tp
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("version", [1.0, 2.0])
@pytest.mark.parametrize(("parts", "tp", "q_groups"), [(2, 1, 4), (4, 1, 2), (4, 2, 8), (8, 1, 1)])
def test_quantised_merges_are_deepspeeds_where_they_are_right(version, parts, tp, q_groups, extra):
    for rank in range(tp):
        checkpoint = megatron(parts, version)
        expected, scales, count = deepspeed(checkpoint, version, tp, rank, q_groups, extra)
        tensors, ours, merge_count = merge_for_deepspeed(
            checkpoint, tp=tp, rank=rank, q_groups=q_groups, mlp_extra_grouping=extra
        )
        assert merge_count == count and list(tensors) == list(expected)
        assert all(tensors[name].dtype == expected[name].dtype for name in expected)
        # Their loader takes any ratio of 4 for an MLP: also that of an output projection which two ranks hold.
        mistaken = extra and (parts, tp) == (2, 1)
        names = [name for name in expected if not (mistaken and name.endswith("attention.dense.weight"))]
        assert len(names) == len(expected) - (LAYERS if mistaken else 0)
        assert all(torch.equal(tensors[name], expected[name]) for name in names)
        rows = [0, 2, 3] if mistaken else [0, 1, 2, 3]
        assert torch.equal(ours[:, rows], scales[:, rows])
        assert (scales[:, 1].count_nonzero(dim=1) == (2 if mistaken else 1) * q_groups * merge_count).all()
        assert (ours[:, 1].count_nonzero(dim=1) == q_groups * merge_count).all()


def test_deepspeed_merges_a_quantised_version_0_qkv_in_the_wrong_order_and_we_do_not():
    checkpoint, name = megatron(2, 0), "transformer.layers.0.attention.query_key_value.weight"
    rows = [rank[name].chunk(3) for rank in checkpoint.ranks]
    right = torch.cat([rows[rank][part] for part in range(3) for rank in range(2)])
    wrong = torch.cat([rank[name] for rank in checkpoint.ranks])
    for load, float_rows in ((deepspeed, wrong), (None, right)):
        if load is not None:
            tensors, scales, count = load(megatron(2, 0), 0, 1, 0, 4, False)
        else:
            tensors, scales, count = merge_for_deepspeed(checkpoint, q_groups=4, mlp_extra_grouping=False)
        scale = group_scales(scales[0, 0], 4, count, tensors[name].shape, "column")
        error = (dequantize(tensors[name], scale, torch.float32) - float_rows).abs()
        assert (error <= 1.01 * scale.repeat_interleave(HIDDEN // scale.shape[1], dim=1)).all()


def kernel_scales(q_scales: list[float], q_groups: int, merge_count: int, out: int, columns: int, row: bool) -> Tensor:
    """A scale an element, by the index arithmetic of DeepSpeed's dequantise kernel, which shifts by log2."""
    shift = int(math.log2(merge_count)) if row else 0
    groups = q_groups if row else q_groups * merge_count
    merged_hidden = columns >> shift
    stride = merged_hidden * out // groups
    scales = torch.empty(out, columns)
    for i in range(columns):
        part = i // merged_hidden
        for o in range(out):
            scales[o, i] = q_scales[(((i - part * merged_hidden + o * merged_hidden) // stride) << shift) + part]
    return scales


@settings(deadline=None, max_examples=40)
@given(
    out=st.sampled_from([1, 4, 6]),
    width=st.sampled_from([2, 4, 12]),
    merge_count=st.sampled_from([1, 2, 4]),
    row=st.booleans(),
    whole_rows=st.booleans(),
    data=st.data(),
)
def test_group_scales_are_what_the_kernel_reads_and_go_back(out, width, merge_count, row, whole_rows, data):
    shape = (out, width * merge_count) if row else (out * merge_count, width)
    counts = [n for n in range(1, out + 1) if out % n == 0]
    if not whole_rows:
        counts = [out * n for n in range(1, width + 1) if width % n == 0]
    q_groups, parallel = data.draw(st.sampled_from(counts)), "row" if row else "column"
    q_scales = torch.rand(q_groups * merge_count)
    expected = kernel_scales(q_scales.tolist(), q_groups, merge_count, *shape, row)

    scale = group_scales(q_scales, q_groups, merge_count, shape, parallel)
    assert torch.equal(scale.repeat_interleave(shape[1] // scale.shape[1], dim=1), expected)
    padded = torch.cat([q_scales, torch.zeros(3)])[None]  # as a row of DeepSpeed's stacked scales
    assert torch.equal(group_scales(padded, q_groups, merge_count, shape, parallel), scale)
    assert torch.equal(to_deepspeed(scale, q_groups, merge_count, shape, parallel), q_scales)
    finer = scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)
    assert torch.equal(to_deepspeed(finer, q_groups, merge_count, shape, parallel), q_scales)
    if shape[0] * shape[1] > q_scales.numel():
        finer[0, 0] += 1
        with pytest.raises(ValueError, match="different scales within runs"):
            to_deepspeed(finer, q_groups, merge_count, shape, parallel)


@pytest.mark.parametrize(
    ("numbers", "q_groups", "merge_count", "shape", "parallel", "message"),
    [
        (12, 4, 3, (12, 6), "row", "merge_count=3 is no power of two"),
        (4, 4, 0, (12, 6), "column", "merge_count=0 is no power of two"),
        (4, 0, 1, (12, 6), "column", "q_groups=0 must be at least 1"),
        (7, 4, 2, (12, 6), "column", "7 scales given; q_groups=4 and merge_count=2 make 8"),
        (9, 4, 2, (12, 6), "column", "9 scales given; q_groups=4 and merge_count=2 make 8"),
        (5, 5, 1, (12, 6), "column", r"5 scales for each of 1 parts do not divide a weight \[12, 6\]"),
        (8, 4, 2, (12, 7), "row", r"4 scales for each of 2 parts do not divide a weight \[12, 7\]"),
        (18, 18, 1, (12, 6), "column", r"runs of 4 of a weight \[12, 6\], which neither divide its rows nor are whole"),
        (9, 9, 1, (12, 6), "row", r"runs of 8 .* as many scales as divide 12, or a multiple of 12 that divides 72"),
        (4, 4, 1, (12, 6), "both", "parallel='both' must be one of column, row"),
    ],
)
def test_scales_that_do_not_fit_are_refused(numbers, q_groups, merge_count, shape, parallel, message):
    with pytest.raises(ValueError, match=message):
        group_scales(torch.ones(numbers), q_groups, merge_count, shape, parallel)


def test_scales_that_are_no_scales_of_the_weight_are_refused_on_the_way_back():
    for scale in (torch.ones(6), torch.ones(3, 2), torch.ones(4, 4), torch.ones(4, 0)):
        with pytest.raises(ValueError, match=r"are not \[out, in / group\] of a weight \[4, 6\]"):
            to_deepspeed(scale, 4, 1, (4, 6), "column")


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
@pytest.mark.parametrize(("parts", "tp"), [(1, 1), (4, 1), (4, 2)])
def test_what_was_merged_reads_back_cuts_and_requantises(version, parts, tp):
    plain = LogicalTensors(megatron(parts, version))
    merged = [merge_for_deepspeed(plain.checkpoint, tp=tp, rank=rank, q_groups=4) for rank in range(tp)]
    count = merged[0][2]
    checkpoint = DeepSpeedInt8(
        [(tensors, scales) for tensors, scales, _ in merged],
        plain.checkpoint.layout,
        plan_of(tp),
        q_groups=4,
        merge_count=count,
    )
    logical, whole = LogicalTensors(checkpoint), plan_of(1)
    assert len(logical.names()) == len(plain.names()) + 4 * LAYERS
    for name in plain.names():
        was, now = plain.share(name, whole, 0), logical.share(name, whole, 0)
        if now.dtype != torch.int8:
            assert torch.equal(was, now)
            continue
        scale = logical.share(name + "_scale", whole, 0)
        error = (dequantize(now, scale, torch.float32) - was).abs()
        assert (error <= 1.01 * scale.repeat_interleave(now.shape[1] // scale.shape[1], dim=1)).all()
    # 4 scales make runs of whole rows: a merged part is one group wide
    assert legal_tp(logical) == [n for n in (1, 2, 4) if n <= parts]
    again = LogicalTensors(native(logical, native_plan(logical, parts)))
    assert all(torch.equal(again.share(n, whole, 0), logical.share(n, whole, 0)) for n in logical.names())
    with pytest.raises(ValueError, match=r"inside a quantisation group of .*; legal tp: 1"):
        check_cut(logical, native_plan(logical, 8))
    finer = Quantized(checkpoint, 8, requantize=True)
    assert legal_tp(finer) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_our_scales_go_back_to_deepspeed_after_a_merge():
    """Two int8 ranks, joined and written for one rank of merge_count 2."""
    plain = megatron(2, 2.0)
    ranks = [merge_for_deepspeed(plain, tp=2, rank=rank, q_groups=4)[:2] for rank in range(2)]
    logical = LogicalTensors(DeepSpeedInt8(ranks, plain.layout, plain.plan, q_groups=4))
    _, expected, count = merge_for_deepspeed(plain, q_groups=4)
    assert count == 2
    rows = ("attention.qkv_weight", "attention.out_weight", "mlp.in_weight", "mlp.out_weight")
    for layer in range(LAYERS):
        for row, name in enumerate(rows):
            name = f"layers.{layer}.{name}"
            # qkv as Megatron 2.0 has it, whose ranks' rows lie one after another
            packing = plain.layout.tensors_for(name, logical.parts(name))[0][1]
            packing = replace(packing, divisor=logical.packing(name + "_scale").divisor)
            scale = torch.empty(logical.shape(name + "_scale", packing, plan_of(1), 0))
            logical.fill(scale, name + "_scale", packing, plan_of(1), 0)
            shape = logical.shape(name, replace(packing, divisor=1), plan_of(1), 0)
            q_groups = 8 if row > 1 else 4
            theirs = to_deepspeed(scale, q_groups, 2, shape, "column" if row % 2 == 0 else "row")
            assert torch.equal(theirs, expected[layer, row, : len(theirs)])


def grouped(tp: int) -> InMemory:
    """DeepSpeed's own names and [in, out] weights, 12 query heads on 6 kv heads."""
    plan = ShardPlan(tp, 12, 6, DIM, HIDDEN, 24, mlp_unit=1)
    rows, columns = 24 * DIM // tp, 12 * DIM // tp
    generator = torch.Generator().manual_seed(7)
    shared = torch.randn(HIDDEN, generator=generator)
    ranks = [
        {
            "layers.0.attention.attn_qkvw": torch.randn(HIDDEN, rows, generator=generator),
            "layers.0.attention.attn_qkvb": torch.randn(rows, generator=generator),
            "layers.0.attention.attn_ow": torch.randn(columns, HIDDEN, generator=generator),
            "layers.0.attention.attn_ob": shared.clone(),
        }
        for _ in range(tp)
    ]
    return InMemory(ranks, LAYOUTS["deepspeed-merged"], plan)


@pytest.mark.parametrize("tp", [2, 3, 6])
def test_weights_in_deepspeeds_orientation_merge_by_thirds_and_three_parts_in_our_own_form(tp):
    checkpoint = grouped(tp)
    tensors, scales, merge_count = merge_for_deepspeed(checkpoint, q_groups=2)
    qkv, out = "layers.0.attention.attn_qkvw", "layers.0.attention.attn_ow"
    parts = [rank[qkv].split([12 * DIM // tp, 6 * DIM // tp, 6 * DIM // tp], dim=1) for rank in checkpoint.ranks]
    right = {
        qkv: torch.cat([part[index] for index in range(3) for part in parts], dim=1).T,
        out: torch.cat([rank[out] for rank in checkpoint.ranks]).T,
    }
    assert tensors[qkv].shape == (HIDDEN, 24 * DIM) and tensors[out].shape == (12 * DIM, HIDDEN)
    assert torch.equal(tensors["layers.0.attention.attn_ob"], checkpoint.ranks[0]["layers.0.attention.attn_ob"])
    assert merge_count == (2 if tp == 2 else 1)
    if tp == 2:
        found = {
            qkv: group_scales(scales[0, 0], 2, 2, (24 * DIM, HIDDEN), "column"),
            out: group_scales(scales[0, 1], 2, 2, (HIDDEN, 12 * DIM), "row"),
        }
        assert not scales[0, 2:].any()  # no MLP
    else:
        assert isinstance(scales, dict)
        found = scales
    assert found[qkv].shape == (24 * DIM, 1) and found[out].shape == (HIDDEN, tp)
    assert (found[out].unique(dim=0).shape[0], found[qkv].unique().numel()) == (2, 2 * tp)
    for name, scale in found.items():
        error = (dequantize(tensors[name].T.contiguous(), scale, torch.float32) - right[name]).abs()
        assert (error <= 1.01 * scale.repeat_interleave(error.shape[1] // scale.shape[1], dim=1)).all()


def test_merges_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="rank=0 of tp=3 cannot merge 4 ranks; use a tp that divides 4"):
        merge_for_deepspeed(megatron(4, 2.0), tp=3)
    with pytest.raises(ValueError, match="rank=2 of tp=2"):
        merge_for_deepspeed(megatron(4, 2.0), tp=2, rank=2)
    uneven = grouped(3)
    uneven.plan = replace(uneven.plan, intermediate_size=25)
    with pytest.raises(ValueError, match="25 columns are uneven on 3 ranks"):
        merge_for_deepspeed(uneven)
    with pytest.raises(ValueError, match=r"q_groups: 35 runs do not divide layers.0.attention.qkv_weight"):
        merge_for_deepspeed(megatron(1, 2.0), q_groups=35)
    replicas = megatron(2, 2.0)
    replicas.ranks[1]["transformer.layers.1.input_layernorm.weight"][3] += 1
    with pytest.raises(ValueError, match=r"layers.1.attention_norm.weight .*ranks disagree"):
        merge_for_deepspeed(replicas)
    broken = megatron(2, 2.0)
    broken.ranks[1]["transformer.layers.1.mlp.dense_h_to_4h.weight"][3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"layers.1.mlp.in_weight has values that are not finite"):
        merge_for_deepspeed(broken, q_groups=4)
    split = {f"layers.0.attention.attn_{part}w": torch.ones(24 if part == "q" else 12, HIDDEN) for part in "qkv"}
    with pytest.raises(ValueError, match="attn_qw holds a part of it, merge these"):
        merge_for_deepspeed(InMemory([split], LAYOUTS["deepspeed-split"], grouped(1).plan), q_groups=2)
    with pytest.raises(ValueError, match="1 ranks given for a plan of tp=2"):
        DeepSpeedInt8([({}, torch.ones(1))], LAYOUTS["megatron-0"], plan_of(2), q_groups=4)


@pytest.mark.parametrize("transposed_mode", [True, False])
@pytest.mark.parametrize("biases", ["qkv", "q", "kv", ""])
@pytest.mark.parametrize("kv", [6, 2])
def test_qkv_merging(transposed_mode, biases, kv):
    weights: dict[str, Tensor | None] = {
        "attn_qw": torch.randn(6, 5),
        "attn_kw": torch.randn(kv, 5),
        "attn_vw": torch.randn(kv, 5),
        "attn_vb": None,
    }
    for part in biases:
        weights[f"attn_{part}b"] = torch.randn(6 if part == "q" else kv)
    weight, bias = merge_qkv(weights, transposed_mode)
    rows = weight if transposed_mode else weight.T
    assert weight.is_contiguous()
    assert torch.equal(rows, torch.cat([weights["attn_qw"], weights["attn_kw"], weights["attn_vw"]]))
    if not biases:
        assert bias is None
        return
    expected = [weights[f"attn_{p}b"] if p in biases else torch.zeros(6 if p == "q" else kv) for p in "qkv"]
    assert torch.equal(bias, torch.cat(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_vw": None}, "qkv_merging needs attn_qw, attn_kw, attn_vw; got"),
        ({"attn_kw": torch.ones(4, 5)}, r"attn_kw torch.float32 \[4, 5\].* do not fit each other"),
        ({"attn_qw": torch.ones(6, 4)}, r"attn_qw torch.float32 \[6, 4\].* do not fit each other"),
        ({"attn_qw": torch.ones(6, 5).half()}, "differ in dtype or device"),
        (
            {"attn_kb": torch.ones(6)},
            r"bias torch.float32 \[6\] does not fit attn_kw \[2, 5\]; expected torch.float32 \[2\]",
        ),
        ({"attn_qb": torch.ones(6), "attn_vb": torch.ones(2).half()}, "bias torch.float16 .* does not fit attn_vw"),
    ],
)
def test_qkv_that_does_not_merge_is_refused(change, message):
    weights = {"attn_qw": torch.ones(6, 5), "attn_kw": torch.ones(2, 5), "attn_vw": torch.ones(2, 5)}
    with pytest.raises(ValueError, match=message):
        merge_qkv(weights | change)
