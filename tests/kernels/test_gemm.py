"""The product of many rows, norms, q/k norm and RoPE against fp64."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tolerances import assert_close
from tp_attention import eager, reference

pytest.importorskip("triton", reason="triton is built for Linux alone")

from tp_attention.kernels.gemm import CONFIGS, Config, Others, gemm, tile_width
from tp_attention.kernels.norm import Config as NormConfig
from tp_attention.kernels.norm import norm
from tp_attention.kernels.rope import qk_norm_rope_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
PROPERTY = settings(
    max_examples=100 if DEVICE == "cuda" else 15,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # outputs may start as NaN for all examples at once
)
FEW = 16  # values, at least: of fewer the largest, which errors are a fraction of, may itself be near 0 by chance
# small tiles: a few hundred rows and columns then are several waves of several groups, of both widths
SMALL = Config(64, 64, 32, 64, 4, 2, group_m=2, store=32)


def small(dtype: torch.dtype, tma: bool, flatten: bool = False) -> Config:
    """What of it a dtype takes: fp32 has no tile loads, and without these there is no tail."""
    if dtype == torch.float32:
        return dataclasses.replace(SMALL, flatten=flatten, tail=0, block_k=16)
    return dataclasses.replace(SMALL, tma=tma, flatten=flatten, tail=SMALL.tail if tma else 0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@PROPERTY
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    depth=st.integers(1, 200),
    aligned=st.booleans(),
    tma=st.booleans(),
    transposed=st.booleans(),
    biased=st.booleans(),
    strided=st.booleans(),
    flatten=st.booleans(),
)
def test_product(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    depth: int,
    aligned: bool,
    tma: bool,
    transposed: bool,
    biased: bool,
    strided: bool,
    flatten: bool,
) -> None:
    assume(rows * columns >= FEW)
    if aligned:  # to what tile loads take
        columns, depth = -(-columns // 8) * 8, -(-depth // 8) * 8
    x, weight = randn(rows, depth, dtype=dtype), randn(columns, depth, dtype=dtype)
    bias = randn(columns, dtype=dtype) if biased else None
    expected = reference.linear(x, weight, bias)
    out = None
    if strided:  # views with gaps between their rows
        x = torch.nn.functional.pad(x, (0, 8))[:, :depth]
        wide = torch.full((rows, columns + 24), torch.nan, dtype=dtype, device=DEVICE)
        out = wide[:, 8 : 8 + columns]
    config = small(dtype, tma, flatten)
    y = gemm(x, weight.T.contiguous() if transposed else weight, bias, transposed=transposed, out=out, config=config)
    assert y.dtype == dtype
    assert_close(y, expected)
    if strided:
        assert y is out and wide[:, :8].isnan().all() and wide[:, 8 + columns :].isnan().all()


@PROPERTY
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 150),
    columns=st.integers(1, 150),
    ranks=st.integers(2, 8),
    rank=st.integers(0, 7),
    tma=st.booleans(),
    biased=st.booleans(),
    added=st.booleans(),
    in_place=st.booleans(),
    copied=st.booleans(),
)
def test_part_of_a_sum(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    ranks: int,
    rank: int,
    tma: bool,
    biased: bool,
    added: bool,
    in_place: bool,
    copied: bool,
) -> None:
    assume(rows * columns >= FEW)
    rank %= ranks
    x, weight = randn(rows, 40, dtype=dtype), randn(columns, 40, dtype=dtype)
    bias = randn(columns, dtype=dtype) if biased else None
    residual = randn(rows, columns, dtype=dtype) if added else None
    config = small(dtype, tma)
    theirs = randn(ranks - 1, rows + 3, columns, dtype=dtype)[:, :rows]  # with gaps between them
    everyone = [*theirs.clone().unbind(0)]
    everyone.insert(rank, gemm(x, weight, config=config))
    expected = functools.reduce(torch.add, [part.float() for part in everyone]).to(dtype).float()
    for each in (bias, residual):
        expected = expected if each is None else expected + each.float()
    out = theirs[0] if in_place else torch.full((rows, columns), torch.nan, dtype=dtype, device=DEVICE)
    copy = torch.full((rows, columns), torch.nan, dtype=dtype, device=DEVICE) if copied else None
    y = gemm(x, weight, bias, out=out, residual=residual, others=Others(rank, theirs, copy), config=config)
    assert y is out and (copy is None or torch.equal(copy, y))
    assert torch.equal(theirs[1:], torch.stack(everyone)[[r for r in range(ranks) if r != rank][1:]])
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter truncates where it should round
        exact = sum(part.double() for part in everyone)
        for each in (bias, residual):
            exact = exact if each is None else exact + each.double()
        assert_close(y, exact)
    else:
        assert torch.equal(y, expected.to(dtype))


def test_what_is_added_fits() -> None:
    x, weight, parts = randn(8, 16), randn(24, 16), randn(2, 8, 24)
    wrong: Any
    for wrong, message in (
        ({"residual": randn(8, 23)}, r"residual is \[8, 23\].*contiguous \[8, 24\]"),
        ({"residual": randn(24, 8).T}, r"residual is \[8, 24\] with strides \(1, 8\)"),
        ({"others": Others(0, randn(2, 7, 24))}, r"part is \[7, 24\]"),
        ({"others": Others(0, parts, randn(8, 1))}, r"copy is \[8, 1\]"),
        ({"others": Others(3, parts)}, "rank 3 is none of 3; use 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            gemm(x, weight, **wrong)


@pytest.mark.parametrize("tma", [False, True])
def test_no_rows(tma: bool) -> None:
    """Some rank's last chunk, where a sum's rows are shared out; a tile load of nothing cannot be described."""
    config = dataclasses.replace(SMALL, tma=tma, tail=0)
    x, weight, parts = randn(0, 64, dtype=HALVES[0]), randn(64, 64, dtype=HALVES[0]), randn(1, 0, 64, dtype=HALVES[0])
    out = parts[0]
    assert gemm(x, weight, out=out, others=Others(0, parts), config=config) is out


@PROPERTY
@given(
    dtype=st.sampled_from(HALVES),
    rows=st.integers(1, 150),
    columns=st.integers(1, 150),
    group=st.sampled_from((1, 6, 24, 40, 64, 80, 128)),
    groups=st.integers(1, 4),
    tma=st.booleans(),
    biased=st.booleans(),
)
def test_int8_weights(
    dtype: torch.dtype, rows: int, columns: int, group: int, groups: int, tma: bool, biased: bool
) -> None:
    assume(rows * columns >= FEW)
    x = randn(rows, group * groups, dtype=dtype)
    weight = torch.randint(-128, 128, (columns, group * groups), device=DEVICE, dtype=torch.int8)
    scale = torch.rand(columns, groups, device=DEVICE) / 100
    bias = randn(columns, dtype=dtype) if biased else None
    exact = weight.double() * scale.double().repeat_interleave(group, 1)
    y = gemm(x, weight, bias, weight_scale=scale, config=dataclasses.replace(SMALL, tail=0, tma=tma))
    assert_close(y, reference.linear(x, exact, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", (False, True), ids=("out-in", "in-out"))
def test_table(dtype: torch.dtype, transposed: bool) -> None:
    x, weight = randn(130, 96, dtype=dtype), randn(200, 96, dtype=dtype)
    stored = weight.T.contiguous() if transposed else weight
    expected = reference.linear(x, weight)
    assert_close(gemm(x, stored, transposed=transposed), expected)
    assert_close(gemm(x, stored.T, transposed=not transposed), expected)  # a view, read in its own order


@pytest.mark.parametrize(
    ("rows", "columns", "width"),
    ((512, 6144, 192), (512, 5120, 160), (4096, 6144, 256), (4096, 5120, 256), (16384, 6144, 256), (128, 6144, 64)),
)
def test_width_fills_the_gpu(rows: int, columns: int, width: int) -> None:
    assert tile_width(rows, columns, 90, "half", 132) == width


def test_table_is_complete() -> None:
    kinds = {key[1] for key in CONFIGS}
    for (_, kind, width), config in CONFIGS.items():
        assert width == config.block_n + config.tail
        assert kind != "int8" or not config.tail
    for architecture in (0, 80, 90):
        assert {kind for a, kind, _ in CONFIGS if a == architecture} == kinds


@PROPERTY
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 20),
    columns=st.integers(1, 700),
    kind=st.sampled_from(("rmsnorm", "layernorm")),
    weighted=st.booleans(),
    biased=st.booleans(),
    strided=st.booleans(),
    config=st.sampled_from((None, NormConfig(1, 64, 4), NormConfig(2, 256, 4))),
)
def test_norm(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    kind: str,
    weighted: bool,
    biased: bool,
    strided: bool,
    config: NormConfig | None,
) -> None:
    assume(rows * columns >= FEW)
    x = 3 * randn(rows, columns + 8 * strided, dtype=dtype)[:, :columns] + 1
    weight = randn(columns, dtype=dtype) if weighted else None
    bias = randn(columns, dtype=dtype) if biased else None
    y = norm(x, weight, bias, kind, 1e-3, config=config)
    assert y.dtype == dtype
    assert_close(y, reference.norm(x, weight, bias, kind, 1e-3))


@pytest.mark.parametrize("columns", (4096, 16384, 20000))
def test_wide_norm(columns: int) -> None:
    x, weight = randn(3, columns, dtype=torch.float16), randn(columns, dtype=torch.float16)
    for kind in ("rmsnorm", "layernorm"):
        assert_close(norm(x, weight, None, kind, 1e-5), reference.norm(x, weight, None, kind))


def test_rmsnorm_rounds_before_the_weight() -> None:
    x, weight = randn(8, 512, dtype=torch.float16), randn(512, dtype=torch.float16)
    same = norm(x, weight, None, "rmsnorm", 1e-5) == eager.norm(x, weight, None, "rmsnorm", 1e-5)
    assert same.double().mean() > 0.99  # sums in another order may turn a rounding over


@PROPERTY
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from((8, 20, 41, 64, 80, 128, 256)),
    qk_norm=st.sampled_from((None, "rmsnorm", "layernorm")),
    weighted=st.booleans(),
    pairs=st.sampled_from((0, 1, 3, 4, 10**9)),
    own_angles=st.booleans(),
    interleaved=st.booleans(),
)
def test_qk_norm_and_rope(
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    qk_norm: str | None,
    weighted: bool,
    pairs: int,
    own_angles: bool,
    interleaved: bool,
) -> None:
    pairs, count = min(pairs, head_dim // 2), heads + 2 * kv_heads
    wide = randn(batch * tokens, count * head_dim + 8, dtype=dtype)
    qkv = wide[:, :-8]  # strided rows
    before = wide.clone()
    q, k, v = before[:, :-8].reshape(batch, tokens, count, head_dim).split([heads, kv_heads, kv_heads], dim=2)
    q_weight = randn(head_dim, dtype=dtype) if weighted and qk_norm else None
    angles = 6 * torch.rand(batch if own_angles else 1, tokens, pairs, device=DEVICE)
    cos, sin = (angles.cos(), angles.sin()) if pairs else (None, None)
    if qk_norm:
        q, k = reference.norm(q, q_weight, None, qk_norm, 1e-4), reference.norm(k, None, None, qk_norm, 1e-4)
    if cos is not None:
        q, k = (reference.rope(part, cos, sin, interleaved) for part in (q, k))
    qk_norm_rope_(
        qkv, heads, kv_heads, head_dim, qk_norm=qk_norm, q_norm_weight=q_weight, eps=1e-4, cos=cos, sin=sin,
        interleaved=interleaved,
    )  # fmt: skip
    expected = torch.cat((q.double(), k.double(), v.double()), dim=2).flatten(2).flatten(0, 1)
    assert_close(qkv, expected)
    assert torch.equal(wide[:, -8:], before[:, -8:])
    assert torch.equal(qkv[:, (heads + kv_heads) * head_dim :], before[:, (heads + kv_heads) * head_dim : -8])


@pytest.mark.skipif(DEVICE == "cpu", reason="13 GB of GPU memory")
def test_more_than_two_to_the_31_elements() -> None:
    rows, depth = 2**19 + 5, 4100  # rows of x past 2^31 elements
    x, weight = torch.empty(rows, depth, dtype=torch.float16, device=DEVICE), randn(72, depth, dtype=torch.float16)
    x[-200:] = randn(200, depth, dtype=torch.float16)
    for config in (None, dataclasses.replace(CONFIGS[0, "half", 64], blocks=4)):
        y = gemm(x, weight, config=config)
        assert_close(y[-200:], reference.linear(x[-200:], weight))
    assert_close(norm(x, None, None, "rmsnorm", 1e-5)[-200:], reference.norm(x[-200:], None))
