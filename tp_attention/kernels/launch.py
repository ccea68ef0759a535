"""Launching a kernel on its tensors' device, and the second time without Triton's look-up of what to run.

Triton derives that anew from every argument on every call, in Python: some 50 µs for an attention kernel, more than
many of them run. Here the same is looked up by one tuple, then the compiled kernel is called directly. replay.py does
without that too, for a function that is called again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from tp_attention.kernels import configs, replay

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    args: Sequence[Any],
    constexprs: Mapping[str, Any],
    *,
    cluster: int = 1,
    **options: Any,
) -> None:
    """kernel[grid](*args, **constexprs, **options) on `device`, where the tensors are; nothing for an empty grid.

    args: the kernel's parameters before its constexprs, in order. constexprs: all of these, in order. cluster: so many
    programs, neighbours in the grid's first dimension, form a thread block cluster (from Hopper on). Unlike Triton's
    num_ctas it leaves them programs of their own. Raises ValueError for a grid that is no whole number of clusters.
    """
    if grid[0] % cluster:
        raise ValueError(f"a grid of {grid[0]} programs is no whole number of clusters of {cluster}")
    if 0 in grid:
        return
    if device.type != "cuda" or configs.interpreted():  # or a test that compiles for a GPU which is not here
        _check_order(kernel, args, constexprs)
        kernel[grid](*args, **constexprs, **options)
    elif device.index == torch.cuda.current_device():
        _launch(kernel, grid, args, constexprs, options, cluster, device.index)
    else:
        with torch.cuda.device(device):
            _launch(kernel, grid, args, constexprs, options, cluster, device.index)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: Sequence[Any],
    constexprs: Mapping[str, Any],
    options: Mapping[str, Any],
    cluster: int,
    device: int,
) -> None:
    specialised = _specialised(kernel)
    key = (
        kernel, device, cluster, *constexprs.values(), *options.values(),
        *[_kind(arg, special) for arg, special in zip(args, specialised, strict=False)],
    )  # fmt: skip
    found = _compiled.get(key)
    watch = replay.watched()
    if found is None:
        if watch is not None:
            watch.compiled = True
        _check_order(kernel, args, constexprs)
        if cluster == 1:
            compiled = kernel[grid](*args, **constexprs, **options)
            _compiled[key] = compiled, compiled.packed_metadata
            return
        compiled = kernel.warmup(*args, grid=grid, **constexprs, **options)
        found = _compiled[key] = compiled, _in_clusters(compiled, cluster)
    compiled, packed = found
    values = *args, *constexprs.values()
    x, y, z = (*grid, 1, 1)[:3]
    x //= cluster
    stream = torch._C._cuda_getCurrentRawStream(device)
    hooks, metadata = (None, None), None
    if replay.profiled():
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        metadata = compiled.launch_metadata((x, y, z), stream, *values)

    def run() -> None:
        compiled.run(x, y, z, stream, compiled.function, packed, metadata, *hooks, *values)

    if watch is None:
        run()
    else:
        watch.launched(compiled, values, run)


def _in_clusters(compiled: Any, cluster: int) -> Any:
    """What Triton's launcher is told of a kernel, with clusters: it takes their size from num_ctas."""
    return make_backend(compiled.metadata.target).pack_metadata(compiled.metadata._replace(num_ctas=cluster))


def _check_order(kernel: Any, args: Sequence[Any], constexprs: Mapping[str, Any]) -> None:
    """A compiled kernel is called with values alone, so their order must be its parameters'."""
    if [*constexprs] != kernel.arg_names[len(args) :]:
        raise TypeError(f"{kernel.__name__} takes {kernel.arg_names[len(args) :]}, got {[*constexprs]}")


def _kind(arg: Any, specialised: bool) -> Any:
    """What Triton's compilation depends on of an argument. As text for integers: True, 1 and 1.0 are equal as keys."""
    if isinstance(arg, int):
        width = "i32" if -(2**31) <= arg < 2**31 else "i64"
        if not specialised:
            return width
        return "1" if arg == 1 else width + "x16" if arg % 16 == 0 else width
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if arg is None or isinstance(arg, float):
        return type(arg)
    return arg.base.dtype, tuple(arg.block_shape)  # a TensorDescriptor


@functools.cache
def _specialised(kernel: JITFunction) -> tuple[bool, ...]:
    return tuple(not parameter.do_not_specialize for parameter in kernel.params)
