"""What the writers share: which cuts a format can hold, and a rank's tensors under a layout's names."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tp_attention.checkpoint import quantization
from tp_attention.checkpoint.formats.files import read_json
from tp_attention.checkpoint.formats.opened import Origin, companions, origin, origin_to_json
from tp_attention.checkpoint.formats.output import OutputTensor
from tp_attention.checkpoint.layouts import SCALE, Layout
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.sharding import ShardPlan

FORMATS = ("native", "hf", "megatron", "deepspeed")


def legal_tp(format: str, logical: LogicalTensors) -> list[int]:
    """Numbers of ranks that `format` can hold the checkpoint at.

    Foreign formats know equal shares alone: divisors of heads, kv heads and MLP columns. The vocabulary does not
    count: Megatron pads it, DeepSpeed does not cut it. They have no place for int8 scales.
    """
    if format == "native":
        return quantization.legal_tp(logical)
    if any(native.endswith(SCALE) for native in logical.names()):
        return []
    if format == "hf":
        return [1]
    plan = logical.checkpoint.plan
    common = math.gcd(plan.heads, plan.kv_heads, plan.intermediate_size)
    return [tp for tp in range(1, common + 1) if common % tp == 0]


def even_plan(format: str, logical: LogicalTensors, plan: ShardPlan) -> ShardPlan:
    """`plan` as a foreign format cuts. Raises ValueError listing the legal tp when the cut is uneven, and for int8."""
    legal = legal_tp(format, logical)
    if not legal:
        raise ValueError(f"format {format!r} has no place for int8 weights and their scales; only 'native' has")
    if plan.tp not in legal:
        what = "whole models alone" if format == "hf" else "equal shares of heads, kv heads and MLP columns alone"
        raise ValueError(
            f"format {format!r} holds {what}: tp={plan.tp} does not fit heads={plan.heads}, kv_heads={plan.kv_heads}, "
            f"intermediate_size={plan.intermediate_size}; use tp {', '.join(map(str, legal))}, or --format native"
        )
    return replace(plan, mlp_unit=1)


def beside(logical: LogicalTensors) -> tuple[dict[str, str], dict[str, Path]]:
    """Config, tokenizer and the like that go with the checkpoint: texts, and files to copy, by path."""
    texts: dict[str, str] = getattr(logical.checkpoint, "texts", {})
    files = companions(logical.checkpoint.path)
    return dict(texts), {name: file for name, file in files.items() if name not in texts}


def config_of(logical: LogicalTensors) -> dict[str, Any] | None:
    """The config.json that goes with the checkpoint, if there is one."""
    texts, files = beside(logical)
    if "config.json" in texts:
        return json.loads(texts["config.json"])
    return read_json(files["config.json"]) if "config.json" in files else None


def config_vocab_rows(logical: LogicalTensors) -> int:
    """Rows of the vocabulary that the checkpoint's config.json speaks of, at most all; without one, the real ones.

    Raises ValueError where the rows past them are none that Megatron has padded its vocabulary with.
    """
    config, real = config_of(logical) or {}, logical.vocab_rows
    said = config.get("padded_vocab_size") or config.get("vocab_size") or real
    padded = origin(logical).layout.name.startswith("megatron")
    if not isinstance(said, int) or said < 1 or (said < real and not padded):
        raise ValueError(
            f"{logical.checkpoint.path} has {real} rows of vocabulary, its config.json says {said!r}; correct that"
        )
    return min(said, logical.checkpoint.plan.vocab_size)


def tensors_of(
    logical: LogicalTensors, natives: list[str], layout: Layout, prefixed: bool, plan: ShardPlan, rank: int
) -> tuple[OutputTensor, ...]:
    """A rank's tensors under `layout`'s names. Raises ValueError when it has no place for one of `natives`."""
    return tuple(
        OutputTensor(name, native, packing, logical.dtype(native), logical.shape(native, packing, plan, rank))
        for native in natives
        for name, packing in layout.tensors_for(native, logical.parts(native), prefixed)
    )


def manifest(format: str, logical: LogicalTensors, source: Origin, plan: ShardPlan) -> dict[str, Any]:
    """What the manifest of any format says beside its files. A vocabulary that is padded has its real size there."""
    metadata = {key: value for key, value in logical.checkpoint.metadata.items() if key not in ("source", "vocab_size")}
    if (real := logical.vocab_rows) < plan.vocab_size:
        metadata["vocab_size"] = real
    return {
        "format": format,
        "version": 1,
        "plan": asdict(plan),
        "source": origin_to_json(source),
        "metadata": metadata,
    }
