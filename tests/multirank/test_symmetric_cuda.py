"""Sums through symmetric memory on GPUs: graphs replayed thousands of times, groups side by side, faults.

torchrun --nproc-per-node=2 -m pytest tests/multirank/test_symmetric_cuda.py

Where there is one GPU alone, ranks share it, as many as ever: it runs now one, now the other, and waits take
milliseconds. So kernels and their order are tested there, but nothing about links.
"""

import hashlib
import itertools
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor

from tests.multirank.test_collectives import sum_in_rank_order
from tests.tolerances import assert_close
from tp_attention import launch, reference
from tp_attention.comm import Norm, TPGroup, all_reduce, linear_all_reduce
from tp_attention.comm.symmetric import agreement
from tp_attention.comm.symmetric.inbox import INBOX_BYTES, Inboxes
from tp_attention.comm.symmetric.overlap import STAGE_BYTES
from tp_attention.comm.symmetric.sums import SymmetricSums

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not GPUS, reason="needs a GPU, better two")
N = 2
MANY = [2, 3, 8] if GPUS == 1 else [n for n in (2, 3, 8) if n <= GPUS]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
REPLAYS = 10_000 if GPUS > 1 else 200
SIZES = (1, 7, 4096, 5001, 131072, 3 << 20)


def draw(rank, turn, size, dtype, device):
    generator = torch.Generator(device).manual_seed(1000 * turn + rank)
    return torch.randn(size, generator=generator, device=device).to(dtype)


@pytest.fixture
def on_gpus(world):
    """run(n, fn): fn(World) on n ranks, each with a GPU of its own or all with one."""

    def run(n, fn, timeout=100):
        return world(n, timeout=timeout)(*([fn] if n <= GPUS else [sharing_one_gpu, fn]))

    return run


def sharing_one_gpu(world, fn):
    """fn(what has the attributes of a World that these tests use); gloo moves what does not go through the memory."""
    device, process_group = torch.device("cuda", 0), world.tp.process_group
    mine = torch.full((INBOX_BYTES + STAGE_BYTES,), 255, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    handles = [None] * world.size
    dist.all_gather_object(handles, reduce_tensor(mine), group=process_group)
    memory = [mine if rank == world.rank else open_(*how) for rank, (open_, how) in enumerate(handles)]
    inboxes = Inboxes(world.rank, [each[:INBOX_BYTES] for each in memory], patience=1 << 28)
    group = TPGroup(world.rank, world.size, device, name="one GPU", backend="nccl", ordered=False)
    group.process_group = process_group
    group.symmetric = SymmetricSums(inboxes, [each[INBOX_BYTES:] for each in memory])
    try:
        return fn(SimpleNamespace(tp=group, rank=world.rank, size=world.size))
    finally:
        torch.cuda.synchronize()
        dist.barrier(process_group)  # nobody's memory goes before


def assert_same_bits(x, group):
    digests = [None] * group.size
    raw = x.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    dist.all_gather_object(digests, hashlib.sha256(raw).digest(), group=group.process_group)
    assert len(set(digests)) == 1, "ranks hold different bits"


def sums_everything(world):
    group = world.tp
    assert group.symmetric is not None
    for way in ("one_shot", "two_shot", "auto"):
        group.symmetric.way = way
        for turn, (dtype, size) in enumerate(
            itertools.product((torch.bfloat16, torch.float16, torch.float32), (*SIZES, 40_000_001))
        ):
            parts = [draw(rank, turn, size, dtype, group.device) for rank in range(group.size)]
            mine, expected = parts[group.rank], sum_in_rank_order(parts)
            out = torch.full_like(mine, torch.nan)
            assert all_reduce(mine, group, out=out) is out
            assert torch.equal(out, expected), (way, dtype, size)
            assert torch.equal(all_reduce(mine, group), expected)
            assert torch.equal(mine, parts[group.rank])
            assert torch.equal(all_reduce(mine, group, out=mine), expected)
    odd = draw(group.rank, 0, 1001, torch.float16, group.device)[1:]  # begins between two words
    assert torch.equal(all_reduce(odd, group), all_reduce(odd.clone(), group))
    strided = draw(group.rank, 1, 64 * 64, torch.bfloat16, group.device).view(64, 64).T
    assert torch.equal(all_reduce(strided, group), all_reduce(strided.contiguous(), group))


@pytest.mark.parametrize("n", MANY)
def test_sums(on_gpus, n):
    on_gpus(n, sums_everything)


def replayed(world):
    """Every replay's result, bit for bit, with a busy second stream and one rank that dawdles."""
    group, sizes = world.tp, SIZES[:5]
    device, dtype = group.device, torch.bfloat16
    inputs = [torch.empty(size, dtype=dtype, device=device) for size in sizes]
    outputs = [torch.empty_like(x) for x in inputs]
    ways = ["one_shot", "two_shot", "one_shot", "one_shot", "two_shot"]

    def step():
        for x, out, way in zip(inputs, outputs, ways, strict=True):
            group.symmetric.way = way
            all_reduce(x, group, out=out)

    side, busy = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        for x in inputs:
            x.zero_()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step()
    load = torch.randn(2048, 2048, dtype=dtype, device=device)
    count = 24  # draws that replays take turns with: making new ones takes longer than a replay
    draws = [
        [[draw(rank, turn, size, dtype, device) for rank in range(group.size)] for size in sizes]
        for turn in range(count)
    ]
    expected = [[sum_in_rank_order(parts) for parts in every] for every in draws]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for turn in range(REPLAYS):
        which = (turn * 7) % count
        for x, parts in zip(inputs, draws[which], strict=True):
            x.copy_(parts[group.rank])
        for out in outputs:
            out.fill_(torch.nan)
        graph.replay()
        for out, total in zip(outputs, expected[which], strict=True):
            wrong += (out != total).any()
        if turn % 16 == 0:
            with torch.cuda.stream(busy):
                load @ load
        if turn % 50 == group.rank:
            torch.cuda._sleep(int(torch.randint(1, 2_000_000, (), generator=torch.Generator().manual_seed(turn))))
        if turn % 1000 == 500 and group.rank == 1:
            time.sleep(0.05)
    torch.cuda.synchronize()
    assert wrong.item() == 0


@pytest.mark.timeout(240)
def test_ten_thousand_replays(on_gpus):
    on_gpus(N, replayed, timeout=120)


def interleaved(world):
    """Two Worlds' groups over the same GPUs, their calls in turns."""
    with launch.init(tp=world.tp.size) as other:
        for turn in range(200):
            size = SIZES[turn % len(SIZES)]
            for group in (world.tp, other.tp) if turn % 3 else (other.tp, world.tp):
                parts = [draw(rank, turn, size, torch.float16, group.device) for rank in range(group.size)]
                assert torch.equal(all_reduce(parts[group.rank], group), sum_in_rank_order(parts))
        assert other.tp.symmetric is not world.tp.symmetric


@two_gpus
def test_two_groups(world):
    world(N)(interleaved)


def streams(world):
    """Calls on several streams, the default one too, one after the other without the caller ordering them."""
    group, pool = world.tp, [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(2))]
    draws = [
        [draw(rank, turn, 70_000, torch.bfloat16, group.device) for rank in range(group.size)] for turn in range(60)
    ]
    torch.cuda.synchronize()
    results = []
    for turn, parts in enumerate(draws):
        with torch.cuda.stream(pool[turn % 3]):
            torch.cuda._sleep(200_000 * (turn % 2))
            results.append(all_reduce(parts[group.rank], group))
    torch.cuda.synchronize()
    assert all(torch.equal(got, sum_in_rank_order(parts)) for got, parts in zip(results, draws, strict=True))


