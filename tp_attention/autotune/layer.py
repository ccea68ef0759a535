"""What an attention layer launches, as calls of the public functions on random tensors.

The public functions, because it is they that choose between the kernels: skinny or tall products, few or many queries,
Hopper's own. Limit: one sequence, as DeepSpeed tunes, and neither norm nor RoPE.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from tp_attention import functional
from tp_attention.functional.prefill import kernel_obstacle

log = logging.getLogger("tp_attention")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8)
GROUP = 128  # columns that share one scale of an int8 weight, unless they or a head have fewer
CODES = 74  # standard deviation of random int8 values

Launch = Callable[[], Any]


@dataclass(frozen=True)
class LayerShape:
    """One rank's part of a layer, and the sequence lengths that it is tuned for; fields as autotune's arguments."""

    min_seqlen: int
    max_seqlen: int
    _: KW_ONLY
    head_size: int
    hidden_size: int
    heads: int
    kv_heads: int
    qkv_rows: int
    causal: bool
    scale: float
    dtype: torch.dtype
    transposed: bool = False
    use_flash: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_seqlen <= self.max_seqlen:
            raise ValueError(f"min_seqlen={self.min_seqlen}, max_seqlen={self.max_seqlen}; use 1 <= min <= max")
        for name in ("head_size", "hidden_size", "heads", "kv_heads", "qkv_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.kv_heads > self.heads:
            raise ValueError(f"kv_heads={self.kv_heads} > heads={self.heads}; a rank holds no kv head that none reads")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")
        if self.dtype == torch.int8 and self.transposed:
            raise ValueError("dtype=torch.int8, transposed=True: int8 weights are [out, in]; pass transposed=False")

    def lengths(self) -> list[int]:
        """Both ends and the powers of two between them."""
        powers = (1 << n for n in range(self.max_seqlen.bit_length()))
        return sorted({self.min_seqlen, *(n for n in powers if self.min_seqlen < n < self.max_seqlen), self.max_seqlen})


def launches(layer: LayerShape, device: torch.device, backend: str = "auto") -> Iterator[tuple[str, Launch]]:
    """Names and calls, the shortest sequences first. All read the same few tensors; none of them is zero."""
    dtype = torch.float16 if layer.dtype == torch.int8 else layer.dtype
    width = layer.heads * layer.head_size
    # its own: this rank's random numbers must stay in step with those of the others, who do not tune
    generator = torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, dtype=dtype, device=device, generator=generator)
    x, context = random(1, layer.max_seqlen, layer.hidden_size), random(1, layer.max_seqlen, width)
    # as the layer has them: views of what its projection writes
    qkv = random(1, layer.max_seqlen, layer.heads + 2 * layer.kv_heads, layer.head_size)
    q, k, v = qkv.split_with_sizes([layer.heads, layer.kv_heads, layer.kv_heads], dim=2)
    into = _weight(layer, layer.qkv_rows, layer.hidden_size, math.gcd(GROUP, layer.hidden_size), generator)
    # groups lie within a head, so that cuts between heads are cuts between groups
    out = _weight(layer, layer.hidden_size, width, math.gcd(GROUP, layer.head_size), generator)

    linear = functools.partial(functional.linear, transposed=layer.transposed, backend=backend)
    attend = functools.partial(
        functional.attention if layer.use_flash else functional.softmax_context,
        scale=layer.scale,
        causal=layer.causal,
        group_size=-(-layer.heads // layer.kv_heads),  # uneven on a rank where heads are
        backend=backend,
    )
    lengths = layer.lengths()
    for tokens in [1, *lengths] if layer.causal and layer.min_seqlen > 1 else lengths:  # 1: as it generates
        yield f"qkv {tokens}", functools.partial(linear, x[:, :tokens], **into)
        yield f"output {tokens}", functools.partial(linear, context[:, :tokens], **out)
    if obstacle := kernel_obstacle(q):
        log.info("autotune: attention is not tuned: %s", obstacle)
        return
    for tokens in lengths:
        keys = k[:, :tokens], v[:, :tokens]
        if layer.causal:
            yield f"attention 1 x {tokens}", functools.partial(attend, q[:, :1], *keys)
        yield f"attention {tokens} x {tokens}", functools.partial(attend, q[:, :tokens], *keys)


def _weight(layer: LayerShape, rows: int, columns: int, group: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A weight and, of int8, its scales, as functional.linear names them; products with it keep the size of x."""
    new: dict[str, Any] = {"device": generator.device, "generator": generator}
    if layer.dtype == torch.int8:
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, **new)
        scale = 0.5 + torch.rand(rows, columns // group, dtype=torch.float32, **new)
        return {"weight": codes, "weight_scale": scale / (CODES * columns**0.5)}
    shape = (columns, rows) if layer.transposed else (rows, columns)
    return {"weight": torch.randn(shape, dtype=layer.dtype, **new) / columns**0.5}
