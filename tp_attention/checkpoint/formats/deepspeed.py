"""DeepSpeed's JSON checkpoints: a file that lists weight files, for DeepSpeed's inference engine.

    type             "Megatron": Megatron's files, one a rank. "ds_model" or "BLOOM": a Hugging Face model's.
    checkpoints      files, or {"tp": files, "non_tp": files}
    parallelization  "pp" (default): the files are the model's own, each holds some of its tensors. "tp": cut for
                     tp_size ranks, files of one part of the model after another; layers have DeepSpeed's names
    mp_size, tp_size ranks; base_dir: where the files are; version: of Megatron's packing
    layout           ours alone: which of DeepSpeed's layouts the files have
Of a "tp" checkpoint only layers are cut; each rank uses the rest whole. Weights of layers may be pairs of a weight and
its scales, of which those of int8 weights, always [out, in], mean something.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tp_attention.checkpoint.deepspeed_int8 import PARALLEL, group_scales
from tp_attention.checkpoint.deepspeed_merge import with_scales
from tp_attention.checkpoint.dimensions import from_config, layout_of
from tp_attention.checkpoint.families import LAYOUTS, find
from tp_attention.checkpoint.formats import megatron
from tp_attention.checkpoint.formats.files import Joined, load_pickled, read_json, tensors_alone
from tp_attention.checkpoint.formats.measure import contents, measured_plan
from tp_attention.checkpoint.formats.opened import Opened, Origin, layout_named, name_of, origin
from tp_attention.checkpoint.formats.output import Output, OutputFile
from tp_attention.checkpoint.formats.targets import beside, config_vocab_rows, even_plan, manifest, tensors_of
from tp_attention.checkpoint.layouts import Layout
from tp_attention.checkpoint.logical import LogicalTensors
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
    cut, shared, tp = _listed(path, said)
    if (parallel := said.get("parallelization", "pp")) not in ("pp", "tp"):
        raise ValueError(f"{path} has parallelization {parallel!r}; known: pp, tp")
    if kind == "Megatron":
        if tp != len(cut):
            raise ValueError(f"{path} lists {len(cut)} files for mp_size={tp}; there must be one a rank")
        version = said.get("version")
        if version is not None and type(version) not in (int, float):
            raise ValueError(f"{path} is of version {version!r}; known: {', '.join(map(str, megatron.VERSIONS))}")
        opened = megatron.open_ranks(
            path, cut, layout, heads, kv_heads, allow_pickle, format="deepspeed", version=version
        )
        return replace(opened, files=(path, *opened.files), metadata={**opened.metadata, "deepspeed": "Megatron"})
    loaded = {file: load_pickled(file, allow_pickle) for file in (*cut, *shared)}
    if parallel == "pp":
        return _whole_model(path, loaded, layout)
    if layout is None and kind == "BLOOM":
        raise ValueError(
            f"{path}: DeepSpeed keeps BLOOM's own order of q, k and v when it cuts, other models it reorders; "
            "say what these files are with --layout"
        )
    if len(cut) % tp:
        raise ValueError(f"{path} lists {len(cut)} files for {tp} ranks, no multiple; copy the others too")
    # The files of one part of the model follow one another, rank by rank.
    ranks = [{file: loaded[file] for file in (*cut[rank::tp], *shared)} for rank in range(tp)]
    try:
        chosen = find(layout) if layout else layout_named(said["layout"]) if "layout" in said else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    opened = _cut_model(path, ranks, chosen, heads, kv_heads)
    return replace(opened, files=(path, *loaded), metadata={"deepspeed": kind})


def _listed(path: Path, said: dict[str, Any]) -> tuple[list[Path], list[Path], int]:
    """The files that are cut, those that are not, and the number of ranks that a checkpoint's JSON speaks of."""
    if not isinstance(folder := said.get("base_dir") or "", str):
        raise ValueError(f"{path} has base_dir {folder!r}, which is no folder's name")
    base = path.parent / folder
    listed = said.get("checkpoints")
    by_kind: dict[str, Any] = listed if isinstance(listed, dict) else {"tp": listed}
    names: list[Any] = [by_kind.get("tp"), by_kind.get("non_tp", [])]
    if not all(isinstance(some, list) and all(isinstance(name, str) for name in some) for some in names):
        raise ValueError(f"{path}: its checkpoints are {listed!r}, neither files nor tp and non_tp files")
    cut, shared = ([base / name for name in some] for some in names)
    if not cut:
        raise ValueError(f"{path} lists no files")
    if twice := [str(file) for file in cut if cut.count(file) > 1]:
        raise ValueError(f"{path} lists {twice[0]} twice; each rank has its own")
    tp = said.get("mp_size") or said.get("tp_size") or len(cut)
    if type(tp) is not int or tp < 1:  # nor True
        raise ValueError(f"{path} is for {tp!r} ranks; it should be a number, at least 1")
    return cut, shared, tp


def _whole_model(path: Path, loaded: Mapping[Path, dict[str, Any]], layout: str | Path | None) -> Opened:
    """A checkpoint that is cut into files, not over ranks."""
    tensors = Joined({file: tensors_alone(file, held) for file, held in loaded.items()})
    config = read_json(path.parent / "config.json")
    chosen = find(layout) if layout else layout_of(config)
    plan = replace(from_config(config), mlp_unit=1, **contents(chosen, tensors))
    return Opened("deepspeed", path, (path, *loaded), chosen, plan, [tensors])


