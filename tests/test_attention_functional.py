"""functional.attention, norms and projections on the torch path, against the fp64 reference."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.tolerances import TOLERANCE, assert_close
from tp_attention import functional, masks, reference
from tp_attention.config import DTYPES as ALL_DTYPES
from tp_attention.config import NORMS

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def random_mask(shape: tuple[int, ...], kind: str) -> Tensor:
    """About half of the keys kept: bool, or float with a soft bias on these and `kind`'s value on the others."""
    keep = torch.rand(shape) < 0.5
    if kind == "bool":
        return keep
    removed = {"-inf": -math.inf, "-1e30": -1e30, "finfo.min": torch.finfo(torch.float32).min}[kind]
    return torch.randn(shape).masked_fill(~keep, removed)


def check(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> None:
    """Out and lse equal the reference's on every device here, and rows that keep nothing are exactly 0."""
    expected, expected_lse = reference.attention(q, k, v, **keywords)
    empty = expected_lse.isneginf().transpose(1, 2)
    for device in DEVICES:
        there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in keywords.items()}
        qkv = [x.to(device) for x in (q, k, v)]
        out = functional.attention(*qkv, **there)
        with_lse, lse = functional.attention(*qkv, return_lse=True, **there)
        for result in (out.cpu(), with_lse.cpu()):
            assert result.dtype == q.dtype
            assert result.isfinite().all()
            assert not result[empty].any()
            assert_close(result, expected)
        assert lse.dtype == torch.float32
        assert_close(lse.cpu(), expected_lse)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    """A seed for the data, and sizes and features: any cut of a GQA layer's heads, every mask, odd sizes."""
    group_size, all_kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    q_start = draw(st.integers(0, group_size * all_kv_heads - 1))
    heads = draw(st.integers(1, group_size * all_kv_heads - q_start))
    kv_start = draw(st.integers(0, q_start // group_size))
    kv_heads = (q_start + heads - 1) // group_size + 1 - kv_start
    batch, queries, keys = draw(st.integers(1, 3)), draw(st.sampled_from((1, 1, 2, 7, 19))), draw(st.integers(0, 70))
    shapes = [(batch, keys), *itertools.product((1, batch), (1, heads), (1, queries), (1, keys))]
    side = st.sampled_from((None, -1, 0, 1, 5, 40))
    return draw(st.integers(0, 2**31)), {
        "sizes": (batch, queries, keys, heads, kv_heads, draw(st.sampled_from((*range(1, 41), 64, 80, 256, 320)))),
        "dtype": draw(st.sampled_from(DTYPES)),
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
        "tiny_blocks": draw(st.booleans()),
    }


@settings(max_examples=250, deadline=None)
@given(problems())
def test_attention_matches_reference_on_random_problems(drawn: tuple[int, dict[str, Any]]) -> None:
    seed, problem = drawn
    torch.manual_seed(seed)
    batch, queries, keys, heads, kv_heads, head_dim = problem["sizes"]
    dtype, keywords = problem["dtype"], problem["keywords"] | problem["head_map"]
    if problem["mask"]:
        keywords["mask"] = random_mask(*problem["mask"])
    if problem["alibi"]:
        keywords["alibi_slopes"] = torch.rand(heads)
    if problem["sinks"]:
        keywords["sinks"] = random(heads, dtype=dtype)
    packed = random(batch, max(queries, keys), heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=2)
    with pytest.MonkeyPatch.context() as patch:
        if problem["tiny_blocks"]:
            patch.setattr("tp_attention.eager.prefill.CPU_SCORES", 0)
            patch.setattr("tp_attention.eager.prefill.GPU_SCORES", 0)
            patch.setattr("tp_attention.eager.prefill.MIN_ROWS", 3)
        check(q[:, :queries], k[:, :keys], v[:, :keys], **keywords)


@pytest.mark.parametrize("kind", ["bool", "-1e30"])
@pytest.mark.parametrize("shape", [(2, 5), *itertools.product((1, 2), (1, 4), (1, 3), (1, 5))], ids=str)
def test_every_mask_shape_with_every_feature(shape: tuple[int, ...], kind: str) -> None:
    q, k, v = random(2, 3, 4, 8), random(2, 5, 2, 8), random(2, 5, 2, 8)
    features = (
        ("causal", True),
        ("window", (1, 1)),
        ("alibi_slopes", torch.rand(4)),
        ("softcap", 1.0),
        ("sinks", random(4)),
    )
    for chosen in itertools.product((False, True), repeat=len(features)):
        check(q, k, v, mask=random_mask(shape, kind), **dict(itertools.compress(features, chosen)))


@pytest.mark.parametrize("queries", [1, 3, 5, 7])
def test_windows_of_every_reach(queries: int) -> None:
    q, k, v = random(1, queries, 2, 4), random(1, 5, 1, 4), random(1, 5, 1, 4)
    for left, right, causal in itertools.product((None, *range(-1, 8)), (None, *range(-1, 8)), (False, True)):
        check(q, k, v, window=(left, right), causal=causal)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [1, 3, 32, 40, 64, 80, 96, 128, 256, 320])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim_and_dtype(dtype: torch.dtype, head_dim: int) -> None:
    for queries, keys in itertools.product((1, 2, 63, 130), (1, 63, 130)):
        q = random(2, queries, 6, head_dim, dtype=dtype)
        k, v = random(2, keys, 2, head_dim, dtype=dtype), random(2, keys, 2, head_dim, dtype=dtype)
        masked = {"causal": True, "mask": random_mask((2, keys), "bool")}
        for keywords in ({}, {"causal": True}, masked, {"window": (17, 9)}, masked | {"alibi_slopes": torch.rand(6)}):
            check(q, k, v, **keywords)


@pytest.mark.parametrize("queries, keys", [(1, 130), (130, 130), (33, 130)])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_error_is_that_of_the_plain_formula(dtype: torch.dtype, head_dim: int, queries: int, keys: int) -> None:
    """Against the textbook in the same dtype with an fp32 softmax: no more than its error, in the root mean square.

    1.25, because fp32 sums in another order; their largest errors, single draws, differ by up to 1.7 and are left to
    TOLERANCE.
    """
    torch.manual_seed(0)
    q, k, v = (random(2, tokens, 4, head_dim, dtype=dtype) for tokens in (queries, keys, keys))
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) / math.sqrt(head_dim)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    probabilities = scores.float().masked_fill(hidden, -math.inf).softmax(-1).to(dtype)
    plain = (probabilities @ v.transpose(1, 2)).transpose(1, 2)
    expected, _ = reference.attention(q, k, v, causal=True)
    with_lse, _ = functional.attention(q, k, v, causal=True, return_lse=True)
    allowed = 1.25 * (plain - expected).square().mean().sqrt()
    for out in (functional.attention(q, k, v, causal=True), with_lse):
        assert (out - expected).square().mean().sqrt() <= allowed


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scores_past_65504(dtype: torch.dtype, queries: int) -> None:
    """Scores of 96,000 in steps of 16, so that fp32's rounding at that size cannot show: only an overflow can."""
    q, k = (torch.randint(-2, 3, (1, tokens, 2, 64)).to(dtype) * 4 for tokens in (queries, 9))
    q[..., 0], k[..., 0] = 400, 240
    v = random(1, 9, 2, 64, dtype=dtype)
    for keywords in (
        {},
        {"causal": True},
        {"mask": random_mask((1, 9), "bool")},
        {"mask": random_mask((1, 9), "-inf")},
    ):
        check(q, k, v, scale=1.0, **keywords)


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("start, stop", [(5, 9), (0, 5), (2, 3), (3, 6), (1, 9)])
def test_uneven_cuts_of_a_layers_heads(start: int, stop: int, queries: int) -> None:
    """Heads start..stop of 9 over 3 kv heads, with the kv heads they read, give their share of the whole result."""
    q, k, v = random(2, queries, 9, 16), random(2, 11, 3, 16), random(2, 11, 3, 16)
    mask, slopes, sinks = random_mask((2, 9, queries, 11), "-inf"), torch.rand(9), random(9)
    kv_start, kv_stop = start // 3, (stop - 1) // 3 + 1
    heads, kv_heads = slice(start, stop), slice(kv_start, kv_stop)
    cut = {"q_start": start, "group_size": 3, "kv_start": kv_start, "causal": True}
    for whole in ({}, {"mask": mask}, {"alibi_slopes": slopes}, {"sinks": sinks, "mask": mask, "alibi_slopes": slopes}):
        share = {name: x[:, heads] if name == "mask" else x[heads] for name, x in whole.items()}
        expected, _ = reference.attention(q, k, v, causal=True, **whole)
        out = functional.attention(q[:, :, heads], k[:, :, kv_heads], v[:, :, kv_heads], **cut, **share)
        assert_close(out, expected[:, :, heads])


