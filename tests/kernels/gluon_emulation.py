"""Runs a warp-specialised Gluon kernel on the CPU: its numbers, and above all its protocol.

Each partition of a program is a thread. Barriers in shared memory have their real phases, counts and bytes to come; a
tile load lands late; an asynchronous product reads its operands when it is issued and again when it is waited for, and
fails if they have changed, as does a tile store. So a buffer that is freed too early or read too soon is an error, and
a deadlock a time-out. Not modelled: registers, proxy fences, races within a warpgroup, rounding inside a product.

The kernel's own functions are run, with the language behind them replaced.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

POISON = math.inf  # what shared memory holds before anything is loaded; tests give no such value
PATIENCE = 20.0  # seconds, after which a wait is a deadlock
WARPGROUP = 128  # threads that a partition counts for at a named barrier

_here = threading.local()  # .program, .flight (products), .stores


class Program:
    """What the partitions of one program share."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        self.changed = threading.Condition()
        self.named: dict[int, list[int]] = {}  # named barrier -> threads there, how often it was passed
        self.errors: list[BaseException] = []

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.errors.append(error)
            self.changed.notify_all()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        if not self.changed.wait_for(lambda: condition() or bool(self.errors), PATIENCE):
            raise RuntimeError(f"deadlock: {what}")
        if self.errors:
            raise RuntimeError(f"another partition failed while this one waited: {what}")


class Shared:
    """A buffer in shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.data[i])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)


class Barrier:
    """One mbarrier: a phase ends when all have arrived and all bytes expected have come."""

    def __init__(self) -> None:
        self.program = _here.program
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        with self.program.changed:
            self.bytes += expected
            self.pending -= count
            self._advance()

    def complete(self, nbytes: int) -> None:
        with self.program.changed:
            self.bytes -= nbytes
            self._advance()

    def wait(self, parity: int) -> None:
        """Until the phase of this parity is over. As on the GPU one phase further on looks like not yet begun."""
        with self.program.changed:
            self.program.wait_for(lambda: self.phase & 1 != parity, f"phase {self.phase} of a barrier")

    def _advance(self) -> None:
        if self.pending < 0:
            raise RuntimeError("more arrivals at a barrier than it counts")
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1
            self.program.changed.notify_all()


class Barriers:
    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self.barriers[i]


class Pointer:
    """Of a tensor, to be added to."""

    def __init__(self, data: Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data.view(-1), offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + offset)


class Descriptor:
    """What the kernel is given for a TensorDescriptor: reads past the end are 0, writes there are dropped."""

    def __init__(self, host: Any) -> None:
        self.data = host.base.as_strided(host.shape, host.strides)
        self.block, self.dtype, self.layout = list(host.block_shape), host.base.dtype, None
        nbytes = math.prod(self.block) * self.data.element_size()
        self.block_type = SimpleNamespace(nbytes=nbytes, shape=self.block)

    def inside(self, place: list[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """The tensor's part of the block there, and where in the block that lies."""
        ends = [max(0, min(n, size - i)) for i, n, size in zip(place, self.block, self.data.shape, strict=True)]
        part = self.data[tuple(slice(i, i + n) for i, n in zip(place, ends, strict=True))]
        return part, tuple(slice(0, n) for n in ends)


class Product:
    """An asynchronous product on its way."""

    def __init__(self, a: Any, b: Shared, acc: Tensor | None) -> None:
        time.sleep(random.random() * 2e-4)
        self.a, self.b, self.value = a, b, None
        self.before = self._operands()
        if any(operand.isinf().any() for operand in self.before):
            raise RuntimeError("a product reads shared memory that nothing was loaded to")
        self.result = self.before[0] @ self.before[1]
        if acc is not None:
            self.result += acc
        _here.flight.append(self)

    def _operands(self) -> list[Tensor]:
        return [(x.data if isinstance(x, Shared) else x).float().clone() for x in (self.a, self.b)]

    def finish(self) -> None:
        if not all(map(_same, self.before, self._operands())):
            raise RuntimeError("an operand was overwritten while its product was on its way")
        self.value = self.result


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _wait_products(left: int = 0, deps: Any = ()) -> Any:
    time.sleep(random.random() * 3e-4)
    while len(_here.flight) > left:
        _here.flight.pop(0).finish()
    values = [dep.value if isinstance(dep, Product) else dep for dep in deps]
    if any(value is None for value in values):
        raise RuntimeError("a product is used that was not waited for")
    return values[0] if len(values) == 1 else tuple(values)


def _load(source: Descriptor, place: list[int], barrier: Barrier, target: Shared) -> None:
    if random.random() < 0.3:  # lost at once, so that whoever still reads it notices
        target.data.fill_(POISON)

    def land() -> None:
        time.sleep(random.random() ** 3 * 8e-3)
        part, where = source.inside(place)
        block = torch.zeros(source.block, dtype=source.dtype)
        block[where] = part
        target.data.copy_(block)
        try:
            barrier.complete(source.block_type.nbytes)
        except RuntimeError as error:
            barrier.program.fail(error)

    threading.Thread(target=land, daemon=True).start()


