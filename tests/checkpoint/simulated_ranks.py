"""Our attention layer on ranks that run one after another in this process, with weights cut from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import linear

from tp_attention.attention import TPSelfAttention
from tp_attention.checkpoint.logical import Checkpoint, LogicalTensors
from tp_attention.comm import TPGroup
from tp_attention.config import AttentionConfig

ATTENTION = "layers.0.attention."


def ours(checkpoint: Checkpoint, config: AttentionConfig, x: Tensor, tp: int) -> Tensor:
    """Our layer on tp ranks, its weights cut from the checkpoint: the sum of what the ranks return."""
    logical, plan = LogicalTensors(checkpoint), replace(checkpoint.plan, tp=tp, mlp_unit=16)
    total = torch.zeros_like(x)
    for rank in range(tp):
        layer = TPSelfAttention(config, TPGroup(rank, tp, torch.device("cpu"), name="simulated", backend="none"))
        shares = {
            name.removeprefix(ATTENTION): logical.share(name, plan, rank)
            for name in logical.names()
            if name.startswith(ATTENTION)
        }
        if "query_gate" in logical.parts(f"{ATTENTION}qkv_weight"):
            _gate(layer, shares, x)
        assert {name for name, _ in layer.named_parameters()} == shares.keys()
        for name, share in shares.items():
            getattr(layer, name).copy_(share)
        if rank:
            layer.out_bias = None  # added once
        with mock.patch("tp_attention.comm.linear.all_reduce", lambda partial, group, out: partial):
            total += layer(x)
    return total


def _gate(layer: TPSelfAttention, shares: dict[str, Tensor], x: Tensor) -> None:
    """Megatron-core's output gate: the context of each query head times the sigmoid of its own projection of x."""
    rows = shares["out_weight"].shape[1]
    gates, context = {}, layer.softmax_context
    for kind in ("weight", "bias"):
        q, gates[kind], kv = shares[f"qkv_{kind}"].tensor_split([rows, 2 * rows])
        shares[f"qkv_{kind}"] = torch.cat([q, kv])
    opened = torch.sigmoid(linear(x, gates["weight"], gates["bias"]))
    layer.softmax_context = lambda *args, **kwargs: context(*args, **kwargs) * opened  # type: ignore[assignment]
