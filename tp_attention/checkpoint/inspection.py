"""What a checkpoint is: format, layout, cut, sizes, and what it can be cut for. Reads headers, no weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tp_attention.checkpoint.formats import FORMATS, legal_tp, open_checkpoint
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.checkpoint.quantization import native_plan
from tp_attention.sharding import ShardPlan


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the checkpoint, and what it is of ours."""

    rank: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    native: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    plan: how it is cut. owners: how our own form would cut it for the tp asked about, or `plan`.
    bytes_by_dtype: of all ranks together. legal_tp: by the format to write.
    """

    path: Path
    format: str
    layout: str
    plan: ShardPlan
    owners: ShardPlan
    tensors: tuple[TensorInfo, ...]
    bytes_by_dtype: dict[str, int]
    legal_tp: dict[str, list[int]]
    metadata: dict[str, Any]


def inspect(
    path: str | Path,
    tp: int | None = None,
    *,
    layout: str | Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    allow_pickle: bool = False,
) -> Inspection:
    """Say what the checkpoint at `path` is, and what `tp` ranks would hold of it. Arguments are reshard's.

    Raises ValueError when it is none, is damaged in a way that headers show, or has tensors that no layout knows.
    """
    checkpoint = open_checkpoint(path, layout=layout, heads=heads, kv_heads=kv_heads, allow_pickle=allow_pickle)
    logical = LogicalTensors(checkpoint)
    tensors, sizes = [], Counter[str]()
    for rank in range(checkpoint.plan.tp):
        for name in checkpoint.names(rank):
            tensor, match = checkpoint.tensor(rank, name), checkpoint.layout.match(name)
            shape = tuple(tensor.shape)
            tensors.append(TensorInfo(rank, name, tensor.dtype, shape, match.native, match.packing.parts))
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    plan = replace(checkpoint.plan, element_bytes=max(logical.dtype(name).itemsize for name in logical.names()))
    return Inspection(
        path=checkpoint.path,
        format=checkpoint.format,
        layout=checkpoint.layout.name,
        plan=plan,
        owners=plan if tp is None else replace(native_plan(logical, tp), element_bytes=plan.element_bytes),
        tensors=tuple(tensors),
        bytes_by_dtype=dict(sizes),
        legal_tp={format: legal_tp(format, logical) for format in FORMATS},
        metadata=checkpoint.metadata,
    )
