"""TritonSelfAttention on 1 to 4 ranks, even and uneven, equals the unsharded fp64 layer; from every kind of group."""

import pytest
import torch
import torch.distributed as dist

from tests import deepspeed_layer as layer
from tests.tolerances import assert_close
from tp_attention import TritonSelfAttention
from tp_attention.comm import TPGroup, all_gather, as_group
from tp_attention.launch import RankError

CONFIGS = {
    "pre-LN": {},
    "post-LN, not causal": {"pre_layer_norm": False, "triangular_masking": False},
    "RMSNorm, GQA, rotary": {"heads": 4, "num_kv": 2, "norm_type": "RMSNorm", "rotary_dim": 8, "rotate_half": True},
    "MQA, transposed, window": {
        "heads": 4, "num_kv": 1, "transposed_mode": True, "local_attention": True, "window_size": 4,
    },
    "GQA, kv heads on two ranks": {"hidden_size": 72, "heads": 9, "num_kv": 3},
    "bloom": {"bigscience_bloom": True},
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
}  # fmt: skip
TOKENS = 9


def inputs(cfg):
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(2, TOKENS, generator=generator) > 0.3
    alibi = torch.randn(2 * cfg.heads, 1, TOKENS, generator=generator)
    per_head = torch.randn(2, cfg.heads, TOKENS, TOKENS, generator=generator)
    head_mask = torch.rand(cfg.heads, generator=generator)
    return layer.make_input(cfg, tokens=TOKENS).to(cfg.dtype), kept, alibi, per_head, head_mask


def norm_of(cfg):
    return {name: w.to(cfg.dtype) for name, w in layer.make_norm(cfg).items()} if cfg.pre_layer_norm else {}


def make(cfg, group, size):
    cfg.mp_size = size
    weights = {name: w.to(cfg.dtype) for name, w in layer.make_weights(cfg).items()}
    return TritonSelfAttention(cfg, mp_group=group).load_unsharded(weights)


def config(name):
    return layer.config(**{"pre_layer_norm": True, **CONFIGS[name]})


@torch.no_grad()
def run_layer(world, name):
    cfg = config(name)
    attention, device = make(cfg, world.tp, world.tp.size), world.device
    x, kept, alibi, per_head, head_mask = (each.to(device) for each in inputs(cfg))
    norm = {key: w.to(device) for key, w in norm_of(cfg).items()}
    results = [
        attention(x, kept, alibi=alibi, **norm),
        attention(x, per_head, head_mask=head_mask, output_attentions=True, use_triton_attention=False, **norm),
        attention(x, None, add_attn_ob=True, **norm),
        attention(x, per_head > 0, **norm),
    ]
    steps, start = [], 0
    for size in (4, 1, 3, 1) if attention.triangular_masking else ():  # token by token, by the layer's own keys
        stop = start + size
        steps.append(attention(x[:, start:stop], kept[:, :stop], first_token=start == 0, **norm)[0])
        start = stop
    results.append(torch.cat(steps, 1) if steps else None)
    head, local = attention.head_size, attention.plan.local_heads(world.tp.rank)
    assert attention.hidden_size_per_partition == head * local and attention.mp_group is world.tp
    span = attention.plan.q_heads(world.tp.rank), attention.plan.kv_head_range(world.tp.rank)
    return [move(result) for result in results], span


def move(result):
    if result is None or isinstance(result, torch.Tensor):
        return result if result is None else result.cpu()
    return tuple(each.cpu() for each in result)


