"""Megatron-LM's checkpoints: mp_rank_XX/model_optim_rng.pt, or DeepSpeed's flat mp_rank_XX_model_states.pt.

The version in the file says how q, k and v are packed, and its arguments, where they are there, how many heads there
are. Weights alone are kept: an optimizer's state and random states belong to the run that wrote them.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tp_attention.checkpoint.families import LAYOUTS, find
from tp_attention.checkpoint.formats.files import load_pickled, plain
from tp_attention.checkpoint.formats.measure import measured_plan
from tp_attention.checkpoint.formats.opened import Opened, origin
from tp_attention.checkpoint.formats.output import Output, OutputFile
from tp_attention.checkpoint.formats.targets import beside, even_plan, manifest, tensors_of
from tp_attention.checkpoint.layouts import Layout
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.sharding import ShardPlan

log = logging.getLogger("tp_attention")

TRACKER = "latest_checkpointed_iteration.txt"
VERSIONS = {0: "megatron-0", 1.0: "megatron-1.0", 2.0: "megatron-2.0", 3.0: "megatron-3.0"}
# Dictionaries inside a classic checkpoint, where the source does not show them.
CLASSIC = [
    ["language_model"],
    ["language_model", "embedding"],
    *(["language_model", "embedding", f"{kind}_embeddings"] for kind in ("word", "position", "tokentype")),
    *(["language_model", part] for part in ("encoder", "transformer", "output_layer", "pooler")),
    ["word_embeddings_for_head"],
]


def rank_files(folder: Path) -> list[Path]:
    """The files of a Megatron checkpoint by rank, below `folder` or the iteration that it names; [] if it is none.

    Raises ValueError when ranks are missing or the model is cut over pipeline stages or experts too.
    """
    if (folder / TRACKER).is_file():
        said = (folder / TRACKER).read_text(errors="replace").strip()
        if not said or Path(said).name != said:
            raise ValueError(f"{folder / TRACKER} says {said!r}; it should be the newest iteration, or release")
        folder = folder / (f"iter_{int(said):07d}" if said.isdecimal() else said)
        if not folder.is_dir():
            raise ValueError(f"{folder} is missing, which {TRACKER} says is the newest; copy it too")
    found: dict[int, Path] = {}
    for entry in folder.glob("mp_rank_*"):
        match = re.fullmatch(r"mp_rank_(\d+)(_model_states\.pt)?", entry.name)
        if match is None:
            raise ValueError(
                f"{entry} is a part of a model cut over pipeline stages or experts too; only tensor parallel "
                "checkpoints are read, mp_rank_XX: merge the stages first"
            )
        files = [entry] if match[2] else sorted(entry.glob("model*_rng.pt"))
        if len(files) != 1:
            raise ValueError(f"{entry} has {len(files)} files model_optim_rng.pt or model_rng.pt; it should have one")
        if (other := found.setdefault(int(match[1]), files[0])) != files[0]:
            raise ValueError(f"{other} and {files[0]} are both of rank {int(match[1])}; remove one")
    if lacking := sorted(set(range(max(found, default=-1) + 1)) - found.keys()):
        raise ValueError(f"{folder} has {len(found)} mp_rank files but none of rank {lacking[0]}; copy it again")
    return [found[rank] for rank in range(len(found))]


def open_ranks(
    path: Path,
    files: list[Path],
    layout: str | Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    allow_pickle: bool = False,
    *,
    format: str = "megatron",
    version: float | None = None,
) -> Opened:
    """The checkpoint whose ranks are `files`. heads, kv_heads, version: where not None, instead of what the files say.

    Raises ValueError when files are broken, contradict one another, or do not say what must be known.
    """
    states = [load_pickled(file, allow_pickle) for file in files]
    key = _weights_key(states[0], files[0])
    versions = {_version(state) for state in states} if version is None else {version}
    if len(versions) > 1:
        raise ValueError(f"{path} has ranks of checkpoint versions {sorted(versions)}; they are of different runs")
    version = versions.pop()
    if version not in VERSIONS:
        raise ValueError(
            f"{path} is of checkpoint version {version}; known: {', '.join(map(str, VERSIONS))} (0: no version in it)"
        )
    args = _plain(states[0].get("args"))
    _check_ranks(path, len(files), args, states)
    nested = []
    ranks: list[Mapping[str, Tensor]] = []
    for file, state in zip(files, states, strict=True):
        if key not in state:
            raise ValueError(f"{file} lacks {key!r}, which the file of rank 0 has")
        tensors: dict[str, Tensor] = {}
        containers: list[list[str]] = []
        _flatten(state[key], [], tensors, containers, file)
        ranks.append(tensors)
        nested.append(containers)
    chosen = find(layout) if layout else _layout(version, ranks[0], args)
    heads = args.get("num_attention_heads") if heads is None else heads
    if kv_heads is None and args.get("group_query_attention"):
        kv_heads = args.get("num_query_groups")
    plan = measured_plan(chosen, ranks[0], len(files), heads, kv_heads)
    _check_sizes(path, args, plan)
    if plan.kv_heads % plan.tp:
        raise ValueError(
            f"{path} has kv_heads={plan.kv_heads} on tp={plan.tp} ranks: Megatron cuts inside a group there, "
            f"which is not read; write it at a tp that divides {plan.kv_heads} first"
        )
    left_out = sorted(states[0].keys() - {key, "args", "checkpoint_version", "iteration", "tp_attention"})
    if left_out:
        log.info("%s: weights alone are read; left out: %s", path, ", ".join(map(str, left_out)))
    metadata: dict[str, Any] = {"megatron": {"key": key, "containers": nested[0], "args": args}}
    if isinstance(states[0].get("iteration"), int):
        metadata["megatron"]["iteration"] = states[0]["iteration"]
    ours = states[0].get("tp_attention")
    if isinstance(ours, dict) and "vocab_size" in ours:
        real = metadata["vocab_size"] = ours["vocab_size"]
        if not isinstance(real, int) or not 0 <= plan.vocab_size - real < plan.tp:
            raise ValueError(
                f"{path} has {plan.vocab_size} rows of vocabulary on {plan.tp} ranks; {real!r} cannot be real"
            )
    return Opened(format, path, tuple(files), chosen, plan, ranks, metadata)


def _weights_key(state: dict[str, Any], file: Path) -> str:
    keys = [key for key in ("model", "module") if isinstance(state.get(key), Mapping)]
    if "model0" in state:
        raise ValueError(f"{file} holds virtual pipeline stages (model0, …); only tensor parallel checkpoints are read")
    if len(keys) != 1:
        held = ", ".join(map(str, list(state)[:8]))
        raise ValueError(f"{file} should hold its weights under one of 'model' and 'module'; it holds: {held}")
    return keys[0]


def _version(state: dict[str, Any]) -> float:
    version = state.get("checkpoint_version", 0)
    if type(version) not in (int, float):  # nor bool, which is an int
        raise ValueError(f"checkpoint_version is {version!r}; known: {', '.join(map(str, VERSIONS))}")
    return version


def _check_ranks(path: Path, count: int, args: dict[str, Any], states: list[dict[str, Any]]) -> None:
    if (stages := args.get("pipeline_model_parallel_size", 1)) != 1:
        raise ValueError(f"{path} is cut over {stages} pipeline stages; only tensor parallel checkpoints are read")
    for name, said in (
        ("tensor_model_parallel_size", args.get("tensor_model_parallel_size", count)),
        ("mp_world_size", states[0].get("mp_world_size", count)),
    ):
        if said != count:
            raise ValueError(f"{path} has the files of {count} ranks, its {name} is {said}; copy the others too")


def _check_sizes(path: Path, args: dict[str, Any], plan: ShardPlan) -> None:
    """Raises ValueError when Megatron's arguments say other sizes than the tensors have with these heads."""
    sizes = {
        "kv_channels": plan.head_dim,
        "hidden_size": plan.hidden_size,
        "ffn_hidden_size": plan.intermediate_size,
        "num_layers": plan.layers,
        "padded_vocab_size": plan.vocab_size,
    }
    for name, measured in sizes.items():
        if measured and (said := args.get(name)) not in (None, measured):
            raise ValueError(
                f"{path} says {name}={said}, its tensors have {measured} if they are of heads={plan.heads}; "
                "other head counts are given by --heads N --kv-heads N"
            )