def test_streams(on_gpus):
    on_gpus(N, streams)


def projects(world):
    group = world.tp
    device, size = group.device, group.size
    for dtype, hidden, rows in itertools.product(
        (torch.bfloat16, torch.float16), (4096, 1000), (1, 3, 16, 64, 65, 300, 2048, 8193, 9000)
    ):
        deep = 512 if hidden == 4096 else 129 + group.rank
        weights = [
            draw(rank, 1, hidden * d, dtype, device).view(hidden, d) / 16 for rank, d in depths(deep, size, group)
        ]
        xs = [draw(rank, 2, rows * d, dtype, device).view(rows, d) / 16 for rank, d in depths(deep, size, group)]
        bias, residual = draw(9, 3, hidden, dtype, device), draw(9, 4, rows * hidden, dtype, device).view(rows, hidden)
        gamma, x, weight = 1 + bias / 8, xs[group.rank], weights[group.rank]
        exact = sum(a.double() @ b.double().T for a, b in zip(xs, weights, strict=True))
        plain = linear_all_reduce(x, weight, group)
        assert_close(plain, exact)
        full = linear_all_reduce(x, weight, group, bias, residual)
        exact = exact + bias.double() + residual.double()
        assert_close(full, exact)
        normed, again = linear_all_reduce(x, weight, group, bias, residual, Norm("rmsnorm", gamma, eps=1e-5))
        assert torch.equal(again, full)
        assert_close(normed, exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gamma.double())
        assert_same_bits(full, group)


def depths(deep, size, group):
    return [(rank, deep if deep == 512 else 129 + rank) for rank in range(size)]


@pytest.mark.parametrize("n", MANY)
def test_linear_all_reduce(on_gpus, n):
    on_gpus(n, projects)


