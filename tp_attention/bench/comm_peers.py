"""Who is measured by bench/comm.py: ours, the backend's own all-reduce, and torch's two over symmetric memory.

Inputs are bf16, drawn from a seed for each rank, so that every rank knows all of them and the sum that is due.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tp_attention import comm, reference
from tp_attention.bench import timing
from tp_attention.bench.cases import sampled
from tp_attention.bench.results import OURS
from tp_attention.comm import TPGroup

DTYPE = torch.bfloat16
GEMM = "gemm alone"  # the projection by cuBLAS without any sum: what the sum comes on top of, and no peer
ONE_SHOT_MOST = 16 << 20  # bytes: torch's one shot is for small tensors
NORM_COLUMNS, NORM_MOST = (4096, 8192), 1 << 20  # of rows with residual and norm, and up to how many bytes
LINK_COPIES = 10


@dataclass(frozen=True)
class Contender:
    """calls: what is timed, each on a copy of its own. result: of one run on fresh inputs; expected: that in fp64.

    exact: what result must be bit for bit. peer: whether it counts for the best peer. note: how it works.
    """

    who: str
    calls: Sequence[timing.Call]
    result: Callable[[], Tensor] | None = None
    expected: Tensor | None = None
    exact: Tensor | None = None
    peer: bool = True
    note: str = ""


class Symmetric:
    """bf16 memory of every rank that all of them can reach, for torch's all-reduces. Every rank must make it at once.

    Raises RuntimeError where the GPUs cannot reach each other's memory.
    """

    def __init__(self, group: TPGroup, nbytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.group = group
        self._whole = symmetric_memory.empty(nbytes // DTYPE.itemsize, dtype=DTYPE, device=group.device)
        self._handle = symmetric_memory.rendezvous(self._whole, group.process_group.group_name)

    def part(self, *shape: int) -> Tensor:
        """The first values, as a tensor of this shape."""
        return self._whole[: torch.Size(shape).numel()].view(shape)

    def one_shot(self, x: Tensor) -> Tensor:
        return torch.ops.symm_mem.one_shot_all_reduce(x, "sum", self.group.process_group.group_name)

    def two_shot(self, x: Tensor) -> Tensor:
        return torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self.group.process_group.group_name)

    def bandwidth(self) -> float:
        """Bytes a second from rank 0 to rank 1 while the link has nothing else to do; the same number on every rank."""
        timing.meet(self.group)
        rate = timing.together(self.group, self._copies) if self.group.rank == 0 else timing.together(self.group, float)
        return timing.of_first(rate, self.group)

    def _copies(self) -> float:
        local, other = torch.zeros_like(self._whole), self._handle.get_buffer(1, self._whole.shape, DTYPE)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(LINK_COPIES + 1)]
        for _ in range(3):  # to warm up
            other.copy_(local)
        events[0].record()
        for event in events[1:]:
            other.copy_(local)
            event.record()
        torch.cuda.synchronize(self.group.device)
        times = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
        return local.nbytes / statistics.median(times) * 1e3


def draw(seed: int, rank: int, device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    """Rank `rank`'s input, the same on whichever rank draws it."""
    generator = torch.Generator(device).manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator, device=device, dtype=DTYPE).mul_(scale)


