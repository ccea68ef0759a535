"""Checkpoints on disk, a file for each format: what opens them, and what a written one consists of."""

from __future__ import annotations

from pathlib import Path

from tp_attention.checkpoint.formats import deepspeed, gguf, hugging_face, megatron, native
from tp_attention.checkpoint.formats.checks import check
from tp_attention.checkpoint.formats.files import read_json
from tp_attention.checkpoint.formats.opened import Opened
from tp_attention.checkpoint.formats.output import Output
from tp_attention.checkpoint.formats.targets import FORMATS, legal_tp
from tp_attention.checkpoint.layouts import Layout
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.sharding import ShardPlan

__all__ = ["FORMATS", "lay_out", "legal_tp", "open_checkpoint"]


def open_checkpoint(
    path: str | Path,
    *,
    layout: str | Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    allow_pickle: bool = False,
) -> Opened:
    """The checkpoint at `path`; which format it is, its files say.

    path: a folder (ours, Hugging Face's, Megatron's, or with DeepSpeed's ds_inference_config.json), a JSON file of
    DeepSpeed's, or a GGUF file. layout: a name that ships or a JSON file; None is what the checkpoint itself says.
    heads, kv_heads: of a checkpoint that does not say. allow_pickle: run the code that a file of torch.save names.
    Tensors are memory-mapped (GGUF's are not). Raises ValueError when there is no checkpoint, or something is missing,
    broken or not known.
    """
    if not str(path):
        raise ValueError("an empty path names no checkpoint; pass a folder or a file")
    path = Path(path).expanduser()
    try:
        checkpoint = _open(path, layout, heads, kv_heads, allow_pickle)
        check(checkpoint)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from None
    return checkpoint


def _open(path: Path, layout: str | Path | None, heads: int | None, kv_heads: int | None, allow_pickle: bool) -> Opened:
    if path.is_file():
        if path.suffix == ".gguf":
            return gguf.open_gguf(path, layout)
        if path.suffix == ".json" and "checkpoints" in read_json(path):
            return deepspeed.open_json(path, layout, heads, kv_heads, allow_pickle)
        raise ValueError(f"{path} is neither a GGUF file nor a JSON file of DeepSpeed's; of others pass the folder")
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; pass a checkpoint's folder, DeepSpeed's JSON file or a GGUF file")
    if (path / native.MANIFEST).is_file():
        if given := [name for name, value in (("layout", layout), ("heads", heads), ("kv_heads", kv_heads)) if value]:
            raise ValueError(f"{path} says itself what it is; leave {given[0]} out")
        return native.open_native(path)
    if single := hugging_face.weights_in(path):
        return hugging_face.open_folder(path, single, layout, heads, kv_heads, allow_pickle)
    if (path / deepspeed.NAME).is_file():
        return deepspeed.open_json(path / deepspeed.NAME, layout, heads, kv_heads, allow_pickle)
    if files := megatron.rank_files(path):
        return megatron.open_ranks(path, files, layout, heads, kv_heads, allow_pickle)
    models = sorted(path.glob("*.gguf"))
    if len(models) == 1:
        return gguf.open_gguf(models[0], layout)
    if models:
        raise ValueError(
            f"{path} has {len(models)} GGUF files; pass one: {', '.join(file.name for file in models[:5])}"
        )
    if any(path.glob("rank-*-of-*.safetensors")):
        raise ValueError(f"{path} has rank files but no {native.MANIFEST}: its writing was cut off; reshard again")
    raise ValueError(
        f"{path} is no checkpoint: it has none of {native.MANIFEST}, {hugging_face.SAFETENSORS}, "
        f"{hugging_face.PICKLED} (or their .index.json), {deepspeed.NAME}, {megatron.TRACKER}, mp_rank_*, *.gguf"
    )


def lay_out(format: str, logical: LogicalTensors, plan: ShardPlan, *, layout: Layout | None = None) -> Output:
    """What the checkpoint consists of when it is written as `format`, cut by `plan`; nothing is written yet.

    layout: how a foreign format names and packs; None is the source's own where that is of this format.
    Raises ValueError for an unknown format, a cut that it cannot hold, and a tensor that it has no place for.
    """
    if format == "native":
        if layout is not None:
            raise ValueError(f"the native form has one layout; layout {layout.name!r} is for --format hf and others")
        return native.lay_out(logical, plan)
    writers = {"hf": hugging_face.lay_out, "megatron": megatron.lay_out, "deepspeed": deepspeed.lay_out}
    if format not in writers:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    return writers[format](logical, plan, layout)
