"""norm_qkv, linear and norm on the Triton path, and the kernel for few rows by itself, against fp64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tolerances import assert_close
from tp_attention import functional, reference

pytest.importorskip("triton", reason="triton is built for Linux alone")

from tp_attention.kernels import skinny_gemm as skinny
from tp_attention.kernels.skinny_gemm import Config, Heads, skinny_gemm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
PROPERTY = settings(
    max_examples=30 if DEVICE == "cuda" else 15,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # one fixture may serve all examples
)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def quantized(columns: int, depth: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 weight [columns, depth], its scales, and what they stand for in fp64."""
    weight = torch.randint(-128, 128, (columns, depth), device=DEVICE, dtype=torch.int8)
    scale = torch.rand(columns, depth // group, device=DEVICE) / 100
    return weight, scale, weight.double() * scale.double().repeat_interleave(group, 1)


def angles(batch: int, tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    turns = 6 * torch.rand(batch, tokens, pairs, device=DEVICE)
    return turns.cos(), turns.sin()


def expected_heads(qkv: Tensor, heads: int, kv_heads: int, eps: float, **follows: Any) -> Tensor:
    """reference: q/k norm and RoPE of qkv [B, T, rows], fp64."""
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=2)
    if follows.get("qk_norm"):
        q = reference.norm(q, follows.get("q_norm_weight"), None, follows["qk_norm"], eps)
        k = reference.norm(k, follows.get("k_norm_weight"), None, follows["qk_norm"], eps)
    if follows.get("rope"):
        q, k = (reference.rope(part, *follows["rope"], follows.get("interleaved", False)) for part in (q, k))
    return torch.cat((q, k, v), dim=2).flatten(2)


@PROPERTY
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 64),
    columns=st.integers(1, 200),
    depth=st.integers(1, 300),
    tma=st.booleans(),
    transposed=st.booleans(),
    biased=st.booleans(),
    norm=st.sampled_from((None, "weightless", "weighted")),
    data=st.data(),
)
def test_product_and_norm(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    depth: int,
    tma: bool,
    transposed: bool,
    biased: bool,
    norm: str | None,
    data: st.DataObject,
) -> None:
    if data.draw(st.booleans(), label="sizes that tile loads take"):
        columns, depth = -(-columns // 8) * 8, -(-depth // 8) * 8
    x, weight = randn(rows, depth, dtype=dtype), randn(columns, depth, dtype=dtype)
    bias = randn(columns, dtype=dtype) if biased else None
    norm_weight = randn(depth, dtype=dtype) if norm == "weighted" else None
    normed = x if norm is None else reference.norm(x, norm_weight, eps=1e-3)
    config = Config(64, 32, 4, 3, 2, tma=tma)
    y = skinny_gemm(
        x,
        weight.T.contiguous() if transposed else weight,
        bias,
        norm_weight=norm_weight,
        rms_eps=None if norm is None else 1e-3,
        transposed=transposed,
        config=config,
    )
    assert y.dtype == dtype
    assert_close(y, reference.linear(normed, weight, bias))


@PROPERTY
@given(
    dtype=st.sampled_from(HALVES),
    rows=st.integers(1, 64),
    columns=st.integers(1, 160),
    group=st.sampled_from((1, 6, 24, 40, 64, 80, 128, 200)),
    groups=st.integers(1, 4),
    tma=st.booleans(),
    norm=st.booleans(),
)
def test_int8_weights(
    dtype: torch.dtype, rows: int, columns: int, group: int, groups: int, tma: bool, norm: bool
) -> None:
    depth, rows = group * groups, max(rows, -(-16 // columns))  # a single product may cancel to near 0
    x, (weight, scale, exact) = randn(rows, depth, dtype=dtype), quantized(columns, depth, group)
    norm_weight = randn(depth, dtype=dtype) if norm else None
    config = Config(64, 64, 4, 3, 2, tma=tma)
    y = skinny_gemm(
        x, weight, weight_scale=scale, norm_weight=norm_weight, rms_eps=1e-5 if norm else None, config=config
    )
    assert_close(y, reference.linear(reference.norm(x, norm_weight) if norm else x, exact))


@PROPERTY
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from((8, 20, 40, 64)),
    norm=st.sampled_from((None, "rmsnorm", "layernorm")),
    return_normed=st.booleans(),
    qk_norm=st.sampled_from((None, "rmsnorm", "layernorm")),
    weighted=st.booleans(),
    pairs=st.sampled_from((0, 2, 3, 4)),
    one_angle=st.booleans(),
    interleaved=st.booleans(),
    backend=st.sampled_from(("triton", "torch")),
)
def test_norm_qkv(
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    norm: str | None,
    return_normed: bool,
    qk_norm: str | None,
    weighted: bool,
    pairs: int,
    one_angle: bool,
    interleaved: bool,
    backend: str,
) -> None:
    depth, rows = 72, (heads + 2 * kv_heads) * head_dim
    x, weight, bias = (
        randn(batch, tokens, depth, dtype=dtype),
        randn(rows, depth, dtype=dtype),
        randn(rows, dtype=dtype),
    )
    norms = {"norm_weight": randn(depth, dtype=dtype)} if norm else {}
    if norm == "layernorm":
        norms["norm_bias"] = randn(depth, dtype=dtype)
    follows: dict[str, Any] = {"qk_norm": qk_norm, "interleaved": interleaved}
    if qk_norm and weighted:
        follows |= {"q_norm_weight": randn(head_dim, dtype=dtype), "k_norm_weight": randn(head_dim, dtype=dtype)}
    if pairs:
        follows["rope"] = angles(1 if one_angle else batch, tokens, pairs)
    made = functional.norm_qkv(
        x,
        weight,
        bias,
        norm=norm,
        **norms,
        eps=1e-3,
        return_normed=return_normed,
        heads=heads,
        kv_heads=kv_heads,
        **follows,
        backend=backend,
    )
    qkv, also_normed = made if return_normed else (made, None)
    normed = x.double()
    if norm:
        normed = reference.norm(x, norms["norm_weight"], norms.get("norm_bias"), norm, 1e-3)
    assert_close(qkv, expected_heads(reference.linear(normed, weight, bias), heads, kv_heads, 1e-3, **follows))
    if also_normed is not None:
        assert_close(also_normed, normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (40, 70))
def test_both_sides_of_64_rows(dtype: torch.dtype, tokens: int) -> None:
    x, weight, norm_weight = randn(1, tokens, 80, dtype=dtype), randn(96, 80, dtype=dtype), randn(80, dtype=dtype)
    follows = {"qk_norm": "rmsnorm", "rope": angles(1, tokens, 8)}
    qkv = functional.norm_qkv(
        x, weight, norm="rmsnorm", norm_weight=norm_weight, heads=4, kv_heads=1, **follows, backend="triton"
    )
    product = reference.linear(reference.norm(x, norm_weight), weight)
    assert_close(qkv, expected_heads(product, 4, 1, 1e-5, **follows))
    assert_close(
        functional.linear(x, weight.T.contiguous(), transposed=True, backend="triton"), reference.linear(x, weight)
    )


@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_norm_qkv_of_any_leading_dimensions(backend: str) -> None:
    x, weight = randn(2, 3, 2, 40), randn(64, 40)
    follows = {"qk_norm": "rmsnorm", "q_norm_weight": randn(16), "k_norm_weight": randn(16)}
    expected = expected_heads(reference.linear(x, weight).flatten(0, 1), 2, 1, 1e-5, **follows)
    for shape in ((12,), (2, 6), (2, 3, 2)):
        qkv = functional.norm_qkv(x.view(*shape, 40), weight, heads=2, kv_heads=1, **follows, backend=backend)
        assert_close(qkv, expected.view(*shape, 64))


@pytest.mark.parametrize("rows", (12, 70))
def test_vectors_that_are_not_contiguous(rows: int) -> None:
    x, weight = randn(rows, 40), randn(64, 40)
    bias, norm_weight, norm_bias = randn(64, 2)[:, 0], randn(40, 3)[:, 1], randn(1).expand(40)
    follows = {"qk_norm": "rmsnorm", "q_norm_weight": randn(16, 2)[:, 1], "k_norm_weight": randn(1).expand(16)}
    for norm in (None, "rmsnorm", "layernorm"):
        keywords: dict[str, Any] = {}
        normed = x.double()
        if norm:
            added = norm_bias if norm == "layernorm" else None
            keywords = {"norm": norm, "norm_weight": norm_weight, "norm_bias": added}
            normed = reference.norm(x, norm_weight, added, norm)
        qkv = functional.norm_qkv(x, weight, bias, **keywords, heads=2, kv_heads=1, **follows, backend="triton")
        expected = expected_heads(reference.linear(normed, weight, bias)[None], 2, 1, 1e-5, **follows)
        assert_close(qkv, expected[0])
    assert_close(functional.linear(x, weight, bias, backend="triton"), reference.linear(x, weight, bias))


@pytest.mark.parametrize("kind", ("rmsnorm", "layernorm"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype, kind: str) -> None:
    x, weight, bias = randn(2, 3, 100, dtype=dtype), randn(100, dtype=dtype), randn(100, dtype=dtype)
    y = functional.norm(x, weight, bias, kind, 1e-3, backend="triton")
    assert_close(y, reference.norm(x, weight, bias, kind, 1e-3))


@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_linear_writes_into_a_buffer(backend: str) -> None:
    x, weight, bias = randn(2, 3, 40), randn(24, 40), randn(24)
    buffer = torch.full((4, 3, 24), torch.nan, device=DEVICE)
    y = functional.linear(x, weight, bias, out=buffer[1:3], backend=backend)
    assert y.data_ptr() == buffer[1].data_ptr()
    assert_close(buffer[1:3], reference.linear(x, weight, bias))
    assert buffer[::3].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_linear_with_int8_weights(dtype: torch.dtype, backend: str) -> None:
    x, (weight, scale, exact) = randn(2, 3, 120, dtype=dtype), quantized(50, 120, 40)
    assert_close(functional.linear(x, weight, weight_scale=scale, backend=backend), reference.linear(x, exact))


def test_int8_weights_with_fp32_activations_take_the_torch_path() -> None:
    x, (weight, scale, exact) = randn(2, 64), quantized(8, 64, 16)
    assert_close(functional.linear(x, weight, weight_scale=scale), reference.linear(x, exact))
    with pytest.raises(RuntimeError, match="int8 weights need float16 or bfloat16 activations"):
        functional.linear(x, weight, weight_scale=scale, backend="triton")


@pytest.mark.parametrize("tma", (False, True))
def test_views(tma: bool) -> None:
    """Rows of x and of the weight further apart than they are long, weights that are columns or start anywhere."""
    config = Config(64, 32, 4, 3, 2, tma=tma)
    big = randn(100, 200)
    x, sliced = big[:9, 3:67], big[:, 8:72]
    assert_close(skinny_gemm(x, sliced, config=config), reference.linear(x, sliced))
    assert_close(skinny_gemm(x, big[:, 1:65], config=config), reference.linear(x, big[:, 1:65]))
    columns = big[:64].T  # [200, 64]
    assert_close(skinny_gemm(x, columns, config=config), reference.linear(x, columns))
    assert_close(skinny_gemm(big[:64, :9].T, sliced, config=config), reference.linear(big[:64, :9].T, sliced))


@pytest.mark.parametrize("tma", (False, True))
def test_rows_more_than_2_to_the_31_elements_apart(tma: bool) -> None:
    depth, apart = 64, 2**31
    base = torch.empty(apart + depth, dtype=torch.int8, device=DEVICE)  # on a CPU hardly any of it becomes memory
    weight = base.as_strided((2, depth), (apart, 1))
    weight.copy_(torch.randint(-128, 128, (2, depth)))
    x, scale = randn(3, depth, dtype=torch.float16), torch.ones(2, 1, device=DEVICE)
    y = skinny_gemm(x, weight, weight_scale=scale, config=Config(64, 64, 4, 3, 2, tma=tma))
    assert_close(y, reference.linear(x, weight))


def test_no_rows_and_no_columns() -> None:
    weight = randn(5, 8)
    assert functional.linear(randn(2, 0, 8), weight, backend="triton").shape == (2, 0, 5)
    assert functional.norm_qkv(randn(2, 3, 8), weight[:0], backend="triton").shape == (2, 3, 0)


def test_large_fp16_rows_do_not_overflow() -> None:
    x, weight = 100 * randn(4, 64, dtype=torch.float16), randn(16, 64, dtype=torch.float16)
    norm_weight = torch.full((64,), 1000.0, device=DEVICE, dtype=torch.float16)
    keywords = {"norm": "rmsnorm", "norm_weight": norm_weight}
    y = functional.norm_qkv(x[None], weight, **keywords, backend="triton")
    assert_close(y[0], reference.linear(reference.norm(x, norm_weight), weight))


@given(st.integers(1, 3000), st.integers(1, 600), st.integers(1, 500))
def test_every_split_has_steps(tiles: int, steps: int, slots: int) -> None:
    splits, each = skinny.splits_of(tiles, steps, slots)
    assert (splits - 1) * each < steps <= splits * each
    assert splits == 1 or tiles * splits <= slots


def test_every_architecture_has_every_entry() -> None:
    assert {key[1:] for key in skinny.CONFIGS} == {
        (m, kind) for m in (16, 32, 64) for kind in ("half", "int8", "float32")
    }
    assert len(skinny.CONFIGS) == 27


def test_refusals() -> None:
    x, weight = randn(2, 3, 8), randn(24, 8)
    int8, scale, cos = weight.to(torch.int8), randn(24, 2), randn(1, 3, 2)
    heads = {"heads": 4, "kv_heads": 1}
    for call, message in (
        (lambda: functional.linear(x, weight, transposed=True), r"x \[2, 3, 8\] and weight \[24, 8\].*\[in, out\]"),
        (lambda: functional.linear(x, weight.T, randn(8), transposed=True), r"bias has shape \[8\].*\[24\]"),
        (lambda: functional.linear(x, weight, out=x), r"out is \[2, 3, 8\].*\[2, 3, 24\]"),
        (lambda: functional.linear(x, weight, out=randn(2, 24, 3).mT), r"strides \[72, 1, 3\]"),
        (lambda: functional.linear(x, weight, out=randn(2, 3, 24).half()), "out is torch.float16"),
        (lambda: functional.linear(x, int8), "weight_scale None; an int8 weight needs"),
        (lambda: functional.linear(x, weight, weight_scale=scale), "weight is torch.float32"),
        (lambda: functional.linear(x, int8.T, weight_scale=scale, transposed=True), "must be"),
        (lambda: functional.linear(x, int8, weight_scale=randn(24, 3)), r"weight_scale \[24, 3\].*divides 8"),
        (lambda: functional.linear(x, int8, weight_scale=scale.half()), "weight_scale is torch.float16"),
        (lambda: functional.norm_qkv(x, weight, qk_norm="rmsnorm"), "heads=None"),
        (lambda: functional.norm_qkv(x, weight, qk_norm="l2", **heads), "unknown qk_norm 'l2'"),
        (lambda: functional.norm_qkv(x, weight, rope=(cos, cos), heads=4, kv_heads=3), r"24 rows.*4 \+ 2·3"),
        (lambda: functional.norm_qkv(x, weight, q_norm_weight=randn(4), **heads), "need qk_norm"),
        (lambda: functional.norm_qkv(x, weight, qk_norm="rmsnorm", q_norm_weight=x[0, 0], **heads), r"\[8\].*\[4\]"),
        (lambda: functional.norm_qkv(x, weight, rope=(cos, cos[:, :2]), **heads), r"\[1, 3, 2\] and sin \[1, 2, 2\]"),
        (
            lambda: functional.norm_qkv(x, weight, rope=(randn(1, 3, 3),) * 2, **heads),
            "turns 6 elements of a head of 4",
        ),
        (lambda: functional.norm_qkv(x, weight, rope=(cos.half(),) * 2, **heads), "cos is torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="weight requires grad"):
        functional.linear(x, weight.requires_grad_(), backend="triton")


def test_the_table_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        skinny.CONFIGS[0, 16, "half"].block_n = 1  # type: ignore[misc]


def test_heads_of_any_size() -> None:
    """A head dim that is no power of two, more heads than one program takes, all of a head turned."""
    x, weight = randn(3, 32), randn(60 * 24, 32)
    cos, sin = angles(1, 3, 12)
    y = skinny_gemm(x, weight, heads=Heads(40, 10, 24, cos=cos[0], sin=sin[0]))
    product = reference.linear(x, weight)[None]
    assert_close(y, expected_heads(product, 40, 10, 1e-5, rope=(cos, sin))[0])
