"""The problems on which each kernel family's table is tuned; what is tried on them is autotune's.

A problem does not say which entry of the family's table it belongs to: the tuner sees which one the launcher asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tp_attention import masks
from tp_attention.autotune.layer import Launch
from tp_attention.autotune.spaces import SPACES, Space
from tp_attention.autotune.spaces import table as table  # with their problems, the families' tables
from tp_attention.autotune.spaces import tables as tables
from tp_attention.bench import attention, projections
from tp_attention.bench.attention import Shape


@dataclass(frozen=True)
class Problem:
    """make: one more copy of the inputs, as a launch with them. reads: bytes of it."""

    name: str
    reads: int
    make: Callable[[], Launch]


@dataclass(frozen=True, kw_only=True)
class Family(Space):
    """A search space, and the problems on which it is searched."""

    problems: Callable[[bool, torch.device], list[Problem]]


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
            return lambda: flash_attention(q, k, v, reach=reach)

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
                return lambda: flash_decode(q, k, v, lengths, causal=True)
            k, v = ((x * 30).to(torch.int8) for x in (k, v))
            scale = torch.full(k.shape[:3], 1 / 30, device=device)
            return lambda: flash_decode(q, k, v, lengths, causal=True, k_scale=scale, v_scale=scale)

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
            return lambda: softmax_context(q, k, v, reach=reach)

        return Problem(shape.name, nbytes, launch)

    return [problem(shape) for shape in _shapes(attention.MATERIALISED, tiny)]


def _skinny_gemm(tiny: bool, device: torch.device) -> list[Problem]:
    from tp_attention.kernels.skinny_gemm import skinny_gemm

    def problem(m: int, k: int, n: int, int8: bool) -> Problem:
        make = projections.maker(m, k, n, int8, device)

        def launch() -> Launch:
            x, norm_weight, weight, *quantised = make()
            weight, scale = quantised if int8 else (weight, None)
            return lambda: skinny_gemm(
                x[0], weight, norm_weight=norm_weight, rms_eps=projections.EPS, weight_scale=scale
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
            return lambda: gemm(x[0], weight, weight_scale=scale)

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
            return lambda: norm(x[0], weight, None, "rmsnorm", projections.EPS)

        return Problem(f"K{k} M{m}", 2 * m * k, launch)

    return [problem(96, 256)] if tiny else [problem(m, k) for k in (4096, 8192) for m in (64, 512, 4096)]


_PROBLEMS = {
    "flash_prefill": _flash_prefill,
    "flash_prefill_hopper": _flash_prefill,  # what asks for it goes there
    "flash_decode": _flash_decode,
    "skinny_gemm": _skinny_gemm,
    "gemm": _gemm,
    "norm": _norm,
    "softmax_context": _softmax_context,
}
FAMILIES = {name: Family(problems=problems, **vars(SPACES[name])) for name, problems in _PROBLEMS.items()}
