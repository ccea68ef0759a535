"""Checkpoints in memory: ranks' tensors with a layout and a plan, and any checkpoint cut anew into our own form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tp_attention.checkpoint.layouts import Layout, Rule
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.sharding import ShardPlan


class InMemory:
    """A Checkpoint of dictionaries, one a rank."""

    path = Path("(in memory)")

    def __init__(self, ranks: Sequence[Mapping[str, Tensor]], layout: Layout, plan: ShardPlan) -> None:
        assert len(ranks) == plan.tp
        self.ranks, self.layout, self.plan = ranks, layout, plan
        self.metadata: dict[str, Any] = {}

    def names(self, rank: int) -> list[str]:
        return list(self.ranks[rank])

    def tensor(self, rank: int, name: str) -> Tensor:
        return self.ranks[rank][name]


def native(logical: LogicalTensors, plan: ShardPlan) -> InMemory:
    """`logical` cut by `plan` in our own form."""
    layout = Layout("native", tuple(Rule(name, name, logical.packing(name)) for name in logical.names()))
    ranks = [{name: logical.share(name, plan, rank) for name in logical.names()} for rank in range(plan.tp)]
    return InMemory(ranks, layout, plan)
