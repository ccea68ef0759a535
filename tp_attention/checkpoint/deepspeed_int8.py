"""DeepSpeed's int8 scales: over runs of a flattened weight, and found again after checkpoints were merged.

A weight [out, in] is flattened row by row and cut into q_groups equal runs, each with one scale (already inverted:
w = q · scale). After merge_count checkpoints were merged into a rank, with `run` the elements under one scale:
    column-parallel (qkv, MLP in), parts stacked by rows: run = out · in / (q_groups · merge_count), and the scale of
        element [o, i] is q_scales[(o · in + i) // run]
    row-parallel (attention and MLP out), parts side by side, each width = in / merge_count wide and flattened by
        itself: run = out · width / q_groups, and the scale of [o, i], with part, j = divmod(i, width), is
        q_scales[(o · width + j) // run · merge_count + part]
DeepSpeed stores log2 of merge_count and shifts by it, so only powers of two exist there. Our form, scales
[out, in / group], says the same wherever runs divide rows, or are whole rows; nothing else is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PARALLEL = ("column", "row")  # by the axis of [out, in] that is cut


def group_scales(q_scales: Tensor, q_groups: int, merge_count: int, shape: Sequence[int], parallel: str) -> Tensor:
    """DeepSpeed's scales of one weight as ours: fp32 [out, in / group], on q_scales' device.

    q_scales: q_groups · merge_count numbers in any shape; more must be zeros, with which DeepSpeed pads. merge_count:
    how many checkpoints were merged, not its logarithm. shape: [out, in] of this rank's weight, however it is stored.
    parallel: "column" or "row". The group is the shorter of a run and a row (of a part, if row-parallel).
    Raises ValueError when merge_count is no power of two, or counts, runs and rows do not fit each other.
    """
    groups, parts = _checked_groups(q_groups, merge_count, parallel)
    flat = q_scales.reshape(-1).float()
    if flat.numel() < groups * parts or flat[groups * parts :].any():
        raise ValueError(
            f"{flat.numel()} scales given; q_groups={q_groups} and merge_count={merge_count} make {groups * parts}"
        )
    return by_rows(flat[: groups * parts], groups, parts, shape)


def to_deepspeed(scale: Tensor, q_groups: int, merge_count: int, shape: Sequence[int], parallel: str) -> Tensor:
    """Our scales [out, in / group] of a weight of `shape` [out, in] as DeepSpeed's, fp32 [q_groups · merge_count].

    Raises ValueError as group_scales does, and when scales differ within a run, which then has no one scale.
    """
    groups, parts = _checked_groups(q_groups, merge_count, parallel)
    run, width = _run(groups, parts, shape)
    if scale.dim() != 2 or scale.shape[0] != shape[0] or not scale.shape[1] or shape[1] % scale.shape[1]:
        raise ValueError(f"scales {list(scale.shape)} are not [out, in / group] of a weight {list(shape)}")
    group = shape[1] // scale.shape[1]
    unit = math.gcd(group, run, width)
    fine = scale.float().repeat_interleave(group // unit, dim=1).unflatten(1, (parts, width // unit))
    runs = fine.movedim(1, 0).reshape(parts, groups, run // unit)
    if not torch.equal(runs, runs[:, :, :1].expand_as(runs)):
        raise ValueError(
            f"groups of {group} have different scales within runs of {run}, which q_groups={q_groups} and "
            f"merge_count={merge_count} make of {list(shape)}; DeepSpeed's form cannot say so, keep ours"
        )
    return runs[:, :, 0].T.flatten()


def runs_and_parts(q_groups: int, merge_count: int, dim: int) -> tuple[int, int]:
    """Runs of a part, and parts: a column-parallel weight is one part of all runs."""
    if q_groups < 1:
        raise ValueError(f"q_groups={q_groups} must be at least 1")
    return (q_groups * merge_count, 1) if dim == 0 else (q_groups, merge_count)


def quantize_runs(weight: Tensor, groups: int, name: str) -> tuple[Tensor, Tensor]:
    """DeepSpeed's own numbers: int8 like weight, and [groups] inverted scales. The largest magnitude is cut to 127."""
    if weight.numel() % groups:
        raise ValueError(f"q_groups: {groups} runs do not divide {name} of {list(weight.shape)} evenly")
    runs = weight.float().reshape(groups, -1)
    if not runs.isfinite().all():
        raise ValueError(f"{name} has values that are not finite; int8 cannot hold them")
    scale = 256.0 / (2 * runs.abs().amax(dim=1) + 1e-5)
    quantized = (runs * scale[:, None]).round().clamp(-128, 127).to(torch.int8)
    return quantized.view(weight.shape), 1 / scale


def by_rows(scales: Tensor, groups: int, parts: int, shape: Sequence[int]) -> Tensor:
    """Scales [groups · parts], parts interleaved, as [out, in / group]."""
    run, width = _run(groups, parts, shape)
    group = min(run, width)
    runs = scales.view(groups, parts).repeat_interleave(run // group, dim=0)
    return runs.view(shape[0], width // group, parts).transpose(1, 2).flatten(1).contiguous()


def _checked_groups(q_groups: int, merge_count: int, parallel: str) -> tuple[int, int]:
    if parallel not in PARALLEL:
        raise ValueError(f"parallel={parallel!r} must be one of {', '.join(PARALLEL)}")
    if merge_count < 1 or merge_count & (merge_count - 1):
        raise ValueError(
            f"merge_count={merge_count} is no power of two, which DeepSpeed's form needs; "
            f"merge_for_deepspeed returns scales of our own form for it"
        )
    return runs_and_parts(q_groups, merge_count, PARALLEL.index(parallel))


def _run(groups: int, parts: int, shape: Sequence[int]) -> tuple[int, int]:
    """Elements under one scale, and the width of a part's rows. One divides the other."""
    out, columns = shape
    if columns % parts or out * columns // parts % groups:
        raise ValueError(f"{groups} scales for each of {parts} parts do not divide a weight {[out, columns]} evenly")
    width = columns // parts
    run = out * width // groups
    if run % width and width % run:
        raise ValueError(
            f"{groups} scales cover runs of {run} of a weight {[out, width]}, which neither divide its rows nor are "
            f"whole rows; give as many scales as divide {out}, or a multiple of {out} that divides {out * width}"
        )
    return run, width
