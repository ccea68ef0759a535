"""A function's launches, made again for other tensors without its host code: `again(function, args, keywords)`.

Checks, configurations and copy-engine descriptors depend on the arguments' shapes, strides, dtypes and alignment alone.
They cost 30 to 60 µs a function in Python, more than small kernels run. So the second call with such arguments is
watched, and what it did is kept: which tensors it allocated, which kernels it started with them, what it returned.
Later calls allocate and start the same, which takes some 5 µs a kernel.

Kept is only what is nothing but allocations, views and launches of ours: a function that runs any operator of torch
beside them (a copy of a misaligned tensor, say) runs as before. Limit: it reaches into Triton's launcher, whose inner
call is not public. Where that is not as expected, and while a profiler's hooks are set, nothing is kept.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

log = logging.getLogger("tp_attention")

MOST_PLANS, MOST_MAPS = 1024, 256

_NEW, _SEEN = object(), object()
_plans: OrderedDict[Any, Any] = OrderedDict()  # a Plan, _SEEN for a call that was made once, None for one not to keep
_thread = threading.local()  # watch: the Watch of this thread; busy: calls are not to be replayed


def again(function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """function(*args, **keywords), by what is known of an earlier call where its tensors are on the current GPU."""
    if getattr(_thread, "busy", False) or profiled():
        return function(*args, **keywords)
    tensors: list[Tensor] = []
    key = (function, torch.is_grad_enabled(), *keywords, *_key(args, tensors), *_key(keywords.values(), tensors))
    if not tensors or tensors[0].get_device() != _current_device():
        return function(*args, **keywords)  # launches go where the current GPU is
    plan = _plans.get(key, _NEW)
    if isinstance(plan, Plan):
        return plan.run(tensors)
    if plan is None:
        return function(*args, **keywords)
    if plan is _NEW:
        _plans[key] = _SEEN
        while len(_plans) > MOST_PLANS:
            _plans.popitem(last=False)
        return function(*args, **keywords)
    watch = _thread.watch = Watch(tensors)
    _thread.busy = True
    try:
        with watch:
            result = function(*args, **keywords)
    finally:
        _thread.busy, _thread.watch = False, None
    if not watch.compiled:  # else the next call is watched
        try:
            _plans[key] = watch.plan(result)
        except _NotKept as reason:
            _plans[key] = None
            log.debug("%s is not replayed: %s", getattr(function, "__name__", function), reason)
    return result


def profiled() -> bool:
    """Whether a profiler wants to hear of every launch."""
    runtime = knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))


@contextmanager
def paused() -> Iterator[None]:
    """In this thread every call does all of its work, and none is kept."""
    before = getattr(_thread, "busy", False)
    _thread.busy = True
    try:
        yield
    finally:
        _thread.busy = before


def forget() -> None:
    """Drop all that is kept: configurations have changed."""
    _plans.clear()


def watched() -> Watch | None:
    """What watches this thread's launches."""
    return getattr(_thread, "watch", None)


