"""DeepSpeed's JSON checkpoints: a file that lists weight files, for DeepSpeed's inference engine.

    type             "Megatron": Megatron's files, one a rank. "ds_model" or "BLOOM": a Hugging Face model's.
    checkpoints      files, or {"tp": files, "non_tp": files}
    parallelization  "pp" (default): the files are the model's own, each holds some of its tensors. "tp": cut for
                     tp_size ranks, files of one part of the model after another; layers have DeepSpeed's names
    mp_size, tp_size ranks; base_dir: where the files are; version: of Megatron's packing
    layout           ours alone: which of DeepSpeed's layouts the files have
Of a "tp" checkpoint only layers are cut; each rank uses the rest whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tp_attention.checkpoint.dimensions import from_config, layout_of
from tp_attention.checkpoint.families import LAYOUTS, find
from tp_attention.checkpoint.formats import megatron
from tp_attention.checkpoint.formats.files import Joined, pickled_tensors, read_json
from tp_attention.checkpoint.formats.measure import contents, measured_plan
from tp_attention.checkpoint.formats.opened import Opened, Origin, layout_named, name_of, origin
from tp_attention.checkpoint.formats.output import Output, OutputFile
from tp_attention.checkpoint.formats.targets import beside, config_vocab_rows, even_plan, manifest, tensors_of
from tp_attention.checkpoint.layouts import Layout
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.checkpoint.packing import Packing
from tp_attention.sharding import Range, ShardPlan

NAME = "ds_inference_config.json"
TYPES = ("Megatron", "ds_model", "BLOOM")


def open_json(
    path: Path, layout: str | Path | None, heads: int | None, kv_heads: int | None, allow_pickle: bool
) -> Opened:
    """The checkpoint that the JSON file `path` lists.

    Raises ValueError when the JSON is not of this kind, or a file is missing, broken or does not say what it must.
    """
    said = read_json(path)
    kind = next((known for known in TYPES if known.lower() == str(said.get("type")).lower()), None)
    if kind is None:
        raise ValueError(f"{path} is of type {said.get('type')!r}; known: {', '.join(TYPES)}")
    base = path.parent / said.get("base_dir", "")
    listed = said.get("checkpoints")
    by_kind: dict[str, Any] = listed if isinstance(listed, dict) else {"tp": listed}
    try:
        cut, shared = [base / file for file in by_kind["tp"]], [base / file for file in by_kind.get("non_tp", ())]
    except (KeyError, TypeError):
        raise ValueError(f"{path}: its checkpoints are {listed!r}, neither files nor tp and non_tp files") from None
    if not cut:
        raise ValueError(f"{path} lists no files")
    tp = said.get("mp_size") or said.get("tp_size") or len(cut)
    if kind == "Megatron":
        if tp != len(cut):
            raise ValueError(f"{path} lists {len(cut)} files for mp_size={tp}; there must be one a rank")
        version = said.get("version")
        opened = megatron.open_ranks(
            path, cut, layout, heads, kv_heads, allow_pickle, format="deepspeed", version=version
        )
        return replace(opened, files=(path, *opened.files), metadata={**opened.metadata, "deepspeed": "Megatron"})
    tensors = {file: pickled_tensors(file, allow_pickle) for file in (*cut, *shared)}
    if said.get("parallelization", "pp") == "pp":
        return _whole_model(path, Joined(tensors), (path, *tensors), layout)
    if layout is None and kind == "BLOOM":
        raise ValueError(
            f"{path}: DeepSpeed keeps BLOOM's own order of q, k and v when it cuts, other models it reorders; "
            "say what these files are with --layout"
        )
    if len(cut) % tp:
        raise ValueError(f"{path} lists {len(cut)} files for {tp} ranks, no multiple; copy the others too")
    config_file = path.parent / "config.json"
    config = read_json(config_file) if config_file.is_file() else None
    if layout is not None:
        chosen = find(layout)
    else:
        chosen = layout_named(said["layout"]) if "layout" in said else _own_layout(tensors[cut[0]], config)
    chosen = _vocabulary_cut(chosen)
    # The files of one part of the model follow one another, rank by rank.
    ranks = [Joined({file: tensors[file] for file in (*cut[rank::tp], *shared)}) for rank in range(tp)]
    uncut = frozenset(name for name in ranks[0] if not chosen.match(name).native.startswith("layers."))
    if heads is None and config is not None:
        sizes = from_config(config)
        heads, kv_heads = sizes.heads, sizes.kv_heads
    plan = measured_plan(chosen, ranks[0], tp, heads, kv_heads, uncut=uncut)
    rows = {name: part for name in uncut for part in chosen.match(name).packing.parts if part in ("vocab", "head")}
    views = [_VocabularyViews(held, rows, plan.vocab_rows(rank)) for rank, held in enumerate(ranks)]
    return Opened("deepspeed", path, (path, *tensors), chosen, plan, views, {"deepspeed": kind})


def _own_layout(names: Iterable[str], config: dict[str, Any] | None) -> Layout:
    """Split weights have other names than merged ones; whether the MLP is gated, only the model's config says."""
    kind = "deepspeed-split" if any(name.endswith(".attn_qw") for name in names) else "deepspeed-merged"
    gated = config is not None and any("gate" in rule.packing.parts for rule in layout_of(config).rules)
    return LAYOUTS[kind + "-gated" if gated else kind]


