"""TPSelfAttention on 1 to 4 ranks equals the unsharded fp64 layer, for every feature of its config."""

import dataclasses

import pytest
import torch

from tests.tolerances import assert_close
from tp_attention import AttentionConfig, KVCache, RopeConfig, TPSelfAttention, reference
from tp_attention.comm import TPGroup
from tp_attention.masks import alibi_slopes
from tp_attention.rope import RotaryEmbedding

BASE = AttentionConfig(hidden_size=40, heads=9, kv_heads=3, head_dim=8)
CONFIGS = {
    "plain": BASE,
    "MHA": dataclasses.replace(BASE, heads=5, kv_heads=5, causal=False, qkv_bias=True, out_bias=True),
    "MQA": dataclasses.replace(BASE, heads=6, kv_heads=1, rope=RopeConfig(theta=100.0, dim=6, interleaved=True)),
    "llama": dataclasses.replace(BASE, rope=RopeConfig(), norm="rmsnorm", norm_eps=1e-3),
    "qwen3": dataclasses.replace(BASE, rope=RopeConfig(), qk_norm="rmsnorm", window=(3, 0)),
    "gpt2": dataclasses.replace(BASE, heads=4, kv_heads=4, norm="layernorm", qkv_bias=True, out_bias=True),
    "bloom": dataclasses.replace(BASE, alibi=True, qkv_bias=True, out_bias=True),
    "gemma": dataclasses.replace(BASE, rope=RopeConfig(), softcap=2.0, scale=0.3, window=(4, 2), causal=False),
    "gpt-oss": dataclasses.replace(BASE, rope=RopeConfig(), sinks=True, window=(5, None), out_bias=True),
}
BATCH, TOKENS = 2, 11