def _plain(args: Any) -> dict[str, Any]:
    """Those of Megatron's arguments that JSON can hold."""
    values = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    found = {}
    for name, value in values.items():
        try:
            found[str(name)] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            log.info("Megatron's argument %s (%s) is not kept", name, type(value).__name__)
    return found


def _flatten(
    nested: Mapping[str, Any], path: list[str], tensors: dict[str, Tensor], containers: list[list[str]], file: Path
) -> None:
    for key, value in nested.items():
        here = [*path, str(key)]
        if isinstance(value, Mapping):
            containers.append(here)
            _flatten(value, here, tensors, containers, file)
        elif isinstance(value, Tensor):
            name = ".".join(here)
            if name in tensors:
                raise ValueError(f"{file} holds {name} twice")
            tensors[name] = plain(value, f"{file}: {name}")
        elif value is not None:
            log.info("%s: %s is a %s, not a tensor, and is left out", file, ".".join(here), type(value).__name__)


def _nested(tensors: Mapping[str, Tensor], containers: list[list[str]]) -> dict[str, Any]:
    """What `_flatten` flattened."""
    deepest = sorted(containers, key=len, reverse=True)
    root: dict[str, Any] = {}
    for name, tensor in tensors.items():
        path = next((path for path in deepest if name.startswith(".".join(path) + ".")), [])
        inner = root
        for key in path:
            inner = inner.setdefault(key, {})
        inner[name.removeprefix(".".join(path) + ".") if path else name] = tensor
    return root