def norms(world):
    """Rows that one program makes and rows that a cluster shares, some programs of which may have nothing to do."""
    group = world.tp
    device, inboxes = group.device, group.symmetric.inboxes
    widths = (2, 768, 1026, 4096, 5120, 8192, 14336, 20000)
    for turn, (columns, rows) in enumerate(itertools.product(widths, (1, 3, 300))):
        kind = ("rmsnorm", "layernorm")[turn // 3 % 2]  # each kernel is compiled for a kind, a width and a dtype
        dtype = (torch.bfloat16, torch.float16, torch.float32)[turn // 6 % 3]
        if not inboxes.holds(columns, dtype.itemsize):
            continue
        parts = [draw(rank, turn, rows * columns, dtype, device).view(rows, columns) for rank in range(group.size)]
        residual, gamma = draw(9, turn, rows * columns, dtype, device).view(rows, columns), None
        y = (sum_in_rank_order(parts).float() + residual.float()).to(dtype)
        if rows == 3:  # neither stops a sum, nor reaches another row
            parts[0][1, columns // 2] = torch.nan
            parts[0][2, 0] = torch.inf
        if turn // 3 % 4 < 2:
            gamma = draw(10, turn, columns, dtype, device)
        x = parts[group.rank].clone()
        out, normed = x if turn % 2 else torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        inboxes.one_shot(x, out, residual=residual, norm=Norm(kind, gamma, eps=1e-5), normed=normed)
        whole = slice(None) if rows != 3 else slice(0, 1)
        assert torch.equal(out[whole], y[whole]), (columns, kind, rows)
        assert_close(normed[whole], reference.norm(y[whole].double(), gamma, None, kind, 1e-5))
        assert rows != 3 or (not normed[1].isfinite().any() and out[2, 1:].isfinite().all())
        assert_same_bits(normed[whole], group)


def norms_in_small_clusters(world):
    """As on a GPU of fewer SMs."""
    with mock.patch("tp_attention.comm.symmetric.inbox.ROOM", 1 << 20):
        norms(world)


@pytest.mark.parametrize("fn", [norms, norms_in_small_clusters])
@pytest.mark.parametrize("n", MANY)
def test_norms(on_gpus, n, fn):
    on_gpus(n, fn)


def captured_projection(world):
    """Few tokens, with a norm too, and many: in one graph, replayed, and called again and again."""
    group = world.tp
    device, dtype = group.device, torch.bfloat16
    weight = draw(group.rank, 1, 4096 * 512, dtype, device).view(4096, 512) / 16
    gamma = draw(9, 3, 4096, dtype, device)
    xs = [torch.empty(rows, 512, dtype=dtype, device=device) for rows in (4, 300, 4096)]
    residuals = [draw(9, 2, len(x) * 4096, dtype, device).view(len(x), 4096) for x in xs]

    def step():
        norm, made = Norm("layernorm", gamma, gamma), []
        for x, residual in zip(xs, residuals, strict=True):
            made += [*linear_all_reduce(x, weight, group, None, residual, norm), linear_all_reduce(x, weight, group)]
        return made

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for x in xs:
            x.zero_()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        results = step()
    for turn in range(200):
        for x in xs:
            x.copy_(draw(group.rank, turn, x.numel(), dtype, device).view_as(x))
        graph.replay()
        if turn % 20 == group.rank:
            torch.cuda._sleep(1_000_000)
        if turn % 10 == 0:
            assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True)), turn
            for normed, y in zip(results[::3], results[1::3], strict=True):
                assert_close(normed, reference.norm(y, gamma, gamma, "layernorm"))


def test_captured_projection(on_gpus):
    on_gpus(N, captured_projection)


def forced(world):
    return None if world.tp.symmetric is None else world.tp.symmetric.way


@two_gpus
@pytest.mark.parametrize(("way", "expected"), [("nccl", None), ("two_shot", "two_shot"), ("auto", "auto")])
def test_switch(world, monkeypatch, way, expected):
    monkeypatch.setenv(agreement.SWITCH, way)
    assert world(N)(forced) == [expected] * N


DIES = """
import os, sys, time, torch
from tp_attention import launch
from tp_attention.comm import all_reduce
with launch.init() as world:
    x = torch.ones(4096, device=world.device)
    all_reduce(x, world.tp)
    torch.cuda.synchronize()
    if world.rank == 1:
        os._exit(7)
    start = time.monotonic()
    all_reduce(x, world.tp)
    torch.cuda.synchronize()
    print("not reached", time.monotonic() - start)
"""


@two_gpus
@pytest.mark.skipif("RANK" in os.environ, reason="starts ranks of its own")
def test_a_dead_rank_ends_the_others(tmp_path):
    """The one that waits in a kernel is ended by the heartbeat within 10 s, and says why."""
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = [
        subprocess.Popen(
            [sys.executable, script], env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert ranks[1].wait(60) == 7
    died = time.monotonic()
    output, _ = ranks[0].communicate(timeout=30)
    assert ranks[0].returncode not in (0, None) and time.monotonic() - died < 10, output
    assert "rank 1" in output and "all_reduce" in output and "not reached" not in output, output
