"""What each rank of test_mpi.py runs: `mpirun -n 2 python -m mpi4py -m tests.multirank.mpi_ranks sums mesh`."""

import os
import signal
import sys
import time
from contextlib import nullcontext

import pytest
import torch

from tests.multirank import test_attention_layer as attention
from tests.multirank import test_collectives as collectives
from tests.tolerances import assert_close
from tp_attention.comm import CollectiveError, MPIGroup, TPGroup, all_gather, all_reduce, barrier, broadcast, mpi
from tp_attention.comm.collectives import ACCUMULATE
from tp_attention.launch import World

SHAPES = [*collectives.SHAPES, (262_147,)]  # past SCATTER_BYTES in every dtype, and no multiple of 2 or 4


def world_of(tp, dp=None):
    """A World as launch makes it, so that the tests of gloo's collectives serve here too."""
    return World(tp.rank, tp.size, 0, tp.device, "mpirun", tp, dp or TPGroup.alone())


def sums(group):
    for dtype in ACCUMULATE:
        for shape in SHAPES:
            parts = [collectives.make(rank, shape, dtype) for rank in range(group.size)]
            x = parts[group.rank].clone()
            total = all_reduce(x, group)
            assert torch.equal(total, collectives.sum_in_rank_order(parts)), (dtype, shape)
            assert torch.equal(x, parts[group.rank]), "x was overwritten"
            assert torch.equal(all_reduce(x, group), total), "a second run gave other bits"
    big = torch.full((3,), 3e38, dtype=torch.bfloat16) * (-1) ** group.rank
    assert torch.equal(all_reduce(big, group), torch.zeros(3, dtype=torch.bfloat16)) or group.size == 1
    collectives.reduce_into(world_of(group))


def moves(group):
    collectives.gather_everything(world_of(group))
    collectives.broadcast_everything(world_of(group))


def chunks(group):
    """Parts that are too large for one call; here a call takes 1000 bytes."""
    whole, mpi.CHUNK_BYTES = mpi.CHUNK_BYTES, 1000
    try:
        sums(group)
        for n in (999, 1000, 1001, 2000, 12_345):
            parts = [collectives.make(rank, (n,), torch.int32).to(torch.uint8) for rank in range(group.size)]
            assert torch.equal(all_gather(parts[group.rank], group), torch.cat(parts))
            assert torch.equal(broadcast(parts[group.rank].clone(), group, group.size - 1), parts[-1])
    finally:
        mpi.CHUNK_BYTES = whole


def memory(group):
    x = torch.zeros(5, dtype=torch.float16)
    view = group._memory(x, 2)
    assert view.address == x.data_ptr() + 2
    view[:2] = x.new_tensor([7]).view(torch.uint8).numpy().tobytes()
    assert x.tolist() == [0, 7, 0, 0, 0]