@pytest.mark.parametrize("ranks", (1, 2, 3, 4))
@pytest.mark.parametrize("name", CONFIGS)
def test_sharded_equals_unsharded(world, name, ranks):
    cfg = config(name)
    x, kept, alibi, per_head, head_mask = inputs(cfg)
    rounded = {key: w.to(cfg.dtype).float() for key, w in layer.make_weights(cfg).items()}
    norm = {key: w.float() for key, w in norm_of(cfg).items()}
    truths = [
        layer.expected(cfg, rounded, x.float(), kept, alibi=alibi, **norm),
        layer.expected(cfg, rounded, x.float(), per_head, head_mask=head_mask, **norm),
        layer.expected(cfg, rounded, x.float(), **norm),
        layer.expected(cfg, rounded, x.float(), per_head > 0, **norm),
    ]
    masked = layer.expected(cfg, rounded, x.float(), kept, **norm)
    head, outputs = cfg.hidden_size // cfg.heads, []
    for (*results, steps), (q, kv) in world(ranks)(run_layer, name):
        for result, truth in zip(results, truths, strict=True):
            output, key, value, context, normed, *probabilities = result
            bias = rounded["attn_ob"].double() if result is results[2] else 0
            assert_close(output, truth["output"] + bias)
            assert_close(key, truth["key"][:, slice(*kv)])
            assert_close(value, truth["value"][:, slice(*kv)])
            assert_close(context, truth["context"][..., q[0] * head : q[1] * head])
            assert_close(normed, truth["inp_norm"])
            for weights in probabilities:
                assert_close(weights, truth["probabilities"][:, slice(*q)])
        if steps is not None:
            assert_close(steps, masked["output"])
        outputs.append(results[0][0])
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@torch.no_grad()
def run_partial(world):
    cfg = layer.config(mlp_after_attn=False)
    attention = make(cfg, world.tp, world.tp.size)
    x = layer.make_input(cfg).to(world.device)
    partial, bias = attention(x, None)[0], attention(x, None, add_attn_ob=True)[0]
    return [all_gather(each[None], world.tp, dim=0, sizes=[1] * world.tp.size).sum(0).cpu() for each in (partial, bias)]


@pytest.mark.parametrize("ranks", (1, 2, 3))
def test_output_stays_partial_without_mlp_after_attn(world, ranks):
    cfg = layer.config()
    truth = layer.expected(cfg, layer.make_weights(cfg), layer.make_input(cfg))["output"]
    for partial, with_bias in world(ranks)(run_partial):
        assert_close(partial, truth)
        assert_close(with_bias, truth + layer.make_weights(cfg)["attn_ob"].double())


@torch.no_grad()
def run_mesh(world):
    """Every replica its own weights and input; two layers on one process group, which share a TPGroup."""
    cfg = layer.config()
    cfg.mp_size = world.tp.size
    group = world.tp.process_group
    layers = [TritonSelfAttention(cfg, mp_group=group) for _ in range(2)]
    weights = layer.make_weights(cfg, seed=world.dp.rank)
    x = layer.make_input(cfg, seed=10 + world.dp.rank).to(world.device)
    same = layers[0].group is layers[1].group is as_group(group)
    return world.dp.rank, same, layers[0].load_unsharded(weights)(x, None)[0].cpu()


@pytest.mark.parametrize("ranks, tp", [(4, 2), (6, 3)])
def test_a_mesh_of_replicas(world, ranks, tp):
    cfg = layer.config()
    for replica, same, output in world(ranks, tp=tp)(run_mesh):
        assert same
        truth = layer.expected(cfg, layer.make_weights(cfg, seed=replica), layer.make_input(cfg, seed=10 + replica))
        assert_close(output, truth["output"])


@torch.no_grad()
def run_caller_groups(world):
    """Groups that the caller made, of ranks that are not in order of the world's."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    cfg = layer.config(heads=4)
    attention = make(cfg, group, 2)
    wrapped = make(cfg, TPGroup.from_process_group(group), 2)
    x = layer.make_input(cfg).to(world.device)
    return attention.group.rank, torch.equal(attention(x, None)[0], wrapped(x, None)[0]), attention(x, None)[0].cpu()


def test_a_group_of_some_ranks(world):
    cfg = layer.config(heads=4)
    truth = layer.expected(cfg, layer.make_weights(cfg), layer.make_input(cfg))["output"]
    first, middle, last = world(3)(run_caller_groups)
    assert middle is None and (first[0], last[0]) == (0, 1)
    for _, same, output in (first, last):
        assert same
        assert_close(output, truth)


def run_mismatch(world, what):
    cfg = layer.config(mp_size=1 if what == "size" else 2, heads=1 if what == "heads" else 5)
    TritonSelfAttention(cfg, mp_group="world" if what == "kind" else world.tp)


@pytest.mark.parametrize(
    "what, match",
    [
        ("size", "config.mp_size=1 but mp_group has 2 ranks"),
        ("heads", "tp=2 exceeds heads=1"),
        ("kind", "'world' is no group of ranks"),
    ],
)
def test_groups_that_are_refused(world, what, match):
    with pytest.raises(RankError, match=match):
        world(2)(run_mismatch, what)
