"""Softmax-context in Triton, fused and in three steps, against the fp64 reference; in the interpreter without a GPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is built for Linux alone")

from tests.tolerances import TOLERANCE, assert_close, error_of
from tp_attention import functional, reference
from tp_attention.kernels import materialised
from tp_attention.kernels import softmax_context as fused

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = fused.Config(16, 16, 4, 1)  # many blocks in few keys


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def near(actual: Tensor, expected: Tensor) -> None:
    """Within the tolerance. The interpreter cuts fp32 off to bf16 where a GPU rounds: an ulp more."""
    factor = 2 if actual.dtype == torch.bfloat16 and not GPU else 1
    assert actual.shape == expected.shape
    assert error_of(actual, expected) <= factor * TOLERANCE[actual.dtype]


def check(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> None:
    """Out and probabilities are the reference's, and rows that keep nothing are exactly 0 in both."""
    out_expected, lse = reference.attention(q, k, v, **keywords)
    expected = reference.probabilities(q, k, **keywords)
    out, probabilities = functional.softmax_context(q, k, v, backend="triton", **keywords)
    assert out.dtype == probabilities.dtype == q.dtype
    near(out, out_expected)
    near(probabilities, expected)
    assert not out[lse.isneginf().transpose(1, 2)].any()
    assert not probabilities[expected == 0].any()


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    """A seed for the data, and sizes and features."""
    group = draw(st.sampled_from((1, 2, 3)))
    return draw(st.integers(0, 2**32 - 1)), {
        "batch": draw(st.integers(1, 2)),
        "tokens": draw(st.sampled_from((1, 5, 33, 70))),
        "keys": draw(st.sampled_from((1, 7, 64, 75, 150))),
        "group": group,
        "heads": draw(st.integers(1, 3)),
        "q_start": draw(st.integers(0, 2 * group)),
        "head_dim": draw(st.sampled_from((8, 40, 64))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "mask": draw(st.sampled_from((None, "bool", "additive"))),
        "mask_shape": draw(st.tuples(*[st.booleans()] * 4)),
        "flags": {name: draw(st.booleans()) for name in ("causal", "window", "alibi", "softcap", "sinks")},
    }


def build(seed: int, p: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """q, k, v of a cut of a GQA layer's heads, and attention's keywords."""
    torch.manual_seed(seed)
    batch, tokens, keys, heads, flags = p["batch"], p["tokens"], p["keys"], p["heads"], p["flags"]
    kv_start = p["q_start"] // p["group"]
    kv_heads = (p["q_start"] + heads - 1) // p["group"] - kv_start + 1
    q = random(batch, tokens, heads, p["head_dim"], dtype=p["dtype"])
    k, v = (random(batch, keys, kv_heads, p["head_dim"], dtype=p["dtype"]) for _ in "kv")
    keywords: dict[str, Any] = {"q_start": p["q_start"], "group_size": p["group"], "kv_start": kv_start}
    if p["mask"]:
        full = (batch, heads, tokens, keys)
        shape = [size if whole else 1 for size, whole in zip(full, p["mask_shape"], strict=True)]
        keep = torch.rand(shape, device=DEVICE) < 0.6
        keywords["mask"] = keep if p["mask"] == "bool" else random(*shape).masked_fill(~keep, -math.inf)
    if flags["causal"]:
        keywords["causal"] = True
    if flags["window"]:
        keywords["window"] = (int(torch.randint(0, keys + 1, ())), int(torch.randint(-1, keys + 1, ())))
    if flags["alibi"]:
        keywords["alibi_slopes"] = torch.rand(heads, device=DEVICE)
    if flags["softcap"]:
        keywords["softcap"] = 2.0
    if flags["sinks"]:
        keywords["sinks"] = random(heads)
    return q, k, v, keywords


@given(problems())
@settings(max_examples=30 if GPU else 15, deadline=None, print_blob=True)
def test_fused_on_random_problems(problem: tuple[int, dict[str, Any]]) -> None:
    q, k, v, keywords = build(*problem)
    check(q, k, v, **keywords)


@given(problems())
@settings(max_examples=30 if GPU else 8, deadline=None, print_blob=True)
def test_three_steps_on_random_problems(problem: tuple[int, dict[str, Any]]) -> None:
    """Masks may be applied by the first step or by the second."""
    q, k, v, keywords = build(*problem)
    heads = {name: keywords.pop(name) for name in ("q_start", "group_size", "kv_start")}
    sinks, softcap = {"sinks": keywords.pop("sinks", None)}, {"softcap": keywords.pop("softcap", None)}
    expected = reference.probabilities(q, k, **keywords, **heads, **sinks, **softcap)
    out_expected, _ = reference.attention(q, k, v, **keywords, **heads, **sinks, **softcap)
    for first, second in ((keywords, {}), ({}, keywords)):
        scores = functional.score_4d_matmul(q, k, backend="triton", **first, **heads, **softcap)
        assert scores.dtype == torch.float32
        eager_scores = functional.score_4d_matmul(q, k, backend="torch", **first, **heads, **softcap)
        assert error_of(scores, eager_scores.double()) <= TOLERANCE[torch.float32]
        probabilities = functional.softmax(scores, dtype=q.dtype, backend="triton", **second, **sinks)
        near(probabilities, expected)
        near(functional.context_4d_matmul(probabilities, v, backend="triton", **heads), out_expected)


@given(problems())
@settings(max_examples=12, deadline=None, print_blob=True)
def test_torch_path_on_random_problems(problem: tuple[int, dict[str, Any]]) -> None:
    q, k, v, keywords = build(*problem)
    out, probabilities = functional.softmax_context(q, k, v, backend="torch", **keywords)
    assert out.dtype == probabilities.dtype == q.dtype
    assert_close(out, reference.attention(q, k, v, **keywords)[0])
    assert_close(probabilities, reference.probabilities(q, k, **keywords))


@pytest.mark.parametrize("reach", [(None, None), (None, 0), (20, 5), (0, 0), (3, None), (None, -40)])
@pytest.mark.parametrize(("tokens", "keys"), [(40, 100), (70, 40), (33, 33)])
def test_every_zone_of_blocks(reach: tuple[int | None, int | None], tokens: int, keys: int) -> None:
    """Blocks that every row sees, that some rows see and that none sees: with blocks so small there are all kinds."""
    q, k, v = (random(1, n, 1, 16) for n in (tokens, keys, keys))
    out, probabilities = fused.softmax_context(q, k, v, reach=reach, config=SMALL)
    left, right = reach
    i = torch.arange(tokens, device=DEVICE)[:, None] + keys - tokens
    j = torch.arange(keys, device=DEVICE)
    far = tokens + keys
    mask = (j <= i + (far if right is None else right)) & (j >= i - (far if left is None else left))
    near(out, reference.attention(q, k, v, mask=mask[None, None])[0])
    near(probabilities, reference.probabilities(q, k, mask=mask[None, None]))


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 40), (torch.float16, 96), (torch.bfloat16, 256)])
def test_views_of_a_packed_tensor(dtype: torch.dtype, head_dim: int) -> None:
    packed = random(2, 40, 4, head_dim, dtype=dtype)
    check(packed[:, :, :2], packed[:, :, 2:3], packed[:, :, 3:], causal=True)
    turned = random(2, head_dim, 3, 20, dtype=dtype).transpose(1, 3)  # last stride not 1
    check(turned, turned, turned)


