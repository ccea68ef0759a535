"""A function's launches, made again for other tensors without its host code: `again(function, args, keywords)`.

Checks, configurations and copy-engine descriptors depend on the arguments' shapes, strides, dtypes and alignment alone.
They cost 30 to 60 µs a function in Python, more than small kernels run. So the second call with such arguments is
watched, and what it did is kept: which tensors it allocated, which kernels it started with them, what it returned.
Later calls allocate and start the same, which takes some 5 µs a kernel.

Kept is only what is nothing but allocations, views and launches of ours: a function that runs any operator of torch
beside them (a copy of a misaligned tensor, say) runs as before. Limit: it reaches into Triton's launcher, whose inner
call is not public. Where that is not as expected, and while a profiler's hooks are set, nothing is kept.
watch.py sees what a call does, plans.py is what is kept of it.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from tp_attention.kernels.plans import NotKept, Plan
from tp_attention.kernels.watch import Watch

log = logging.getLogger("tp_attention")

MOST_PLANS = 1024

_NEW, _SEEN = object(), object()
_plans: OrderedDict[Any, Any] = OrderedDict()  # a Plan, _SEEN for a call that was made once, None for one not to keep
_thread = threading.local()  # watch: the Watch of this thread; busy: calls are not to be replayed


def again(
    function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any], fixed: Sequence[Tensor] = ()
) -> Any:
    """function(*args, **keywords), by what is known of an earlier call where its tensors are on the current GPU.

    fixed: tensors that the function uses beside its arguments; they must stay where they are until `forget`.
    """
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
    watch = _thread.watch = Watch(tensors, fixed)
    _thread.busy = True
    try:
        with watch:
            result = function(*args, **keywords)
    finally:
        _thread.busy, _thread.watch = False, None
    if not watch.compiled:  # else the next call is watched
        try:
            _plans[key] = watch.plan(result)
        except NotKept as reason:
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
    """Drop all that is kept: configurations have changed, or fixed tensors are about to go."""
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


def _current_device() -> int:
    return torch._C._cuda_getDevice()
