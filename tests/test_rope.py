"""RoPE: frequencies and cos/sin equal transformers' for every scaling, application equals the complex rotation."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tp_attention.config import RopeConfig, RopeScaling
from tp_attention.models.policy import rope_config
from tp_attention.rope import RotaryEmbedding, apply_rope

SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-mscale": {"factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.3,
                    "beta_fast": 16, "beta_slow": 2},
    "llama3": {"factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 32,
                 "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]},
}  # fmt: skip


def hugging_face_config(name: str) -> LlamaConfig:
    parameters = {"rope_type": name.split("-")[0], "rope_theta": 5000.0, **SCALINGS[name]}
    return LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=64, rope_parameters=parameters
    )


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [20, 50, 100])  # within the trained context, between, and past the longest
def test_equals_transformers_bit_for_bit(name, length):
    config = hugging_face_config(name)
    positions = torch.arange(length)[None]
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    q, k = torch.randn(1, 3, length, 16), torch.randn(1, 2, length, 16)
    expected = apply_rotary_pos_emb(q, k, *theirs)
    cos, sin = RotaryEmbedding(rope_config(config, 16), 16)(positions)
    for x, turned in zip((q, k), expected, strict=True):
        ours = apply_rope(x.transpose(1, 2), cos, sin).transpose(1, 2)
        torch.testing.assert_close(ours, turned, atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.cat([cos, cos], -1), theirs[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 6])
def test_application_is_the_complex_rotation(interleaved, dim):
    rope = RopeConfig(theta=100.0, dim=dim, interleaved=interleaved)
    positions = torch.tensor([[3, 4, 9], [0, 1, 2]])
    x = torch.randn(2, 3, 5, 10, dtype=torch.float64)
    turned = apply_rope(x, *RotaryEmbedding(rope, 10)(positions), interleaved=interleaved)
    half = (dim or 10) // 2
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    for i, (a, b) in enumerate(pairs):
        angle = positions.double() * 100.0 ** (-2 * i / (2 * half))
        expected = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones_like(angle), angle)[..., None]
        torch.testing.assert_close(turned[..., a], expected.real, atol=1e-5, rtol=0)
        torch.testing.assert_close(turned[..., b], expected.imag, atol=1e-5, rtol=0)
    assert torch.equal(turned[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_turned_in_fp32_and_rounded_once(dtype):
    cos, sin = RotaryEmbedding(RopeConfig(), 8)(torch.arange(40)[None])
    x = torch.randn(1, 40, 2, 8).to(dtype)
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin).to(dtype))


def test_longrope_with_too_few_factors_is_refused():
    scaling = RopeScaling("longrope", 2.0, 32, short_factor=(1.0,), long_factor=(1.0,))
    with pytest.raises(ValueError, match="longrope has 1 factors, the rotary half-dimension is 4"):
        RotaryEmbedding(RopeConfig(scaling=scaling), 8)(torch.arange(3)[None])


def test_an_unknown_scaling_of_a_hugging_face_config_is_refused():
    config = hugging_face_config("default")
    config.rope_parameters = {"rope_type": "proportional", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="unknown RoPE scaling 'proportional'"):
        rope_config(config, 16)
