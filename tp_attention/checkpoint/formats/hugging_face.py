"""Hugging Face folders: config.json beside safetensors or pytorch_model.bin, one file or sharded with an index."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from tp_attention.checkpoint.dimensions import from_config, layout_of
from tp_attention.checkpoint.families import find
from tp_attention.checkpoint.formats.files import (
    SafetensorsFile,
    load_pickled,
    read_json,
    single_or_indexed,
    tensors_alone,
)
from tp_attention.checkpoint.formats.measure import contents, measured_plan
from tp_attention.checkpoint.formats.opened import Opened, Origin, origin
from tp_attention.checkpoint.formats.output import Output, OutputFile, OutputTensor
from tp_attention.checkpoint.formats.targets import (
    beside,
    config_of,
    config_vocab_rows,
    even_plan,
    manifest,
    tensors_of,
)
from tp_attention.checkpoint.layouts import Layout
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.sharding import ShardPlan

log = logging.getLogger("tp_attention")

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
SHARD_BYTES = 5 * 10**9


def weights_in(folder: Path) -> str | None:
    """SAFETENSORS or PICKLED, whichever `folder` holds, whole or sharded; safetensors first."""
    for single in (SAFETENSORS, PICKLED):
        if (folder / single).is_file() or (folder / f"{single}.index.json").is_file():
            return single
    return None


def open_folder(
    folder: Path,
    single: str,
    layout: str | Path | None,
    heads: int | None,
    kv_heads: int | None,
    allow_pickle: bool,
) -> Opened:
    """The checkpoint in `folder`, whose weights are `single`, or shards of it; sizes and layout are config.json's.

    Where there is none, or it is of a model that is not known, the layout must be given, and sizes are measured.
    Raises ValueError when a file is missing or broken, the model is not known, or heads and kv_heads are not those of
    config.json.
    """
    if single == SAFETENSORS:
        tensors = single_or_indexed(folder, single, SafetensorsFile)
    else:
        tensors = single_or_indexed(folder, single, lambda path: tensors_alone(path, load_pickled(path, allow_pickle)))
    config_file = folder / "config.json"
    if not config_file.is_file():
        if layout is None:
            raise ValueError(f"{config_file} is missing; copy it here, or say what the weights are with --layout")
        chosen = find(layout)
        plan = measured_plan(chosen, tensors, 1, heads, kv_heads)
        return Opened("hf", folder, tensors.files, chosen, plan, [tensors])
    config = read_json(config_file)
    try:
        plan = replace(from_config(config), mlp_unit=1)
        chosen = find(layout) if layout else layout_of(config)
    except ValueError as error:
        if layout is None:
            raise ValueError(f"{config_file}: {error}") from None
        chosen = find(layout)
        log.info("%s: %s; sizes are measured", config_file, error)
        heads = heads or config.get("num_attention_heads")
        plan = measured_plan(chosen, tensors, 1, heads, kv_heads or config.get("num_key_value_heads"))
    for name, given, said in (("heads", heads, plan.heads), ("kv_heads", kv_heads, plan.kv_heads)):
        if given is not None and given != said:
            raise ValueError(f"{name}={given} given, but {config_file} says {said}; leave it out")
    plan = replace(plan, **contents(chosen, tensors))
    if _has_head(config, chosen) and all(chosen.match(name).native != "head.weight" for name in tensors):
        raise ValueError(
            f"{folder} lacks a head, and {config_file} does not tie it to the embedding; download it again"
        )
    return Opened("hf", folder, (config_file, *tensors.files), chosen, plan, [tensors])


def _has_head(config: dict[str, Any], layout: Layout) -> bool:
    """Whether the model has a head of its own, not the embedding once more. An encoder saved alone has none."""
    architecture = str((config.get("architectures") or ["ForCausalLM"])[0])
    causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    known = any(rule.native.startswith("head.") for rule in layout.rules)
    return causal and known and config.get("tie_word_embeddings") is False


def lay_out(logical: LogicalTensors, plan: ShardPlan, layout: Layout | None) -> Output:
    """A Hugging Face folder of safetensors, in shards of 5 GB, with the vocabulary that config.json speaks of.

    layout: None is the source's own, or the one that its config.json means.
    Raises ValueError when plan is cut, the layout is not known, or it has no place for a tensor.
    """
    source = origin(logical)
    plan = replace(even_plan("hf", logical, plan), vocab_size=config_vocab_rows(logical))
    layout = layout or _own_layout(logical, source)
    prefixed = source.prefixed_in(layout)
    shards: list[list[OutputTensor]] = [[]]
    for tensor in tensors_of(logical, logical.names(), layout, prefixed, plan, 0):
        if shards[-1] and sum(held.nbytes for held in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    names = [SAFETENSORS]
    texts, copies = beside(logical)
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        texts[f"{SAFETENSORS}.index.json"] = json.dumps(index, indent=2) + "\n"
    files = tuple(
        OutputFile(name, 0, tuple(shard), header={"format": "pt"}) for name, shard in zip(names, shards, strict=True)
    )
    return Output("hf", plan, files, texts, copies, manifest("hf", logical, source, plan))


def _own_layout(logical: LogicalTensors, source: Origin) -> Layout:
    if not source.layout.name.startswith(("megatron", "deepspeed", "native")):
        return source.layout
    if (config := config_of(logical)) is None:
        raise ValueError(
            f"{logical.checkpoint.path} has layout {source.layout.name!r} and no config.json that says which Hugging "
            "Face model it is; name its layout with --target-layout, or put the config.json there"
        )
    return layout_of(config)
