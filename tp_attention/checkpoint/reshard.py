"""Turns a checkpoint cut for some number of ranks into one for another: plan, write aside, verify, rename.

Everything is written in DST.partial beside DST and renamed at the end, so DST is whole or not there. A run that was
killed goes on where it was when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tp_attention.checkpoint.families import find
from tp_attention.checkpoint.formats import lay_out, legal_tp, open_checkpoint
from tp_attention.checkpoint.formats.native import MANIFEST as NATIVE_MANIFEST
from tp_attention.checkpoint.formats.output import Output, OutputFile
from tp_attention.checkpoint.journal import Journal, tidy
from tp_attention.checkpoint.logical import LogicalTensors
from tp_attention.checkpoint.quantization import Quantized, native_plan
from tp_attention.checkpoint.verify import MANIFEST, compare, forget_cached, hashes, leaves
from tp_attention.checkpoint.verify_forward import compare as compare_forward
from tp_attention.checkpoint.writing import Progress, Writer, file_bytes, workers_for, write_small


@dataclass(frozen=True)
class Report:
    """What a reshard wrote, or would write.

    files: bytes by path. peak_memory: bytes of the workers' buffers. legal_tp: what this source can be cut for.
    resumed: bytes of tensors that an earlier, killed run had written. notes: what was verified, a line each.
    """

    destination: Path
    format: str
    tp: int
    files: dict[str, int]
    tensors: int
    workers: int
    peak_memory: int
    legal_tp: list[int]
    written: bool = False
    seconds: float = 0.0
    resumed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())


def reshard(
    source: str | Path,
    destination: str | Path,
    tp: int,
    *,
    format: str = "native",
    layout: str | Path | None = None,
    target_layout: str | Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    max_memory: int | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    verify: bool = False,
    verify_forward: bool = False,
    allow_pickle: bool = False,
    quantize: bool = False,
    group_size: int = 128,
    requantize: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the checkpoint `source`, cut for `tp` ranks, as the new folder `destination`.

    format: "native" (any tp up to the number of heads), or "hf", "megatron", "deepspeed" (even cuts).
    layout: how the source packs its weights, where its files do not say: a name or a layout's .json file.
    target_layout: the same of the destination, where it is not the source's. heads, kv_heads: where no file says.
    max_memory: bytes for the workers' buffers, each of the largest tensor. workers: threads, at most 4 by default.
    dry_run: say what would be written; write nothing. verify: hash the source, read the destination back from disk,
    and compare both ways. verify_forward: run attention and MLP at both cuts and compare. allow_pickle: unpickle files
    that need it, which runs code in them. quantize: weights to int8, group_size columns to a scale. requantize: of
    an int8 source, make new groups. progress: called with bytes done and bytes in all.

    Raises ValueError for whatever is wrong with arguments or source; then nothing stays behind. Raises OSError when
    the disk is full or fails: what is finished stays in DESTINATION.partial, and the same call goes on from there.
    """
    started = time.monotonic()
    if not (str(source) and str(destination)):
        raise ValueError(f"source {str(source)!r} and destination {str(destination)!r} must both be paths, not empty")
    source, destination = Path(source).expanduser().resolve(), Path(destination).expanduser().resolve()
    _check_paths(source, destination, dry_run)
    checkpoint = open_checkpoint(source, layout=layout, heads=heads, kv_heads=kv_heads, allow_pickle=allow_pickle)
    logical = LogicalTensors(checkpoint)
    if quantize or requantize:
        logical = Quantized(checkpoint, group_size, requantize)
    plan = native_plan(logical, tp) if format == "native" else replace(checkpoint.plan, tp=tp, mlp_unit=1)
    output = lay_out(format, logical, plan, layout=find(target_layout) if target_layout else None)
    workers, buffer = workers_for(output, workers, max_memory)
    report = Report(
        destination=destination,
        format=format,
        tp=tp,
        files={file.path: file_bytes(file) for file in output.files},
        tensors=sum(len(file.tensors) for file in output.files),
        workers=workers,
        peak_memory=workers * buffer,
        legal_tp=legal_tp(format, logical),
    )
    if dry_run:
        return report

    manifest = dict(output.manifest)
    if verify:
        manifest["source_sha256"] = hashes(checkpoint, workers)
    begun = {
        "format": format,
        "tp": tp,
        "quantize": quantize,
        "group_size": group_size if quantize or requantize else None,
        "requantize": requantize,
        "source": {str(file): [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in checkpoint.files},
        "layout": _fingerprint((checkpoint.layout, checkpoint.plan)),
        "files": _fingerprint([(file.path, file.rank, file.plan, file.tensors, file.header) for file in output.files]),
    }
    journal = Journal(destination.with_name(destination.name + ".partial"), begun)
    try:
        resumed = _write(output, logical, journal, workers, progress, manifest)
        notes = _verify(logical, journal.folder, workers, verify, verify_forward)
        report = replace(
            report,
            files={file.path: (journal.folder / file.path).stat().st_size for file in output.files},
            written=True,
            resumed=resumed,
            notes=notes,
            seconds=time.monotonic() - started,
        )
        journal.finish(destination)
    except BaseException as error:
        # A bad source stays bad, and what failed to verify must not be resumed. All else may go on later.
        if isinstance(error, ValueError) or not journal.done:
            journal.discard()
        else:
            journal.close()
        raise
    return report


def _check_paths(source: Path, destination: Path, dry_run: bool) -> None:
    if source == destination or source in destination.parents or destination in source.parents:
        raise ValueError(f"{destination} and the source {source} lie in one another; write elsewhere")
    if not dry_run and any((destination / name).is_file() for name in (NATIVE_MANIFEST, MANIFEST)):
        tidy(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty folder; remove it or write elsewhere")


def _write(
    output: Output,
    logical: LogicalTensors,
    journal: Journal,
    workers: int,
    progress: Progress | None,
    manifest: dict[str, Any],
) -> int:
    """Write everything but what the journal has; bytes of that."""
    resumed = Writer(output, logical, journal, workers, progress).write()
    for path, text in output.texts.items():
        write_small(journal.folder / path, text.encode())
    for path, copied in output.copies.items():
        write_small(journal.folder / path, copied.read_bytes())
    manifest["files"] = {
        file.path: {
            "rank": file.rank,
            "bytes": (journal.folder / file.path).stat().st_size,
            "sha256": {name: journal.done[file.path, tensor] for tensor, name in _names_in_file(file).items()},
        }
        for file in output.files
    }
    name = NATIVE_MANIFEST if output.format == "native" else MANIFEST
    write_small(journal.folder / name, json.dumps(manifest, indent=1).encode())  # last: without it there is nothing
    return resumed


def _names_in_file(file: OutputFile) -> dict[str, str]:
    """Each tensor's name below the dictionaries of a torch.save file; its own name in a safetensors file."""
    if file.nest is None:
        return {tensor.name: tensor.name for tensor in file.tensors}
    tensors = {tensor.name: torch.empty(0) for tensor in file.tensors}
    nested = {id(tensor): name for name, tensor in leaves(file.nest(tensors))}
    return {name: nested[id(tensor)] for name, tensor in tensors.items()}


def _verify(logical: LogicalTensors, written: Path, workers: int, content: bool, forward: bool) -> list[str]:
    """What was verified, in lines."""
    if not content and not forward:
        return []
    notes = []
    if content:
        forget_cached(written)
    copy = open_checkpoint(written)
    destination = LogicalTensors(copy)
    if content:
        count = sum(map(len, hashes(copy, workers).values()))
        compare(logical, destination)
        notes.append(f"verified: {count} tensors read back have their SHA-256, and the source is recovered from them")
    if forward:
        notes.append(compare_forward(logical, destination))
    return notes


def _fingerprint(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
