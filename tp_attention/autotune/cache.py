"""Tuned entries as a JSON file, and why such a file may not be believed.

A file belongs to one GPU model and one layer shape; what else its numbers depend on (versions, the kernels' sources) is
inside, so that a stale file is noticed and overwritten. Nothing in it is executed or made into an object: keys and
configurations are looked up among those that the tuner itself could have found. Written aside and renamed: of two
processes that tune at once the last one wins, and nobody reads half a file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton

import tp_attention
from tp_attention import kernels
from tp_attention.autotune.layer import LayerShape
from tp_attention.autotune.spaces import SPACES, Entry, entry, keys

log = logging.getLogger("tp_attention")

FIELDS = {"kernel", "key", "config"}


def circumstances(layer: LayerShape, device: torch.device) -> dict[str, Any]:
    """All that measured entries depend on, as JSON has it."""
    cuda = device.type == "cuda"
    shape = {name: str(x) if name == "dtype" else x for name, x in dataclasses.asdict(layer).items()}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else [],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tp_attention": tp_attention.__version__,
        "kernels": _sources(),
        "layer": shape,
    }


def file_of(folder: Path, about: dict[str, Any]) -> Path:
    """The GPU's name, so that people find it, and a digest of what tells files of one folder apart."""
    apart = json.dumps([about["device"], about["capability"], about["layer"]])
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return folder / f"autotune-{name}-{hashlib.sha256(apart.encode()).hexdigest()[:16]}.json"


def read(path: Path, about: dict[str, Any]) -> list[Entry] | None:
    """The entries of a file that was written under the same circumstances; else None, and the log says why."""
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.keys() != {"about", "entries"}:
            raise ValueError("it is no object of 'about' and 'entries'")
        if document["about"] != about:
            raise ValueError(_difference(document["about"], about))
        return decoded(document["entries"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as why:  # JSON and text that is none are ValueErrors
        log.warning("autotune: %s is ignored and will be written anew: %s", path, why)
        return None


def write(path: Path, about: dict[str, Any], entries: Iterable[Entry]) -> None:
    """Replaces the file. A folder that cannot be written costs the next process its time, and is a line of the log."""
    text = json.dumps({"about": about, "entries": encoded(entries)}, indent=1)
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
            aside = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a crash may leave the new name on an empty file
        os.replace(aside, path)
    except OSError as why:
        if aside is not None:
            Path(aside).unlink(missing_ok=True)
        log.warning("autotune: cannot keep the results in %s: %s; set TP_ATTENTION_CACHE to a folder", path, why)


def encoded(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    return [
        {"kernel": kernel, "key": repr(key), "config": dataclasses.asdict(config)} for kernel, key, config in entries
    ]


def decoded(items: Any) -> list[Entry]:
    """`encoded`, backwards. Raises ValueError for what the tuner could not have found."""
    if not isinstance(items, list):
        raise ValueError("entries are no list")
    return [_entry(item) for item in items]


def _entry(item: Any) -> Entry:
    if not isinstance(item, dict) or item.keys() != FIELDS:
        raise ValueError(f"an entry is no object of {', '.join(sorted(FIELDS))}: {item!r:.80}")
    kernel, text, values = item["kernel"], item["key"], item["config"]
    if not isinstance(kernel, str) or kernel not in SPACES:
        raise ValueError(f"{kernel!r:.80} is no kernel that is tuned; those are {', '.join(SPACES)}")
    key = next((key for key in keys(kernel) if repr(key) == text), None)
    if key is None:
        raise ValueError(f"{kernel} has no key {text!r:.80}")
    # as text, where true is not 1 and 4 not 4.0
    wanted = json.dumps(values, sort_keys=True)
    for config in SPACES[kernel].candidates(entry(kernel, key)):
        if json.dumps(dataclasses.asdict(config), sort_keys=True) == wanted:
            return Entry(kernel, key, config)
    raise ValueError(f"{kernel} {key} is never tried with {wanted:.200}")


def _difference(found: Any, about: dict[str, Any]) -> str:
    if not isinstance(found, dict) or found.keys() != about.keys():
        return f"its 'about' is no object of {', '.join(about)}"
    name = next(name for name in about if found[name] != about[name])
    return f"it is for {name} {found[name]!r:.80}, here is {about[name]!r:.80}"


@functools.cache
def _sources() -> str:
    """A digest of the kernels' files."""
    digest = hashlib.sha256()
    for path in sorted(Path(kernels.__path__[0]).glob("*.py")):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()