def make_weights(config, seed=0):
    """Whole, unsharded, weights as load_unsharded takes them; norms away from one, biases away from zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(config.dtype)

    shapes = {name: slot[0] for name, slot in TPSelfAttention(config)._slots().items()}
    return {name: draw(*shape) * (0.3 if len(shape) == 2 else 1.0) for name, shape in shapes.items()}


def make_input(config, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, TOKENS, config.hidden_size, generator=generator, dtype=torch.float64).to(config.dtype)


def expected(config, weights, x, mask=None):
    positions = torch.arange(x.shape[1])[None]
    return reference.self_attention(
        x,
        weights,
        heads=config.heads,
        kv_heads=config.kv_heads,
        norm=config.norm,
        norm_eps=config.norm_eps,
        qk_norm=config.qk_norm,
        rope=RotaryEmbedding(config.rope, config.head_dim)(positions) if config.rope else None,
        interleaved=config.rope.interleaved if config.rope else False,
        causal=config.causal,
        window=config.window,
        mask=mask,
        alibi_slopes=alibi_slopes(config.heads) if config.alibi else None,
        softcap=config.softcap,
        scale=config.scale,
    )


def padding_mask():
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[0, :3] = False  # with a causal mask its first rows keep nothing at all
    return mask


def masks(config):
    """None, [B, S], one per head of the whole layer as bool, and additive."""
    generator = torch.Generator().manual_seed(2)
    per_head = torch.rand(1, config.heads, TOKENS, TOKENS, generator=generator)
    return [None, padding_mask(), per_head > 0.3, torch.where(per_head > 0.2, per_head * 4, -torch.inf)]


def run_layer(world, config):
    weights, x = make_weights(config), make_input(config).to(world.device)
    layer = TPSelfAttention(config, world.tp)
    for parameter in layer.parameters():
        parameter.fill_(float("nan"))  # whatever is not loaded shows
    layer.load_unsharded(weights)
    whole = [layer(x, mask=None if mask is None else mask.to(world.device)).cpu() for mask in masks(config)]
    cache = KVCache(
        layer.plan, world.tp.rank, batch=BATCH, max_length=TOKENS, dtype=config.dtype, device=world.device
    ).layers[0]
    pieces = [layer(x[:, :6], cache=cache), layer(x[:, 6:9], cache=cache)]
    pieces += [layer(x[:, i : i + 1], cache=cache) for i in range(9, TOKENS)]
    return (
        whole,
        torch.cat(pieces, 1),
        sum(p.nbytes for p in layer.parameters()),
        layer.plan.weight_bytes(world.tp.rank),
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_unsharded_layer(name, ranks, world):
    config = CONFIGS[name]
    weights, x = make_weights(config), make_input(config)
    results = world(ranks)(run_layer, config)
    for whole, pieces, held, planned in results:
        for y, mask in zip(whole, masks(config), strict=True):
            assert_close(y, expected(config, weights, x, mask), config.dtype)
        if config.causal:  # token by token through the cache, as without one
            assert_close(pieces, expected(config, weights, x), config.dtype)
        assert held == planned
    for whole, pieces, _, _ in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(whole, results[0][0], strict=True)), "ranks differ"
        assert torch.equal(pieces, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, world):
    config = dataclasses.replace(CONFIGS["llama"], dtype=dtype)
    weights, x = make_weights(config), make_input(config)
    truth = expected(config, weights, x)
    single = TPSelfAttention(config).load_unsharded(weights)(x)
    error = (single.double() - truth).abs().max()
    for whole, *_ in world(3)(run_layer, config):
        assert (whole[0].double() - truth).abs().max() <= 2 * error + torch.finfo(dtype).eps


def run_mesh(world, config):
    """Each data-parallel copy has weights of its own."""
    layer = TPSelfAttention(config, world.tp).load_unsharded(make_weights(config, seed=world.dp.rank))
    return layer(make_input(config).to(world.device)).cpu()


def test_on_a_mesh_each_copy_is_its_own(world):
    config = CONFIGS["llama"]
    results = world(4, tp=2)(run_mesh, config)
    for rank, y in enumerate(results):
        assert_close(y, expected(config, make_weights(config, seed=rank // 2), make_input(config)), config.dtype)


def run_two_layers(world, config):
    """A sharded layer and a whole one in the same process, in turn."""
    sharded = TPSelfAttention(config, world.tp).load_unsharded(make_weights(config))
    alone = TPSelfAttention(config, TPGroup.alone(world.device)).load_unsharded(make_weights(config, seed=7))
    x = make_input(config).to(world.device)
    return sharded(x).cpu(), alone(x).cpu(), sharded(x).cpu()


def test_two_layers_in_one_process(world):
    config = CONFIGS["bloom"]
    for first, second, again in world(2)(run_two_layers, config):
        assert_close(first, expected(config, make_weights(config), make_input(config)), config.dtype)
        assert_close(second, expected(config, make_weights(config, seed=7), make_input(config)), config.dtype)
        assert torch.equal(first, again)


def test_alone_needs_no_launcher_and_positions_may_be_given():
    config = CONFIGS["llama"]
    weights, x = make_weights(config), make_input(config)
    layer = TPSelfAttention(config).load_unsharded(weights)
    shifted = layer(x, positions=torch.arange(5, 5 + TOKENS)[None])
    assert_close(shifted, expected(config, weights, x), config.dtype)  # RoPE is relative
    stretched = layer(x, positions=torch.arange(0, 2 * TOKENS, 2)[None])
    assert (stretched - shifted).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_weight": None}, r"missing: \['q_weight'\]; unknown: none"),
        ({"gate": torch.ones(1)}, r"missing: none; unknown: \['gate'\]"),
        ({"k_weight": torch.ones(72, 40)}, r"k_weight has shape \[72, 40\]; expected \[24, 40\]"),
    ],
)
def test_wrong_weights_are_refused_and_nothing_is_copied(change, message):
    layer = TPSelfAttention(BASE)
    for parameter in layer.parameters():
        parameter.fill_(5.0)
    weights = {name: w for name, w in {**make_weights(BASE), **change}.items() if w is not None}
    with pytest.raises(ValueError, match=message):
        layer.load_unsharded(weights)
    assert all((parameter == 5.0).all() for parameter in layer.parameters())


def test_wrong_inputs_are_refused():
    layer = TPSelfAttention(BASE).load_unsharded(make_weights(BASE))
    with pytest.raises(ValueError, match=r"x has shape \[1, 2, 39\]; expected \[B, T, hidden_size=40\]"):
        layer(torch.zeros(1, 2, 39))
    with pytest.raises(ValueError, match="mask has 2 heads, the layer 9"):
        layer(torch.zeros(1, 2, 40), mask=torch.ones(1, 2, 2, 2, dtype=torch.bool))


def run_too_many(world):
    with pytest.raises(ValueError, match="tp=3 exceeds heads=2; use tp <= 2"):
        TPSelfAttention(AttentionConfig(hidden_size=8, heads=2), world.tp)
    return True


def test_more_ranks_than_heads_are_refused(world):
    assert all(world(3)(run_too_many))
