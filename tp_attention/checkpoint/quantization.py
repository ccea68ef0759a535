"""int8 weights with group scales, and where checkpoints that hold them may be cut.

A weight [out, in] is kept as int8 q beside fp32 scales [out, in / group]: w = q · scale, groups along a row. So a cut
of rows cuts the scales alike, and a cut of columns (of the output projections) must fall between groups. A group of
attention's output projection lies within a head, for which every cut is between groups; an MLP is cut in units of
its group.

DeepSpeed's scales are another thing: deepspeed_int8.py and deepspeed_merge.py, whose functions are to be had here too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tp_attention.checkpoint.deepspeed_int8 import group_scales
from tp_attention.checkpoint.deepspeed_merge import DeepSpeedInt8, merge_for_deepspeed, merge_qkv
from tp_attention.checkpoint.layouts import SCALE, native_packing
from tp_attention.checkpoint.logical import Checkpoint, LogicalTensors
from tp_attention.checkpoint.packing import Packing, Piece, copy_parts, pieces, spans
from tp_attention.eager.projections import dequantize
from tp_attention.sharding import ShardPlan

__all__ = [
    "DeepSpeedInt8",
    "Quantized",
    "check_cut",
    "dequantize",
    "divisors",
    "group_scales",
    "legal_tp",
    "merge_for_deepspeed",
    "merge_qkv",
    "native_plan",
    "quantize",
]

_QUANTIZED = re.compile(r"layers\.\d+\.(attention\.(qkv|out)|mlp\.(in|out))_weight")
_CHUNK = 1 << 20  # elements quantised at a time, so that it takes no second copy of a weight


def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> (int8 [out, in], fp32 scales [out, in / group_size]), symmetric, within scale / 2 of it.

    A group's scale is its largest magnitude / 127, rounding is to the nearest, halves to even. A group of zeros, or of
    nothing that 127 steps of normal fp32 numbers could tell from zero, becomes zeros with scale 1.
    Raises ValueError when group_size does not divide `in`, or the weight is no floating point matrix of finite values.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"cannot quantise {weight.dtype} {list(weight.shape)}; give a floating point weight [out, in]")
    columns = weight.shape[1]
    if group_size < 1 or columns % group_size:
        raise ValueError(f"groups of {group_size} do not divide rows of {columns}; use one of {divisors(columns)}")
    groups = weight.float().unflatten(1, (-1, group_size))
    scale = groups.abs().amax(dim=2) / 127
    if not scale.isfinite().all():
        raise ValueError(f"a weight {list(weight.shape)} has values that are not finite; int8 cannot hold them")
    scale[scale < torch.finfo(torch.float32).tiny] = 1
    return (groups / scale[:, :, None]).round_().clamp_(-127, 127).flatten(1).to(torch.int8), scale


def divisors(number: int) -> list[int]:
    """All divisors of `number`, in order."""
    return [size for size in range(1, number + 1) if number % size == 0]


class Quantized(LogicalTensors):
    """A checkpoint seen with its attention and MLP weights in int8, quantised as they are read.

    Embeddings, norms, head and biases stay as they are. group_size: columns that share a scale. The output
    projection's groups have head_dim columns, or group_size where that divides head_dim, so that head cuts fall
    between groups. The cut must have mlp_unit = the group: native_plan's has. Groups lie within what a rank holds, so
    its share is quantised as the whole weight would be, whatever the source's cut.
    requantize: the checkpoint is in int8 already, and dequantised first; its error is kept.

    Raises ValueError when group_size does not divide the rows, or requantize is set or not set against the facts.
    """

    def __init__(self, checkpoint: Checkpoint, group_size: int = 128, requantize: bool = False) -> None:
        super().__init__(checkpoint)
        whole = replace(checkpoint.plan, tp=1)
        self._int8 = {name for name in self._holders if name + SCALE in self._holders}
        if self._int8 and not requantize:
            raise ValueError(f"{checkpoint.path} is in int8 already; pass requantize (--requantize) for other groups")
        if requantize and not self._int8:
            raise ValueError(f"{checkpoint.path} has no int8 weights to requantise; pass quantize (--quantize) alone")
        weights = {name for name in self._holders if _QUANTIZED.fullmatch(name)}
        if not weights or self._int8 - weights:
            what = f"{min(self._int8 - weights)} in int8" if weights else "no attention or MLP weights"
            raise ValueError(f"{checkpoint.path} has {what}; only attention and MLP weights of layers are quantised")
        within_head = group_size if group_size > 0 and checkpoint.plan.head_dim % group_size == 0 else None
        self.groups: dict[str, int] = {}
        widths: dict[str, int] = {}
        for name in sorted(weights):
            if "out" in self.parts(name):
                self.groups[name] = within_head or checkpoint.plan.head_dim
            else:
                self.groups[name] = group_size
                widths[name] = super().shape(name, super().packing(name), whole, 0)[1]
        legal = divisors(math.gcd(*widths.values()))
        for name, width in widths.items():
            if group_size not in legal:
                raise ValueError(
                    f"groups of {group_size} do not divide the rows of {width} of {name}; "
                    f"use a group size (--group-size) of {', '.join(map(str, legal))}"
                )

    def names(self) -> list[str]:
        """Our names; a weight's scales follow it."""
        scales = {name + SCALE for name in self.groups}
        found = []
        for name in self._holders:
            if name not in scales:
                found += [name, name + SCALE] if name in self.groups else [name]
        return found

    def parts(self, native: str) -> set[str]:
        """The parts of our tensor; of scales, those of their weight."""
        return super().parts(native if native in self._holders else native.removesuffix(SCALE))

    def packing(self, native: str) -> Packing:
        """How our own form packs the tensor."""
        weight = native.removesuffix(SCALE)
        if weight not in self.groups:
            return super().packing(native)
        packing = native_packing(self.parts(weight))
        return packing if native == weight else _of_scales(packing, self.groups[weight])

    def sources(self, native: str) -> Iterator[tuple[str, Tensor]]:
        """Every file tensor that holds some of it; none where scales are yet to be made."""
        return super().sources(native) if native in self._holders else iter(())

    def dtype(self, native: str) -> torch.dtype:
        """int8 for quantised weights, fp32 for their scales, else what the checkpoint has."""
        weight = native.removesuffix(SCALE)
        held = super().dtype(weight if weight in self.groups else native)
        if weight not in self.groups:
            return held
        return torch.int8 if native == weight else torch.float32

    def shape(self, native: str, packing: Packing, plan: ShardPlan, rank: int) -> tuple[int, ...]:
        """Shape of `rank`'s share under `plan`, in `packing`. Raises ValueError where a cut divides a group."""
        weight = native.removesuffix(SCALE)
        if weight not in self.groups:
            return super().shape(native, packing, plan, rank)
        if packing.transposed:
            raise ValueError(f"{weight} cannot be int8 and [in, out]: groups lie along rows of [out, in]")
        rows, columns = super().shape(weight, replace(packing, divisor=1), plan, rank)
        return rows, columns if native == weight else columns // self.groups[weight]

    def fill(self, out: Tensor, native: str, packing: Packing, plan: ShardPlan, rank: int) -> Tensor:
        """Copy `rank`'s share under `plan` into `out`, packed like `packing`, quantised where this class does so.

        Raises ValueError as LogicalTensors.fill does, and where a cut divides a group or a weight is not finite.
        """
        weight = native.removesuffix(SCALE)
        if weight not in self.groups:
            return super().fill(out, native, packing, plan, rank)
        if tuple(out.shape) != (expected := self.shape(native, packing, plan, rank)):
            raise ValueError(f"{native} has shape {list(out.shape)}; expected {list(expected)}")
        group, across, of_scales = self.groups[weight], packing.dim == 1, native != weight
        scales = _of_scales(packing, group)
        try:
            spans(scales, plan, rank)
            for target in pieces(out, scales if of_scales else replace(packing, divisor=1), plan, rank):
                source = self._floats(weight, target.part, across)
                # columns that a unit of the target stands for, and units that must be taken together
                columns, together = (group, 1) if across and of_scales else (1, group if across else 1)
                step = max(1, _CHUNK // (columns * together * source.unit)) * together
                for start in range(target.start, target.stop, step):
                    stop = min(start + step, target.stop)
                    values = quantize(source.read(start * columns, stop * columns), group)[of_scales]
                    view = target.view[start - target.start : stop - target.start]
                    view.copy_((values.T if across else values).reshape(view.shape))
        except ValueError as error:
            raise ValueError(f"{weight} of {self.checkpoint.path}: {error}") from None
        return out

    def _floats(self, weight: str, part: str, across: bool) -> _Floats:
        def held(native: str) -> list[Piece]:
            return [piece for piece in self._pieces(native, (part,)) if piece.part == part]

        if weight not in self._int8:
            return _Floats(held(weight), [], across, 1)
        return _Floats(held(weight), held(weight + SCALE), across, super().packing(weight + SCALE).divisor)


class _Floats:
    """One part of a weight, read run by run as [rows, columns]; from int8 as fp32. unit: elements of a unit of it."""

    def __init__(self, values: list[Piece], scales: list[Piece], across: bool, group: int) -> None:
        self._values, self._scales, self._across, self._group = values, scales, across, group
        self.unit = values[0].view.shape[1:].numel()

    def read(self, start: int, stop: int) -> Tensor:
        """Units [start, stop) of the part: its rows, or its columns if it lies across."""
        if not self._scales:
            return self._run(self._values, start, stop)
        first, last = start // self._group, -(-stop // self._group)  # old groups are read whole, then cut
        values = self._run(self._values, first * self._group, last * self._group)
        floats = dequantize(values, self._run(self._scales, first, last), torch.float32)
        return floats[:, start - first * self._group :][:, : stop - start] if self._across else floats

    def _run(self, source: list[Piece], start: int, stop: int) -> Tensor:
        like, count = source[0].view, stop - start
        rest = like.shape[1:]
        run = torch.empty((*rest, count) if self._across else (count, *rest), dtype=like.dtype)
        copy_parts(source, [Piece(source[0].part, start, stop, run.movedim(-1, 0) if self._across else run)])
        return run.flatten(0, -2)


def _of_scales(packing: Packing, group: int) -> Packing:
    """How the scales of a weight so packed are packed: alike, with an entry a group where columns are cut."""
    return replace(packing, divisor=group if packing.dim == 1 else 1)


def native_plan(logical: LogicalTensors, tp: int) -> ShardPlan:
    """Our own cut of the checkpoint for `tp` ranks: MLPs in units of 16 columns, or of their quantisation group.

    Raises ValueError when tp is not in 1..heads.
    """
    plan = logical.checkpoint.plan
    groups = {packing.divisor for packing in _row_parallel(logical).values() if "down" in packing.parts}
    return replace(plan, tp=tp, mlp_unit=math.lcm(*groups) if groups else ShardPlan.mlp_unit)


def legal_tp(logical: LogicalTensors) -> list[int]:
    """Every tp for which native_plan cuts no quantisation group."""
    packings = set(_row_parallel(logical).values())
    return [
        tp
        for tp in range(1, logical.checkpoint.plan.heads + 1)
        if all(_keeps_groups(packing, native_plan(logical, tp)) for packing in packings)
    ]


def check_cut(logical: LogicalTensors, plan: ShardPlan) -> None:
    """Raises ValueError, with the legal tp values, when `plan` cuts a quantisation group of some weight."""
    for name, packing in _row_parallel(logical).items():
        if not _keeps_groups(packing, plan):
            unit = f", mlp_unit={plan.mlp_unit}" if "down" in packing.parts else ""
            raise ValueError(
                f"tp={plan.tp}{unit} cuts {name.removesuffix(SCALE)} inside a quantisation group of {packing.divisor}; "
                f"legal tp: {', '.join(map(str, legal_tp(logical)))}; or force it with requantize (--requantize)"
            )


def _row_parallel(logical: LogicalTensors) -> dict[str, Packing]:
    """Packings of the scales that are cut by their weight's columns."""
    scales = {name: logical.packing(name) for name in logical.names() if name.endswith(SCALE)}
    return {name: packing for name, packing in scales.items() if packing.divisor > 1}


def _keeps_groups(packing: Packing, plan: ShardPlan) -> bool:
    try:
        for rank in range(plan.tp):
            spans(packing, plan, rank)
    except ValueError:
        return False
    return True
