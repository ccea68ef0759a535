"""verify_forward passes what a right cut gives, at any number of ranks, and names the layer of a wrong one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tp_attention.checkpoint.layouts import Layout, Rule
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.checkpoint.packing import Packing
from tp_attention.checkpoint.quantization import Quantized
from tp_attention.checkpoint.verify_forward import compare
from tp_attention.sharding import ShardPlan


@pytest.fixture(autouse=True)
def one_thread():
    """For matrices this small the threads' barriers would be most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


PLAN = ShardPlan(tp=1, heads=9, kv_heads=3, head_dim=4, hidden_size=20, intermediate_size=53, mlp_unit=16)
PREFIX = "layers.{layer}."


def layout(*, gated=True, query_gate=False, group=0):
    """Our own packings under our own names; int8 in groups of `group` if that is not 0."""
    qkv = ("q", "query_gate", "k", "v") if query_gate else ("q", "k", "v")
    packings = {
        "attention.qkv": Packing(qkv),
        "attention.out": Packing(("out",), dim=1),
        "mlp.in": Packing(("gate", "up") if gated else ("up",)),
        "mlp.out": Packing(("down",), dim=1),
    }
    rules = [Rule(PREFIX + "attention.sinks", PREFIX + "attention.sinks", Packing(("sinks",)))]
    for name, packing in packings.items():
        bias = Packing(("whole",)) if packing.dim else packing
        rules.append(Rule(f"{PREFIX}{name}_weight", f"{PREFIX}{name}_weight", packing))
        rules.append(Rule(f"{PREFIX}{name}_bias", f"{PREFIX}{name}_bias", bias))
        if group:
            scale = replace(packing, divisor=group if packing.dim else 1)
            rules.append(Rule(f"{PREFIX}{name}_weight_scale", f"{PREFIX}{name}_weight_scale", scale))
    return Layout("ours", tuple(rules))


class Ranks:
    """A checkpoint of one dictionary a rank."""

    def __init__(self, name, tensors, layout, plan):
        self.path, self.tensors, self.layout, self.plan = Path(name), tensors, layout, plan

    def names(self, rank):
        return list(self.tensors[rank])

    def tensor(self, rank, name):
        return self.tensors[rank][name]


def source(dtype=torch.float32, *, layers=2, gated=True, query_gate=False, bias=True, sinks=True, **changes):
    plan = replace(PLAN, **changes)
    q, kv, hidden, mlp = plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim, plan.hidden_size, 53
    shapes = {
        "attention.qkv": ((2 if query_gate else 1) * q + 2 * kv, hidden),
        "attention.out": (hidden, q),
        "mlp.in": ((2 if gated else 1) * mlp, hidden),
        "mlp.out": (hidden, mlp),
    }
    tensors = {}
    for layer in range(layers):
        for name, shape in shapes.items():
            tensors[f"layers.{layer}.{name}_weight"] = (torch.randn(shape) / 4).to(dtype)
            if bias:
                tensors[f"layers.{layer}.{name}_bias"] = torch.randn(shape[0]).to(dtype)
        if sinks:
            tensors[f"layers.{layer}.attention.sinks"] = torch.randn(plan.heads).to(dtype)
    return LogicalTensors(Ranks("source", [tensors], layout(gated=gated, query_gate=query_gate), plan))


def cut(logical, tp):
    """The same checkpoint on tp ranks, its tensors free to be spoiled."""
    plan = replace(logical.checkpoint.plan, tp=tp)
    ranks = [{name: logical.share(name, plan, rank) for name in logical.names()} for rank in range(tp)]
    return Ranks("destination", ranks, logical.checkpoint.layout, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"gated": False, "bias": False, "sinks": False},
        {"query_gate": True},
        {"kv_heads": 9},
        {"kv_heads": 1},
    ],
)
def test_right_cuts_pass(dtype, kind):
    whole = source(dtype, **kind)
    for tp in (1, 2, 3, 4, 9):  # 9 ranks, 3 units of the MLP: some ranks have no columns
        line = compare(whole, LogicalTensors(cut(whole, tp)))
        assert f"layers 0, 1 at tp=1 and tp={tp} equal" in line
        assert "\n" not in line
    assert "tp=3 and tp=2" in compare(LogicalTensors(cut(whole, 3)), LogicalTensors(cut(whole, 2)))


def swap(tensor, first, second, count, dim=0):
    """Exchange `count` entries from `first` on with those from `second` on."""
    a, b = tensor.narrow(dim, first, count), tensor.narrow(dim, second, count)
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


SPOILED = {
    "two query heads": ("attention", 0, "attention.qkv_weight", 0, 4, 4, 0),
    "a head's two halves": ("attention", 1, "attention.qkv_weight", 0, 2, 2, 0),
    "a key and a value": ("attention", 1, "attention.qkv_weight", 3 * 4, 4 * 4, 4, 0),
    "biases of two heads": ("attention", 1, "attention.qkv_bias", 0, 4, 4, 0),
    "two sinks": ("attention", 0, "attention.sinks", 0, 1, 1, 0),
    "columns of two heads": ("attention", 2, "attention.out_weight", 0, 4, 4, 1),
    "gate and up": ("MLP", 2, "mlp.in_weight", 0, 21, 21, 0),
    "two columns of the MLP": ("MLP", 0, "mlp.out_weight", 3, 9, 1, 1),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_wrong_cut_is_named(how):
    what, rank, name, first, second, count, dim = SPOILED[how]
    whole = source()
    spoiled = cut(whole, 3)
    swap(spoiled.tensors[rank][f"layers.1.{name}"], first, second, count, dim)
    with pytest.raises(ValueError, match=f"the {what} of layer 1 of destination at tp=3 differs") as caught:
        compare(whole, LogicalTensors(spoiled))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"the {what} of layer 1 of (source|destination)"):
        compare(LogicalTensors(spoiled), whole)