def test_vectors_that_are_not_contiguous() -> None:
    q, k, v = (random(2, 20, 4, 16) for _ in "qkv")
    slopes, sinks = torch.rand(4, 3, device=DEVICE)[:, 1], random(4, 2)[:, 0]
    check(q, k, v, alibi_slopes=slopes, sinks=sinks)
    scores = functional.score_4d_matmul(q, k, alibi_slopes=slopes, backend="triton")
    near(
        functional.softmax(scores, sinks=sinks, backend="triton"),
        reference.probabilities(q, k, alibi_slopes=slopes, sinks=sinks),
    )
    scores = functional.score_4d_matmul(q, k, backend="triton")
    near(
        functional.softmax(scores, alibi_slopes=slopes, backend="triton"),
        reference.probabilities(q, k, alibi_slopes=slopes),
    )


def test_scores_past_the_range_of_fp16() -> None:
    q, k, v = (random(1, 20, 1, 64, dtype=torch.float16) for _ in "qkv")
    q, k = q * 100, k * 100
    check(q, k, v, scale=1.0)
    assert functional.score_4d_matmul(q, k, scale=1.0, backend="triton").abs().max() > 65504


@pytest.mark.parametrize("scale", (0.0, -0.3))
def test_scale_that_is_not_positive(scale: float) -> None:
    q, k, v = (random(1, 20, 1, 16) for _ in "qkv")
    check(q, k, v, scale=scale, causal=True)


