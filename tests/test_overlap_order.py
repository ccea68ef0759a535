"""Whether what Overlap.project reads is never written at the same time, however the ranks' streams run.

Every rank's calls are recorded rather than run: what each reads and writes, and what it comes after, on its stream, by
an event or by the ranks meeting. Two accesses to one place, one of them a write, must be in one order or the other.
"""

from __future__ import annotations

import itertools
import random
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is built for Linux alone")

from tp_attention.comm.symmetric import overlap
from tp_attention.comm.symmetric.overlap import Overlap

MAIN, SIDE = "main", "side"


class Record:
    """steps: (what, the steps it comes after). accesses: by address, the steps that do it and whether they write."""

    def __init__(self):
        self.steps, self.accesses = [], {}

    def add(self, name, after, reads=(), writes=()):
        self.steps.append((name, set(after)))
        step = len(self.steps) - 1
        for tensors, written in ((reads, False), (writes, True)):
            for address in {address for tensor in tensors for address in addresses(tensor)}:
                self.accesses.setdefault(address, []).append((step, written))
        return step

    def races(self):
        before = [0] * len(self.steps)  # bit i: step i comes before this one
        waiting = dict(enumerate(after for _, after in self.steps))
        while waiting:
            ready = [step for step, after in waiting.items() if not after & waiting.keys()]
            assert ready, "steps wait for each other in a circle"
            for step in ready:
                for earlier in waiting.pop(step):
                    before[step] |= before[earlier] | 1 << earlier
        pairs = {
            (a, b)
            for every in self.accesses.values()
            for (a, a_writes), (b, b_writes) in itertools.combinations(every, 2)
            if (a_writes or b_writes) and a != b
        }
        return {
            (self.steps[a][0], self.steps[b][0]) for a, b in pairs if not (before[b] >> a & 1 or before[a] >> b & 1)
        }


def addresses(tensor):
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + torch.arange(size) * stride).flatten()
    return (tensor.data_ptr() + offsets * tensor.element_size()).tolist()


class Rank(TorchDispatchMode):
    """Its two streams, in place of overlap._Side, of Inboxes and of the product; copies it sees as a dispatch mode."""

    def __init__(self, record, rank, size, broken):
        super().__init__()
        self.record, self.rank, self.size, self.broken = record, rank, size, broken
        self.device, self.stream = torch.device("cpu"), MAIN
        self.after = {MAIN: set(), SIDE: set()}  # what a stream's next step comes after
        self.meetings = []  # (what is sent, what is received)

    def step(self, name, reads=(), writes=()):
        made = self.record.add(f"rank {self.rank}, {self.stream}: {name}", self.after[self.stream], reads, writes)
        self.after[self.stream] = {made}
        return made

    @contextmanager
    def after_main(self):
        self.after[SIDE] |= self.after[MAIN]
        self.stream = SIDE
        yield
        self.stream = MAIN

    def mark(self):
        return set(self.after[SIDE])

    def main_waits_for(self, event):
        if event is not None and self.broken != "events":
            self.after[MAIN] |= event

    def one_shot(self, x, out):
        if self.broken != "barriers":
            self.meetings.append((self.step("meets"), self.step("has met")))

    def gather(self, out, chunk, stride):
        of = [out[rank * stride : rank * stride + chunk] for rank in range(self.size)]
        sent = self.step("sends", [of[self.rank]])
        others = [rows for rank, rows in enumerate(of) if rank != self.rank]
        received = self.step("gathers", [], others)
        if self.broken != "gather":
            self.meetings.append((sent, received))

    def multiply(self, x, out, bias=None, residual=None, others=None):
        if out.numel():
            reads = [x, *([] if residual is None else [residual]), *([] if others is None else [others.parts])]
            copied = others is not None and others.copy is not None
            self.step("multiplies", reads, [out, *([others.copy] if copied else [])])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.step("copies", [args[1]], [args[0]])
            return args[0]
        return function(*args, **(kwargs or {}))


def races(size, calls, stage, processors, broken=None):
    """Of calls [(rows, columns, dtype)], one after the other, with stages of so many bytes."""
    record, stages, kept = Record(), [torch.zeros(stage, dtype=torch.uint8) for _ in range(size)], []
    ranks = [Rank(record, rank, size, broken) for rank in range(size)]
    for rank in ranks:
        mine = Overlap(rank, stages)
        mine._side, mine._processors = rank, processors
        for rows, columns, dtype in calls:
            x, out, residual = kept[len(kept) :] = [torch.zeros(rows, columns, dtype=dtype) for _ in range(3)]
            with rank:
                mine.project(rank.multiply, x, out, None, residual)
                rank.step("uses", [out])
    for meeting in zip(*(rank.meetings for rank in ranks), strict=True):
        for _, received in meeting:
            record.steps[received][1].update(sent for sent, _ in meeting)
    return record.races()


def cases(count):
    draw = random.Random(7)
    for _ in range(count):
        size = draw.choice((2, 2, 3, 4, 8))
        calls = [
            (draw.randint(1, 50), draw.choice((2, 4, 6)), draw.choice((torch.float32, torch.float16))) for _ in range(2)
        ]
        whole = (size - 1) * 50 * 6 * 4
        yield size, calls, draw.choice((whole, (size - 1) * 6 * 4 * draw.randint(1, 8))), draw.choice((1, 2, 5))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(overlap, "TILE", (2, 2))
    overlap.chunk_ends.cache_clear()
    yield
    overlap.chunk_ends.cache_clear()


def test_nothing_is_read_while_it_is_written():
    for case in cases(40):
        assert not races(*case), case


@pytest.mark.parametrize("broken", ["events", "barriers", "gather"])
def test_each_kind_of_wait_is_needed(broken):
    """And this file's other test would notice."""
    assert races(2, [(50, 4, torch.float32)] * 2, 1 << 12, 1, broken)
