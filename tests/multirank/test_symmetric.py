"""Sums through symmetric memory in Triton's interpreter: ranks are processes, their memory a file (symmetric_ranks)."""

import itertools
import random
import time

import pytest
import torch

from tests.tolerances import assert_close
from tp_attention import reference
from tp_attention.comm import Norm, all_reduce

pytest.importorskip("triton", reason="triton is built for Linux alone")

from tests.multirank.symmetric_ranks import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    SMALL,
    WIDE,
    assert_empty,
    calls_of,
    draw,
    make_inboxes,
    symmetric,
    words_of,
)
from tests.multirank.test_collectives import sum_in_rank_order
from tp_attention.comm.symmetric.inbox import Inboxes, in_words
from tp_attention.comm.symmetric.sums import ONE_SHOT_BYTES, SymmetricSums

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in Triton's interpreter without a GPU")
WAYS = ("one_shot", "two_shot")


def check_one(inboxes, turn, way, numel, dtype, in_place=False):
    parts = [draw(rank, turn, (numel,), dtype) for rank in range(inboxes.size)]
    x = parts[inboxes.rank].clone()
    out = x if in_place else torch.full_like(x, torch.nan)
    getattr(inboxes, way)(x, out, config=(SMALL, WIDE)[turn % 2])
    assert torch.equal(out, sum_in_rank_order(parts)), (turn, way, numel, dtype, in_place)
    assert in_place or torch.equal(x, parts[inboxes.rank]), "x was overwritten"


def sum_everything(world, nbytes, counts, repeats):
    """Ways, sizes and dtypes in an order that is random and the same on every rank."""
    inboxes = make_inboxes(nbytes)
    cases = [*itertools.product(WAYS, counts, DTYPES)] * repeats
    random.Random(world.size).shuffle(cases)
    for turn, (way, count, dtype) in enumerate(cases):
        check_one(inboxes, turn, way, words_of(count, dtype), dtype, in_place=turn % 3 == 0)
    calls = calls_of(inboxes)
    assert calls > len(cases), "no tensor needed several pieces"
    assert_empty(inboxes)
    return calls


# 900 words are several pieces of every inbox here, 65 and 200 several programs of one
@pytest.mark.parametrize("n", [2, 3, 4])
def test_sums(world, n):
    assert len(set(world(n)(sum_everything, 4096, (1, 3, 65, 200, 900), 1))) == 1


def test_sums_of_eight(world):
    world(8)(sum_everything, 8192, (1, 600), 1)


def pass_specials(world):
    inboxes, rank, size = make_inboxes(4096), world.rank, world.size
    for dtype, way, lonely in itertools.product(DTYPES, WAYS, (-1, 1)):
        parts = [draw(r, 3, (words_of(5 * size * 64, dtype),), dtype) for r in range(size)]
        for r, part in enumerate(parts):
            raw = part.view(torch.int32)
            part[32:64], part[128:160], part[256:257] = -0.0, torch.inf, torch.inf * (-1) ** r
            if lonely in (-1, r):
                raw[::7] = -1  # looks EMPTY
                raw.view(torch.int16)[51] = -1  # half a word of bf16 or fp16 that does
        out = torch.zeros_like(parts[rank])
        getattr(inboxes, way)(parts[rank], out, config=SMALL)
        expected = sum_in_rank_order(parts)
        there = expected.isnan()
        assert torch.equal(out.isnan(), there) and there.sum() > 1
        assert torch.equal(out.signbit()[~there], expected.signbit()[~there])  # of zeros too
        assert torch.equal(out[~there], expected[~there])
        rows = torch.zeros(size, len(out), dtype=dtype)
        rows[rank] = parts[rank]
        inboxes.gather(rows, 1, 1)
        assert torch.equal(rows.isnan(), torch.stack(parts).isnan())
        assert torch.equal(rows.nan_to_num(5), torch.stack(parts).nan_to_num(5))
        assert_empty(inboxes)


@pytest.mark.parametrize("n", [2, 3])
def test_nan_that_looks_empty_negative_zero_and_inf(world, n):
    world(n)(pass_specials)


