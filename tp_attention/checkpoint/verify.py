"""What `--verify` does: hash what lies on disk, and recover the source from what was written.

Loading checks sizes and metadata only, so this is where a flipped bit shows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tp_attention.checkpoint.formats.files import SafetensorsFile, load_pickled, read_json
from tp_attention.checkpoint.formats.native import MANIFEST as NATIVE_MANIFEST
from tp_attention.checkpoint.logical import Checkpoint, LogicalTensors
from tp_attention.checkpoint.packing import same_bits
from tp_attention.checkpoint.quantization import Quantized

MANIFEST = "tp_attention-manifest.json"  # beside the files of other formats; the native form has one of its own
T = TypeVar("T")
R = TypeVar("R")


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order, in hex."""
    content = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(content.view(torch.uint8).numpy().data).hexdigest()


def leaves(nested: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a file's dictionaries with its keys, joined by dots: its name in a manifest."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        elif isinstance(value, Tensor):
            yield f"{path}{key}", value


def check_manifest(path: Path, workers: int) -> dict[str, dict[str, str]] | None:
    """SHA-256 by file and tensor of a checkpoint that we have written; None for others.

    Raises ValueError naming the tensors that are not what its manifest says.
    """
    folder = path if path.is_dir() else path.parent
    found = next((folder / name for name in (NATIVE_MANIFEST, MANIFEST) if (folder / name).is_file()), None)
    if found is None:
        return None
    try:
        written = {file: dict(entry["sha256"]) for file, entry in read_json(found)["files"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{found} does not say each tensor's SHA-256: {error!r} is wrong with it") from None
    for file, digests in written.items():
        native = file.endswith(".safetensors")
        tensors = dict(leaves(SafetensorsFile(folder / file) if native else load_pickled(folder / file)))
        held = dict(zip(tensors, _each(sha256, tensors.values(), workers), strict=True))
        if bad := [name for name in {**digests, **held} if digests.get(name) != held.get(name)]:
            raise ValueError(
                f"{len(bad)} tensors of {folder / file} are not what was written, by their SHA-256: "
                f"{', '.join(bad[:5])}; copy or make the checkpoint again"
            )
    return written


def hashes(checkpoint: Checkpoint, workers: int) -> dict[str, dict[str, str]]:
    """SHA-256 of every tensor: by file and name where a manifest says what it should be, else by rank and name."""
    if (checked := check_manifest(checkpoint.path, workers)) is not None:
        return checked
    wanted = [(rank, name) for rank in range(checkpoint.plan.tp) for name in checkpoint.names(rank)]
    found: dict[str, dict[str, str]] = {}
    digests = _each(lambda key: sha256(checkpoint.tensor(*key)), wanted, workers)
    for (rank, name), digest in zip(wanted, digests, strict=True):
        found.setdefault(f"rank {rank}", {})[name] = digest
    return found


def compare(source: LogicalTensors, destination: LogicalTensors) -> None:
    """Recover all that the source's ranks hold from the destination. Raises ValueError for a tensor that differs.

    Two shares of the source's cut are in memory at a time. What is quantised on the way is compared quantised.
    Vocabulary rows that only one side has are padding.
    """
    if differ := set(source.names()) ^ set(destination.names()):
        raise ValueError(f"{min(differ)} is only in one of {source.checkpoint.path} and {destination.checkpoint.path}")
    plans = source.checkpoint.plan, destination.checkpoint.plan
    plan = plans[isinstance(source, Quantized)]  # the source's own cut may divide the groups that it now gets
    plan = replace(plan, vocab_size=min(plan.vocab_size for plan in plans))

    bad = [
        f"{native} of rank {rank}"
        for native in source.names()
        for rank in range(plan.tp)
        if not same_bits(source.share(native, plan, rank), destination.share(native, plan, rank))
    ]
    if bad:
        raise ValueError(
            f"{len(bad)} tensors of {destination.checkpoint.path} differ from {source.checkpoint.path}: "
            f"{', '.join(bad[:5])}"
        )


def forget_cached(folder: Path) -> None:
    """Ask the system to drop its copies of the files in memory, so that the next read comes from the disk."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _each(work: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))