def _whole_model(path: Path, tensors: Joined, files: tuple[Path, ...], layout: str | Path | None) -> Opened:
    config = read_json(path.parent / "config.json")
    chosen = find(layout) if layout else layout_of(config)
    plan = replace(from_config(config), mlp_unit=1, **contents(chosen, tensors))
    return Opened("deepspeed", path, files, chosen, plan, [tensors])


def _vocabulary_cut(layout: Layout) -> Layout:
    """`layout` with embedding and head seen by rows, as all others have them; here no file cuts them."""
    rows = {"embedding.weight": "vocab", "head.weight": "head", "head.{kind}": "head"}
    rules = (replace(r, packing=Packing((rows[r.native],))) if r.native in rows else r for r in layout.rules)
    return replace(layout, rules=tuple(rules))


@dataclass(frozen=True)
class _VocabularyViews(Mapping[str, Tensor]):
    """A rank's tensors; of those in `names`, which it holds whole, the rows that a rank has elsewhere."""

    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    rows: Range

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor[slice(*self.rows)] if name in self.names else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def lay_out(logical: LogicalTensors, plan: ShardPlan, layout: Layout | None) -> Output:
    """A DeepSpeed checkpoint: type Megatron of a Megatron source or layout, else ds_model with its merged layout.

    It names no base_dir, which would be this machine's: DeepSpeed takes init_inference's, or where it is started.

    Raises ValueError when the cut is uneven or the layout has no place for a tensor.
    """
    source = origin(logical)
    if (layout or source.layout).name.startswith("megatron"):
        output = megatron.lay_out(logical, plan, layout, format="deepspeed")
        said = {"type": "Megatron", "checkpoints": [file.path for file in output.files], "mp_size": plan.tp}
        chosen = layout or source.layout
        said["version"] = next((v for v, name in megatron.VERSIONS.items() if chosen.name.startswith(name)), 3.0)
        return replace(output, texts={**output.texts, NAME: _text({**said, "parallelization": "tp"})})
    plan = replace(even_plan("deepspeed", plan), vocab_size=config_vocab_rows(logical))
    if layout is None:
        gated = any("gate" in logical.parts(native) for native in logical.names())
        merged = LAYOUTS["deepspeed-merged-gated" if gated else "deepspeed-merged"]
        layout = source.layout if source.layout.name.startswith("deepspeed") else merged
    named = name_of(layout)
    layout = _inside(_vocabulary_cut(layout), source, logical)
    prefixed = source.prefixed_in(layout)
    layers = [native for native in logical.names() if native.startswith("layers.")]
    others = [native for native in logical.names() if not native.startswith("layers.")]
    files = [
        OutputFile(f"tp_{rank:02d}_00.pt", rank, tensors_of(logical, layers, layout, prefixed, plan, rank), nest=dict)
        for rank in range(plan.tp)
    ]
    whole = replace(plan, tp=1)
    shared = tensors_of(logical, others, layout, prefixed, whole, 0)
    files.append(OutputFile("non-tp.pt", 0, shared, nest=dict, plan=whole))
    said = {
        "type": "ds_model",
        "checkpoints": {"tp": [file.path for file in files[:-1]], "non_tp": ["non-tp.pt"]},
        "version": 1.0,
        "parallelization": "tp",
        "tp_size": plan.tp,
        "layout": named,
    }
    texts, copies = beside(logical)
    texts[NAME] = _text(said)
    return Output("deepspeed", plan, tuple(files), texts, copies, manifest("deepspeed", logical, source, plan))


def _inside(layout: Layout, source: Origin, logical: LogicalTensors) -> Layout:
    """`layout` with the names that the source's model has around DeepSpeed's layers: "gpt_neox.layers.", say."""
    if source.layout.name == layout.name:
        return layout.spelled_like(name for rule in source.layout.rules for name in _examples(rule.name))
    named = [
        (native, name)
        for native in logical.names()
        for name, _ in source.layout.tensors_for(native, logical.parts(native), source.prefixed)
    ]
    roots = {name.partition(f".{native.split('.')[1]}.")[0] for native, name in named if native.startswith("layers.")}
    examples = [name for rule in layout.rules for name in _examples(rule.name)]
    inside = [name for name in examples if name.partition(".0.")[0] in roots]
    return layout.spelled_like([*inside, *(name for native, name in named if not native.startswith("layers."))])


def _examples(template: str) -> list[str]:
    """Names that a rule's template stands for, of layer 0, with and without its prefix."""
    filled = template.replace("{layer}", "0").replace("{kind}", "weight")
    if not filled.startswith("["):
        return [filled]
    prefix, rest = filled[1:].split("]", 1)
    return [prefix + rest, rest]


def _text(said: dict[str, Any]) -> str:
    return json.dumps(said, indent=2) + "\n"
