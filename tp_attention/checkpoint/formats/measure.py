"""A plan's numbers from the tensors themselves, once their layout and head counts are known.

Megatron's and DeepSpeed's files come without a config.json. What each tensor is never follows from shapes; how large
the model is does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tp_attention.checkpoint.layouts import SCALE, Layout
from tp_attention.checkpoint.packing import HEAD_PARTS, WHOLE
from tp_attention.sharding import ShardPlan


def contents(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a ShardPlan that only say what there is in its layers and around, from one rank's tensors."""
    found: dict[str, tuple[str, ...]] = {}
    whole, size = 0, 1
    for name, tensor in tensors.items():
        match = layout.match(name)
        found[match.native] = found.get(match.native, ()) + match.packing.parts
        if match.native.endswith(".out_weight"):
            size = tensor.element_size()
        # The biases of row-parallel layers are not cut either, but ShardPlan counts them by their flags.
        if match.packing.parts == WHOLE.parts and not match.native.endswith((".out_bias", SCALE)):
            whole += tensor.numel()

    def any_of(suffix: str) -> bool:
        return any(native.endswith(suffix) for native in found)

    return {
        "qkv_bias": any_of(".attention.qkv_bias"),
        "out_bias": any_of(".attention.out_bias"),
        "sinks": any_of(".attention.sinks"),
        "mlp_in_matrices": 2 if any("gate" in parts for parts in found.values()) else 1,
        "mlp_in_bias": any_of(".mlp.in_bias"),
        "mlp_out_bias": any_of(".mlp.out_bias"),
        "vocab_matrices": ("embedding.weight" in found) + ("head.weight" in found),
        "whole_elements": whole,
        "element_bytes": size,
    }


def measured_plan(
    layout: Layout,
    tensors: Mapping[str, Tensor],
    tp: int,
    heads: int | None,
    kv_heads: int | None,
    *,
    uncut: frozenset[str] = frozenset(),
) -> ShardPlan:
    """The plan of an even cut over `tp` ranks whose rank 0 holds `tensors`; those named in `uncut` are not cut.

    kv_heads: None is as many as heads. Raises ValueError when heads is None, and where the attention's weights
    contradict the head counts.
    """
    if heads is None:
        raise ValueError(
            "the checkpoint does not say how many heads it has; pass --heads N (heads=N), and --kv-heads N"
        )
    kv_heads = heads if kv_heads is None else kv_heads
    for what, count in (("heads", heads), ("kv_heads", kv_heads)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{what}={count!r} must be a number, at least 1")
    layers = [re.match(r"layers\.(\d+)\.", layout.match(name).native) for name in tensors]
    sizes: dict[str, int] = {}
    qkv: list[tuple[str, tuple[str, ...], int, int]] = []
    for name, tensor in tensors.items():
        packing = layout.match(name).packing
        if tensor.dim() != 2 or packing.parts == WHOLE.parts:
            continue
        axis = packing.dim if not packing.transposed else 1 - packing.dim
        size = tensor.shape[axis] * (1 if name in uncut else tp)
        if set(packing.parts) <= set(HEAD_PARTS):
            qkv.append((name, packing.parts, size, tensor.shape[1 - axis]))
        elif len(packing.parts) == 1:
            sizes.setdefault(packing.parts[0], size)
    if "out" not in sizes or not qkv:
        raise ValueError(f"layout {layout.name!r} finds no attention weights to measure in the checkpoint")
    head_dim, rest = divmod(sizes["out"], heads)
    if rest:
        raise ValueError(f"the attention output takes {sizes['out']} columns, no multiple of heads={heads}")
    for name, parts, size, _ in qkv:
        expected = sum(heads if part in ("q", "query_gate") else kv_heads for part in parts) * head_dim
        if size != expected:
            raise ValueError(
                f"{name} has {size} rows over {tp} ranks; heads={heads}, kv_heads={kv_heads} of {head_dim} make "
                f"{expected}: other head counts are given by --heads N --kv-heads N"
            )
    return ShardPlan(
        tp=tp,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=qkv[0][3],
        intermediate_size=sizes.get("down", 0),
        vocab_size=sizes.get("vocab", sizes.get("head", 0)),
        mlp_unit=1,
        layers=1 + max((int(layer[1]) for layer in layers if layer), default=0),
        **contents(layout, tensors),
    )
