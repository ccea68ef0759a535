"""Checkpoints: how each family packs its weights, and reading, cutting and joining them for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tp_attention.checkpoint.formats import open_checkpoint
from tp_attention.checkpoint.inspection import Inspection, inspect
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.checkpoint.quantization import check_cut
from tp_attention.checkpoint.reshard import Report, reshard
from tp_attention.sharding import ShardPlan

__all__ = ["Inspection", "Report", "inspect", "iter_tensors", "load_rank", "open_checkpoint", "reshard"]


def load_rank(path: str | Path, plan: ShardPlan, rank: int, **options: Any) -> dict[str, Tensor]:
    """`rank`'s share of every tensor under `plan`, by our names and in our packing, as TPSelfAttention holds it.

    path: a checkpoint of any format, cut for any number of ranks. plan: replace(open_checkpoint(path).plan, tp=…), say;
    that of a foreign format has mlp_unit=1, where reshard cuts MLPs by 16. options: open_checkpoint's.
    Raises ValueError when the plan is of a model of another size, or cuts a quantisation group.
    """
    logical = LogicalTensors(open_checkpoint(path, **options))
    logical.check_sizes(plan, "the plan; open_checkpoint(path).plan has the checkpoint's own")
    check_cut(logical, plan)
    return {native: logical.share(native, plan, rank) for native in logical.names()}


def iter_tensors(path: str | Path, **options: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of everything in a checkpoint, under its own names; what ranks share out is joined.

    One tensor at a time is in memory. options: open_checkpoint's.
    """
    checkpoint = open_checkpoint(path, **options)
    if checkpoint.plan.tp == 1:
        for name in checkpoint.names(0):
            yield name, checkpoint.tensor(0, name)
        return
    logical, whole = LogicalTensors(checkpoint), replace(checkpoint.plan, tp=1)
    for native in logical.names():
        for name, packing in checkpoint.layout.tensors_for(native, logical.parts(native), logical.prefixed):
            shape = logical.shape(native, packing, whole, 0)
            yield name, logical.fill(torch.empty(shape, dtype=logical.dtype(native)), native, packing, whole, 0)
