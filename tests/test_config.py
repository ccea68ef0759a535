"""AttentionConfig: defaults are filled in, nonsense is refused with its numbers, nothing changes afterwards."""

import dataclasses

import pytest
import torch

from tp_attention import AttentionConfig, RopeConfig, RopeScaling


def test_defaults():
    config = AttentionConfig(hidden_size=96, heads=8)
    assert (config.kv_heads, config.head_dim, config.dtype) == (8, 12, torch.float32)
    assert AttentionConfig(hidden_size=100, heads=8, head_dim=16).head_dim == 16


def test_frozen_and_hashable():
    config = AttentionConfig(hidden_size=96, heads=8, rope=RopeConfig(scaling=RopeScaling("linear", 2.0)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.heads = 4
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"heads": 0}, "heads=0"),
        ({"heads": 7}, "hidden_size=96 is no multiple of heads=7; pass head_dim"),
        ({"kv_heads": 3}, "heads=8 is no multiple of kv_heads=3"),
        ({"kv_heads": 0}, "kv_heads=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"norm": "batchnorm"}, "unknown norm 'batchnorm'; known: rmsnorm, layernorm"),
        ({"qk_norm": "l2"}, "unknown qk_norm 'l2'"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0"),
        ({"rope": RopeConfig(dim=16)}, "rope dim=16 exceeds head_dim=12"),
        ({"head_dim": 13, "rope": RopeConfig()}, "head_dim=13 is odd"),
        ({"window": (-2, 0)}, r"window=\(-2, 0\)"),
        ({"window": (1,)}, r"window=\(1,\)"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not supported"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**{"hidden_size": 96, "heads": 8, **change})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RopeConfig(theta=0.0), "theta=0.0"),
        (lambda: RopeConfig(dim=3), "dim=3 must be even"),
        (lambda: RopeScaling("ntk"), "unknown RoPE scaling 'ntk'; known: linear"),
        (lambda: RopeScaling("linear", 0.5), "factor=0.5"),
        (lambda: RopeScaling("yarn", 2.0), "needs original_max_positions"),
        (lambda: RopeScaling("longrope", 2.0, 64, short_factor=(1.0,)), "1 short and 0 long factors"),
    ],
)
def test_rope_nonsense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
