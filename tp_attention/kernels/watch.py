"""What a function allocates and launches, seen from outside while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tp_attention.kernels.plans import Descriptor, NotKept, Output, Place, Plan, Step, described, slots

ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class Watch(TorchDispatchMode):
    """Sees what a call allocates and launches, and whether it does anything else."""

    def __init__(self, inputs: list[Tensor], fixed: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.inputs = list(inputs)
        self.fixed = {tensor.untyped_storage().data_ptr() for tensor in fixed}
        self.allocated: list[Tensor] = []
        self.launches: list[tuple[Any, tuple[Any, ...], Callable[..., Any], tuple[Any, ...]]] = []
        self.obstacle = ""
        self.compiled = False  # a kernel, so that this call says nothing of the next

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        views = schema.returns and all(
            out.alias_info is not None and not out.alias_info.is_write for out in schema.returns
        )
        if schema.name.removeprefix("aten::") in ALLOCATIONS:
            self.allocated.append(result)
        elif not views:
            self.obstacle = self.obstacle or f"it calls {schema.name}"
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
        """What the call did. Raises NotKept where that cannot be made again."""
        if self.obstacle or not self.launches:
            raise NotKept(self.obstacle or "it launches nothing")
        results = result if isinstance(result, tuple) else (result,)
        if not all(isinstance(each, Tensor) for each in results):
            raise NotKept("its result is no tensor")
        bases = [*self.inputs, *self.allocated]
        pointers = [base.data_ptr() for base in bases]
        if len(set(pointers)) < len(pointers) or any(base.numel() == 0 for base in bases):
            raise NotKept("tensors lie in the same place, or nowhere")
        steps = [self._step(*launch) for launch in self.launches]
        allocations = [(tuple(base.shape), base.dtype) for base in self.allocated]
        if not all(base.is_contiguous() for base in self.allocated):
            raise NotKept("it allocates what is not contiguous")
        outputs: list[Output] = []
        for each in results:
            place = self._place(each)
            base, own = bases[place.index], place.index - len(self.inputs)
            if place.offset % each.element_size() or base.dtype != each.dtype:
                raise NotKept("a result is of another dtype than its memory")
            if own < 0 and each is not base:
                raise NotKept("it returns a view of an argument")
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
            raise NotKept(f"its tensors are on {len(devices)} devices")
        return devices.pop()

    def _place(self, tensor: Tensor) -> Place:
        """Among inputs and allocations; exactly where one begins, or within the memory of a single one."""
        bases = [*self.inputs, *self.allocated]
        pointer = tensor.data_ptr()
        for index, base in enumerate(bases):
            if base.data_ptr() == pointer:
                return Place(index, 0)
        storage = tensor.untyped_storage().data_ptr()
        owners = [index for index, base in enumerate(bases) if base.untyped_storage().data_ptr() == storage]
        if len(owners) != 1:
            raise NotKept("it uses a tensor that is no argument, or of several")
        return Place(owners[0], pointer - bases[owners[0]].data_ptr())

    def _step(
        self, compiled: Any, values: tuple[Any, ...], launcher: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Step:
        nested = isinstance(arguments[-1], list | tuple)
        if nested:  # from Triton 3.7 on
            before, kernel = list(arguments[:-1]), list(arguments[-1])
        else:
            count = len(arguments) - sum(slots(value) for value in described(compiled, values))
            before, kernel = list(arguments[:count]), list(arguments[count:])
        if any(isinstance(each, Tensor) for each in before):
            raise NotKept("a kernel has scratch memory")
        pointers: list[tuple[int, Place]] = []
        maps: list[tuple[int, Place, dict[int, Any], Any, Any]] = []
        at = 0
        for value, expanded, metadata in described(compiled, values):
            if isinstance(value, Tensor):
                if value.untyped_storage().data_ptr() in self.fixed:
                    kernel[at] = value.data_ptr()
                else:
                    pointers.append((at, self._place(value)))
            elif expanded is not None:
                place = self._place(value.base)
                if isinstance(expanded[0], Tensor):
                    pointers.append((at, place))
                else:
                    maps.append((at, place, {}, Descriptor(value, 0), metadata))
            at += slots((value, expanded, metadata))
        for slot in [*(slot for slot, _ in pointers), *(slot for slot, *_ in maps)]:
            kernel[slot] = None  # not to keep tensors
        if at != len(kernel):
            raise NotKept("Triton's launcher takes other arguments than expected")
        return Step(launcher, before, kernel, nested, pointers, maps)