def _key(values: Any, tensors: list[Tensor]) -> list[Any]:
    """What a function's doings depend on, of each value; its tensors are appended to `tensors`."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            found += (
                value.shape,
                value.stride(),
                value.dtype,
                value.data_ptr() & 15,
                value.requires_grad,
                value.device,
            )
        elif isinstance(value, tuple | list):
            found += (len(value), *_key(value, tensors))
        else:
            found += (type(value), value)
    return found


class _NotKept(Exception):
    """Why a call cannot be made again by its launches."""


@dataclass(frozen=True)
class _Place:
    """A tensor: number `index` of inputs and allocations, from byte `offset` of its first element on."""

    index: int
    offset: int


@dataclass
class _Step:
    """A launch: the launcher's arguments, where `pointers` and `maps` are put in. nested: the kernel's are a list."""

    launcher: Callable[..., Any]
    before: list[Any]
    kernel: list[Any]
    nested: bool
    pointers: list[tuple[int, _Place]]
    maps: list[tuple[int, _Place, dict[int, Any], Any, Any]]  # with what was made, a descriptor to copy, its metadata

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


_Output = tuple[int, tuple[int, ...] | None, tuple[int, ...], int]  # tensor, shape if a view of it, strides, offset


@dataclass
class Plan:
    """What a call does. allocations: shapes and dtypes. results: each a tensor, or how it lies in one."""

    allocations: list[tuple[tuple[int, ...], torch.dtype]]
    steps: list[_Step]
    results: list[_Output]
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


class Watch(TorchDispatchMode):
    """Sees what a call allocates and launches, and whether it does anything else."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.inputs = list(inputs)
        self.allocated: list[Tensor] = []
        self.launches: list[tuple[Any, tuple[Any, ...], Callable[..., Any], tuple[Any, ...]]] = []
        self.obstacle = ""
        self.compiled = False  # a kernel, so that this call says nothing of the next

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in (
            "aten::empty",
            "aten::empty_like",
            "aten::new_empty",
            "aten::empty_strided",
            "aten::new_empty_strided",
        ):
            self.allocated.append(result)
        elif not all(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns):
            self.obstacle = self.obstacle or f"it calls {name}"
        return result

    def launched(self, compiled: Any, values: tuple[Any, ...], call: Callable[[], None]) -> None:
        """Make a launch, and note what Triton's launcher is called with."""
        launcher = compiled.run
        launch = launcher.launch
        seen: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

        def spy(inner: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any) -> Any:
                seen.append((inner, args))
                return inner(*args)

            return noted

        names = getattr(getattr(launch, "__code__", None), "co_freevars", ())
        if "launcher" in names:  # it makes descriptors of tensors first
            cell = launch.__closure__[names.index("launcher")]
            inner = cell.cell_contents
            cell.cell_contents = spy(inner)
            try:
                call()
            finally:
                cell.cell_contents = inner
        else:
            launcher.launch = spy(launch)
            try:
                call()
            finally:
                launcher.launch = launch
        if len(seen) != 1:
            self.obstacle = self.obstacle or "Triton's launcher is not as expected"
            return
        self.launches.append((compiled, values, *seen[0]))

    def plan(self, result: Any) -> Plan:
        """What the call did. Raises _NotKept where that cannot be made again."""
        if self.obstacle or not self.launches:
            raise _NotKept(self.obstacle or "it launches nothing")
        results = result if isinstance(result, tuple) else (result,)
        if not all(isinstance(each, Tensor) for each in results):
            raise _NotKept("its result is no tensor")
        bases = [*self.inputs, *self.allocated]
        pointers = [base.data_ptr() for base in bases]
        if len(set(pointers)) < len(pointers) or any(base.numel() == 0 for base in bases):
            raise _NotKept("tensors lie in the same place, or nowhere")
        steps = [self._step(*launch) for launch in self.launches]
        allocations = [(tuple(base.shape), base.dtype) for base in self.allocated]
        if not all(base.is_contiguous() for base in self.allocated):
            raise _NotKept("it allocates what is not contiguous")
        outputs: list[_Output] = []
        for each in results:
            place = self._place(each)
            base, own = bases[place.index], place.index - len(self.inputs)
            if place.offset % each.element_size() or base.dtype != each.dtype:
                raise _NotKept("a result is of another dtype than its memory")
            if own < 0 and each is not base:
                raise _NotKept("it returns a view of an argument")
            whole = own < 0 or (each.numel() == base.numel() and each.is_contiguous() and not place.offset)
            if own >= 0 and whole and all(index != place.index for index, *_ in outputs):
                allocations[own] = tuple(each.shape), each.dtype  # a kernel takes memory of any shape
            elif whole:
                whole = own < 0 or allocations[own][0] == each.shape
            outputs.append(
                (place.index, None if whole else tuple(each.shape), each.stride(), place.offset // each.element_size())
            )
        return Plan(allocations, steps, outputs, not isinstance(result, tuple), self.device())

    def device(self) -> torch.device:
        """Where all of it happens."""
        devices = {base.device for base in [*self.inputs, *self.allocated]}
        if len(devices) != 1:
            raise _NotKept(f"its tensors are on {len(devices)} devices")
        return devices.pop()

    def _place(self, tensor: Tensor) -> _Place:
        """Among inputs and allocations; exactly where one begins, or within the memory of a single one."""
        bases = [*self.inputs, *self.allocated]
        pointer = tensor.data_ptr()
        for index, base in enumerate(bases):
            if base.data_ptr() == pointer:
                return _Place(index, 0)
        storage = tensor.untyped_storage().data_ptr()
        owners = [index for index, base in enumerate(bases) if base.untyped_storage().data_ptr() == storage]
        if len(owners) != 1:
            raise _NotKept("it uses a tensor that is no argument, or of several")
        return _Place(owners[0], pointer - bases[owners[0]].data_ptr())

    def _step(
        self, compiled: Any, values: tuple[Any, ...], launcher: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> _Step:
        nested = isinstance(arguments[-1], list | tuple)
        if nested:  # from Triton 3.7 on
            before, kernel = list(arguments[:-1]), list(arguments[-1])
        else:
            count = len(arguments) - sum(_slots(value) for value in _described(compiled, values))
            before, kernel = list(arguments[:count]), list(arguments[count:])
        if any(isinstance(each, Tensor) for each in before):
            raise _NotKept("a kernel has scratch memory")
        pointers: list[tuple[int, _Place]] = []
        maps: list[tuple[int, _Place, dict[int, Any], Any, Any]] = []
        at = 0
        for value, expanded, metadata in _described(compiled, values):
            if isinstance(value, Tensor):
                pointers.append((at, self._place(value)))
            elif expanded is not None:
                place = self._place(value.base)
                if isinstance(expanded[0], Tensor):
                    pointers.append((at, place))
                else:
                    maps.append((at, place, {}, _Descriptor(value, 0), metadata))
            at += _slots((value, expanded, metadata))
        for slot in [*(slot for slot, _ in pointers), *(slot for slot, *_ in maps)]:
            kernel[slot] = None  # not to keep tensors
        if at != len(kernel):
            raise _NotKept("Triton's launcher takes other arguments than expected")
        return _Step(launcher, before, kernel, nested, pointers, maps)


def _current_device() -> int:
    return torch._C._cuda_getDevice()


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


Described = tuple[Any, list[Any] | None, Any]


def _described(compiled: Any, values: tuple[Any, ...]) -> list[Described]:
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


def _slots(described: Described) -> int:
    return 1 if described[1] is None else len(described[1])


class _At:
    """Stands for a tensor at an address, as far as a descriptor is made of it."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def data_ptr(self) -> int:
        return self.pointer


class _Descriptor:
    """A descriptor like another one, of a tensor at another address."""

    def __init__(self, like: Any, pointer: int) -> None:
        self.base, self.shape, self.strides, self.padding = _At(pointer), like.shape, like.strides, like.padding
        self.round_f32_to_tf32 = getattr(like, "round_f32_to_tf32", False)


def _tensor_map(like: Any, metadata: Any, pointer: int) -> Any:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return make_tensordesc_arg(_Descriptor(like, pointer), metadata)[0]
