"""Attention benchmarks: prefill, decode, and softmax-context, which writes the probabilities out.

Prefill is bound by the tensor cores, and causal counts half of the work. Decode is bound by reading the cache,
materialised attention by writing the probabilities once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tp_attention import functional, reference
from tp_attention.bench import peers
from tp_attention.bench.cases import Case, Inputs, relative_error, sampled

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """batch B, query heads Hq over kv heads Hkv, tokens S (those of the cache in decode), head dim D."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    causal: bool = False

    @property
    def sizes(self) -> str:
        return f"B{self.batch} H{self.heads}/{self.kv_heads} S{self.tokens} D{self.head_dim}"

    @property
    def name(self) -> str:
        return f"{self.sizes} {'causal' if self.causal else 'full'}"

    @property
    def score_flops(self) -> float:
        """Of q·kᵀ and probabilities·v over all tokens squared, half of them where causal."""
        flops = 4 * self.batch * self.heads * self.tokens**2 * self.head_dim
        return flops / 2 if self.causal else flops

    def tiny(self) -> Shape:
        """The same features in a size that a CPU computes at once."""
        group, kv_heads = self.heads // self.kv_heads, min(self.kv_heads, 2)
        return replace(self, batch=min(self.batch, 2), heads=group * kv_heads, kv_heads=kv_heads, tokens=48)


PREFILL = (
    Shape(8, 16, 16, 512, 64),
    Shape(16, 12, 12, 128, 64),
    Shape(4, 32, 32, 2048, 64, causal=True),
    Shape(4, 32, 32, 2048, 128),
    Shape(4, 32, 32, 2048, 128, causal=True),
    Shape(2, 32, 8, 4096, 128, causal=True),
    Shape(1, 32, 8, 16384, 128, causal=True),
    Shape(1, 32, 32, 16384, 128),
    Shape(1, 16, 16, 8192, 256, causal=True),
    Shape(4, 16, 4, 4096, 64, causal=True),
)
DECODE = (
    Shape(1, 32, 8, 4096, 128),
    Shape(1, 32, 8, 32768, 128),
    Shape(8, 32, 8, 8192, 128),
    Shape(64, 32, 8, 4096, 128),
    Shape(16, 32, 32, 4096, 128),
    Shape(1, 8, 1, 32768, 128),
    Shape(64, 64, 8, 2048, 64),
)
MATERIALISED = (
    Shape(8, 16, 16, 512, 64),
    Shape(16, 12, 12, 128, 64),
    Shape(4, 32, 32, 2048, 64, causal=True),
    Shape(4, 32, 32, 2048, 128, causal=True),
)


def prefill(tiny: bool, device: torch.device) -> Iterator[Case]:
    """functional.attention; error against SDPA-flash's."""
    for shape in _shapes(PREFILL, tiny):

        def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool = shape.causal) -> Callable[[], Tensor]:
            return lambda: functional.attention(q, k, v, causal=causal)

        yield Case(
            benchmark="attention",
            name=f"attention {shape.name}",
            dtype=DTYPE,
            work=shape.score_flops,
            unit="TFLOP/s",
            make=maker(shape, DTYPE, shape.tokens, device),
            ours=ours,
            peers=peers.attention(shape.causal),
            baseline="flash",
            truth=_truth(shape.causal),
        )


def decode(tiny: bool, device: torch.device) -> Iterator[Case]:
    """functional.attention_decode, one query token over full caches; error against SDPA-flash's."""

    def ours(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
        return lambda: functional.attention_decode(q, k, v, lengths)

    for shape in _shapes(DECODE, tiny):
        make = maker(shape, DTYPE, 1, device)

        def with_lengths(make: Callable[[], Inputs] = make, shape: Shape = shape) -> Inputs:
            return *make(), torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=device)

        kv_bytes = 2 * shape.batch * shape.kv_heads * shape.tokens * shape.head_dim * DTYPE.itemsize
        yield Case(
            benchmark="decode",
            name=f"decode {shape.sizes}",
            dtype=DTYPE,
            work=kv_bytes,
            unit="TB/s",
            make=with_lengths,
            ours=ours,
            peers=peers.decode(),
            baseline="flash",
            truth=_truth(causal=False),
        )


def materialised(tiny: bool, device: torch.device) -> Iterator[Case]:
    """functional.softmax_context, and the same in three steps; fp16, DeepSpeed's dtype; error against the formula's."""
    for shape in _shapes(MATERIALISED, tiny):

        def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool = shape.causal) -> Callable[[], Any]:
            return lambda: functional.softmax_context(q, k, v, causal=causal)

        def steps(q: Tensor, k: Tensor, v: Tensor, causal: bool = shape.causal) -> Callable[[], Any]:
            def call() -> Any:
                scores = functional.score_4d_matmul(q, k, causal=causal)
                probabilities = functional.softmax(scores, dtype=q.dtype)
                return functional.context_4d_matmul(probabilities, v), probabilities

            return call

        tokens = shape.batch * shape.heads * shape.tokens
        yield Case(
            benchmark="materialised",
            name=f"materialised {shape.name}",
            dtype=torch.float16,
            work=tokens * (4 * shape.head_dim + shape.tokens) * torch.float16.itemsize,  # q, k, v, out, probabilities
            unit="TB/s",
            make=maker(shape, torch.float16, shape.tokens, device),
            ours=ours,
            peers={"three steps": steps, **peers.materialised(shape.causal)},
            baseline="formula",
            truth=_truth(shape.causal),
        )


def _shapes(shapes: tuple[Shape, ...], tiny: bool) -> list[Shape]:
    return [shape.tiny() for shape in shapes] if tiny else list(shapes)


def maker(shape: Shape, dtype: torch.dtype, queries: int, device: torch.device) -> Callable[[], Inputs]:
    def make() -> Inputs:
        def random(tokens: int, heads: int) -> Tensor:
            return torch.randn(shape.batch, tokens, heads, shape.head_dim, dtype=dtype, device=device)

        kv = (random(shape.tokens, shape.kv_heads) for _ in range(2))
        return random(queries, shape.heads), *kv

    return make


def _truth(causal: bool) -> Callable[..., Callable[[Any], float]]:
    """Compares sampled query rows of every head with the fp64 reference; all of the result must be finite.

    Given probabilities too, their product with v, in fp64, must be the result as well.
    """

    def truth(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Callable[[Any], float]:
        queries, keys = q.shape[1], k.shape[1]
        rows = sampled(queries, q.device)
        seen = torch.arange(keys, device=q.device) <= rows[:, None] + keys - queries
        expected = reference.attention(q[:, rows], k, v, mask=seen[None, None] if causal else None)[0]

        def error_of(result: Any) -> float:
            out, probabilities = result if isinstance(result, tuple) else (result, None)
            if not all(x.isfinite().all() for x in (out, probabilities) if x is not None):
                return float("inf")
            error = relative_error(out[:, rows], expected)
            if probabilities is not None:
                product = torch.einsum("bhts,bshd->bthd", probabilities[:, :, rows].double(), v.double())
                error = max(error, relative_error(product, expected))
            return error

        return error_of

    return truth
