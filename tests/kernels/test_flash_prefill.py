"""The flash prefill kernel against the fp64 reference: in the interpreter on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tolerances import TOLERANCE, error_of
from tp_attention import functional, masks, reference

pytest.importorskip("triton", reason="triton is built for Linux alone")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts fp32 to bf16 instead of rounding: an error of up to one ulp where half is allowed for.
SLACK = {torch.bfloat16: 2.0 if DEVICE == "cpu" else 1.0}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    error = error_of(actual, expected)
    assert error <= TOLERANCE[dtype] * SLACK.get(dtype, 1.0), f"error {error:.3g} for {dtype}"


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def random_mask(shape: tuple[int, ...], kind: str) -> Tensor:
    keep = torch.rand(shape, device=DEVICE) < 0.5
    if kind == "bool":
        return keep
    removed = {"-inf": -torch.inf, "finfo.min": torch.finfo(torch.float32).min}[kind]
    return torch.randn(shape, device=DEVICE).masked_fill(~keep, removed)


def check(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> None:
    expected, expected_lse = reference.attention(q, k, v, **keywords)
    out, lse = functional.attention(q, k, v, return_lse=True, backend="triton", **keywords)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert_close(out, expected, q.dtype)
    assert_close(lse, expected_lse, torch.float32)  # scores are fp32 sums of exact products
    assert not out[expected_lse.isneginf().transpose(1, 2)].any()


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A seed for the data, sizes on and off the blocks' edges, any cut of a GQA layer's heads, every feature."""
    group_size, all_kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    q_start = draw(st.integers(0, group_size * all_kv_heads - 1))
    heads = draw(st.integers(1, min(3, group_size * all_kv_heads - q_start)))
    kv_start = draw(st.integers(0, q_start // group_size))
    kv_heads = (q_start + heads - 1) // group_size + 1 - kv_start
    batch, queries, keys = draw(st.integers(1, 2)), draw(st.integers(1, 150)), draw(st.integers(1, 200))
    shapes = [(batch, keys), *itertools.product((1, batch), (1, heads), (1, queries), (1, keys))]
    side = st.sampled_from((None, -1, 0, 1, 30, 100))
    return {
        "seed": draw(st.integers(0, 2**31)),
        "sizes": (
            batch,
            queries,
            keys,
            heads,
            kv_heads,
            draw(st.sampled_from((8, 16, 40, 41, 64, 80, 96, 128, 200, 256))),
        ),
        "dtype": draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        "head_map": {"q_start": q_start, "group_size": group_size, "kv_start": kv_start},
        "mask": draw(st.none() | st.tuples(st.sampled_from(shapes), st.sampled_from(("bool", "-inf", "finfo.min")))),
        "keywords": {
            "causal": draw(st.booleans()),
            "window": draw(st.none() | st.tuples(side, side)),
            "softcap": draw(st.sampled_from((None, None, 0.5, 30.0))),
            "scale": draw(st.sampled_from((None, None, 0.05, -0.3, 0.0))),
        },
        "alibi": draw(st.booleans()),
        "sinks": draw(st.booleans()),
    }


@settings(max_examples=25, deadline=None, print_blob=True)
@given(problem=problems())
def test_random_problems(problem: dict[str, Any]) -> None:
    torch.manual_seed(problem["seed"])
    batch, queries, keys, heads, kv_heads, head_dim = problem["sizes"]
    dtype, keywords = problem["dtype"], dict(problem["keywords"], **problem["head_map"])
    if problem["mask"] is not None:
        keywords["mask"] = random_mask(*problem["mask"])
    if problem["alibi"]:
        keywords["alibi_slopes"] = torch.rand(heads, device=DEVICE)
    if problem["sinks"]:
        keywords["sinks"] = random(heads, dtype=dtype)
    packed = random(batch, max(queries, keys), heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=2)
    check(q[:, :queries], k[:, :keys], v[:, :keys], **keywords)


@pytest.mark.parametrize("window", [None, (0, 0), (3, 3), (64, 0), (70, None), (None, 5), (127, 64)], ids=str)
@pytest.mark.parametrize("queries, keys", [(1, 1), (64, 64), (130, 130), (65, 191), (150, 70)])
def test_every_key_within_reach_is_seen_once(queries: int, keys: int, window: masks.Window | None) -> None:
    q, k, v = random(1, queries, 1, 16), random(1, keys, 1, 16), random(1, keys, 1, 16)
    for causal in (False, True):
        check(q, k, v, window=window, causal=causal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_past_65504(dtype: torch.dtype) -> None:
    q, k, v = (random(1, 40, 1, 64, dtype=dtype) * 100 for _ in range(3))
    assert torch.einsum("bihd,bjhd->bij", q.double(), k.double()).abs().max() > 65504
    check(q, k, v, scale=1.0)


def test_layouts_that_need_a_copy_and_those_that_do_not() -> None:
    """Heads before tokens, a transposed head dimension, an odd base address, one kv head expanded over the batch."""
    q = random(2, 3, 50, 32).transpose(1, 2)
    k, v = random(2, 50, 32, 3).transpose(2, 3), random(2 * 50 * 3 * 32 + 1)[1:].view(2, 50, 3, 32)
    check(q, k, v, causal=True)
    shared = random(1, 50, 1, 32).expand(2, 50, 1, 32)
    check(q, shared, shared)


def test_padding_may_hold_nan_past_the_end_of_a_tensor() -> None:
    """The last block of keys is read past S: what lies there must not come through as 0 · NaN."""
    held = random(1, 128, 2, 32)
    held[:, 70:] = torch.nan
    check(random(1, 30, 2, 32), held[:, :70], held[:, :70])


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal: bool) -> None:
    """Empty sequences, no queries, no keys, more queries than keys; NaN in one sequence stays there."""
    lengths_q, lengths_k = [70, 0, 1, 130, 5, 20], [70, 10, 90, 60, 0, 33]
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=DEVICE) for x in (lengths_q, lengths_k)
    )
    q, k, v = random(sum(lengths_q), 4, 40), random(sum(lengths_k), 2, 40), random(sum(lengths_k), 2, 40)
    v[-33:] = torch.nan
    keywords = {"causal": causal, "window": (40, None), "sinks": random(4), "softcap": 5.0}
    for backend in ("triton", "torch"):
        out, lse = functional.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, backend=backend, **keywords)
        alone = functional.attention_varlen(q, k, v, cu_q, cu_k, backend=backend, **keywords)
        assert torch.equal(out.nan_to_num(7), alone.nan_to_num(7))
        for b in range(len(lengths_q) - 1):
            queries, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            expected, expected_lse = reference.attention(q[None, queries], k[None, keys], v[None, keys], **keywords)
            assert_close(out[None, queries], expected, torch.float32)
            assert_close(lse[None, :, queries], expected_lse, torch.float32)


