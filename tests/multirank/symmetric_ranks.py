"""Ranks that are processes of one machine, with memory that all of them map: a file takes symmetric memory's place.

Kernels run on it in Triton's interpreter, which truncates where it should round to bf16: `draw` gives bf16 integers
whose sums are exact.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from triton.runtime.interpreter import InterpreterBuilder

from tp_attention.comm.symmetric.inbox import Config, Inboxes
from tp_attention.comm.symmetric.sums import SymmetricSums

FP32, FP16, BF16 = DTYPES = torch.float32, torch.float16, torch.bfloat16
SMALL, WIDE = Config(256, 4), Config(1024, 4)  # 64 and 256 words a program: a few hundred values are several
PATIENCE = 1_000_000  # looks, minutes: a rank that fails ends the others long before
LOOK = 5e-5  # seconds


@functools.cache  # once a process
def _share_cores():
    """Ranks share a few cores here: one that looks in vain lets another run."""
    load = InterpreterBuilder.create_masked_load
    names = list(inspect.signature(load).parameters)

    def give_way(*args, **keywords):
        if {**dict(zip(names, args, strict=False)), **keywords}["is_volatile"]:
            time.sleep(LOOK)
        return load(*args, **keywords)

    InterpreterBuilder.create_masked_load = give_way


def shared(nbytes, process_group=None):
    """Every rank's `nbytes` bytes in rank order, all bits set. Every rank of the group must call it."""
    _share_cores()
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    folder = tempfile.TemporaryDirectory() if rank == 0 else None
    path = [folder.name if folder else None]
    dist.broadcast_object_list(path, group=process_group, group_src=0)
    file = Path(path[0]) / "memory"
    if rank == 0:
        file.write_bytes(b"\xff" * (size * nbytes))
    dist.barrier(process_group)
    memory = torch.from_file(str(file), shared=True, size=size * nbytes, dtype=torch.uint8)
    dist.barrier(process_group)
    if folder:
        folder.cleanup()  # what is mapped stays
    return list(memory.view(size, nbytes).unbind())


def make_inboxes(nbytes, process_group=None, patience=PATIENCE):
    return Inboxes(dist.get_rank(process_group), shared(nbytes, process_group), patience=patience)


def assert_empty(inboxes, process_group=None):
    """Whatever came has been emptied again, on every rank, and nobody waited in vain."""
    dist.barrier(process_group)
    assert not inboxes.failed()
    assert all((memory == -1).all() for memory in inboxes._inboxes[: inboxes.size]), "words are left in an inbox"
    dist.barrier(process_group)


@contextmanager
def symmetric(group, inbox=1 << 14, stage=0, way="auto"):
    """The group sums through files inside, and gloo moves nothing but what symmetric/ does not take."""
    stages = shared(stage, group.process_group) if stage else []
    sums = group.symmetric = SymmetricSums(make_inboxes(inbox, group.process_group), stages, way)
    try:
        yield sums
        assert_empty(sums.inboxes, group.process_group)
    finally:
        group.symmetric = None  # before the group ends, which would wait for its GPU


def calls_of(inboxes):
    """How many launches there have been."""
    return int(inboxes._state[0])


def draw(rank, turn, shape, dtype, most=32):
    """Rank's tensor in this turn, which any rank can make. most: the largest integer of bf16."""
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    if dtype == BF16:
        return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def words_of(count, dtype):
    """How many values so many words hold."""
    return count * 4 // dtype.itemsize
