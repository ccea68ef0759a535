"""Collectives at worlds of 1 to 4, against sums and joins computed here from every rank's input."""

import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tp_attention import launch
from tp_attention.comm import CollectiveError, TPGroup, all_gather, all_reduce, barrier, broadcast

WORLDS = [1, 2, 3, 4]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(1, 1, 577), (), (0,), (2, 0, 3), (3, 5, 7), (70_001,)]  # the last is summed in chunks


def make(rank, shape, dtype):
    generator = torch.Generator().manual_seed(1000 + rank)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


def sum_in_rank_order(parts):
    dtype = parts[0].dtype
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(dtype)


def check_sum(got, expected, group):
    if group.ordered:
        assert torch.equal(got.cpu(), expected)  # the same additions in the same order: the same bits
    else:
        torch.testing.assert_close(got.cpu(), expected)


def reduce_everything(world):
    group, results = world.tp, []
    for dtype in [*FLOATS, torch.int64]:
        for shape in SHAPES:
            parts = [make(rank, shape, dtype) for rank in range(group.size)]
            x = parts[group.rank].to(group.device)
            total = all_reduce(x, group)
            check_sum(total, sum_in_rank_order(parts), group)
            assert total.shape == x.shape and total.dtype == dtype
            assert torch.equal(x.cpu(), parts[group.rank]), "x was overwritten"
            assert torch.equal(all_reduce(x, group), total) or not group.ordered, "a second run gave other bits"
            results.append(total.cpu())
    return results


@pytest.mark.parametrize("n", WORLDS)
def test_all_reduce(world, n):
    first, *others = world(n)(reduce_everything)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), "ranks hold different bits"


def reduce_into(world):
    group = world.tp
    parts = [make(rank, (4, 6), torch.float32) for rank in range(group.size)]
    expected = sum_in_rank_order(parts)
    x = parts[group.rank].to(group.device)
    columns = x.t().contiguous().t()  # not contiguous
    check_sum(all_reduce(columns, group), expected, group)

    out = torch.full((6, 4), torch.nan, device=group.device).t()
    assert all_reduce(x, group, out=out) is out
    check_sum(out, expected, group)
    assert torch.equal(x.cpu(), parts[group.rank])

    alias = all_reduce(x, group)
    alias.add_(1)  # a new tensor at world 1 too
    assert torch.equal(x.cpu(), parts[group.rank])

    assert all_reduce(columns, group, out=columns) is columns
    check_sum(columns, expected, group)


@pytest.mark.parametrize("n", WORLDS)
def test_all_reduce_out_and_strides(world, n):
    world(n)(reduce_into)


def reduce_past_fp16(world):
    value = [60000.0, 60000.0, -80000.0 + 16416.0][world.rank]
    return all_reduce(torch.tensor([value], dtype=torch.float16, device=world.device), world.tp).item()


def test_fp16_partial_sums_may_pass_65504(world):
    run = world(3)
    if torch.cuda.device_count() >= 3:
        pytest.skip("NCCL sums fp16 in its own way")
    # 60000 + 60000 is inf in fp16; 120000 - 63584 is 56416, and fp16 has multiples of 32 there
    assert run(reduce_past_fp16) == [56416.0] * 3


def gather_everything(world):
    group = world.tp
    for dtype in [*FLOATS, torch.int64, torch.bool]:
        for sizes in ([3] * group.size, [(2 * r + 1) % 4 for r in range(group.size)], [0, 5, 0, 0][: group.size]):
            for dim in (0, 1, -1):
                shapes = [[2, 3, 5] for _ in sizes]
                for shape, size in zip(shapes, sizes, strict=True):
                    shape[dim] = size
                parts = [make(rank, shape, dtype) for rank, shape in enumerate(shapes)]
                x = parts[group.rank].to(group.device)
                for known in (None, sizes):
                    got = all_gather(x, group, dim=dim, sizes=known)
                    assert got.is_contiguous()
                    assert torch.equal(got.cpu(), torch.cat(parts, dim))
    large = make(group.rank, (300_000,), torch.float32).to(group.device)  # the ring
    assert torch.equal(all_gather(large, group).view(group.size, -1)[group.rank], large)
    transposed = all_gather(torch.full((3, 2), float(group.rank), device=group.device).t(), group, dim=0)
    assert transposed[:, 0].tolist() == [float(r) for r in range(group.size) for _ in range(2)]


@pytest.mark.parametrize("n", WORLDS)
def test_all_gather_even_and_uneven(world, n):
    world(n)(gather_everything)


def broadcast_everything(world):
    group = world.tp
    for dtype in [*FLOATS, torch.int64, torch.bool]:
        for shape in ((5, 3), (), (0, 2)):
            for src in range(group.size):
                x = make(group.rank, shape, dtype).to(group.device)
                assert broadcast(x, group, src) is x
                assert torch.equal(x.cpu(), make(src, shape, dtype))
    columns = make(group.rank, (5, 3), torch.float32).to(group.device).t()
    broadcast(columns, group)
    barrier(group)
    assert torch.equal(columns.cpu(), make(0, (5, 3), torch.float32).t())


@pytest.mark.parametrize("n", WORLDS)
def test_broadcast_and_barrier(world, n):
    world(n)(broadcast_everything)


