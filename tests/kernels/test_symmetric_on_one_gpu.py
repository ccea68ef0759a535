"""Sums over ranks that share one GPU, each on a stream of its own: kernels as compiled, where there are no two GPUs.

Nothing here is about links. Few programs and few ranks, for all must run at the same time. Of 8 ranks they do not, nor
does a projection of many tokens, whose copies wait for other ranks: those want a GPU each.
"""

import itertools

import pytest
import torch

from tests.tolerances import assert_close
from tp_attention import reference

pytest.importorskip("triton", reason="triton is built for Linux alone")

from tp_attention.comm import Norm
from tp_attention.comm.collectives import add_up
from tp_attention.comm.symmetric.inbox import Inboxes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the interpreter has no streams")
BF16, FP16, FP32 = DTYPES = torch.bfloat16, torch.float16, torch.float32


class Ranks:
    """`size` of them."""

    def __init__(self, size):
        self.memory = [torch.empty(1 << 22, dtype=torch.uint8, device="cuda") for _ in range(size)]
        self.inboxes = [Inboxes(rank, self.memory, patience=1) for rank in range(size)]
        self.streams = [torch.cuda.Stream() for _ in range(size)]

    def run(self, call, times=3):
        """The results of call(rank) of all ranks at once, as often."""
        self._prepare(-1)
        for rank in range(len(self.inboxes)):  # one by one: loading a kernel may wait for those that run
            call(rank)
        self._prepare((1 << 24) + 1)  # odd too: for a multiple of 16 Triton would compile another kernel
        results = []
        for _ in range(times):
            for rank, stream in enumerate(self.streams):
                with torch.cuda.stream(stream):
                    results.append(call(rank))
        torch.cuda.synchronize()
        assert not any(inboxes.failed() for inboxes in self.inboxes)
        assert all((memory == 255).all() for memory in self.memory), "words are left in an inbox"
        return results

    def _prepare(self, patience):
        torch.cuda.synchronize()
        for inboxes, memory in zip(self.inboxes, self.memory, strict=True):
            inboxes.patience = patience
            inboxes._state.zero_()
            memory.fill_(255)
        torch.cuda.synchronize()


def draw(seed, *shape, dtype):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


@pytest.mark.parametrize("size", [2, 3])
def test_sums(size):
    ranks = Ranks(size)
    for way, dtype, numel in itertools.product(("one_shot", "two_shot"), DTYPES, (2, 5002, 70_000)):
        parts = [draw(rank, numel, dtype=dtype) for rank in range(size)]

        def call(rank, way=way, parts=parts):
            out = torch.full_like(parts[rank], torch.nan)
            getattr(ranks.inboxes[rank], way)(parts[rank], out)
            return out

        expected = add_up(torch.stack(parts))
        assert all(torch.equal(got, expected) for got in ranks.run(call)), (way, dtype, numel)


@pytest.mark.parametrize("size", [2, 3])
def test_norms(size):
    ranks = Ranks(size)
    for turn, (rows, columns) in enumerate(itertools.product((1, 5), (768, 4096, 8192))):
        dtype, kind = DTYPES[turn % 3], ("rmsnorm", "layernorm")[turn % 2]
        parts = [draw(rank, rows, columns, dtype=dtype) for rank in range(size)]
        residual, weight = draw(8, rows, columns, dtype=dtype), draw(9, columns, dtype=dtype)
        y = (add_up(torch.stack(parts)).float() + residual.float()).to(dtype)

        norm = Norm(kind, weight, None, 1e-5)

        def call(rank, parts=parts, residual=residual, norm=norm):
            out, normed = (torch.full_like(parts[rank], torch.nan) for _ in range(2))
            ranks.inboxes[rank].one_shot(parts[rank], out, residual=residual, norm=norm, normed=normed)
            return out, normed

        results = ranks.run(call)
        assert all(torch.equal(out, y) and torch.equal(normed, results[0][1]) for out, normed in results)
        assert_close(results[0][1], reference.norm(y.double(), weight, None, kind, 1e-5))


@pytest.mark.parametrize("size", [2, 3])
def test_gather(size):
    ranks = Ranks(size)
    for rows, (chunk, stride), dtype in itertools.product((1, 40, 700), ((3, 7), (100, 100)), DTYPES):
        whole = draw(0, rows, 130, dtype=dtype)
        there = torch.arange(rows, device="cuda") % stride < chunk
        there &= torch.arange(rows, device="cuda") < (size - 1) * stride + chunk

        def call(rank, whole=whole, chunk=chunk, stride=stride):
            out, mine = torch.full_like(whole, torch.nan), slice(rank * stride, rank * stride + chunk)
            out[mine] = whole[mine]
            ranks.inboxes[rank].gather(out, chunk, stride)
            return out

        for out in ranks.run(call):
            assert torch.equal(out[there], whole[there]) and out[~there].isnan().all()
