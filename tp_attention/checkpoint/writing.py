"""Carries an Output out: each tensor through one buffer into its place in its file, hashed on the way.

Files get their full size first, so a full disk shows before anything is copied. Tensors go to safetensors files
directly; a file of torch.save is gathered in a safetensors file beside it, memory-mapped, and saved from there, so
that memory holds the workers' buffers and no more.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from tp_attention.checkpoint.formats.output import Output, OutputFile, OutputTensor
from tp_attention.checkpoint.journal import Journal, sync_data, sync_folder, write_all
from tp_attention.checkpoint.logical import LogicalTensors

SYNC_BYTES = 256 << 20  # bytes between two syncs: what a kill costs at most, once the disk keeps up
# Hashed, then written while still in the cache of the core that hashed it. Measured: at 256 KiB a reshard of 4 GB takes
# 2.5 s, at 1 MiB 3.5, at 4 MiB 5: the page cache looks for unbroken memory as large as each write.
STEP_BYTES = 256 << 10

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Place:
    """Where in its file a tensor's bytes start."""

    file: OutputFile
    tensor: OutputTensor
    offset: int


def header(file: OutputFile) -> tuple[bytes, list[Place]]:
    """The safetensors header of `file`, and where its tensors lie: wide dtypes first, so that all are aligned.

    Raises ValueError for a dtype that safetensors has not.
    """
    entries: dict[str, object] = {"__metadata__": file.header} if file.header else {}
    ordered, at = sorted(file.tensors, key=lambda tensor: -tensor.dtype.itemsize), 0
    starts = []
    for tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{tensor.name} is {tensor.dtype}, which no safetensors file holds")
        stop = at + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, stop],
        }
        starts.append(at)
        at = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    places = [Place(file, tensor, base + start) for tensor, start in zip(ordered, starts, strict=True)]
    return struct.pack("<Q", len(text)) + text, places


def file_bytes(file: OutputFile) -> int:
    """Size of `file`; of a file of torch.save, of the one that its tensors are gathered in."""
    return len(header(file)[0]) + sum(tensor.nbytes for tensor in file.tensors)


