"""Hugging Face safetensors folders, one file or sharded with an index, read slice by slice. Nothing is unpickled."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SafetensorsFolder:
    """The tensors of a model folder. Files are memory-mapped: a slice costs its own bytes and no more.

    Raises ValueError when there are no safetensors files, one is missing or truncated, or the index does not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: Any = None  # the file read last stays open: names() comes file by file
        self._open_file: Path | None = None
        wanted = self._index()
        for file in sorted(set(wanted.values())) if wanted else [folder / SINGLE]:
            for name, entry in _header(file).items():
                if name in self._file_of:
                    raise ValueError(f"tensor {name!r} is both in {self._file_of[name].name} and in {file.name}")
                self._file_of[name], self._shapes[name] = file, tuple(entry["shape"])
        if missing := sorted(wanted.keys() - self._file_of.keys()):
            raise ValueError(f"{len(missing)} tensors of {INDEX} are in no file of {folder}: {', '.join(missing[:5])}")

    def _index(self) -> dict[str, Path]:
        """Tensor name -> file, empty for a folder of a single file."""
        index = self.folder / INDEX
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return {name: self.folder / file for name, file in weight_map.items()}
        if not (self.folder / SINGLE).is_file():
            raise ValueError(f"{self.folder} has neither {SINGLE} nor {INDEX}; only safetensors weights are read")
        return {}

    def names(self) -> list[str]:
        """All tensor names, file by file, so that reading in this order reads each file once from front to back."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor `name`."""
        return self._shapes[name]

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Tensor `name`, or its [start:stop] along `dim` (0 or 1)."""
        file = self._file_of[name]
        if file != self._open_file:
            self._open, self._open_file = safe_open(file, framework="pt"), file
        if dim is None:
            return self._open.get_tensor(name)
        part = self._open.get_slice(name)
        return part[start:stop] if dim == 0 else part[:, start:stop]


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """The safetensors header (8 bytes of length, then JSON), checked against the file's size."""
    if not file.is_file():
        raise ValueError(f"{file} is missing; download or copy the model again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or 8 + length > size:
            raise ValueError(
                f"{file} is truncated: {size:,} bytes, its header alone needs {8 + length:,}; copy it again"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is no safetensors file: its header is not JSON ({error})") from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise ValueError(f"{file} has {size:,} bytes, its header promises {expected:,}; download or copy it again")
    return header
