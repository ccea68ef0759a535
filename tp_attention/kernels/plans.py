"""What a function does beside its host code, as replay.py keeps it: allocations, launches and results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_MAPS = 256  # of addresses, for each descriptor of a launch


class NotKept(Exception):
    """Why a call cannot be made again by its launches."""


@dataclass(frozen=True)
class Place:
    """A tensor: number `index` of inputs and allocations, from byte `offset` of its first element on."""

    index: int
    offset: int


@dataclass
class Step:
    """A launch: the launcher's arguments, where `pointers` and `maps` are put in. nested: the kernel's are a list."""

    launcher: Callable[..., Any]
    before: list[Any]
    kernel: list[Any]
    nested: bool
    pointers: list[tuple[int, Place]]
    maps: list[tuple[int, Place, dict[int, Any], Any, Any]]  # with what was made, a descriptor to copy, its metadata

    def run(self, pointers: list[int], stream: int) -> None:
        arguments = self.kernel.copy()
        for at, place in self.pointers:
            arguments[at] = pointers[place.index] + place.offset
        for at, place, made, like, metadata in self.maps:
            pointer = pointers[place.index] + place.offset
            if (found := made.get(pointer)) is None:
                if len(made) >= MOST_MAPS:
                    made.clear()
                found = made[pointer] = _tensor_map(like, metadata, pointer)
            arguments[at] = found
        before = self.before
        if self.nested:
            self.launcher(*before[:3], stream, *before[4:], arguments)
        else:
            self.launcher(*before[:3], stream, *before[4:], *arguments)


Output = tuple[int, tuple[int, ...] | None, tuple[int, ...], int]  # tensor, shape if a view of it, strides, offset


@dataclass
class Plan:
    """What a call does. allocations: shapes and dtypes. results: each a tensor, or how it lies in one."""

    allocations: list[tuple[tuple[int, ...], torch.dtype]]
    steps: list[Step]
    results: list[Output]
    single: bool
    device: torch.device

    def run(self, tensors: list[Tensor]) -> Any:
        for shape, dtype in self.allocations:
            tensors.append(torch.empty(shape, dtype=dtype, device=self.device))
        pointers = [tensor.data_ptr() for tensor in tensors]
        stream = _stream(self.device)
        for step in self.steps:
            step.run(pointers, stream)
        found = [
            tensors[index] if shape is None else tensors[index].as_strided(shape, strides, offset)
            for index, shape, strides, offset in self.results
        ]
        return found[0] if self.single else tuple(found)


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


Described = tuple[Any, list[Any] | None, Any]


def described(compiled: Any, values: tuple[Any, ...]) -> list[Described]:
    """Each value, what the launcher makes of it if it is a descriptor, and by which metadata."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    descriptors = [value for value in values if hasattr(value, "block_shape")]
    known = getattr(compiled.metadata, "tensordesc_meta", None) or [None] * len(descriptors)
    rest = iter(known)
    found: list[Described] = []
    for value in values:
        if hasattr(value, "block_shape"):
            metadata = next(rest)
            found.append((value, make_tensordesc_arg(value, metadata), metadata))
        else:
            found.append((value, None, None))
    return found


def slots(described: Described) -> int:
    return 1 if described[1] is None else len(described[1])


class _At:
    """Stands for a tensor at an address, as far as a descriptor is made of it."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def data_ptr(self) -> int:
        return self.pointer


class Descriptor:
    """A descriptor like another one, of a tensor at another address."""

    def __init__(self, like: Any, pointer: int) -> None:
        self.base, self.shape, self.strides, self.padding = _At(pointer), like.shape, like.strides, like.padding
        self.round_f32_to_tf32 = getattr(like, "round_f32_to_tf32", False)


def _tensor_map(like: Any, metadata: Any, pointer: int) -> Any:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return make_tensordesc_arg(Descriptor(like, pointer), metadata)[0]