def _layout(version: float, names: Mapping[str, Tensor], args: dict[str, Any]) -> Layout:
    """Megatron-core has names of its own; its arguments tell gated MLPs from others."""
    kind = "megatron-core" if any(".linear_qkv." in name for name in names) else VERSIONS[version]
    if args.get("attention_output_gate"):
        kind += "-output-gate"
    elif args.get("swiglu"):
        kind += "-gated"
    if kind not in LAYOUTS:
        raise ValueError(f"no layout {kind!r} ships for checkpoint version {version}; describe it as JSON for --layout")
    return LAYOUTS[kind]


def lay_out(logical: LogicalTensors, plan: ShardPlan, layout: Layout | None, *, format: str = "megatron") -> Output:
    """A Megatron checkpoint: of the source's layout where that is Megatron's, else of version 3.0.

    The vocabulary is padded with zeros to a multiple of tp; the file says how many rows are real.
    Raises ValueError when the cut is uneven or the layout has no place for a tensor.
    """
    plan = even_plan(format, logical, plan)
    source = origin(logical)
    said = logical.checkpoint.metadata.get("megatron", {})
    real = logical.vocab_rows
    padded = -(-real // plan.tp) * plan.tp
    plan = replace(plan, vocab_size=padded)
    gated = any("gate" in logical.parts(native) for native in logical.names())
    if layout is None:
        megatron = source.layout.name.startswith("megatron")
        layout = source.layout if megatron else LAYOUTS["megatron-3.0-gated" if gated else "megatron-3.0"]
    prefixed = source.prefixed_in(layout)
    core = layout.name.startswith("megatron-core")
    version = next((number for number, name in VERSIONS.items() if layout.name.startswith(name)), 3.0)
    args = {
        **said.get("args", {}),
        "num_layers": plan.layers,
        "hidden_size": plan.hidden_size,
        "ffn_hidden_size": plan.intermediate_size,
        "num_attention_heads": plan.heads,
        "kv_channels": plan.head_dim,
        "group_query_attention": plan.kv_heads != plan.heads,
        "num_query_groups": plan.kv_heads,
        "swiglu": gated,
        "padded_vocab_size": padded,
        "tensor_model_parallel_size": plan.tp,
        "pipeline_model_parallel_size": 1,
    }
    rest: dict[str, Any] = {"args": argparse.Namespace(**args)}
    if version:
        rest["checkpoint_version"] = version
    if "iteration" in said:
        rest["iteration"] = said["iteration"]
    if padded != real:
        rest["tp_attention"] = {"vocab_size": real}
    key, containers = said.get("key", "model"), said.get("containers", [] if core else CLASSIC)

    def nest(tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {key: _nested(tensors, containers), **rest}

    folder = f"iter_{said['iteration']:07d}" if "iteration" in said else "release"
    name = f"{folder}/mp_rank_{{:02d}}/model_optim_rng.pt" if format == "megatron" else "mp_rank_{:02d}_model_states.pt"
    files = tuple(
        OutputFile(
            name.format(rank),
            rank,
            tensors_of(logical, logical.names(), layout, prefixed, plan, rank),
            nest=nest,
        )
        for rank in range(plan.tp)
    )
    texts, copies = beside(logical)
    if format == "megatron":
        texts[TRACKER] = str(said.get("iteration", "release"))
    return Output(format, plan, files, texts, copies, manifest(format, logical, source, plan))
