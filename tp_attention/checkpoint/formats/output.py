"""What a checkpoint to be written consists of: said by the formats, carried out by reshard.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tp_attention.checkpoint.packing import Packing
from tp_attention.sharding import ShardPlan


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of a file: `name` there, the parts of our tensor `native` that `packing` names, a rank's share."""

    name: str
    native: str
    packing: Packing
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class OutputFile:
    """One file of tensors. path: below the destination. rank: whose share under Output.plan it holds.

    plan: where not None, used instead of Output.plan (a file of tensors that its format does not cut).
    header: strings for a safetensors header. nest: for a file of torch.save, makes the object to save of the tensors
    by name; None for a safetensors file.
    """

    path: str
    rank: int
    tensors: tuple[OutputTensor, ...]
    header: dict[str, str] = field(default_factory=dict)
    nest: Callable[[dict[str, Tensor]], Any] | None = None
    plan: ShardPlan | None = None


@dataclass(frozen=True)
class Output:
    """A whole checkpoint: files of tensors cut by `plan`, small texts, and files to copy as they are, all by path.

    manifest: what the manifest says beside its "files", as JSON; of the native form, of which it is a part, and others.
    """

    format: str
    plan: ShardPlan
    files: tuple[OutputFile, ...]
    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
