"""The proof behind `--verify-forward`: attention and MLP computed rank by rank at both cuts equal the uncut layer.

It shows what hashes cannot: that the shares of the ranks belong together. It takes the first, the middle and the last
layer, since a wrong cut is wrong in all of them; single bytes, norms and embeddings are `--verify`'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tp_attention.checkpoint.layouts import SCALE
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.checkpoint.packing import spans
from tp_attention.eager.prefill import attention
from tp_attention.eager.projections import dequantize
from tp_attention.sharding import ShardPlan

TOKENS = 7
ROWS = 1024  # of a weight are widened to fp64 at a time, so that memory stays at one share
# Largest difference, of the largest value, whatever the dtype: every weight is exact in fp64 and so is all that is
# computed, so a cut only reorders sums of thousands of terms, each rounded to 1e-16. Int8 against what it came from:
# a weight is off by up to half a step of 1/127 of its group's largest, which products in a row average to 1 or 2%.
EXACT, QUANTISED = 1e-10, 5e-2


@torch.inference_mode()
def compare(source: LogicalTensors, destination: LogicalTensors) -> str:
    """One line of what was compared. Raises ValueError naming layer and difference where the two compute another thing.

    Both are run as they are cut, each rank with its own share, the partial outputs summed. source may be a view, such
    as Quantized, of its checkpoint: then the view is compared with the checkpoint too.
    """
    checkpoint = LogicalTensors(source.checkpoint)
    names = set(checkpoint.names())
    layers = sorted({int(name.split(".")[1]) for name in names if name.endswith(".attention.qkv_weight")})
    if not layers:
        raise ValueError(f"{source.checkpoint.path} has no attention layer; there is no forward pass to verify")
    cut, uncut, final = source.checkpoint.plan, replace(source.checkpoint.plan, tp=1), destination.checkpoint.plan
    x = torch.randn(1, TOKENS, cut.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = [(destination, final, EXACT if _scales(destination) == _scales(source) else QUANTISED)]
    if type(source) is not LogicalTensors:
        steps.insert(0, (source, uncut, QUANTISED))
    if cut.tp > 1:
        steps.insert(0, (checkpoint, cut, EXACT))
    chosen = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    greatest = 0.0
    for layer in chosen:
        wanted = {name for name in names if name.startswith(f"layers.{layer}.")}
        if lacking := sorted(wanted.difference(destination.names())):
            raise ValueError(f"{destination.checkpoint.path} lacks {lacking[0]} of {source.checkpoint.path}")
        for what, forward in {"attention": _attention, "MLP": _mlp}.items():
            if what == "MLP" and f"layers.{layer}.mlp.in_weight" not in names:
                continue
            whole = forward(checkpoint, layer, uncut, x)
            for actual, plan, limit in steps:
                y = forward(actual, layer, plan, x)
                largest = whole.abs().max().clamp(min=1e-300)  # weights may all be zero
                difference = float((y - whole).abs().max() / largest)
                if not difference <= limit:  # NaN too
                    raise ValueError(
                        f"the {what} of layer {layer} of {actual.checkpoint.path} at tp={plan.tp} differs from the "
                        f"uncut one of {source.checkpoint.path} by {difference:.1e} of the largest; at most {limit:.0e}"
                    )
                greatest = max(greatest, difference)
                if plan is uncut:  # what was written is exactly this view
                    whole = y
    return (
        f"forward: layers {', '.join(map(str, chosen))} at tp={cut.tp} and tp={final.tp} equal the uncut ones, "
        f"greatest difference {greatest:.1e} of the largest (limit {max(limit for _, _, limit in steps):.0e})"
    )


def _attention(logical: LogicalTensors, layer: int, plan: ShardPlan, x: Tensor) -> Tensor:
    """Causal attention without norms and RoPE, which no cut touches; x [1, T, E] -> [1, T, E]."""
    root = f"layers.{layer}.attention"
    y = torch.zeros_like(x)
    for rank in range(plan.tp):
        packing = logical.packing(f"{root}.qkv_weight")
        rows = [stop - start for start, stop in spans(packing, plan, rank).values()]
        packed = _linear(logical, f"{root}.qkv", plan, rank, x).split(rows, dim=-1)
        heads = (part.unflatten(-1, (-1, plan.head_dim)) for part in packed)
        parts = dict(zip(packing.parts, heads, strict=True))
        sinks = logical.share(f"{root}.sinks", plan, rank) if f"{root}.sinks" in logical.names() else None
        context: Any = attention(
            parts["q"],
            parts["k"],
            parts["v"],
            causal=True,
            sinks=sinks,
            q_start=plan.q_heads(rank)[0],
            group_size=plan.group_size,
            kv_start=plan.kv_head_range(rank)[0],
        )
        if "query_gate" in parts:
            context = context * parts["query_gate"].sigmoid()
        y += _linear(logical, f"{root}.out", plan, rank, context.flatten(2), bias=rank == 0)
    return y


def _mlp(logical: LogicalTensors, layer: int, plan: ShardPlan, x: Tensor) -> Tensor:
    """SiLU stands for whichever activation the model has: any that works element by element shows a wrong cut."""
    root = f"layers.{layer}.mlp"
    y = torch.zeros_like(x)
    for rank in range(plan.tp):
        h = _linear(logical, f"{root}.in", plan, rank, x)
        if "gate" in logical.packing(f"{root}.in_weight").parts:
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = F.silu(h)
        y += _linear(logical, f"{root}.out", plan, rank, h, bias=rank == 0)
    return y


def _linear(logical: LogicalTensors, name: str, plan: ShardPlan, rank: int, x: Tensor, *, bias: bool = True) -> Tensor:
    """x [1, T, in] times this rank's weight [out, in], dequantised where int8, in fp64; plus its bias if it has one."""
    weight = logical.share(f"{name}_weight", plan, rank)
    scale = logical.share(f"{name}_weight{SCALE}", plan, rank) if weight.dtype == torch.int8 else None
    blocks = []
    for start in range(0, max(len(weight), 1), ROWS):
        rows = slice(start, start + ROWS)
        wide = weight[rows].double() if scale is None else dequantize(weight[rows], scale[rows].double(), torch.float64)
        blocks.append(x @ wide.T)
    y = torch.cat(blocks, dim=-1)
    if bias and f"{name}_bias" in logical.names():
        y += logical.share(f"{name}_bias", plan, rank).double()
    return y


def _scales(logical: LogicalTensors) -> dict[str, int]:
    """Quantised weights and the number of their groups."""
    plan = replace(logical.checkpoint.plan, tp=1)
    return {
        name: logical.shape(name, logical.packing(name), plan, 0)[-1]
        for name in logical.names()
        if name.endswith(SCALE)
    }
