"""Our own form: a safetensors file for each rank and a manifest, tp_attention.json, that says all about them.

A rank's file holds our names in our packing, as a rank of TPSelfAttention does; any plan goes. Each file's header says
whose it is, so that a file of another rank, cut or source does not pass for it. The manifest:

    format, version   "tp_attention", 1
    plan              ShardPlan's fields
    source            format, layout and prefix of the foreign form that the tensors came in first
    tensors           by name: dtype, packing, and shape of the whole
    files             by file: rank, bytes, and sha256 by tensor
    metadata          what else must survive
It is written last: a folder without it is no checkpoint. Opening checks sizes and metadata, and hashes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tp_attention.checkpoint.formats.files import SafetensorsFile, check_name, read_json
from tp_attention.checkpoint.formats.opened import Opened, origin, source_hash
from tp_attention.checkpoint.formats.output import Output, OutputFile, OutputTensor
from tp_attention.checkpoint.formats.targets import beside, manifest
from tp_attention.checkpoint.layouts import Layout, Match, native_packing, packing_to_json
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.checkpoint.packing import Packing
from tp_attention.checkpoint.quantization import check_cut
from tp_attention.sharding import ShardPlan

MANIFEST = "tp_attention.json"
VERSION = 1


@dataclass(frozen=True)
class NativeLayout(Layout):
    """Our own names; each tensor is packed as the manifest says."""

    packings: Mapping[str, Packing] = field(default_factory=dict)

    def match(self, name: str) -> Match:
        """The tensor of that name. Raises ValueError when the manifest does not list it."""
        if name not in self.packings:
            raise ValueError(f"the manifest does not list the tensor {name!r}; it would be lost, so it is refused")
        return Match(name, self.packings[name])

    def tensors_for(self, native: str, parts: set[str], prefixed: bool = True) -> list[tuple[str, Packing]]:
        """The tensor itself."""
        return [(native, self.packings.get(native) or native_packing(parts))]


def rank_file(rank: int, tp: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}-of-{tp:05d}.safetensors"


def lay_out(logical: LogicalTensors, plan: ShardPlan) -> Output:
    """The native form of a checkpoint, cut by `plan`; its manifest lacks "files", which are known once written.

    Raises ValueError with the legal tp when the cut divides a quantisation group.
    """
    check_cut(logical, plan)
    plan = replace(plan, vocab_size=logical.vocab_rows)
    source, whole = origin(logical), replace(plan, tp=1)
    packings = {native: logical.packing(native) for native in logical.names()}
    said = manifest("tp_attention", logical, source, plan)
    said["tensors"] = {
        native: {
            "dtype": str(logical.dtype(native)).removeprefix("torch."),
            "packing": packing_to_json(packing),
            "shape": list(logical.shape(native, packing, whole, 0)),
        }
        for native, packing in packings.items()
    }
    said["source"]["hash"] = source_hash(getattr(logical.checkpoint, "files", ()))
    files = tuple(
        OutputFile(
            rank_file(rank, plan.tp),
            rank,
            tuple(
                OutputTensor(name, name, packing, logical.dtype(name), logical.shape(name, packing, plan, rank))
                for name, packing in packings.items()
            ),
            header=_header(said, rank),
        )
        for rank in range(plan.tp)
    )
    return Output("native", plan, files, *beside(logical), said)


def _header(said: dict[str, Any], rank: int) -> dict[str, str]:
    layout, plan = said["source"]["layout"], said["plan"]
    return {
        "format": said["format"],
        "version": str(said["version"]),
        "layout": layout if isinstance(layout, str) else layout["name"],
        **{key: str(plan[key]) for key in ("heads", "kv_heads", "head_dim", "tp")},
        "rank": str(rank),
        "source": said["source"]["hash"],
    }


def open_native(folder: Path) -> Opened:
    """The checkpoint in `folder`. Raises ValueError when a file is missing, of another size or another checkpoint's."""
    file = folder / MANIFEST
    said = read_json(file)
    if said.get("format") != "tp_attention" or said.get("version") != VERSION:
        raise ValueError(
            f"{file} is of format {said.get('format')!r} version {said.get('version')!r}; "
            f"this program reads 'tp_attention' version {VERSION}"
        )
    try:
        try:
            plan = ShardPlan(**said["plan"])
            packings = {name: Packing(**tensor["packing"]) for name, tensor in said["tensors"].items()}
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        for name in said["files"]:
            check_name(name, file)
        wanted = {folder / name: entry for name, entry in said["files"].items()}
        ranks = {entry["rank"]: path for path, entry in wanted.items()}
        # vocab_size is of files that pad their vocabulary, which these do not
        metadata = {**said["metadata"], "source": said["source"]}
        metadata.pop("vocab_size", None)
        if lacking := sorted(set(range(plan.tp)) - ranks.keys()):
            raise ValueError(f"{file} names no file of rank {lacking[0]} of {plan.tp}; reshard again")
        if len(wanted) != plan.tp:
            raise ValueError(f"{file} names {len(wanted)} files for {plan.tp} ranks; reshard again")
        opened = []
        for rank in range(plan.tp):
            size = wanted[ranks[rank]]["bytes"]
            opened.append(_rank(ranks[rank], size, _header(said, rank), said["tensors"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no manifest of this version: {error!r} is wrong with it") from None
    layout = NativeLayout("native", (), packings=packings)
    files = (file, *(ranks[rank] for rank in range(plan.tp)))
    return Opened("native", folder, files, layout, plan, opened, metadata)


def _rank(path: Path, size: int, header: dict[str, str], tensors: Mapping[str, Any]) -> Mapping[str, Tensor]:
    if not isinstance(size, int):
        raise TypeError(f"bytes of {path.name}")
    if path.is_file() and path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, the manifest says {size:,}; copy it again")
    file = SafetensorsFile(path)
    for key, value in header.items():
        if file.header.get(key) != value:
            raise ValueError(
                f"{path} is not the file that the manifest means: its {key} is {file.header.get(key)!r}, not {value!r}"
            )
    if file.keys() != tensors.keys():
        name = min(file.keys() ^ tensors.keys())
        raise ValueError(f"{path}: tensor {name!r} is in the {'file' if name in file else 'manifest'} alone")
    return file