def mesh(group):
    tp = min(2, group.size)
    tp_group, dp_group = MPIGroup.mesh(tp)
    assert (tp_group.size, dp_group.size) == (tp, group.size // tp)
    assert group.rank == dp_group.rank * tp + tp_group.rank
    ranks = torch.tensor([group.rank])
    row, column = all_gather(ranks, tp_group), all_gather(ranks, dp_group)
    assert row.tolist() == [dp_group.rank * tp + i for i in range(tp)]
    assert column.tolist() == [tp_group.rank + i * tp for i in range(group.size // tp)]
    config = attention.CONFIGS["llama"]
    y = attention.run_mesh(world_of(tp_group, dp_group), config)
    weights = attention.make_weights(config, seed=dp_group.rank)
    assert_close(y, attention.expected(config, weights, attention.make_input(config)), config.dtype)
    dp_group.destroy()
    assert all_reduce(ranks, tp_group) == sum(row.tolist())  # the one does not need the other
    tp_group.destroy()
    tp_group.destroy()
    if tp > 1:
        with pytest.raises(RuntimeError, match=r"all_reduce on the destroyed group tp \["):
            all_reduce(ranks, tp_group)


def layer(group):
    for name in ("gpt-oss", "bloom"):
        config = attention.CONFIGS[name]
        weights, x = attention.make_weights(config), attention.make_input(config)
        whole, pieces, *_ = attention.run_layer(world_of(group), config)
        for y, mask in zip(whole, attention.masks(config), strict=True):
            assert_close(y, attention.expected(config, weights, x, mask), config.dtype)
            assert torch.equal(broadcast(y.clone(), group), y), "ranks differ"
        assert_close(pieces, attention.expected(config, weights, x), config.dtype)


def refusals(group):
    with pytest.raises(ValueError, match="tensor on meta, but group MPI world on cpu"):
        all_reduce(torch.zeros(2, device="meta"), group)
    legal = "1, 2, 4"[: 3 * group.size.bit_length() - 2]
    with pytest.raises(ValueError, match=f"tp=3 does not divide the world of {group.size} ranks; use tp = {legal}$"):
        MPIGroup.mesh(3)
    if group.size > 1:
        with pytest.raises(ValueError, match=r"the ranks want tp=\[1, 2"):
            MPIGroup.mesh(1 + (group.rank > 0))
    from mpi4py import MPI

    for bad in (None, MPI.COMM_NULL, "world"):
        with pytest.raises(ValueError, match="from_comm takes an mpi4py intracommunicator"):
            MPIGroup.from_comm(bad)


def errors(group):
    """A freed communicator, what MPI itself raises, a rank that is late, ranks that disagree; then others go on."""
    from mpi4py import MPI

    def made(name, **options):
        return MPIGroup.from_comm(MPI.COMM_WORLD.Dup(), name=name, **options)

    here = f"failed on rank {group.rank} of {group.size} of group"
    freed = made("freed")
    freed.process_group.Free()
    with pytest.raises(CollectiveError, match=rf"bfloat16 \[2, 3\] {here} freed: call 1, .*communicator was freed"):
        all_reduce(torch.zeros(2, 3, dtype=torch.bfloat16), freed)

    torn = made("torn", timeout=1)
    with pytest.raises(CollectiveError, match=f"{here} torn: ") if group.rank else nullcontext():
        broadcast(torch.ones(4 if group.rank else 1000), torn)

    late = made("late", owned=True, timeout=0.3)
    if group.rank == group.size - 1:
        barrier(group)  # where the others come once they gave up
        all_reduce(torch.ones(4), late)
    else:
        with pytest.raises(CollectiveError, match=rf"all_reduce of torch.float32 \[4\] {here} late: call 1, .*not all"):
            all_reduce(torch.ones(4), late)
        barrier(group)

    os.environ["TP_ATTENTION_CHECK"] = "1"
    with made("checked", owned=True) as checked:
        with pytest.raises(CollectiveError, match=rf"{here} checked: call 1, .*\[4\].*\[5\]"):
            all_reduce(torch.ones(4 + min(group.rank, 1)), checked)
        assert all_reduce(torch.ones(1), checked) == group.size
    del os.environ["TP_ATTENTION_CHECK"]

    barrier(group)
    with MPIGroup.world() as second:
        late.destroy()
        assert all_reduce(torch.ones(1), second) == group.size


def never(group):
    """The last rank never comes; the others must not wait for it at exit either."""
    if group.rank == group.size - 1:
        time.sleep(60)
    group.timeout = 0.5
    barrier(group)


def killed(group):
    if group.rank == group.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier(group)


def large(group):
    """Past what 32 bits count. 2 x 6.5 GB."""
    n = 2**28 + 3  # int64: 2^31 + 24 bytes
    mine = torch.arange(n) + group.rank
    out = torch.full((group.size, n), -1)
    with group.transfer("all_gather", mine):
        group._gather(out.view(-1), mine)
    for rank in range(group.size):
        assert torch.equal(out[rank].sub_(out[rank, 0].item()), mine - group.rank)
    broadcast(mine, group, 1)
    assert mine[0] == 1 and torch.equal(mine.sub_(1), out[0])


def main(names):
    assert "mpi4py.MPI" not in sys.modules, "importing the package initialised MPI"
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with MPIGroup.world(timeout=20) as group:
        for name in names:
            globals()[name](group)
            barrier(group)
    print(f"rank {group.rank} of {group.size} is done")


if __name__ == "__main__":
    main(sys.argv[1:])