def _cut_model(
    path: Path,
    loaded: Sequence[Mapping[Path, dict[str, Any]]],
    layout: Layout | None,
    heads: int | None,
    kv_heads: int | None,
) -> Opened:
    """A checkpoint cut over ranks. loaded: what each rank's files hold."""
    pairs = [{file: _in_pairs(held) for file, held in mine.items()} for mine in loaded]
    ranks = [Joined({file: tensors_alone(file, held) for file, (held, _) in mine.items()}) for mine in pairs]
    scales = [{name: scale for _, found in mine.values() for name, scale in found.items()} for mine in pairs]
    config_file = path.parent / "config.json"
    config = read_json(config_file) if config_file.is_file() else None
    chosen = layout or _own_layout(ranks[0], config)
    if any(scales):
        chosen = _out_by_in(path, ranks, scales, chosen)
    uncut = frozenset(name for name in ranks[0] if not chosen.match(name).native.startswith("layers."))
    if heads is None and config is not None:
        sizes = from_config(config)
        heads, kv_heads = sizes.heads, sizes.kv_heads
    plan = measured_plan(chosen, ranks[0], len(ranks), heads, kv_heads, uncut=uncut)
    rows = {name for name in uncut if set(chosen.match(name).packing.parts) & {"vocab", "head"}}
    views: Sequence[Mapping[str, Tensor]] = [
        _VocabularyViews(held, rows, plan.vocab_rows(rank)) for rank, held in enumerate(ranks)
    ]
    if any(scales):
        views, chosen = _int8(path, views, scales, chosen)
    return Opened("deepspeed", path, (), chosen, plan, views)


def _own_layout(names: Iterable[str], config: dict[str, Any] | None) -> Layout:
    """Split weights have other names than merged ones; whether the MLP is gated, only the model's config says."""
    kind = "deepspeed-split" if any(name.endswith(".attn_qw") for name in names) else "deepspeed-merged"
    if config is None:
        raise ValueError(f"no config.json says what model it is; copy it here, or pass --layout {kind} or {kind}-gated")
    gated = any("gate" in rule.packing.parts for rule in layout_of(config).rules)
    return LAYOUTS[kind + "-gated" if gated else kind]


def _in_pairs(loaded: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's weights without their scales, and the scales of int8 ones; those of others mean nothing."""
    weights, scales = dict(loaded), {}
    for name, value in loaded.items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(tensor, Tensor) for tensor in value):
            weights[name] = value[0]
            if value[0].dtype == torch.int8:
                scales[name] = value[1]
    return weights, scales


def _out_by_in(
    path: Path, ranks: Sequence[Mapping[str, Tensor]], scales: Sequence[Mapping[str, Tensor]], layout: Layout
) -> Layout:
    """`layout` for int8 weights, none of which is [in, out]. Raises ValueError when not all weights of layers are."""
    for tensors, mine in zip(ranks, scales, strict=True):
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and name not in mine and layout.match(name).native.startswith("layers."):
                raise ValueError(f"{path}: {name} is {tensor.dtype}, other weights are int8; all must be, or none")
    rules = (replace(rule, packing=replace(rule.packing, transposed=False)) for rule in layout.rules)
    return replace(layout, rules=tuple(rules))


def _int8(
    path: Path, ranks: Sequence[Mapping[str, Tensor]], scales: Sequence[Mapping[str, Tensor]], layout: Layout
) -> tuple[list[dict[str, Tensor]], Layout]:
    """The ranks' tensors with our form of `scales`, [runs, 3] by name: of the weight, then of halves of its rows.

    Raises ValueError where they are no scales of the rank's own rows.
    """
    ours: list[dict[str, Tensor]] = [{} for _ in ranks]
    for tensors, theirs, mine in zip(ranks, scales, ours, strict=True):
        for name, scale in theirs.items():
            runs, packing, shape = len(scale), layout.match(name).packing, tensors[name].shape
            try:
                # DeepSpeed cuts weights that it has quantised, and gives each rank the scales of all rows.
                if len(ranks) > 1 and packing.dim == 0 and runs > shape[0]:
                    raise ValueError(f"{runs} scales for {shape[0]} rows are those of other ranks too, in some order")
                mine[name] = group_scales(scale.reshape(-1)[:runs], runs, 1, shape, PARALLEL[packing.dim])
            except ValueError as error:
                raise ValueError(
                    f"{path}: {name}: {error}; save the model in fp16 or bf16 and --quantize that"
                ) from None
    return with_scales(ranks, ours, layout)


@dataclass(frozen=True)
class _VocabularyViews(Mapping[str, Tensor]):
    """A rank's tensors; of those in `names`, which it holds whole, the rows that a rank has elsewhere."""

    tensors: Mapping[str, Tensor]
    names: Set[str]
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
    plan = replace(even_plan("deepspeed", logical, plan), vocab_size=config_vocab_rows(logical))
    if layout is None:
        gated = any("gate" in logical.parts(native) for native in logical.names())
        merged = LAYOUTS["deepspeed-merged-gated" if gated else "deepspeed-merged"]
        layout = source.layout if source.layout.name.startswith("deepspeed") else merged
    named = name_of(layout)
    layout = _inside(layout, source, logical)
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
    same = [{(rule.name, rule.native, rule.packing) for rule in either.rules} for either in (layout, source.layout)]
    if same[0] == same[1]:
        return source.layout
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
