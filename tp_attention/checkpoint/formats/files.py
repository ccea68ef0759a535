"""The two kinds of weight files, safetensors and torch.save's, as mappings of memory-mapped tensors by name.

Opening reads headers and no tensor; what is wrong with a file is one line that names it. Nothing is unpickled but
plain data unless the caller says so.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

log = logging.getLogger("tp_attention")

# What Megatron's files hold beside tensors: its arguments, and numpy's random state. Plain data, all of it.
# numpy pickles arrays by a function without a public name, which numpy 1 and numpy 2 say lies elsewhere.
_ARRAY = np.zeros(0).__reduce__()[0]
PLAIN_DATA: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


# What torch's reading of a damaged file raises, beside its own UnpicklingError.
_OF_DAMAGE = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file when it is missing, broken or no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; download or copy the checkpoint again") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}, not an object")
    return data


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of one file, as views of its memory map. header: the file's own metadata.

    Raises ValueError when the file is missing, or its size is not the one that its header promises.
    """

    def __init__(self, path: Path) -> None:
        entries = _header(path)
        self.header: dict[str, str] = entries.pop("__metadata__", {})
        self._names = dict.fromkeys(entries)
        try:
            self._file: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _header(path: Path) -> dict[str, Any]:
    """The safetensors header (8 bytes of length, then JSON), checked against the file's size."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; download or copy the checkpoint again")
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or 8 + length > size:
            raise ValueError(
                f"{path} is truncated: {size:,} bytes, its header alone needs {8 + length:,}; copy it again"
            )
        try:
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is no safetensors file: its header is broken ({error!r})") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, its header promises {expected:,}; download or copy it again")
    return header


def load_pickled(path: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """What torch.save wrote, its tensors memory-mapped.

    allow_pickle: run whatever code the file names; without it, tensors and plain data alone are read.
    Raises ValueError when the file is missing, broken, or needs allow_pickle.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; download or copy the checkpoint again")
    with path.open("rb") as stream:
        mapped = stream.read(4) == b"PK\x03\x04"  # torch.save's zip; the format before it cannot be mapped
    if not mapped:
        log.info("%s is of torch.save's old format: read into memory, not mapped", path)
    try:
        with torch.serialization.safe_globals(PLAIN_DATA):
            data = torch.load(path, map_location="cpu", mmap=mapped, weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if allow_pickle or not named:
            raise ValueError(f"{path} is broken, or nothing that torch.save wrote: {_cause(error)}") from None
        raise ValueError(
            f"{path} holds more than tensors and plain data ({named[1]}); if you trust where it comes "
            "from, --allow-pickle (allow_pickle=True) unpickles it, which runs its code"
        ) from None
    except _OF_DAMAGE as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that one is torch's, seeking in a cut-off file
            raise
        raise ValueError(f"{path} is truncated or no file of torch.save: {_cause(error)}; copy it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not a dictionary of tensors")
    return data


def tensors_alone(path: Path, loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    """What was `loaded` from `path` without numbers and the like.

    Raises ValueError for lists, dictionaries and tensors that are not simply their numbers.
    """
    found = {}
    for name, value in loaded.items():
        if isinstance(value, Tensor):
            found[str(name)] = plain(value, f"{path}: {name}")
        elif isinstance(value, list | tuple | dict):
            raise ValueError(
                f"{path}: {name} is a {type(value).__name__}, not a tensor; save the weights alone, by name"
            )
        else:
            log.info("%s: %s is a %s, not a tensor, and is left out", path, name, type(value).__name__)
    return found


def plain(tensor: Tensor, name: str) -> Tensor:
    """`tensor` without autograd, and conjugated where it says that it is to be.

    Raises ValueError for one that is sparse, quantised by torch, or has no numbers.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantised by torch" if tensor.is_quantized else "on meta" if tensor.is_meta else str(tensor.layout)
        raise ValueError(f"{name} is {kind}; save it as a dense tensor")
    return tensor.detach().resolve_conj().resolve_neg()


def _cause(error: Exception) -> str:
    """The line of an error of torch's that says what is wrong."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return (text.strip() or type(error).__name__).splitlines()[0][:200]


def check_name(name: Any, said_by: Path) -> None:
    """Raises ValueError when `name`, of a file that `said_by` names, is no name of a file beside it."""
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ValueError(f"{said_by} names a file {name!r}; it should be one in its own folder")


class Joined(Mapping[str, Tensor]):
    """The tensors of several files as one mapping, file by file. Raises ValueError for a name that two files hold."""

    def __init__(self, files: Mapping[Path, Mapping[str, Tensor]]) -> None:
        self.files = tuple(files)
        self._file_of: dict[str, Path] = {}
        self._files = files
        for path, tensors in files.items():
            for name in tensors:
                if (other := self._file_of.setdefault(name, path)) != path:
                    raise ValueError(f"tensor {name!r} is both in {other.name} and in {path.name}")

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._file_of[name]][name]

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def single_or_indexed(folder: Path, single: str, open_file: Callable[[Path], Mapping[str, Tensor]]) -> Joined:
    """The tensors of a folder's one file `single`, or else of the files that `single`.index.json names.

    Raises ValueError when a file is missing or the index names tensors that no file has.
    """
    if (folder / single).is_file():  # first, as transformers does: an index beside it is of another time
        return Joined({folder / single: open_file(folder / single)})
    index = folder / f"{single}.index.json"
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map; download or copy the checkpoint again")
    for name in weight_map.values():
        check_name(name, index)
    joined = Joined({folder / name: open_file(folder / name) for name in sorted(set(weight_map.values()))})
    if missing := sorted(weight_map.keys() - joined.keys()):
        raise ValueError(f"{len(missing)} tensors of {index.name} are in no file of {folder}: {', '.join(missing[:5])}")
    return joined
