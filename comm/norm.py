"""Norm: what may follow a sum over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """functional.norm over the last dimension: kind "rmsnorm" or "layernorm", weight and bias [E] or None."""

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
