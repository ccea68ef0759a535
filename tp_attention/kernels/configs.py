"""Which configuration a kernel runs with: the caller's, else an autotuned one, else its file's frozen table.

A table maps (architecture, ...) to a configuration, the rest of the key being the kernel's own (head dim, dtype, ...).
Architectures are 80 (A100), 90 (H100, H200) and 0, the safe entry that every other GPU gets: less shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
import triton

from tp_attention.kernels import replay

Config = TypeVar("Config")
Key = tuple[Hashable, ...]

# Written by `remember` alone, so only where autotuning was asked for.
_autotuned: dict[tuple[str, Key], Any] = {}


def choose(kernel: str, table: Mapping[Any, Config], key: Key, config: Config | None = None) -> Config:
    """`config`, else what `remember` was given for this kernel and key, else the table's entry, else its safe one.

    key: (architecture, ...). The table must hold the same key with architecture 0.
    """
    if config is not None:
        return config
    if _autotuned and (tuned := _autotuned.get((kernel, key))) is not None:
        return tuned
    return table[key] if key in table else table[(0, *key[1:])]


def remember(kernel: str, key: Key, config: object) -> None:
    """Use `config` for this kernel and key from now on, in this process."""
    _autotuned[kernel, key] = config
    replay.forget()


@functools.cache
def architecture(device: torch.device) -> int:
    """80 or 90 where the tables have entries for this GPU, else 0."""
    if device.type != "cuda" or interpreted():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor if (major, minor) in ((8, 0), (9, 0)) else 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of this GPU; 4 in the interpreter, so that splits and waves are exercised there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)