def all_reduce(nbytes: int, group: TPGroup, symmetric: Symmetric | None) -> list[Contender]:
    """Sums of a tensor of so many bytes, ours first."""
    numel, device, sums = nbytes // DTYPE.itemsize, group.device, group.symmetric
    x = draw(nbytes, group.rank, device, numel)
    wide, truth = torch.zeros(numel, device=device), torch.zeros(numel, device=device, dtype=torch.float64)
    for rank in range(group.size):
        part = draw(nbytes, rank, device, numel)
        wide += part
        truth += part
    rounded, out = wide.to(DTYPE), torch.empty_like(x)

    def ours() -> Tensor:
        return comm.all_reduce(x, group, out=out)

    def forced(way: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            assert sums is not None
            before, sums.way = sums.way, way
            try:
                return ours()
            finally:
                sums.way = before

        return call

    def backend() -> Tensor:
        dist.all_reduce(own, group=group.process_group)  # in place: values grow with each call, to infinity in the end
        return own

    chosen = sums.way_of(nbytes) if sums is not None else "ordered" if group.ordered else group.backend
    exact = rounded if sums is not None or group.ordered else None
    contenders = [Contender(OURS, [ours], _fresh(ours, out), truth, exact, False, chosen)]
    if sums is not None:
        for way in ("one_shot", "two_shot"):
            if way != chosen:
                call = forced(way)
                contenders.append(Contender(f"{OURS} {way}", [call], _fresh(call, out), truth, rounded, False))
        if nbytes <= NORM_MOST:
            contenders += [_with_norm(x, rounded, group, width) for width in NORM_COLUMNS if numel % width == 0]
    own = x.clone()
    contenders.append(Contender(group.backend, [backend], _fresh(backend, own, x), truth))
    if symmetric is not None:
        t = symmetric.part(numel)
        for way, call in (("one_shot", lambda: symmetric.one_shot(t)), ("two_shot", lambda: symmetric.two_shot(t))):
            if way == "two_shot" or nbytes <= ONE_SHOT_MOST:
                contenders.append(Contender(f"torch {way}", [call], _fresh(call, t, x), truth))
    return contenders


def _fresh(call: Callable[[], Tensor], target: Tensor, source: Tensor | None = None) -> Callable[[], Tensor]:
    """call() on a target that was set to source, or to NaNs, which it must overwrite."""

    def run() -> Tensor:
        target.fill_(torch.nan) if source is None else target.copy_(source)
        return call()

    return run


def _with_norm(x: Tensor, total: Tensor, group: TPGroup, columns: int) -> Contender:
    """The sum, + residual, and the RMSNorm of that, in one launch, for rows of so many columns. total: the sum."""
    assert group.symmetric is not None
    inboxes, rows, device = group.symmetric.inboxes, x.view(-1, columns), group.device
    residual = draw(1, group.size, device, *rows.shape)  # the same on every rank
    weight = 1 + draw(2, group.size, device, columns, scale=0.1)
    norm = comm.Norm("rmsnorm", weight)
    both = torch.empty((2, *rows.shape), dtype=x.dtype, device=device)
    y, normed = both.unbind(0)

    def call() -> Tensor:
        inboxes.one_shot(rows, y, residual=residual, norm=norm, normed=normed)
        return both

    expected = (total.view_as(rows).float() + residual.float()).to(x.dtype)
    after = reference.norm(expected, weight, None, norm.kind, norm.eps)
    truth = torch.stack((expected.double(), after.double()))
    return Contender(f"{OURS} + residual + RMSNorm {columns}", [call], _fresh(call, both), truth, None, False)


def projection(rows: int, width: int, group: TPGroup, symmetric: Symmetric | None) -> list[Contender]:
    """[rows, width / size] @ [width, width / size]ᵀ and its sum over the ranks, ours first.

    The calls go round copies of the weight, as layers do: it is never in the L2.
    """
    device, columns, seed = group.device, width // group.size, rows + width
    at = sampled(rows, device)  # of the rows, for fp64 takes too long for all of them

    def inputs(rank: int) -> tuple[Tensor, Tensor]:
        x = draw(2 * seed, rank, device, rows, columns)
        return x, draw(2 * seed + 1, rank, device, width, columns, scale=width**-0.5)

    truth = torch.zeros((len(at), width), dtype=torch.float64, device=device)
    for rank in range(group.size):
        part, matrix = inputs(rank)
        truth += part[at].double() @ matrix.double().T
    x, weight = inputs(group.rank)
    weights = [weight, *(weight.clone() for _ in range(timing.copies_needed(weight.nbytes, device) - 1))]
    y = torch.empty((rows, width), dtype=DTYPE, device=device)

    def ours(w: Tensor) -> Tensor:
        return comm.linear_all_reduce(x, w, group)

    def gemm(w: Tensor) -> Tensor:
        return torch.mm(x, w.t(), out=y)

    def backend(w: Tensor) -> Tensor:
        dist.all_reduce(gemm(w), group=group.process_group)
        return y

    def contender(who: str, call: Callable[[Tensor], Tensor], peer: bool = True) -> Contender:
        calls = [lambda w=w: call(w) for w in weights]  # type: ignore[misc]
        return Contender(who, calls, None if who == GEMM else lambda: call(weight)[at], truth, peer=peer)

    contenders = [contender(OURS, ours, False), contender(GEMM, gemm, False), contender(group.backend, backend)]
    if symmetric is not None:
        t = symmetric.part(rows, width)

        def one_shot(w: Tensor) -> Tensor:
            return symmetric.one_shot(torch.mm(x, w.t(), out=t))

        def two_shot(w: Tensor) -> Tensor:
            return symmetric.two_shot(torch.mm(x, w.t(), out=t))

        if t.nbytes <= ONE_SHOT_MOST:
            contenders.append(contender("torch one_shot", one_shot))
        contenders.append(contender("torch two_shot", two_shot))
    return contenders