def workers_for(output: Output, workers: int | None, max_memory: int | None) -> tuple[int, int]:
    """Workers to use and bytes of a worker's buffer, the largest tensor's.

    Raises ValueError when `max_memory` bytes do not hold one buffer.
    """
    buffer = max((tensor.nbytes for file in output.files for tensor in file.tensors), default=0)
    count = min(4, os.cpu_count() or 1) if workers is None else workers
    if count < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if max_memory is not None:
        if max_memory < buffer:
            raise ValueError(f"max_memory={max_memory:,} bytes is less than the largest tensor, {buffer:,} bytes")
        count = min(count, max_memory // max(buffer, 1))
    return count, buffer


class Writer:
    """Writes the tensors of `output` into the journal's folder."""

    def __init__(
        self, output: Output, logical: LogicalTensors, journal: Journal, workers: int, progress: Progress | None
    ) -> None:
        self.output, self.logical, self.journal, self.workers = output, logical, journal, workers
        self._progress = progress or (lambda done, total: None)
        self._descriptors: dict[str, int] = {}
        self._buffers: SimpleQueue[bytearray] = SimpleQueue()

    def write(self) -> int:
        """Write what the journal does not have yet, all the way to the disk. Bytes of tensors that it had.

        Raises OSError, naming bytes needed and free, when the disk is full; ValueError of LogicalTensors.fill.
        """
        _, buffer = workers_for(self.output, None, None)
        for _ in range(self.workers):
            self._buffers.put(bytearray(buffer))
        try:
            places = [place for file in self.output.files for place in self._open(file)]
            resumed = self._copy(places)
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)  # headers and sizes, beside the tensors' bytes
            for file in self.output.files:
                if file.nest and (file.path, "") not in self.journal.done:
                    self._save(file, file.nest)
            return resumed
        finally:
            for descriptor in self._descriptors.values():
                os.close(descriptor)

    def _open(self, file: OutputFile) -> list[Place]:
        """Give the file its size and header; the tensors that it still lacks."""
        if (file.path, "") in self.journal.done:
            if (self.journal.folder / file.path).is_file():
                self._gathering(file).unlink(missing_ok=True)
                return []
            self.journal.forget(file.path)
        path = self._gathering(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        content, places = header(file)
        size = file_bytes(file)
        descriptor = self._descriptors[file.path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if os.fstat(descriptor).st_size != size:
            self.journal.forget(file.path)
            os.ftruncate(descriptor, size)
        folder = path.parent
        while folder != self.journal.folder.parent:  # what the journal says of a file implies that it is there
            sync_folder(folder)
            folder = folder.parent
        try:
            if hasattr(os, "posix_fallocate"):  # macOS has not: there a full disk shows later
                os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise _disk_full(path, size) from None
        write_all(descriptor, content, 0)
        return [place for place in places if (file.path, place.tensor.name) not in self.journal.done]

    def _gathering(self, file: OutputFile) -> Path:
        return self.journal.folder / (file.path + ".gathering" if file.nest else file.path)

    def _copy(self, places: list[Place]) -> int:
        # Tensor by tensor over all files, so that the source is read once from front to back.
        order = {native: index for index, native in enumerate(self.logical.names())}
        places.sort(key=lambda place: order[place.tensor.native])
        total = sum(tensor.nbytes for file in self.output.files for tensor in file.tensors)
        resumed = done = total - sum(place.tensor.nbytes for place in places)
        self._progress(done, total)
        unsynced: list[tuple[str, str, str]] = []
        since = 0
        with ThreadPoolExecutor(self.workers) as pool:
            futures: dict[Future[str], Place] = {pool.submit(self._transfer, place): place for place in places}
            try:
                for future in as_completed(futures):
                    place = futures.pop(future)
                    unsynced.append((place.file.path, place.tensor.name, future.result()))
                    done, since = done + place.tensor.nbytes, since + place.tensor.nbytes
                    self._progress(done, total)
                    if since >= SYNC_BYTES:
                        self._sync(unsynced)
                        unsynced, since = [], 0
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self._sync(unsynced)
        return resumed

    def _sync(self, finished: list[tuple[str, str, str]]) -> None:
        for file in sorted({file for file, _, _ in finished}):
            sync_data(self._descriptors[file])
        self.journal.add(finished)

    def _transfer(self, place: Place) -> str:
        """Write one tensor; its SHA-256."""
        tensor, buffer = place.tensor, self._buffers.get()
        try:
            out = view(buffer, tensor)
            self.logical.fill(out, tensor.native, tensor.packing, place.file.plan or self.output.plan, place.file.rank)
            digest, content = hashlib.sha256(), memoryview(buffer)[: tensor.nbytes]
            for start in range(0, tensor.nbytes, STEP_BYTES):
                step = content[start : start + STEP_BYTES]
                digest.update(step)
                write_all(self._descriptors[place.file.path], step, place.offset + start)
            return digest.hexdigest()
        finally:
            self._buffers.put(buffer)

    def _save(self, file: OutputFile, nest: Callable[[dict[str, Tensor]], Any]) -> None:
        """Make a file of torch.save of its gathered tensors."""
        gathered = self._gathering(file)
        with open(gathered, "rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)  # closed when its last tensor goes
        tensors = {place.tensor.name: view(content, place.tensor, place.offset) for place in header(file)[1]}
        aside = self.journal.folder / (file.path + ".saving")
        aside.unlink(missing_ok=True)
        if shutil.disk_usage(aside.parent).free < (size := gathered.stat().st_size):
            raise _disk_full(aside, size)  # torch.save would call it an unexpected position
        with open(aside, "wb") as stream:
            torch.save(nest(tensors), stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, self.journal.folder / file.path)
        sync_folder(aside.parent)
        self.journal.add([(file.path, "", "")])
        gathered.unlink()


def _disk_full(path: Path, size: int) -> OSError:
    free = shutil.disk_usage(path.parent).free
    return OSError(errno.ENOSPC, f"disk full: {path.name} takes {size:,} bytes, {free:,} are left at {path.parent}")


def view(buffer: bytearray | mmap.mmap, tensor: OutputTensor, offset: int = 0) -> Tensor:
    """`tensor` in the bytes of `buffer` from `offset` on."""
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    count = tensor.nbytes // tensor.dtype.itemsize
    return torch.frombuffer(buffer, dtype=tensor.dtype, count=count, offset=offset).view(tensor.shape)


def write_small(path: Path, content: bytes) -> None:
    """Write a whole file, with its folders, and bring it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(path.parent)