def test_large_additive_masks_cancel() -> None:
    q, k, v = (random(1, 20, 1, 16) for _ in "qkv")
    check(q, k, v, mask=torch.full((1, 20), -1e29, device=DEVICE))


def test_softmax_in_more_than_one_block_and_in_place() -> None:
    scores, sinks = random(1, 2, 5, 150), random(2)
    q = scores.transpose(1, 2)  # scores are the products of q and an identity
    k = torch.eye(150, device=DEVICE)[None, :, None].expand(1, 150, 2, 150)
    cases: tuple[tuple[dict[str, Any], Any], ...] = (
        ({}, (None, None)),
        ({"causal": True}, (None, 0)),
        ({"window": (30, 2)}, (30, 2)),
    )
    for keywords, reach in cases:
        expected = reference.probabilities(q, k, scale=1.0, sinks=sinks, **keywords)
        for config in (None, materialised.Config(1, 64, 4, 1)):
            in_place = scores.clone()
            materialised.softmax(in_place, in_place, reach=reach, sinks=sinks, config=config)
            near(in_place, expected)


def test_softmax_dtypes_and_strides() -> None:
    for source, target in itertools.product(DTYPES, DTYPES):
        scores = random(1, 7, 2, 50, dtype=source).transpose(1, 2)
        out = functional.softmax(scores, dtype=target, backend="triton")
        near(out, torch.softmax(scores.double(), -1))
        assert out.dtype == target
        given_out = torch.zeros(1, 2, 7, 60, dtype=target, device=DEVICE)[..., :50]
        assert functional.softmax(scores, out=given_out, backend="triton") is given_out
        assert torch.equal(given_out, out)


def test_context_takes_probabilities_of_another_dtype() -> None:
    probabilities, v = torch.rand(2, 4, 9, 70, device=DEVICE), random(2, 70, 2, 24, dtype=torch.float16)
    out = functional.context_4d_matmul(probabilities, v, backend="triton")
    assert out.dtype == v.dtype
    near(out, (probabilities.double() @ v.double().repeat_interleave(2, 2).transpose(1, 2)).transpose(1, 2))


def test_no_keys() -> None:
    q, k = random(2, 3, 4, 8), random(2, 0, 2, 8)
    out, probabilities = functional.softmax_context(q, k, k, backend="triton")
    assert not out.any()
    assert probabilities.shape == (2, 4, 3, 0)


def test_refuses_what_does_not_fit() -> None:
    q, k = random(2, 3, 4, 8), random(2, 5, 2, 8)
    p = torch.rand(2, 4, 3, 5, device=DEVICE)
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3"):
        functional.softmax_context(q, random(2, 5, 3, 8), random(2, 5, 3, 8))
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        functional.score_4d_matmul(q, k, mask=torch.ones(2, 4, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match="int32"):
        functional.score_4d_matmul(q, k, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\[2, 4, 3, 6\].*\[2, 4, 3, 5\]"):
        functional.softmax(p, out=torch.zeros(2, 4, 3, 6, device=DEVICE))
    with pytest.raises(ValueError, match=r"\[Hq\] = \[4\]"):
        functional.softmax(p, sinks=random(3))
    with pytest.raises(ValueError, match=r"\[2, 4, 3, 5\] and v \[2, 6, 2, 8\]"):
        functional.context_4d_matmul(p, random(2, 6, 2, 8))
    with pytest.raises(RuntimeError, match="requires grad"):
        functional.softmax_context(q.requires_grad_(), k, k, backend="triton")
    with pytest.raises(RuntimeError, match="head_dim 300"):
        functional.softmax_context(random(1, 2, 1, 300), random(1, 2, 1, 300), random(1, 2, 1, 300), backend="triton")


@pytest.mark.skipif(not GPU, reason="needs 9 GB")
def test_more_than_2_31_probabilities() -> None:
    q, k = (random(1, n, 1, 16, dtype=torch.float16) for n in (66_000, 33_000))
    _, probabilities = functional.softmax_context(q, k, k)
    near(probabilities[:, :, -3:], reference.probabilities(q[:, -3:], k))
    scores = functional.score_4d_matmul(q, k, dtype=torch.float16)
    expected = scores[:, :, -3:].double().softmax(-1)  # of scores that fp16 has rounded: a part in 512 at 4
    functional.softmax(scores, out=scores)
    near(scores[:, :, -3:], expected)
    expected = torch.einsum("bhts,bshd->bthd", scores[:, :, -3:].double(), k.double())
    near(functional.context_4d_matmul(scores, k)[:, -3:], expected)