def test_addresses_past_2_to_the_31() -> None:
    """The last tokens lie more than 2^31 elements after the first, in memory that is mostly never touched."""
    held = torch.zeros(2**31 + 2**20, dtype=torch.float16, device=DEVICE)
    far = 2**31 // 8
    for tokens, strides in ((9, (0, 96, 2**31, 1)), (513, (0, 2**22, 32, 1)), (9, (0, far, 32, 1))):
        heads = 2 if strides[2] > 32 else 1
        q, k, v = (torch.as_strided(held, (1, tokens, heads, 32), strides, offset) for offset in (0, 32, 64))
        for x in (q, k, v):
            x.copy_(random(1, tokens, heads, 32, dtype=torch.float16))
        check(q[:, -3:], k, v, causal=True)


REFUSED = {
    "3-D q": ({"q": torch.zeros(4, 3, 8, 16)}, r"q has shape \[4, 3, 8, 16\]"),
    "int64 lengths": ({"cu_seqlens_k": torch.tensor([0, 4])}, r"cu_seqlens_k is torch.int64 \[2\]; expected int32"),
    "other number of sequences": ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32)}, r"cu_seqlens_k is .* \[3\]"),
    "heads": ({"q": torch.zeros(4, 3, 16)}, "3 query heads are no multiple of 2 kv heads"),
}


@pytest.mark.parametrize("given, message", REFUSED.values(), ids=REFUSED)
def test_wrong_packed_arguments_are_refused(given: dict[str, Any], message: str) -> None:
    cu, x = torch.tensor([0, 4], dtype=torch.int32), torch.zeros(4, 2, 16)
    arguments = {"q": x, "k": x, "v": x, "cu_seqlens_q": cu, "cu_seqlens_k": cu} | given
    with pytest.raises(ValueError, match=message):
        functional.attention_varlen(**arguments)


def test_gradients_are_refused_not_lost() -> None:
    q = random(1, 2, 1, 16).requires_grad_()
    with pytest.raises(RuntimeError, match="q requires grad"):
        functional.attention(q, q, q, backend="triton")
    with torch.no_grad():
        assert functional.attention(q, q, q, backend="triton").isfinite().all()
    assert functional.attention(q, q, q, backend="torch").requires_grad


def test_wide_heads_take_torch_and_say_so() -> None:
    q = random(1, 2, 1, 320)
    with pytest.raises(RuntimeError, match="head_dim 320 > 256"):
        functional.attention(q, q, q, backend="triton")
    assert functional.attention(q, q, q).isfinite().all()