def test_nan_is_a_difference():
    whole = source()
    spoiled = cut(whole, 2)
    spoiled.tensors[1]["layers.0.mlp.out_weight"][3, 3] = torch.nan
    with pytest.raises(ValueError, match="the MLP of layer 0"):
        compare(whole, LogicalTensors(spoiled))


def test_replicas_that_differ():
    """9 query heads over 3 kv heads on 2 ranks: kv head 1 is on both."""
    whole = source()
    spoiled = cut(whole, 2)
    spoiled.tensors[1]["layers.0.attention.qkv_weight"][4 * 4] += 1
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.qkv_weight.*ranks disagree about heads 1 to 1 of k"):
        compare(whole, LogicalTensors(spoiled))


def test_first_middle_and_last_layer():
    whole = source(layers=6)
    assert "layers 0, 3, 5 at" in compare(whole, LogicalTensors(cut(whole, 2)))


def quantised(logical, group):
    """The weights of a checkpoint in int8, in groups of `group` columns."""
    tensors = {}
    for name, tensor in logical.checkpoint.tensors[0].items():
        if name.endswith("_weight"):
            groups = tensor.unflatten(1, (-1, group))
            scale = groups.abs().amax(2) / 127
            tensors[name] = (groups / scale[:, :, None]).round().to(torch.int8).flatten(1)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = tensor
    return LogicalTensors(Ranks("int8", [tensors], layout(group=group), logical.checkpoint.plan))


def test_int8():
    """Against what it came from within rounding; against itself, cut, exactly."""
    whole = source(intermediate_size=48)
    shrunk = {name: tensor for name, tensor in whole.checkpoint.tensors[0].items() if ".mlp." not in name}
    whole = LogicalTensors(Ranks("source", [shrunk], whole.checkpoint.layout, whole.checkpoint.plan))
    int8 = quantised(whole, 4)
    assert "limit 5e-02" in compare(whole, int8)
    halves = cut(int8, 2)
    assert "limit 1e-10" in compare(int8, LogicalTensors(halves))
    scale = halves.tensors[1]["layers.1.attention.out_weight_scale"]
    swap(scale, 0, 1, 1, dim=1)
    for original in (whole, int8):
        with pytest.raises(ValueError, match="the attention of layer 1 of destination at tp=2"):
            compare(original, LogicalTensors(halves))


def test_a_quantised_view_of_a_cut_source():
    """Its own cut falls inside groups; the checkpoint is run as it is cut, and what is written as that is."""
    whole = source(intermediate_size=48, sinks=False)
    tensors = {name: t for name, t in whole.checkpoint.tensors[0].items() if ".mlp." not in name}
    for layer in range(2):
        tensors |= {f"layers.{layer}.mlp.in_weight": torch.randn(96, 20) / 4}
        tensors |= {f"layers.{layer}.mlp.out_weight": torch.randn(20, 48) / 4}
    plan = replace(whole.checkpoint.plan, mlp_unit=1)
    whole = LogicalTensors(Ranks("source", [tensors], whole.checkpoint.layout, plan))
    halves = cut(whole, 5)
    view = Quantized(halves, group_size=4)
    written = Ranks("destination", [], layout(group=4), replace(plan, tp=3, mlp_unit=4))
    written.tensors = [{name: view.share(name, written.plan, rank) for name in view.names()} for rank in range(3)]
    assert "at tp=5 and tp=3" in compare(view, LogicalTensors(written))
    everything = LogicalTensors(written)
    plan = replace(plan, tp=4, mlp_unit=16)  # three units: the last rank has no columns
    shares = [{name: everything.share(name, plan, rank) for name in everything.names()} for rank in range(4)]
    assert "limit 1e-10" in compare(everything, LogicalTensors(Ranks("four", shares, layout(group=4), plan)))
    written.tensors[1]["layers.1.mlp.out_weight"][0, 0] ^= 1
    with pytest.raises(ValueError, match=r"the MLP of layer 1 of destination at tp=3 .* at most 1e-10"):
        compare(view, LogicalTensors(written))


def test_layers_of_zeros_are_equal():
    whole = source(layers=1)
    whole.checkpoint.tensors[0]["layers.0.mlp.out_weight"].zero_()
    whole.checkpoint.tensors[0]["layers.0.mlp.out_bias"].zero_()
    assert "equal" in compare(whole, LogicalTensors(cut(whole, 2)))


def test_a_tensor_that_is_gone():
    whole = source()
    spoiled = cut(whole, 2)
    for tensors in spoiled.tensors:
        del tensors["layers.1.attention.sinks"]
    with pytest.raises(ValueError, match=r"destination lacks layers\.1\.attention\.sinks of source"):
        compare(whole, LogicalTensors(spoiled))


def test_nothing_to_verify():
    empty = LogicalTensors(Ranks("source", [{}], layout(), PLAN))
    with pytest.raises(ValueError, match="source has no attention layer"):
        compare(empty, empty)