def add_and_norm(world):
    """Bit for bit but for norms, bf16 apart: the sum is rounded, then bias and residual are added in fp32."""
    inboxes, rank, size = make_inboxes(1024), world.rank, world.size
    wider, rows = make_inboxes(1024 * (size - 1)), 4
    norms = [None, *itertools.product(("rmsnorm", "layernorm"), (False, True), (False, True))]
    cases = itertools.product((False, True), (False, True), norms)
    for turn, (biased, added, kind) in enumerate(cases, 1):
        dtype, into = DTYPES[turn % 3], ("new", "x", "residual")[turn // 3 % 3]
        columns = words_of(40, dtype)
        parts = [draw(r, turn, (rows, columns), dtype) for r in range(size)]
        bias, residual = draw(8, turn, (columns,), dtype), draw(9, turn, (rows, columns), dtype)
        x = parts[rank].clone()
        expected = sum_in_rank_order(parts).float()
        expected = expected + bias.float() if biased else expected
        expected = expected + residual.float() if added else expected
        out = x if into == "x" else residual if into == "residual" and added else torch.full_like(x, torch.nan)
        norm, normed = None, None
        if kind is not None:
            weight = draw(10, turn, (columns,), dtype, 3) if kind[1] else None
            norm = Norm(kind[0], weight, draw(11, turn, (columns,), dtype, 3) if kind[2] else None, 1e-2)
            normed = torch.full_like(x, torch.nan)
        keywords = dict(bias=bias if biased else None, residual=residual if added else None, norm=norm, normed=normed)
        inboxes.one_shot(x, out, **keywords, config=SMALL)
        assert torch.equal(out, expected.to(dtype)), (turn, biased, added, kind)
        if kind is None:
            residual = draw(9, turn, (rows, columns), dtype)
            x = parts[rank].clone()
            out = x if into == "x" else residual if into == "residual" and added else torch.full_like(x, torch.nan)
            keywords = dict(bias=bias if biased else None, residual=residual if added else None)
            wider.two_shot(x, out, **keywords, config=SMALL)
            assert torch.equal(out, expected.to(dtype)), (turn, biased, added, "two shots")
        if norm is not None:
            assert_close(normed, reference.norm(out, norm.weight, norm.bias, norm.kind, norm.eps))
            if norm.kind == "rmsnorm" and norm.weight is not None and dtype == FP16:  # rounded before the weight too
                plain = reference.norm(out, None, None, "rmsnorm", norm.eps).to(dtype).float() * norm.weight.float()
                plain = plain if norm.bias is None else plain + norm.bias.float()
                assert (normed == plain.to(dtype)).float().mean() > 0.98  # sums in another order may turn a rounding
    assert_empty(inboxes)
    assert_empty(wider)
    assert calls_of(wider) == (8 if size == 2 else 4)  # of two, in pieces: the second does not begin with a row


@pytest.mark.parametrize("n", [2, 3])
def test_bias_residual_and_norm(world, n):
    world(n)(add_and_norm)


def add_partial_sums(world):
    """fp32 [splits, M, N] on some ranks, as many as rank and turn say, and plain tensors on others."""
    inboxes, rank, size = make_inboxes(4096), world.rank, world.size
    for turn, dtype in enumerate((FP32, FP16, BF16) * 2):
        shape = (3, words_of(33, dtype))
        wide = [
            draw(r, turn, ((r + turn) % 5, *shape), dtype, 5).float() * (1 if dtype == BF16 else 1.001)
            for r in range(size)
        ]
        parts = []
        for r, splits in enumerate(wide):
            total = draw(r, turn, shape, dtype) if not len(splits) else splits[0]
            for each in splits[1:]:
                total = total + each
            parts.append(total.to(dtype))
        x = wide[rank] if len(wide[rank]) else parts[rank]
        out = torch.full(shape, torch.nan, dtype=dtype)
        bias = draw(9, turn, shape[1:], dtype)
        norm, normed = (Norm("rmsnorm"), torch.full_like(out, torch.nan)) if turn >= 3 else (None, None)
        inboxes.one_shot(x, out, bias=bias, norm=norm, normed=normed, config=SMALL)
        assert torch.equal(out, (sum_in_rank_order(parts).float() + bias.float()).to(dtype))
        assert normed is None or assert_close(normed, reference.norm(out, None)) >= 0
    assert_empty(inboxes)
    with pytest.raises(ValueError, match=r"4000 bytes must .* room for 2048" if size == 2 else "must go at once"):
        inboxes.one_shot(torch.zeros(2, 1000), torch.zeros(1000))
    assert calls_of(inboxes) == 6


@pytest.mark.parametrize("n", [2, 3])
def test_partial_sums(world, n):
    world(n)(add_partial_sums)


def gather_rows(world):
    """In one piece and in several, of rows that do not share out; and nobody is through before every rank has begun."""
    inboxes, rank, size = make_inboxes(2048), world.rank, world.size
    every = ((rows, chunk) for rows in (1, 7, 40) for chunk in (1, 3, 13))
    for turn, ((rows, chunk), dtype) in enumerate(itertools.product(every, DTYPES)):
        stride, columns = chunk + turn % 3, words_of(21, dtype)
        whole = draw(9, turn, (rows, columns), dtype)
        out = torch.full_like(whole, torch.nan)
        mine = slice(rank * stride, rank * stride + chunk)
        out[mine] = whole[mine]
        begun, late = time.monotonic(), turn % size
        if rank == late and turn % 4 == 0:
            time.sleep(0.05)
            begun = time.monotonic()
        inboxes.gather(out, chunk, stride)
        ended, begins = time.monotonic(), [None] * size
        torch.distributed.all_gather_object(begins, begun)
        assert max(begins) <= ended, (turn, begins, ended)
        there = torch.zeros(rows, dtype=torch.bool)
        for r in range(size):
            there[r * stride : r * stride + chunk] = True
        assert torch.equal(out[there], whole[there]), (rows, chunk, dtype)
        assert out[~there].isnan().all()
    assert calls_of(inboxes) > turn + 1, "none needed several pieces"
    assert_empty(inboxes)


@pytest.mark.parametrize("n", [2, 3])
def test_gather(world, n):
    world(n)(gather_rows)


def come_late(world):
    inboxes = make_inboxes(2048)
    for late, way in itertools.product(range(world.size), WAYS):
        if world.rank == late:
            time.sleep(0.3)
        for turn in range(2):
            check_one(inboxes, turn, way, 300, FP32)
    assert_empty(inboxes)


def test_a_late_rank_changes_nothing(world):
    world(3)(come_late)


def wait_in_vain(world, way):
    inboxes = make_inboxes(4096, patience=-50)
    if world.rank != 1:
        x = torch.ones(200)
        getattr(inboxes, way)(x, torch.empty_like(x), config=SMALL)
    return inboxes.failed()


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_never_comes(world, way):
    assert world(3)(wait_in_vain, way) == [True, False, True]


def interleave(world):
    """Rows and columns of a mesh and, twice, all of it: every rank is in four sets of inboxes."""
    groups = [world.tp.process_group, world.dp.process_group, None, None]
    sets = [make_inboxes(4096, group) for group in groups]
    order = random.Random(5)
    for turn in range(24):
        which, way, count = order.randrange(4), order.choice(WAYS), order.choice((1, 65, 300))
        check_one(sets[which], turn, way, words_of(count, FP16), FP16)
    for group, inboxes in zip(groups, sets, strict=True):
        assert_empty(inboxes, group)


def test_overlapping_groups(world):
    world(4, tp=2)(interleave)


def fit_every_tensor(world):
    group, rank = world.tp, world.rank
    every = range(group.size)
    with symmetric(group) as sums:
        for turn, (numel, dtype) in enumerate(itertools.product((1, 3, 1001, 2500), DTYPES)):
            sums.way = ("auto", *WAYS)[turn % 3]
            parts = [draw(r, turn, (numel,), dtype) for r in every]
            x, expected = parts[rank].clone(), sum_in_rank_order(parts)
            total = all_reduce(x, group)
            assert torch.equal(total, expected) and total.dtype == dtype and torch.equal(x, parts[rank])
            out = torch.full_like(x, torch.nan)
            assert all_reduce(x, group, out=out) is out and torch.equal(out, expected)
            wide = torch.full((numel + 2,), torch.nan, dtype=dtype)  # out begins between two words of halves
            assert torch.equal(all_reduce(x, group, out=wide[1:-1]), expected)
            assert wide[[0, -1]].isnan().all() and torch.equal(wide[1:-1], expected)
            assert torch.equal(all_reduce(wide[1:-1].copy_(x), group), expected)  # as x does
            assert all_reduce(x, group, out=x) is x and torch.equal(x, expected)
        for dtype in DTYPES:
            parts = [draw(r, 50, (6, 7), dtype) for r in every]
            expected = sum_in_rank_order(parts)
            columns = parts[rank].T.contiguous().T
            assert not in_words(columns)
            assert torch.equal(all_reduce(columns, group), expected)
            out = torch.full((7, 6), torch.nan, dtype=dtype).T
            assert all_reduce(parts[rank], group, out=out) is out and torch.equal(out, expected)
            assert all_reduce(columns, group, out=columns) is columns and torch.equal(columns, expected)
        scalar = torch.tensor(rank + 1.0)
        assert all_reduce(scalar, group).item() == sum(r + 1 for r in every)
        assert all_reduce(torch.empty(0, 3), group).shape == (0, 3)
        calls = calls_of(sums.inboxes)
        for dtype in (torch.int64, torch.float64):  # gloo's
            assert all_reduce(scalar.to(dtype), group).item() == sum(r + 1 for r in every)
        assert calls_of(sums.inboxes) == calls


@pytest.mark.parametrize("n", [2, 3])
def test_all_reduce_fits_every_tensor(world, n):
    world(n)(fit_every_tensor)


def test_way_of_a_size():
    for size, most in ONE_SHOT_BYTES.items():
        inboxes = Inboxes(0, [torch.empty(4096, dtype=torch.uint8)] * size, patience=1)
        sums = SymmetricSums(inboxes, [])
        assert sums.way_of(0) == "one_shot" and sums.way_of(1 << 30) == ("one_shot" if size == 2 else "two_shot")
        assert most is None or (sums.way_of(most), sums.way_of(most + 1)) == WAYS
        for way in WAYS:
            assert {SymmetricSums(inboxes, [], way).way_of(nbytes) for nbytes in (1, 1 << 30)} == {way}
        assert [sums.takes(torch.empty(1, dtype=dtype)) for dtype in (*DTYPES, torch.int32)] == [True] * 3 + [False]
