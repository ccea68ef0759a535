"""linear_all_reduce: its kernels in Triton's interpreter (symmetric_ranks), and through gloo."""

import itertools

import pytest
import torch

from tests.tolerances import assert_close
from tp_attention import reference
from tp_attention.comm import Norm, linear_all_reduce

pytest.importorskip("triton", reason="triton is built for Linux alone")

from tests.multirank.symmetric_ranks import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    calls_of,
    draw,
    symmetric,
    words_of,
)
from tp_attention.comm.symmetric import overlap
from tp_attention.kernels.skinny_gemm import partial_sums

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in Triton's interpreter without a GPU")
NORMS = (None, ("rmsnorm", True, False), ("layernorm", True, True), ("rmsnorm", False, False))


def project_and_check(world, turn, rows, columns, depths, dtype, norm, *, biased, added, transposed=False, int8=False):
    """linear_all_reduce against fp64; what it returned. Leading dimensions where rows are even, bf16 exact."""
    rank, size, rows_shape = world.rank, world.size, (2, rows // 2) if rows % 2 == 0 else (rows,)
    xs = [draw(r, turn, (*rows_shape, depths[r]), dtype, 2) for r in range(size)]
    weights = [draw(r, turn + 500, (columns, depths[r]), dtype, 2) for r in range(size)]
    scales, scale = [1.0] * size, None
    if int8:  # groups of 8 columns
        weights = [weight.float().mul(10).round().clamp(-128, 127).to(torch.int8) for weight in weights]
        exact = [draw(r, turn, (columns, depths[r] // 8), FP32).abs() / 16 for r in range(size)]
        scale, scales = exact[rank], [each.double().repeat_interleave(8, 1) for each in exact]
    bias, residual = draw(8, turn, (columns,), dtype), draw(9, turn, (*rows_shape, columns), dtype)
    y = sum(x.double() @ (w.double() * s).T for x, w, s in zip(xs, weights, scales, strict=True))
    y = y + bias.double() if biased else y
    y = y + residual.double() if added else y
    weight = weights[rank].T.contiguous() if transposed else weights[rank]
    made = None
    if norm is not None:
        kind, weighted, shifted = norm
        made = Norm(kind, bias if weighted else None, residual.view(-1, columns)[0] if shifted else None, 1e-3)
    got = linear_all_reduce(
        xs[rank], weight, world.tp, bias if biased else None, residual if added else None, made,
        weight_scale=scale, transposed=transposed,
    )  # fmt: skip
    assert torch.equal(residual, draw(9, turn, (*rows_shape, columns), dtype)), "the residual was overwritten"
    if made is None:
        assert_close(got, y)
        return [got]
    assert_close(got[1], y)
    assert_close(got[0], reference.norm(got[1], made.weight, made.bias, made.kind, made.eps))
    return list(got)


def all_equal(results):
    first, *others = results
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def project_few(world):
    """At most 64 tokens: one launch after the product; ranks hold different numbers of columns of x, one none."""
    results, launches, depths = [], 0, [140, 0, 17][: world.size]
    parts, out = partial_sums(torch.ones(1, 140), torch.ones(36, 140))
    assert parts.shape[1:] == out.shape and len(parts) > 1, "K is not split, so partial sums are not summed here"
    with symmetric(world.tp, 1 << 16) as sums:
        cases = [*itertools.product((5,), (False, True), (False, True), NORMS)]
        cases += [(1, True, False, NORMS[2]), (1, False, True, None), (64, True, True, NORMS[1])]
        for turn, (rows, biased, added, norm) in enumerate(cases):
            dtype = (FP32, FP16)[turn // 2 % 2]
            results += project_and_check(
                world, turn, rows, 36, depths, dtype, norm, biased=biased, added=added, transposed=bool(turn % 2)
            )
            launches += 1
        for norm in NORMS[:2]:
            results += project_and_check(world, 70, 3, 36, [48, 0, 40], BF16, norm, biased=True, added=False)
            results += project_and_check(
                world, 71, 3, 36, [48, 0, 40], FP16, norm, biased=True, added=True, int8=True
            )  # fmt: skip
            launches += 2
        assert calls_of(sums.inboxes) == launches
        # an odd number of halves: a projection and an all_reduce; two shots: the norm by itself
        results += project_and_check(world, 72, 3, 35, depths, FP16, NORMS[1], biased=True, added=True)
        sums.way = "two_shot"
        for turn, norm in enumerate(NORMS):
            results += project_and_check(world, 73 + turn, 3, 36, depths, FP16, norm, biased=True, added=turn < 2)
        assert calls_of(sums.inboxes) == launches + 1 + len(NORMS)
        sums.way = "auto"
        wide = torch.zeros(2, 3, 80)[:, :, :40].normal_()  # rows with gaps, and views that begin between two words
        x, odd = torch.ones(2, 3, 8, dtype=FP16), torch.ones(41, dtype=FP16)[1:]
        plain = linear_all_reduce(x, torch.ones(40, 8, dtype=FP16), world.tp)
        full, y = linear_all_reduce(
            x, torch.ones(40, 8, dtype=FP16), world.tp, odd, wide.half(), Norm("rmsnorm", odd, odd)
        )
        assert torch.equal(plain, torch.full_like(plain, 8 * world.size))
        assert torch.equal(y, (plain.float() + 1 + wide.half().float()).half())
        assert_close(full, reference.norm(y, odd, odd))
        with pytest.raises(RuntimeError, match="requires grad"):
            linear_all_reduce(x.requires_grad_(), torch.ones(40, 8, dtype=FP16), world.tp)
    return results


@pytest.mark.parametrize("n", [2, 3])
def test_linear_all_reduce_of_few_tokens(world, n):
    assert all_equal(world(n)(project_few))


def project_many(world):
    """Rows that each rank sums for all, in chunks, with a stage that holds all of them and one that does not."""
    results, hidden, overlapped = [], [], overlap.Overlap.project

    def project(*args):
        hidden.append(args)
        overlapped(*args)

    with pytest.MonkeyPatch.context() as patch, symmetric(world.tp, 1 << 13, 1 << 14) as sums:
        patch.setattr(overlap.Overlap, "project", project)
        patch.setattr(overlap, "OVERLAP_BYTES", 0)
        patch.setattr(overlap, "TILE", (16, 16))  # waves of 16 rows
        overlap.chunk_ends.cache_clear()  # other tiles, other chunks
        cases = [*itertools.product((False, True), (False, True)), (True, True), (False, True)]
        for turn, (biased, added) in enumerate(cases):
            dtype, norm = (FP32, FP16, BF16)[turn % 3], NORMS[1] if turn == 3 else None
            rows, columns = (300, 65, 129)[turn % 3], words_of(40, dtype) - (2 if turn == 2 else 0)
            depths = ([40, 24, 8], [0, 40, 8], [40, 24, 0], [33, 0, 9], [24, 17, 3], [8, 8, 8])[turn]
            results += project_and_check(
                world, turn, rows, columns, depths, dtype, norm, biased=biased, added=added, transposed=turn % 2 == 1
            )
            assert len(hidden) == turn + 1, "the sum was not hidden behind the product"
        results += project_and_check(world, 9, 129, 80, [24, 8, 0], FP16, None, biased=True, added=True, int8=True)
        count = len(hidden)

        # One launch after the product: where one shot is wanted, or there are too few rows.
        sums.way, before = "one_shot", calls_of(sums.inboxes)
        cases = [(False, False, None), (True, False, None), (True, True, NORMS[1]), (False, True, NORMS[2])]
        for turn, (biased, added, norm) in enumerate(cases):
            kinds = dict(biased=biased, added=added, transposed=turn % 2 == 1)
            results += project_and_check(world, 20 + turn, 66, 4, [8, 4, 0], (FP32, FP16)[turn % 2], norm, **kinds)
        assert calls_of(sums.inboxes) - before == turn + 1
        patch.setattr(overlap, "TILE", (1000, 16))
        sums.way, before = "auto", calls_of(sums.inboxes)
        results += project_and_check(world, 11, 70, 40, [8, 4, 3], FP32, None, biased=True, added=True)
        assert calls_of(sums.inboxes) > before
        sums.way = "two_shot"
        results += project_and_check(world, 10, 70, 40, [8, 4, 3], FP32, NORMS[1], biased=True, added=True)
        sums.way = "auto"  # an odd number of halves: a projection, an all_reduce and the rest
        odd = [project_and_check(world, 12, 70, 41, [8, 4, 3], FP16, None, biased=True, added=True)[0]]
        assert len(hidden) == count
    overlap.chunk_ends.cache_clear()
    return results + odd


@pytest.mark.parametrize("n", [2, 3])
def test_linear_all_reduce_of_many_tokens(world, n):
    assert all_equal(world(n)(project_many))


def project_plainly(world):
    results, depths = [], [9, 0, 14]
    cases = itertools.product((1, 6, 70), (False, True), (False, True), NORMS)
    for turn, (rows, biased, added, norm) in enumerate(cases):
        results += project_and_check(
            world, turn, rows, 36, depths, DTYPES[turn % 3], norm,
            biased=biased, added=added, transposed=turn // 3 % 2 == 1,
        )  # fmt: skip
    results += project_and_check(world, 90, 6, 36, [16, 0, 8], FP16, None, biased=True, added=True, int8=True)
    return results


@pytest.mark.parametrize("n", [1, 2, 3])
def test_linear_all_reduce_through_gloo(world, n):
    assert all_equal(world(n)(project_plainly))


def refuse_shapes(world):
    """On rank 0 alone where there are several: nothing may be sent, or the others would hang."""
    x, weight, vector, wrong = torch.ones(2, 8), torch.ones(6, 8), torch.ones(6), torch.ones(7)
    group, residual = world.tp, torch.ones(2, 6)
    if world.rank == 0:
        for arguments, reason in (
            ((x, weight.T), "do not fit"),
            ((x, weight.half()), "float16"),
            ((x, weight, group, wrong), r"bias has shape \[7\]; expected \[out\] = \[6\]"),
            ((x, weight, group, vector.half()), "bias is torch.float16"),
            ((x, weight, group, None, torch.ones(2, 8)), r"residual has shape \[2, 8\]; expected \[2, 6\]"),
            ((x, weight, group, None, torch.ones(6)), r"residual has shape \[6\]"),
            ((x, weight, group, None, residual.double()), "residual is torch.float64"),
            ((x, weight, group, None, residual.to("meta")), "residual is on meta"),
            ((x, weight, None), "a TPGroup, not a NoneType"),
            ((x, weight, group, None, None, "rmsnorm"), r"norm is a str; use comm\.Norm"),
            ((x, weight, group, None, None, Norm("batchnorm")), "unknown norm 'batchnorm'"),
            ((x, weight, group, None, None, Norm("rmsnorm", wrong)), r"norm weight has shape \[7\]"),
            ((x, weight, group, None, None, Norm("layernorm", vector, wrong)), r"norm bias has shape \[7\]"),
        ):
            x_given, weight_given, *rest = arguments
            with pytest.raises(ValueError, match=reason):
                linear_all_reduce(x_given, weight_given, *(rest or [group]))
        with pytest.raises(ValueError, match="weight_scale"):
            linear_all_reduce(x, weight.to(torch.int8), group)
    assert torch.equal(linear_all_reduce(x, weight, group, vector), torch.full((2, 6), 8.0 * world.size + 1))


@pytest.mark.parametrize("n", [1, 2])
def test_linear_all_reduce_refuses_wrong_shapes(world, n):
    world(n)(refuse_shapes)
