"""Whether an opened checkpoint holds a whole model of its sizes: seen before anything is done with it.

Headers show nearly all of it; of weights a few rows are read, which tell ranks apart.
"""

from __future__ import annotations

import re

from torch import Tensor

from tp_attention.checkpoint.formats.opened import Opened
from tp_attention.checkpoint.layouts import SCALE, Layout
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.checkpoint.packing import WHOLE, pieces, same_bits

# What every model has, where its layout has a name for it. All else depends on the model: biases, other norms, a head.
_NEEDED = re.compile(r"(embedding|norm|.*\.attention_norm)\.weight|layers\..*\.(qkv|in|out)_weight")
_LAYER = re.compile(r"layers\.(\d+|\{layer\})\.(.+)")
_OF_HIDDEN_SIZE = re.compile(r"(layers\.\d+\.\w+_|embedding_)?norm\..+|layers\.\d+\.\w+\.out_bias|.*embedding\..+")
Part = tuple[str, str]  # our name, and which part of it


def check(checkpoint: Opened) -> None:
    """Raises ValueError naming what the checkpoint lacks, a tensor whose shape does not fit, or ranks that are one."""
    logical, path, count = LogicalTensors(checkpoint), checkpoint.path, checkpoint.plan.layers
    layers: dict[int, set[Part]] = {layer: set() for layer in range(count)}
    around: set[Part] = set()
    for native in logical.names():
        layer = _LAYER.fullmatch(native)
        held = around if layer is None else layers.setdefault(int(layer[1]), set())
        held.update((layer[2] if layer else native, part) for part in logical.parts(native))
    if len(layers) > count:
        raise ValueError(f"{path} has a layer {max(layers)}, counted from 0; its config says {count} layers")
    outside, inside = _needed(checkpoint.layout)
    inside = inside.union(*layers.values())  # what one layer has, all have
    lacking = sorted(outside - around)
    lacking += [(f"layers.{layer}.{name}", part) for layer in layers for name, part in sorted(inside - layers[layer])]
    if lacking:
        some = ", ".join(name if part == "whole" else f"{name} ({part})" for name, part in lacking[:5])
        raise ValueError(f"{path} lacks {len(lacking)} parts of its model: {some}; download or copy it again")
    _check_shapes(checkpoint)
    _check_ranks(checkpoint)


def _needed(layout: Layout) -> tuple[set[Part], set[Part]]:
    """What every model of a layout has outside of its layers, and in each."""
    outside: set[Part] = set()
    inside = {("attention.out_weight", "out"), *(("attention.qkv_weight", part) for part in "qkv")}
    for rule in layout.rules:
        native = rule.native.replace("{kind}", "weight")
        # DeepSpeed's layouts are for several models, of which BERT has no last norm.
        other_models = native == "norm.weight" and layout.name.startswith("deepspeed")
        if _NEEDED.fullmatch(native) and not rule.alias and not other_models:
            layer = _LAYER.fullmatch(native)
            needed = outside if layer is None else inside
            needed.update((layer[2] if layer else native, part) for part in rule.packing.parts)
    return outside, inside


def _check_shapes(checkpoint: Opened) -> None:
    hidden = checkpoint.plan.hidden_size
    for rank in range(checkpoint.plan.tp):
        for name in checkpoint.names(rank):
            match, tensor = checkpoint.layout.match(name), checkpoint.tensor(rank, name)
            try:
                pieces(tensor, match.packing, checkpoint.plan, rank)
            except ValueError as error:
                raise ValueError(f"{name} of rank {rank} of {checkpoint.path} {error}") from None
            if match.packing.parts != WHOLE.parts:
                across = match.packing.dim if match.packing.transposed else 1 - match.packing.dim
                matrix = match.native.endswith(("weight", SCALE))
                fits = tensor.dim() == 1 + matrix
                if fits and matrix and not match.native.endswith(SCALE):
                    fits = tensor.shape[across] == hidden
            else:
                fits = not _OF_HIDDEN_SIZE.fullmatch(match.native) or tensor.shape[-1:] == (hidden,)
            if not fits:
                raise ValueError(
                    f"{name} of rank {rank} of {checkpoint.path} has shape {list(tensor.shape)}, which does not fit "
                    f"hidden_size={hidden}"
                )


def _check_ranks(checkpoint: Opened) -> None:
    """A rank's file in place of another's has the same names and shapes; that nothing in it differs gives it away."""
    if checkpoint.plan.tp == 1:
        return
    matches = {name: checkpoint.layout.match(name) for name in checkpoint.names(0)}
    # Of layers: DeepSpeed's ranks read their rows of the vocabulary in one file.
    cut = [name for name, match in matches.items() if _LAYER.fullmatch(match.native) and match.packing != WHOLE]
    rows = [{name: tensors[name][:16] for name in cut if name in tensors} for tensors in checkpoint.ranks]
    for rank, own in enumerate(rows):
        for other, others in enumerate(rows[:rank]):
            if any(map(_varies, own.values())) and all(same_bits(own[name], others[name]) for name in own):
                raise ValueError(
                    f"{checkpoint.path} has the same weights on ranks {other} and {rank}, which should hold different "
                    "ones: a file is a copy of the other; copy the right one again"
                )


def _varies(rows: Tensor) -> bool:
    """Not of one value throughout, like the weights of a model that was never trained."""
    return rows.numel() > 0 and not same_bits(rows, rows.flatten()[0].expand(rows.shape))
