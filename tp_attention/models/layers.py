"""The sharded MLP, embedding and head that stand beside TPSelfAttention in a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tp_attention.comm import TPGroup, all_gather, all_reduce, linear_all_reduce
from tp_attention.ops import LinearOp
from tp_attention.sharding import ShardPlan


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised inference parameter on torch's current default device (the models build on "meta")."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class TPMLP(nn.Module):
    """y = act(x Wᵢₙᵀ) Wₒᵤₜᵀ, or gated: act(x W_gateᵀ)·(x W_upᵀ) Wₒᵤₜᵀ, with the intermediate columns sharded.

    x, y: [B, T, E], the same on every rank; one all-reduce, then the bias once. in_weight holds this rank's columns,
    [gate; up] if gated. Where a rank owns no columns it adds zeros.
    """

    def __init__(
        self, plan: ShardPlan, group: TPGroup, activation: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.group, self.activation = group, activation
        self.gated = plan.mlp_in_matrices == 2
        start, stop = plan.mlp_columns(group.rank)
        rows, hidden = plan.mlp_in_matrices * (stop - start), plan.hidden_size
        self.in_weight = empty_parameter(rows, hidden, dtype=dtype)
        self.in_bias = empty_parameter(rows, dtype=dtype) if plan.mlp_in_bias else None
        self.out_weight = empty_parameter(hidden, stop - start, dtype=dtype)
        self.out_bias = empty_parameter(hidden, dtype=dtype) if plan.mlp_out_bias else None
        self.linear = LinearOp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x, self.in_weight, self.in_bias)
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            h = self.activation(gate) * up
        else:
            h = self.activation(h)
        return linear_all_reduce(h, self.out_weight, self.group, self.out_bias)


class VocabParallelEmbedding(nn.Module):
    """Embedding with its rows sharded: each rank looks up the ids it owns, zeros otherwise, then an all-reduce."""

    def __init__(self, plan: ShardPlan, group: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.group = group
        self.start, self.stop = plan.vocab_rows(group.rank)
        self.weight = empty_parameter(self.stop - self.start, plan.hidden_size, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, E]."""
        if self.group.size == 1:
            return nn.functional.embedding(ids, self.weight)
        mine = (ids >= self.start) & (ids < self.stop)
        if self.stop == self.start:
            partial = self.weight.new_zeros(*ids.shape, self.weight.shape[1])
        else:
            rows = nn.functional.embedding(torch.where(mine, ids - self.start, 0), self.weight)
            partial = torch.where(mine[..., None], rows, 0)
        return all_reduce(partial, self.group, out=partial)


class VocabParallelHead(nn.Module):
    """Language-model head with its rows sharded; the logits of all ranks are gathered, whole on every rank."""

    def __init__(self, plan: ShardPlan, group: TPGroup, weight: nn.Parameter) -> None:
        super().__init__()
        self.group, self.sizes = group, plan.sizes("vocab_rows")
        self.weight = weight  # the embedding's, where the model ties them
        self.linear = LinearOp()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, E] -> [B, T, vocabulary]."""
        return all_gather(self.linear(x, self.weight), self.group, dim=-1, sizes=self.sizes)