def refuse(world):
    group = world.tp
    x = torch.ones(2, 3, device=group.device)
    elsewhere = torch.ones(2, 3, device="meta")
    for collective in (all_reduce, all_gather, broadcast):
        with pytest.raises(ValueError, match=f"meta.*{group.device}"):
            collective(elsewhere, group)
        with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
            collective(x.clone().requires_grad_(), group)
    with torch.no_grad():
        all_reduce(x.clone().requires_grad_(), group)
    with pytest.raises(ValueError, match=r"\[3, 2\].*\[2, 3\]"):
        all_reduce(x, group, out=x.t())
    with pytest.raises(ValueError, match="bool"):
        all_reduce(x.bool(), group)
    with pytest.raises(ValueError, match=r"sizes=\[1.*=3"):
        all_gather(x, group, sizes=[1] * group.size)
    with pytest.raises(ValueError, match=rf"{group.size} has"):
        all_gather(x, group, sizes=[3] * (group.size + 1))
    with pytest.raises(ValueError, match="reshape"):
        all_gather(x[0, 0], group)
    with pytest.raises(ValueError, match=f"src={group.size} .* 0 to {group.size - 1}"):
        broadcast(x, group, group.size)
    for collective in (all_reduce, all_gather, broadcast):
        for wrong in (None, world, group.process_group or 2):
            with pytest.raises(ValueError, match=rf"a TPGroup, not a {type(wrong).__name__}; pass world\.tp"):
                collective(x, wrong)
        with pytest.raises(ValueError, match=r"sparse_coo; use x\.to_dense"):
            collective(x.to_sparse(), group)
    with pytest.raises(ValueError, match="not a World"):
        barrier(world)
    barrier(group)  # nothing above left a transfer behind
    assert "destroyed" not in repr(group)
    group.destroy()
    if group.size > 1:
        assert repr(group).endswith("destroyed)")
        with pytest.raises(RuntimeError, match="destroyed"):
            all_reduce(x, group)


@pytest.mark.parametrize("n", [1, 2])
def test_wrong_calls_name_both_sides(world, n):
    world(n)(refuse)


def sum_over_mesh(world):
    rank = torch.tensor([float(world.rank)], device=world.device)
    totals = [(all_reduce(rank, world.tp).item(), all_reduce(rank, world.dp).item()) for _ in range(3)]
    assert len(set(totals)) == 1
    return world.dp.rank, world.tp.rank, *totals[0]


def test_dp_by_tp_mesh(world):
    assert world(4, tp=2)(sum_over_mesh) == [(0, 0, 1, 2), (0, 1, 1, 4), (1, 0, 5, 2), (1, 1, 5, 4)]
    assert world(4, tp=1)(sum_over_mesh) == [(r, 0, r, 6) for r in range(4)]


def sum_over_torch_groups(world):
    mesh = init_device_mesh(world.device.type, (world.size // 2, 2), mesh_dim_names=("dp", "tp"))
    rank = torch.tensor([float(world.rank)], device=world.device)
    with TPGroup.from_mesh(mesh, "tp") as tp, TPGroup.from_mesh(mesh, 0) as dp:
        sums = all_reduce(rank, tp).item(), all_reduce(rank, dp).item()
        ranks = tp.rank, tp.size, dp.rank, dp.size
    assert dist.get_world_size(mesh.get_group("tp")) == 2  # destroy left alone what the group did not make
    whole = TPGroup.from_process_group(dist.group.WORLD)
    assert (whole.rank, whole.size, whole.device) == (world.rank, world.size, world.device)
    with pytest.raises(ValueError, match="cannot serve meta"):
        TPGroup.from_process_group(dist.group.WORLD, "meta")
    return *ranks, *sums, all_reduce(rank, whole).item()


@pytest.mark.parametrize("n", [2, 4])
def test_groups_from_torch(world, n):
    expected = [
        (rank % 2, 2, rank // 2, n // 2, 4 * (rank // 2) + 1, rank if n == 2 else 2 * (rank % 2) + 2, n * (n - 1) / 2)
        for rank in range(n)
    ]
    assert world(n)(sum_over_torch_groups) == expected


def use_two_worlds(world, first):
    inner = launch.init(tp=1)
    other = launch.init(tp=world.size)
    one = torch.ones(1, device=world.device)
    sums = [all_reduce(one, group).item() for group in (world.tp, inner.tp, inner.dp, other.tp)]
    for closed in (inner, other) if first == "inner" else (other, inner):
        closed.close()
        closed.close()
    return [*sums, all_reduce(one, world.tp).item()]  # closing the others left this one alone


@pytest.mark.parametrize("first", ["inner", "other"])
def test_two_worlds_in_one_process(world, first):
    assert world(2)(use_two_worlds, first) == [[2, 1, 2, 2, 2]] * 2


def reduce_with_a_late_rank(world):
    with launch.init(timeout=1) as impatient:
        if world.rank:
            time.sleep(2)
            return "late"
        with pytest.raises(CollectiveError, match=r"torch.float32 \[1\] failed on rank 0 of 2 .*Timed out"):
            all_reduce(torch.ones(1), impatient.tp)


def test_time_limit_of_a_collective(world):
    run = world(2)
    if torch.cuda.device_count() >= 2:
        pytest.skip("NCCL's time limit ends the process")
    assert run(reduce_with_a_late_rank) == [None, "late"]


def reduce_with_a_missing_rank(world):
    if world.rank:
        return "left"
    try:
        return all_reduce(torch.ones(3, 5), world.tp)
    except CollectiveError as error:
        return str(error)


def test_a_rank_that_left_is_an_error_not_a_hang(world):
    run = world(2)
    if torch.cuda.device_count() >= 2:
        pytest.skip("nothing interrupts an NCCL kernel before its time limit")
    text, _ = run(reduce_with_a_missing_rank)
    assert text.startswith("all_reduce of torch.float32 [3, 5] failed on rank 0 of 2 of group tp [0, 1]: ")
