"""What the tuner tries: for each kernel family its problems, launched with a given configuration, and its search space.

A problem does not say which entry of the family's table it belongs to: the tuner sees which one the launcher asks for.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tp_attention import kernels, masks
from tp_attention.bench import attention, projections
from tp_attention.bench.attention import Shape

Launch = Callable[[Any], Any]  # config or None -> result


@dataclass(frozen=True)
class Problem:
    """make: one more copy of the inputs, as a launch with them. reads: bytes of it."""

    name: str
    reads: int
    make: Callable[[], Launch]


@dataclass(frozen=True)
class Family:
    """space: values of the configuration's fields; a field that is not there keeps the value of the table's entry."""

    problems: Callable[[bool, torch.device], list[Problem]]
    space: Mapping[str, Sequence[Any]]
    keep: Callable[[Any], bool] = lambda config: True

    def candidates(self, default: Any) -> Iterator[Any]:
        """The entry of today first, then all others of the space, shuffled: time may be up before the last ones.

        The same order every time, as those that not every problem of an entry came to do not count.
        """
        yield default
        points = list(itertools.product(*self.space.values()))
        random.Random(0).shuffle(points)
        for values in points:
            config = dataclasses.replace(default, **dict(zip(self.space, values, strict=True)))
            if config != default and self.keep(config):
                yield config


def table(family: str) -> dict[Any, Any]:
    """The frozen table in the family's file."""
    return importlib.import_module(f"{kernels.__name__}.{family}").CONFIGS


def tables() -> list[str]:
    """Every family with a table, also those that are not tuned here."""
    names = (module.name for module in pkgutil.iter_modules(kernels.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"{kernels.__name__}.{name}"), "CONFIGS")]


def _qkv(shape: Shape, queries: int, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Any], int]:
    """A maker of q, k, v and their bytes."""
    elements = shape.batch * shape.head_dim * (queries * shape.heads + 2 * shape.tokens * shape.kv_heads)
    return attention.maker(shape, dtype, queries, device), elements * dtype.itemsize


def _shapes(shapes: Sequence[Shape], tiny: bool) -> list[Shape]:
    return [shape.tiny() for shape in shapes[:2]] if tiny else list(shapes)


def _flash_prefill(tiny: bool, device: torch.device) -> list[Problem]:
    from tp_attention.kernels.flash_prefill import flash_attention

    def problem(shape: Shape) -> Problem:
        make, nbytes = _qkv(shape, shape.tokens, attention.DTYPE, device)
        reach = masks.effective_window(shape.tokens, shape.tokens, shape.causal, None)

        def launch() -> Launch:
            q, k, v = make()
            return lambda config: flash_attention(q, k, v, reach=reach, config=config)

        return Problem(shape.name, nbytes, launch)

    extra = Shape(1, 16, 16, 8192, 256), Shape(4, 32, 32, 2048, 32, causal=True), Shape(4, 32, 32, 2048, 32)
    return [problem(shape) for shape in _shapes((*attention.PREFILL, *extra), tiny)]


