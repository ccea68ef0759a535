"""The reference against things that share nothing with it: scalar loops, torch's own layers, complex numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.tolerances import TOLERANCE, assert_close
from tp_attention import reference

ALL = {
    "causal": True,
    "window": (2, -1),
    "softcap": 1.5,
    "scale": 0.7,
    "q_start": 1,
    "group_size": 2,
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("queries, keys", [(3, 5), (5, 3), (1, 4)])
def test_every_feature_matches_scalar_loops(queries: int, keys: int) -> None:
    heads, head_dim = 3, 2
    q, k, v = random(1, queries, heads, head_dim), random(1, keys, 2, head_dim), random(1, keys, 2, head_dim)
    slopes, sinks, added = random(heads).abs(), random(heads), random(1, 1, queries, keys).float()
    added[0, 0, 0, 0] = -1e30
    out, lse = reference.attention(q, k, v, mask=added, alibi_slopes=slopes, sinks=sinks, **ALL)

    for h in range(heads):
        kv = (1 + h) // 2
        for row in range(queries):
            i = keys - queries + row
            terms, weighted = [], [0.0] * head_dim
            for j in range(keys):
                if j > i or j < i - 2 or (row, j) == (0, 0):
                    continue
                score = sum(float(q[0, row, h, d]) * float(k[0, j, kv, d]) for d in range(head_dim)) * 0.7
                score = 1.5 * math.tanh(score / 1.5) - float(slopes[h]) * abs(i - j) + float(added[0, 0, row, j])
                terms.append(math.exp(score))
                weighted = [w + terms[-1] * float(v[0, j, kv, d]) for d, w in enumerate(weighted)]
            total = sum(terms) + math.exp(float(sinks[h]))
            expected = [w / total for w in weighted] if terms else [0.0] * head_dim
            assert out[0, row, h].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
            assert float(lse[0, h, row]) == pytest.approx(math.log(total) if terms else -math.inf, rel=1e-12)


def test_plain_attention_matches_torch() -> None:
    q, k, v = random(2, 5, 4, 8), random(2, 5, 2, 8), random(2, 5, 2, 8)
    out, _ = reference.attention(q, k, v, causal=True)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2).repeat_interleave(4 // x.shape[2], dim=1) for x in (q, k, v)), is_causal=True
    )
    assert_close(out, expected.transpose(1, 2))


def test_no_keys_give_zeros() -> None:
    out, lse = reference.attention(random(1, 2, 3, 4), random(1, 0, 3, 4), random(1, 0, 3, 4))
    assert not out.any() and (lse == -math.inf).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_a_complex_rotation_of_pairs(interleaved: bool) -> None:
    x, positions = random(2, 3, 2, 10), torch.tensor([[0, 5, 7], [1, 2, 1000]])
    turned = reference.rope(x, *reference.rope_angles(positions, dim=6, theta=100.0), interleaved)
    pairs = [(0, 1), (2, 3), (4, 5)] if interleaved else [(0, 3), (1, 4), (2, 5)]
    for n, (first, second) in enumerate(pairs):
        angle = positions[..., None].double() * 100.0 ** (-2 * n / 6)
        expected = torch.complex(x[..., first], x[..., second]) * torch.exp(1j * angle)
        assert_close(turned[..., first], expected.real)
        assert_close(turned[..., second], expected.imag)
    assert torch.equal(turned[..., 6:], x[..., 6:])


def test_norms_match_torch() -> None:
    x, weight, bias = random(2, 3, 16), random(16), random(16)
    assert_close(reference.norm(x, weight, bias, "layernorm", 1e-3), F.layer_norm(x, (16,), weight, bias, 1e-3))
    assert_close(reference.norm(x, weight, None, "rmsnorm", 1e-3), F.rms_norm(x, (16,), weight, 1e-3))


def test_layer_matches_torch_multihead_attention() -> None:
    layer = torch.nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.in_proj_bias)
    torch.nn.init.normal_(layer.out_proj.bias)
    weights = {"out_weight": layer.out_proj.weight, "out_bias": layer.out_proj.bias}
    for name, weight, bias in zip("qkv", layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True):
        weights |= {f"{name}_weight": weight, f"{name}_bias": bias}
    x, hidden = random(2, 5, 24), torch.zeros(2, 5, dtype=torch.bool)
    hidden[0, 3:] = True
    expected, _ = layer(x, x, x, key_padding_mask=hidden)
    assert_close(reference.self_attention(x, weights, heads=3, mask=~hidden), expected)


def test_layer_norms_before_projecting_and_turns_after() -> None:
    heads, kv_heads, dim = 4, 2, 6
    x, rope = random(1, 5, 8), reference.rope_angles(torch.arange(5)[None], dim)
    weights = {
        "norm_weight": random(8),
        "q_weight": random(heads * dim, 8),
        "k_weight": random(kv_heads * dim, 8),
        "v_weight": random(kv_heads * dim, 8),
        "q_norm_weight": random(dim),
        "k_norm_weight": random(dim),
        "out_weight": random(8, heads * dim),
    }
    y = reference.self_attention(
        x, weights, heads=heads, kv_heads=kv_heads, norm="rmsnorm", qk_norm="rmsnorm", rope=rope, causal=True
    )
    normed = F.rms_norm(x, (8,), weights["norm_weight"], 1e-5)
    q, k, v = ((normed @ weights[f"{name}_weight"].T).unflatten(-1, (-1, dim)) for name in "qkv")
    q, k = (F.rms_norm(z, (dim,), weights[f"{name}_norm_weight"], 1e-5) for name, z in (("q", q), ("k", k)))
    q, k = (reference.rope(z, *rope) for z in (q, k))
    context, _ = reference.attention(q, k, v, causal=True)
    assert_close(y, context.flatten(2) @ weights["out_weight"].T)


def test_assert_close_can_fail() -> None:
    expected = random(4)
    for wrong in (expected * (1 + 2 * TOLERANCE[torch.float32]), expected.clone().fill_(math.nan), expected * math.inf):
        with pytest.raises(AssertionError, match="error"):
            assert_close(wrong.float(), expected)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(expected[:3], expected)