@pytest.mark.parametrize("window", [None, (20, 0), (100, 30)])
def test_long_inputs_by_blocks_of_rows(window: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tp_attention.eager.prefill.CPU_SCORES", 0)
    q, k, v = random(1, 150, 2, 8), random(1, 200, 1, 8), random(1, 200, 1, 8)
    check(q, k, v, causal=True, window=window, mask=random_mask((1, 2, 150, 200), "-inf"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_keep_nothing(dtype: torch.dtype) -> None:
    """T > S under a causal mask, a padded-out sequence, S = 0; with sinks too, whose lse is then -inf all the same."""
    q, k, v = random(2, 5, 4, 8, dtype=dtype), random(2, 3, 2, 8, dtype=dtype), random(2, 3, 2, 8, dtype=dtype)
    padded_out = torch.tensor([[True, True, True], [False, False, False]])
    for keywords in ({"causal": True}, {"mask": padded_out}, {"mask": (~padded_out).float() * -1e30}):
        for sinks in (None, random(4)):
            check(q, k, v, sinks=sinks, **keywords)
            check(q[:, :1], k, v, sinks=sinks, **keywords)
    check(q, k[:, :0], v[:, :0], causal=True)
    check(q[:, :0], k, v)


def test_cheapest_form_of_torchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding and plain causal prefill must not build a mask, and decoding must not copy k."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    torchs = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        calls.append((k, keywords))
        return torchs(q, k, v, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, cache = random(1, 6, 9, 16), random(1, 6, 3, 16)
    for queries, keywords in (
        (1, {"causal": True}),
        (1, {"causal": True, "window": (3, 0)}),
        (6, {"causal": True}),
        (6, {}),
    ):
        functional.attention(q[:, :queries], cache, cache, **keywords)
        k, passed = calls.pop()
        assert passed.get("attn_mask") is None
        assert passed["is_causal"] is (queries > 1 and "causal" in keywords)
        assert queries > 1 or k.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


def test_torch_path_is_differentiable() -> None:
    q, k, v = (torch.randn(1, tokens, heads, 4, dtype=torch.float64) for tokens, heads in ((3, 4), (5, 2), (5, 2)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for keywords in ({}, {"softcap": 1.0, "sinks": torch.randn(4).double(), "mask": random_mask((1, 5), "bool")}):
        assert torch.autograd.gradcheck(
            lambda *qkv, given=keywords: functional.attention(*qkv, causal=True, **given), inputs
        )


Q, KV = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8)
REFUSED = {
    "q is 3-D": ({"q": Q[0]}, r"\[3, 4, 8\].*expected q \[B, T, Hq, D\]"),
    "k is 3-D": ({"k": KV[0]}, r"k \[5, 2, 8\]"),
    "k and v differ": ({"v": KV[:, 1:]}, r"v \[2, 4, 2, 8\]"),
    "batches differ": ({"q": Q[:1]}, r"q \[1, 3, 4, 8\], k \[2, 5, 2, 8\]"),
    "head dims differ": ({"q": Q[..., :7]}, r"q \[2, 3, 4, 7\]"),
    "no head dim": ({"q": Q[..., :0], "k": KV[..., :0], "v": KV[..., :0]}, "D >= 1"),
    "dtypes differ": ({"k": KV.half()}, r"k is torch.float16, q is torch.float32; convert"),
    "v's dtype differs": ({"v": KV.double()}, r"v is torch.float64, q is torch.float32"),
    "integers": ({"q": Q.int(), "k": KV.int(), "v": KV.int()}, "torch.int32.*convert both to one of torch.float32"),
    "devices differ": ({"k": KV.to("meta")}, r"k is on meta, the rest on cpu; move it with .to\('cpu'\)"),
    "no multiple": ({"q": Q[:, :, :3]}, "3 query heads are no multiple of 2 kv heads"),
    "no kv heads": ({"k": KV[:, :, :0], "v": KV[:, :, :0]}, "4 query heads are no multiple of 0 kv heads"),
    "starts alone": ({"q_start": 1}, "q_start=1, kv_start=0 need group_size"),
    "group of 0": ({"group_size": 0}, "group_size=0 must be >= 1"),
    "negative start": ({"group_size": 2, "q_start": -1}, "q_start=-1"),
    "past the last kv head": (
        {"group_size": 2, "q_start": 1},
        r"heads 1..4 in groups of 2 read kv heads 0..2, k holds 0..1",
    ),
    "before the first": ({"group_size": 2, "kv_start": 1}, r"read kv heads 0..1, k holds 1..2"),
    "integer mask": ({"mask": torch.ones(2, 5, dtype=torch.long)}, r"torch.int64.*pass mask.bool\(\)"),
    "2-D mask is [B, S]": ({"mask": torch.ones(3, 5) > 0}, r"\[3, 5\]; expected \[B, S\] = \[2, 5\]"),
    "2-D mask never broadcasts": ({"mask": torch.ones(1, 5) > 0}, r"\[1, 5\]"),
    "3-D mask": ({"mask": torch.ones(2, 3, 5) > 0}, r"\[2, 3, 5\]; expected.*\[2, 4, 3, 5\]"),
    "4-D mask of kv heads": ({"mask": torch.ones(2, 2, 3, 5) > 0}, r"\[2, 2, 3, 5\]"),
    "mask elsewhere": ({"mask": torch.ones(2, 5, device="meta") > 0}, "mask is on meta"),
    "slopes of the whole layer": (
        {"alibi_slopes": torch.ones(8)},
        r"alibi_slopes is torch.float32 \[8\].*\[Hq\] = \[4\]",
    ),
    "integer slopes": ({"alibi_slopes": torch.ones(4, dtype=torch.int32)}, "alibi_slopes is torch.int32"),
    "slopes elsewhere": ({"alibi_slopes": torch.ones(4, device="meta")}, "alibi_slopes is on meta"),
    "sinks per head": ({"sinks": torch.ones(4, 1)}, r"sinks is torch.float32 \[4, 1\]"),
    "negative window": ({"window": (-2, 0)}, r"window=\(-2, 0\)"),
    "one-sided window": ({"window": (4,)}, r"window=\(4,\)"),
    "softcap 0": ({"softcap": 0.0}, "softcap=0.0 must be positive"),
    "softcap nan": ({"softcap": math.nan}, "softcap=nan"),
    "unknown backend": ({"backend": "cuda"}, "unknown backend 'cuda'; use one of auto, triton, torch"),
}


@pytest.mark.parametrize("given, message", REFUSED.values(), ids=REFUSED)
def test_wrong_arguments_are_refused_before_any_work(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tp_attention.eager.prefill.attention", lambda *_, **__: pytest.fail("work was done"))
    arguments = {"q": Q, "k": KV, "v": KV} | given
    with pytest.raises(ValueError, match=message):
        functional.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_triton_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tp_attention.functional.backends._interpreted", lambda: False)
    functional.choose_backend.cache_clear()
    with pytest.raises(
        RuntimeError, match="cannot run: the tensors are on cpu, not a GPU; use backend='auto' or 'torch'"
    ):
        functional.attention(Q, KV, KV, backend="triton")
    with pytest.raises(RuntimeError, match="head_dim 320 > 256"):
        functional.choose_backend("triton", torch.device("cuda"), "head_dim 320 > 256")
    functional.choose_backend.cache_clear()


def test_the_log_says_once_why_torch_runs(caplog: pytest.LogCaptureFixture) -> None:
    functional.choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="tp_attention"):
        for backend in ("torch", "auto", "auto"):
            functional.attention(Q, KV, KV, backend=backend)
    assert caplog.messages == ["torch path: the tensors are on cpu, not a GPU"]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_linear_and_norm_qkv(dtype: torch.dtype, kind: str) -> None:
    x = random(2, 3, 48, dtype=dtype) * 50 + 20
    weight, bias, projection, rows = (random(*shape, dtype=dtype) for shape in ((48,), (48,), (30, 48), (30,)))
    normed = functional.norm(x, weight, bias, kind, 1e-3)
    assert_close(normed, reference.norm(x, weight, bias, kind, 1e-3))
    assert_close(functional.norm(x, None, kind=kind), reference.norm(x, None, kind=kind))
    assert_close(functional.linear(x, projection, rows), reference.linear(x, projection, rows))

    keywords = {"norm": kind, "norm_weight": weight, "norm_bias": bias, "eps": 1e-3}
    qkv, also_normed = functional.norm_qkv(x, projection, rows, return_normed=True, **keywords)
    assert torch.equal(normed, also_normed) and torch.equal(qkv, functional.norm_qkv(x, projection, rows, **keywords))
    assert_close(qkv, reference.linear(normed, projection, rows))
    assert torch.equal(functional.norm_qkv(x, projection), functional.linear(x, projection))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rmsnorm_has_the_bits_of_hugging_faces(dtype: torch.dtype) -> None:
    x, weight = random(2, 7, 576, dtype=dtype) * 30, random(576, dtype=dtype)
    wide = x.float()
    theirs = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    assert torch.equal(functional.norm(x, weight), theirs)


def test_norms_and_projections_refuse_what_does_not_fit() -> None:
    x, weight = torch.zeros(2, 3, 8), torch.zeros(5, 8)
    for call, message in (
        (lambda: functional.linear(x, weight.T), r"x \[2, 3, 8\] and weight \[8, 5\]"),
        (lambda: functional.linear(x, weight.half()), "weight is torch.float16, x is torch.float32"),
        (lambda: functional.linear(x, weight, torch.zeros(8)), r"bias has shape \[8\]; expected \[out\] = \[5\]"),
        (lambda: functional.norm(x, torch.zeros(7)), r"\[7\]; expected \[8\]"),
        (lambda: functional.norm(x, torch.zeros(8).double()), "norm weight is torch.float64"),
        (lambda: functional.norm(x, None, kind="batchnorm"), "unknown norm 'batchnorm'; use one of rmsnorm, layernorm"),
        (lambda: functional.norm_qkv(x, weight, norm_weight=torch.zeros(8)), "need a norm"),
        (lambda: functional.norm_qkv(x, weight, norm="rmsnorm", backend="gpu"), "unknown backend 'gpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_alibi_slopes_are_the_published_ones() -> None:
    assert masks.alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    assert masks.alibi_slopes(6).tolist() == [2.0**-n for n in (2, 4, 6, 8, 1, 3)]
    assert masks.alibi_slopes(1).tolist() == [2.0**-8]


def test_tolerances_cover_every_dtype() -> None:
    assert TOLERANCE.keys() == set(ALL_DTYPES)
