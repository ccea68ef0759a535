"""Merging checkpoints for DeepSpeed's attention class: what its loader returns, for every layout, and the way back.

Where DeepSpeed's Megatron loader is right, merge_for_deepspeed agrees with it bit for bit. deepspeed_int8.py has the
formulas of the scales.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tp_attention.checkpoint.deepspeed_int8 import PARALLEL, by_rows, group_scales, quantize_runs, runs_and_parts
from tp_attention.checkpoint.layouts import SCALE, Layout, Rule
from tp_attention.checkpoint.logical import Checkpoint, LogicalTensors
from tp_attention.sharding import ShardPlan

# The order of DeepSpeed's scales of a layer.
_ROWS = ("attention.qkv_weight", "attention.out_weight", "mlp.in_weight", "mlp.out_weight")
_NATIVE = re.compile(rf"layers\.(?P<layer>\d+|\{{layer\}})\.(?P<weight>{'|'.join(map(re.escape, _ROWS))})")


def merge_for_deepspeed(
    checkpoint: Checkpoint, *, tp: int = 1, rank: int = 0, q_groups: int | None = None, mlp_extra_grouping: bool = True
) -> tuple[dict[str, Tensor], Tensor | dict[str, Tensor] | None, int]:
    """What rank `rank` of `tp` loads of a checkpoint that is not quantised: (tensors, scales, merge_count).

    tensors: under the checkpoint's own names, packed like its own layout. With q_groups, attention and MLP weights are
    int8 (their scales twice as many for MLPs with mlp_extra_grouping), and
    scales: fp32 [layers, 4, scales], those of qkv, attention out, MLP in and MLP out, zeros behind. They are found by
    the formulas above, also where DeepSpeed's loader leaves a version 0 qkv in the order of the parts.
    merge_count: how many of the checkpoint's ranks were merged. Where that is no power of two, scales is a dict of
    ours, [out, in / group] by tensor name, and merge_count 1.
    Raises ValueError when the ranks do not divide or are uneven, replicas differ, or runs do not divide a weight.
    """
    plan = checkpoint.plan
    if tp < 1 or plan.tp % tp or not 0 <= rank < tp:
        raise ValueError(f"rank={rank} of tp={tp} cannot merge {plan.tp} ranks; use a tp that divides {plan.tp}")
    for what, count in (("heads", plan.heads), ("kv_heads", plan.kv_heads), ("columns", plan.intermediate_size)):
        if count % plan.tp:
            raise ValueError(f"{count} {what} are uneven on {plan.tp} ranks; DeepSpeed holds even cuts only")
    merged = range(rank * plan.tp // tp, (rank + 1) * plan.tp // tp)
    power_of_two = len(merged) & (len(merged) - 1) == 0
    logical, target = LogicalTensors(checkpoint), replace(plan, tp=tp)
    tensors: dict[str, Tensor] = {}
    theirs: dict[tuple[int, int], Tensor] = {}
    ours: dict[str, Tensor] = {}
    for name in checkpoint.names(merged[0]):
        found = checkpoint.layout.match(name)
        native, packing = found.native, found.packing
        match = _NATIVE.fullmatch(native)
        if q_groups is None or match is None:
            tensors[name] = logical.share(native, target, rank, packing)
            continue
        if logical.parts(native) - set(packing.parts):
            raise ValueError(f"DeepSpeed has one scale row for all of {native}; {name} holds a part of it, merge these")
        row = _ROWS.index(match["weight"])
        flat = replace(packing, transposed=False)
        if packing.dim == 0:
            shares = [logical.share(native, target, rank, flat)]
        else:
            shares = [logical.share(native, plan, source, flat) for source in merged]
        groups, parts = runs_and_parts(_q_groups(q_groups, row, mlp_extra_grouping), len(merged), packing.dim)
        pairs = [quantize_runs(share, groups, native) for share in shares]
        weight = torch.cat([part for part, _ in pairs], dim=1)
        scales = torch.stack([scale for _, scale in pairs], dim=1).flatten()
        tensors[name] = weight.T.contiguous() if packing.transposed else weight
        theirs[int(match["layer"]), row] = scales
        if not power_of_two:
            ours[name] = by_rows(scales, groups, parts, weight.shape)
    if q_groups is None:
        return tensors, None, len(merged)
    return (tensors, _stacked(theirs), len(merged)) if power_of_two else (tensors, ours, 1)


class DeepSpeedInt8:
    """Quantised tensors as DeepSpeed's loader, or merge_for_deepspeed, makes them: a Checkpoint in our form.

    ranks: each rank's tensors under the names of `layout`, and its scales [layers, 4, scales]. plan: how they are cut.
    The scales become tensors beside their weights, so that everything here reads, cuts and requantises them.
    Raises ValueError as group_scales does, or when weights of one kind come out with different groups.
    """

    path = Path("(in memory)")

    def __init__(
        self,
        ranks: Sequence[tuple[Mapping[str, Tensor], Tensor]],
        layout: Layout,
        plan: ShardPlan,
        *,
        q_groups: int,
        merge_count: int = 1,
        mlp_extra_grouping: bool = True,
    ) -> None:
        if len(ranks) != plan.tp:
            raise ValueError(f"{len(ranks)} ranks given for a plan of tp={plan.tp}")
        self.plan = plan
        self.metadata: dict[str, Any] = {}
        scales: list[dict[str, Tensor]] = [{} for _ in ranks]
        for mine, (tensors, q_scales) in zip(scales, ranks, strict=True):
            for name, tensor in tensors.items():
                match = layout.match(name)
                if tensor.dtype != torch.int8 or not (weight := _NATIVE.fullmatch(match.native)):
                    continue
                row = _ROWS.index(weight["weight"])
                mine[name] = group_scales(
                    q_scales[int(weight["layer"]), row],
                    _q_groups(q_groups, row, mlp_extra_grouping),
                    merge_count,
                    tensor.T.shape if match.packing.transposed else tensor.shape,
                    PARALLEL[match.packing.dim],
                )
        self._tensors, self.layout = with_scales([tensors for tensors, _ in ranks], scales, layout)

    def names(self, rank: int) -> list[str]:
        return list(self._tensors[rank])

    def tensor(self, rank: int, name: str) -> Tensor:
        return self._tensors[rank][name]


def with_scales(
    ranks: Sequence[Mapping[str, Tensor]], scales: Sequence[Mapping[str, Tensor]], layout: Layout
) -> tuple[list[dict[str, Tensor]], Layout]:
    """Each rank's tensors with the scales of its weights beside them, and the layout that names those too.

    scales: each rank's, ours, [out, in / group] by the name of their weight.
    Raises ValueError when row-parallel weights of one kind have different groups.
    """
    divisors: dict[str, int] = {}
    for tensors, mine in zip(ranks, scales, strict=True):
        for name, scale in mine.items():
            match, weight = layout.match(name), tensors[name]
            if match.packing.dim == 0:
                continue
            group = weight.shape[0 if match.packing.transposed else 1] // scale.shape[1]
            kind = match.native.split(".", 2)[2]
            if divisors.setdefault(kind, group) != group:
                raise ValueError(f"{name} has groups of {group}, others like it of {divisors[kind]}")
    joined = [
        {**tensors, **{name + SCALE: scale for name, scale in mine.items()}}
        for tensors, mine in zip(ranks, scales, strict=True)
    ]
    return joined, Layout(layout.name, (*layout.rules, *_scale_rules(layout, divisors)), layout.extra)


def merge_qkv(weights: Mapping[str, Tensor | None], transposed_mode: bool = False) -> tuple[Tensor, Tensor | None]:
    """attn_qw [q, in], attn_kw [kv, in], attn_vw [kv, in] (and attn_qb, attn_kb, attn_vb) -> (attn_qkvw, attn_qkvb).

    attn_qkvw is [in, q + 2 kv], or [q + 2 kv, in] in transposed_mode; attn_qkvb [q + 2 kv], None where there is no
    bias at all. A bias that is missing (or None) beside others is zeros.
    Raises ValueError when a weight is missing, or shapes or dtypes do not fit each other.
    """
    names = ("attn_qw", "attn_kw", "attn_vw")
    parts = [tensor for tensor in map(weights.get, names) if tensor is not None]
    if len(parts) < len(names):
        raise ValueError(f"qkv_merging needs {', '.join(names)}; got {', '.join(sorted(weights)) or 'nothing'}")
    shapes = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in zip(names, parts, strict=True))
    q, k, v = parts
    if {part.dim() for part in parts} != {2} or k.shape != v.shape or q.shape[1] != k.shape[1]:
        raise ValueError(f"{shapes} do not fit each other; expected [q, in], [kv, in], [kv, in]")
    if len({(part.dtype, part.device) for part in parts}) > 1:
        raise ValueError(f"{shapes} differ in dtype or device; convert them to one")
    biases = [weights.get(name) for name in ("attn_qb", "attn_kb", "attn_vb")]
    like = next((bias for bias in biases if bias is not None), None)
    merged = torch.cat(parts)
    if like is None:
        return merged if transposed_mode else merged.T.contiguous(), None
    filled = []
    for name, part, bias in zip(names, parts, biases, strict=True):
        if bias is not None and (bias.shape != part.shape[:1] or bias.dtype != like.dtype):
            raise ValueError(
                f"bias {bias.dtype} {list(bias.shape)} does not fit {name} {list(part.shape)}; "
                f"expected {like.dtype} [{part.shape[0]}]"
            )
        filled.append(like.new_zeros(part.shape[0]) if bias is None else bias)
    return merged if transposed_mode else merged.T.contiguous(), torch.cat(filled)


def _q_groups(q_groups: int, row: int, mlp_extra_grouping: bool) -> int:
    # By name. DeepSpeed's loader asks whether sizes are as 1 to 4, which a projection that two ranks hold is too.
    return 2 * q_groups if mlp_extra_grouping and _ROWS[row].startswith("mlp.") else q_groups


def _stacked(scales: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """[layers, 4, longest], zeros where there is nothing."""
    layers = 1 + max((layer for layer, _ in scales), default=-1)
    stacked = torch.zeros(layers, len(_ROWS), max((len(scale) for scale in scales.values()), default=0))
    for (layer, row), scale in scales.items():
        stacked[layer, row, : len(scale)] = scale
    return stacked


def _scale_rules(layout: Layout, divisors: Mapping[str, int]) -> list[Rule]:
    """Rules for scales under their weights' names with _scale added; groups of the row-parallel ones by native name."""
    rules = []
    for rule in layout.rules:
        name, native = (text.replace("{kind}", "weight") for text in (rule.name, rule.native))
        if match := _NATIVE.fullmatch(native):
            divisor = divisors.get(match["weight"], 1) if rule.packing.dim == 1 else 1
            packing = replace(rule.packing, transposed=False, divisor=divisor)
            rules.append(Rule(name + SCALE, native + SCALE, packing, rule.alias))
    return rules
