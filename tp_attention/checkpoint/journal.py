"""What of a destination is on disk already, so that a reshard goes on after a kill at any moment.

The journal lies in the temporary folder beside the destination. Its first line says what is being written from what;
each later one names a tensor, or a file, whose bytes had reached the disk before the line was written, or a file that
is to be done again. Its lock keeps two processes from writing one destination.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME = "journal.jsonl"
sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has fsync alone


class Journal:
    """The journal in `folder`, which is made if need be; held locked until `close` or the end of the process.

    begun: what is written from what, as JSON. done: SHA-256 by (file, tensor); a file that is finished as a whole
    stands under (file, ""). Raises ValueError when another process writes here, or something else was begun here.
    """

    def __init__(self, folder: Path, begun: dict[str, Any]) -> None:
        self.folder, self.done = folder, dict[tuple[str, str], str]()
        if folder.exists() and not (folder / NAME).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is in the way and no reshard began it; move it away")
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._read(json.loads(json.dumps(begun)))
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {self.folder}; wait for it to end") from None
        path = self.folder / NAME
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(self._descriptor)):
            raise ValueError(f"another process has just finished or removed {self.folder}; look, then run again")

    def _read(self, begun: dict[str, Any]) -> None:
        content = (self.folder / NAME).read_bytes()
        # A kill can tear the last line; what it spoke of is done again.
        whole = content.rfind(b"\n") + 1
        os.ftruncate(self._descriptor, whole)
        lines = content[:whole].splitlines()
        if not lines:
            return self._append([begun])
        try:
            before, entries = dict(json.loads(lines[0])), [json.loads(line) for line in lines[1:]]
            for file, name, digest in entries:
                if digest is None:
                    self._drop(file)
                else:
                    self.done[file, name] = digest
        except (ValueError, TypeError):
            raise ValueError(f"{self.folder / NAME} is broken; delete {self.folder} to start anew") from None
        if before != begun:
            raise ValueError(
                f"{self.folder} was begun with {_difference(before, begun)}, this run has "
                f"{_difference(begun, before)}; run that one again to go on with it, or delete {self.folder} to start "
                "anew"
            )

    def add(self, entries: Iterable[tuple[str, str, str]]) -> None:
        """Record (file, tensor, SHA-256) of tensors whose bytes are on disk."""
        entries = list(entries)
        self._append(entries)
        self.done |= {(file, name): digest for file, name, digest in entries}

    def forget(self, file: str) -> None:
        """Do `file` again from the start: it is not what its lines say. The next run must know too."""
        self._append([(file, "", None)])
        self._drop(file)

    def _drop(self, file: str) -> None:
        self.done = {key: digest for key, digest in self.done.items() if key[0] != file}

    def discard(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.folder)
        self.close()

    def finish(self, destination: Path) -> None:
        """Make the folder the destination. Raises OSError when that exists and is not empty."""
        os.rename(self.folder, destination)
        sync_folder(destination.parent)
        tidy(destination)
        self.close()

    def close(self) -> None:
        """Let others write here."""
        os.close(self._descriptor)

    def _append(self, lines: Iterable[Any]) -> None:
        write_all(self._descriptor, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        sync_data(self._descriptor)


def tidy(destination: Path) -> None:
    """Remove the journal from a whole destination: a run may have been killed just after it had renamed it."""
    (destination / NAME).unlink(missing_ok=True)


def write_all(descriptor: int, content: bytes | memoryview, offset: int | None = None) -> None:
    """Write all of `content`, at `offset` or at the file's end; a nearly full disk takes a part of it first."""
    while content:
        written = os.write(descriptor, content) if offset is None else os.pwrite(descriptor, content, offset)
        content, offset = content[written:], None if offset is None else offset + written


def sync_folder(folder: Path) -> None:
    """Bring a folder's own entries to disk: after this its new names outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _difference(values: dict[str, Any], others: dict[str, Any]) -> str:
    """The first of `values` that is not the same in `others`: a source's file with its bytes and time, say."""
    key = next(key for key in {**values, **others} if values.get(key) != others.get(key))
    value, other = values.get(key), others.get(key)
    if isinstance(value, dict) and isinstance(other, dict):
        return f"{key} {_difference(value, other)}"
    return f"{key}={json.dumps(value)}"