def _store(target: Descriptor, place: list[int], source: Shared) -> None:
    _here.stores.append((target, place, source, source.data.clone()))


def _wait_stores(left: int) -> None:
    while len(_here.stores) > left:
        target, place, source, before = _here.stores.pop(0)
        if not _same(source.data, before):
            raise RuntimeError("shared memory was overwritten before a tile store had read it")
        part, where = target.inside(place)
        part.copy_(before[where])


def _named_barrier(asm: str, *_: Any, **__: Any) -> None:
    operation, number, threads = re.search(r"bar\.(sync|arrive) (\d+), (\d+)", asm).groups()  # type: ignore[union-attr]
    program = _here.program
    with program.changed:
        state = program.named.setdefault(int(number), [0, 0])
        state[0] += WARPGROUP
        passed = state[1]
        if state[0] > int(threads):
            raise RuntimeError(f"more threads at named barrier {number} than the {threads} it is for")
        if state[0] == int(threads):
            state[:] = 0, passed + 1
            program.changed.notify_all()
        elif operation == "sync":
            program.wait_for(lambda: state[1] != passed, f"named barrier {number}")


def _specialize(partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    program = _here.program

    def run(function: Callable[..., None], args: tuple[Any, ...]) -> None:
        _here.program, _here.flight, _here.stores = program, [], []
        try:
            function(*args)
            if _here.flight or _here.stores:
                raise RuntimeError("a partition ends with a product or store on its way")
        except BaseException as error:  # of any kind: it is raised again by the thread that waits for this one
            program.fail(error)

    threads = [
        threading.Thread(target=run, args=partition, name=f"partition {i}") for i, partition in enumerate(partitions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if program.errors:
        raise program.errors[0]


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    return Barriers(shape[0]) if dtype == torch.int64 else Shared(torch.full(shape, POISON, dtype=dtype))


def _gather(pointer: Pointer) -> Any:
    return int(pointer.data[pointer.offset])


def _scatter(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    pointer.data[pointer.offset[mask].long()] = value[mask].to(pointer.data.dtype)


def _either(a: Any, b: Any, tensors: Callable[..., Tensor], numbers: Callable[..., Any]) -> Any:
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return numbers(a, b)
    return tensors(torch.as_tensor(a), torch.as_tensor(b))


_LANGUAGE = SimpleNamespace(
    constexpr=lambda value: value,
    float32=torch.float32,
    int32=torch.int32,
    int64=torch.int64,
    static_range=range,
    program_id=lambda axis: _here.program.index,
    num_programs=lambda axis: _here.program.count,
    allocate_shared_memory=_allocate,
    warp_specialize=_specialize,
    inline_asm_elementwise=_named_barrier,
    to_tensor=lambda value: value,
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    arange=lambda start, stop, layout: torch.arange(start, stop),
    where=lambda kept, a, b: torch.where(kept, a, torch.as_tensor(b, dtype=a.dtype)),
    maximum=lambda a, b: _either(a, b, torch.maximum, max),
    minimum=lambda a, b: _either(a, b, torch.minimum, min),
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    exp2=torch.exp2,
    log2=torch.log2,
    cdiv=lambda a, b: -(-a // b),
    cast=lambda x, dtype: x,
    convert_layout=lambda x, layout: x,
    load=_gather,
    store=_scatter,
    **dict.fromkeys(
        ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"), lambda *_, **__: None
    ),
)
HARDWARE = {
    "gl": _LANGUAGE,
    "warpgroup_mma": lambda a, b, acc, use_acc=True, is_async=True: Product(a, b, acc if use_acc else None),
    "warpgroup_mma_wait": _wait_products,
    "fence_async_shared": lambda: None,
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, nbytes: barrier.arrive(1, nbytes),
        arrive=lambda barrier, count: barrier.arrive(count),
        wait=lambda barrier, parity: barrier.wait(parity),
    ),
    "tma": SimpleNamespace(
        async_copy_global_to_shared=_load, async_copy_shared_to_global=_store, store_wait=_wait_stores
    ),
}


def emulated(kernel: Any) -> Callable[..., None]:
    """`kernel` to be called with (grid,), its arguments and constexprs, as launch() does; tensors are on the CPU."""
    names = dict(kernel.fn.__globals__)
    for name, value in names.items():
        if hasattr(value, "fn") and isinstance(value.fn, types.FunctionType):
            names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        elif hasattr(value, "value") and type(value).__name__ == "constexpr":
            names[name] = value.value
    names |= HARDWARE
    function = names[kernel.fn.__name__]

    def run(programs: int, args: tuple[Any, ...], constexprs: dict[str, Any]) -> None:
        values = [
            Descriptor(arg) if hasattr(arg, "block_shape") else Pointer(arg) if isinstance(arg, Tensor) else arg
            for arg in args
        ]
        for index in range(programs):
            _here.program = Program(index, programs)
            function(*values, **constexprs)

    return run