def _flash_decode(tiny: bool, device: torch.device) -> list[Problem]:
    from tp_attention.kernels.flash_decode import flash_decode

    def problem(shape: Shape, queries: int, int8: bool) -> Problem:
        make, nbytes = _qkv(shape, queries, attention.DTYPE, device)

        def launch() -> Launch:
            q, k, v = make()
            lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=device)
            if not int8:
                return lambda config: flash_decode(q, k, v, lengths, causal=True, config=config)
            k, v = ((x * 30).to(torch.int8) for x in (k, v))
            scale = torch.full(k.shape[:3], 1 / 30, device=device)
            return lambda config: flash_decode(
                q, k, v, lengths, causal=True, k_scale=scale, v_scale=scale, config=config
            )

        return Problem(f"{shape.sizes} T{queries}{' int8' if int8 else ''}", nbytes // (1 + int8), launch)

    few = Shape(1, 32, 8, 4096, 128), Shape(8, 32, 8, 8192, 128)
    return [
        *(problem(shape, 1, False) for shape in _shapes(attention.DECODE, tiny)),
        *(problem(shape, 8, False) for shape in _shapes(few, tiny)),
        *(problem(shape, 1, True) for shape in _shapes(few, tiny)),
    ]


def _softmax_context(tiny: bool, device: torch.device) -> list[Problem]:
    from tp_attention.kernels.softmax_context import softmax_context

    def problem(shape: Shape) -> Problem:
        make, nbytes = _qkv(shape, shape.tokens, torch.float16, device)
        reach = masks.effective_window(shape.tokens, shape.tokens, shape.causal, None)

        def launch() -> Launch:
            q, k, v = make()
            return lambda config: softmax_context(q, k, v, reach=reach, config=config)

        return Problem(shape.name, nbytes, launch)

    return [problem(shape) for shape in _shapes(attention.MATERIALISED, tiny)]


def _skinny_gemm(tiny: bool, device: torch.device) -> list[Problem]:
    from tp_attention.kernels.skinny_gemm import skinny_gemm

    def problem(m: int, k: int, n: int, int8: bool) -> Problem:
        make = projections.maker(m, k, n, int8, device)

        def launch() -> Launch:
            x, norm_weight, weight, *quantised = make()
            weight, scale = quantised if int8 else (weight, None)
            return lambda config: skinny_gemm(
                x[0], weight, norm_weight=norm_weight, rms_eps=projections.EPS, weight_scale=scale, config=config
            )

        return Problem(f"K{k} N{n} M{m}{' int8' if int8 else ''}", n * k * (1 if int8 else 2), launch)

    sizes = [(256, 384)] if tiny else projections.QKV
    tokens = (1, 32, 64)
    return [problem(m, k, n, int8) for int8 in (False, True) for m in tokens for k, n in sizes]


def _gemm(tiny: bool, device: torch.device) -> list[Problem]:
    from tp_attention.kernels.gemm import gemm

    def problem(m: int, k: int, n: int, int8: bool) -> Problem:
        make = projections.maker(m, k, n, int8, device)

        def launch() -> Launch:
            x, _, weight, *quantised = make()
            weight, scale = quantised if int8 else (weight, None)
            return lambda config: gemm(x[0], weight, weight_scale=scale, config=config)

        reads = n * k * (1 if int8 else 2) + m * k * 2
        return Problem(f"K{k} N{n} M{m}{' int8' if int8 else ''}", reads, launch)

    sizes = [(256, 384)] if tiny else (*projections.QKV, *projections.OUTPUT)
    tokens = (96,) if tiny else (128, 256, 512, 1024, 4096, 16384)
    return [problem(m, k, n, int8) for int8 in (False, True) for m in tokens for k, n in sizes]


def _norm(tiny: bool, device: torch.device) -> list[Problem]:
    from tp_attention.kernels.norm import norm

    def problem(m: int, k: int) -> Problem:
        make = projections.maker(m, k, 1, False, device)

        def launch() -> Launch:
            x, weight, _ = make()
            return lambda config: norm(x[0], weight, None, "rmsnorm", projections.EPS, config=config)

        return Problem(f"K{k} M{m}", 2 * m * k, launch)

    return [problem(96, 256)] if tiny else [problem(m, k) for k in (4096, 8192) for m in (64, 512, 4096)]


def _flash_fits(config: Any) -> bool:
    """Accumulators of block_m rows over too few warps spill."""
    return config.block_m <= 32 * config.num_warps


def _skinny_fits(config: Any) -> bool:
    """Enough of the weights under way for an SM to keep the memory busy, and not more than it has room for."""
    return 48 << 10 <= config.block_n * config.block_k * config.stages * 2 <= 208 << 10


FAMILIES = {
    "flash_prefill": Family(
        _flash_prefill,
        {"block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
        _flash_fits,
    ),
    "flash_decode": Family(
        _flash_decode,
        {"block_n": (32, 64, 128), "num_warps": (2, 4), "num_stages": (2, 3, 4, 5), "programs": (1, 2, 3, 4)},
        lambda config: config.num_warps > 2 or config.block_n <= 32,  # else they spill
    ),
    "skinny_gemm": Family(
        _skinny_gemm,
        {
            "block_n": (64, 128, 256),
            "block_k": (64, 128, 256),
            "warps": (4, 8),
            "stages": (3, 4, 6, 8),
            "blocks": (1, 2, 3),
            "prefetch": (0, 256, 1024),
        },
        _skinny_fits,
    ),
    # not the tile's size, which the launcher picks by the problem's, and asks the table for the rest
    "gemm": Family(
        _gemm,
        {
            "stages": (3, 4, 5),
            "store": (64, 128, 256),
            "blocks": (1, 2),
            "group_m": (4, 8, 16),
            "flatten": (True, False),
        },
    ),
    "norm": Family(_norm, {"rows": (1, 2, 4), "warps": (2, 4, 8, 16)}),
    "softmax_context": Family(
        _softmax_context,
        {"block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
        _flash_fits,
    ),
}
