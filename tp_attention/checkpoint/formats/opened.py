"""What every reader returns, and what all formats keep of a checkpoint beside its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tp_attention.checkpoint.families import LAYOUTS, find
from tp_attention.checkpoint.layouts import Layout, from_data, to_json
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.sharding import ShardPlan

# What makes a folder of weights a model: copied along as it is.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "*.tiktoken",
    "*.model",  # SentencePiece's
    "*.py",  # a remote-code model's
    "modules.json",  # this and the rest: a sentence encoder's, with its pooling and what follows that
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "[1-9]_*/*",
)


@dataclass
class Opened:
    """A Checkpoint of logical.py, opened from `path`.

    format: "native", "hf", "megatron", "deepspeed" or "gguf". files: all that was opened, so that a change of one can
    be noticed. ranks: each rank's tensors by name. texts: small files that belong to it but do not exist.
    """

    format: str
    path: Path
    files: tuple[Path, ...]
    layout: Layout
    plan: ShardPlan
    ranks: Sequence[Mapping[str, Tensor]]
    metadata: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def names(self, rank: int) -> list[str]:
        return list(self.ranks[rank])

    def tensor(self, rank: int, name: str) -> Tensor:
        return self.ranks[rank][name]


def companions(path: Path) -> dict[str, Path]:
    """The config, tokenizer and the like in a checkpoint's folder, by their path within it."""
    folder = path if path.is_dir() else path.parent
    files = {file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    return {file.relative_to(folder).as_posix(): file for file in sorted(files)}


@dataclass(frozen=True)
class Origin:
    """The foreign form that a checkpoint had first, which its native form remembers so that it can be given back."""

    format: str
    layout: Layout
    prefixed: bool

    def prefixed_in(self, layout: Layout) -> bool:
        """Whether `layout` should write its prefix: Hugging Face's and DeepSpeed's is the same, Megatron's another."""
        megatron = [name.startswith("megatron") for name in (layout.name, self.layout.name)]
        return self.prefixed if megatron[0] == megatron[1] else True


def origin(logical: LogicalTensors) -> Origin:
    """Where the tensors come from first: what the checkpoint's metadata remembers, or the checkpoint itself."""
    checkpoint = logical.checkpoint
    if (source := checkpoint.metadata.get("source")) is not None:
        return Origin(source["format"], layout_named(source["layout"]), source["prefixed"])
    # A layout that knows two spellings of a name writes the one that this checkpoint has.
    matches = {name: checkpoint.layout.match(name) for name in checkpoint.names(0)}
    parts: dict[str, set[str]] = {}
    for match in matches.values():
        parts.setdefault(match.native, set()).update(match.packing.parts)
    named = {
        name
        for native, held in parts.items()
        for name, _ in checkpoint.layout.tensors_for(native, held, logical.prefixed)
    }
    layout = checkpoint.layout if named == matches.keys() else checkpoint.layout.spelled_like(matches)
    return Origin(getattr(checkpoint, "format", "memory"), layout, logical.prefixed)


def origin_to_json(source: Origin) -> dict[str, Any]:
    """What `origin` reads, kept as metadata["source"]."""
    return {"format": source.format, "layout": name_of(source.layout), "prefixed": source.prefixed}


def name_of(layout: Layout) -> str | dict[str, Any]:
    """The layout's name where it ships, else its rules, as JSON."""
    return layout.name if LAYOUTS.get(layout.name) == layout else to_json(layout)


def layout_named(name: str | dict[str, Any]) -> Layout:
    """The layout that `name_of` named. Raises ValueError when no layout of that name ships, or it is none."""
    if isinstance(name, str):
        return find(name)
    try:
        return from_data(name)
    except ValueError as error:
        raise ValueError(f"the checkpoint's own layout is no layout: {error}") from None


def source_hash(files: Iterable[Path]) -> str:
    """SHA-256 over names, sizes and samples of `files`: tells checkpoints apart, and costs no reading of all."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for sample in range(64):  # two trainings of one model may share their first tensors
                stream.seek(size * sample // 64)
                digest.update(stream.read(1 << 15))
    return digest.hexdigest()
