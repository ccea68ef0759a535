"""What may be tried: for each kernel family the values of its configuration's fields, around the entry of its table.

Asked by autotune, which tunes one layer, by its cache, which holds nothing else, and by bench.tune, which makes the
tables. Limit: tiles for tensor cores. Of fp32, only a product's tile, which is not tried here, is not that large.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tp_attention import kernels
from tp_attention.kernels import configs

ARCHITECTURES = (0, 80, 90)  # of kernels.configs


class Entry(NamedTuple):
    """A configuration for one key of a family's table, as configs.remember takes it."""

    kernel: str
    key: configs.Key
    config: Any


@dataclass(frozen=True)
class Space:
    """space: values of the configuration's fields; a field that is not there keeps the value of the table's entry."""

    space: Mapping[str, Sequence[Any]]
    keep: Callable[[Any], bool] = lambda config: True

    def candidates(self, default: Any) -> Iterator[Any]:
        """The table's entry first, then all others of the space, shuffled: time may be up before the last ones.

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


def entry(family: str, key: configs.Key) -> Any:
    """What the table has for this key: its own entry, else the safe one, else None."""
    known = table(family)
    return known.get(key, known.get((0, *key[1:])))


def keys(family: str) -> list[configs.Key]:
    """Every key that the table has an entry for."""
    rests = dict.fromkeys(key[1:] for key in table(family))
    found = ((architecture, *rest) for rest in rests for architecture in ARCHITECTURES)
    return [key for key in found if entry(family, key) is not None]


def _flash_fits(config: Any) -> bool:
    """Accumulators of block_m rows over too few warps spill."""
    return config.block_m <= 32 * config.num_warps


def _hopper_ends(config: Any) -> bool:
    """A causal consumer passes over up to a block for each consumer after it; where those are all stages, it hangs."""
    return config.stages >= config.consumers


def _skinny_fits(config: Any) -> bool:
    """Enough of the weights under way for an SM to keep the memory busy, and not more than it has room for."""
    if config.prefetch and not config.tma:  # which prefetches nothing
        return False
    return 48 << 10 <= config.block_n * config.block_k * config.stages * 2 <= 208 << 10


SPACES = {
    "flash_prefill": Space(
        {"block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}, _flash_fits
    ),
    # not its tiles, which decide whether a program has room for its operands
    "flash_prefill_hopper": Space({"turns": (True, False), "stages": (2, 3, 4)}, _hopper_ends),
    "flash_decode": Space(
        {"block_n": (32, 64, 128), "num_warps": (2, 4), "num_stages": (2, 3, 4, 5), "programs": (1, 2, 3, 4)},
        lambda config: config.num_warps > 2 or config.block_n <= 32,  # else they spill
    ),
    "skinny_gemm": Space(
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
    "gemm": Space(
        {
            "stages": (3, 4, 5),
            "store": (64, 128, 256),
            "blocks": (1, 2),
            "group_m": (4, 8, 16),
            "flatten": (True, False),
        },
        lambda config: config.tma or config.store == 128,  # columns of a tile store
    ),
    "norm": Space({"rows": (1, 2, 4), "warps": (2, 4, 8, 16)}),
    "softmax_context": Space(
        {"block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)}, _flash_fits
    ),
}
ANY_DTYPE = ("gemm",)  # whose spaces are as good for fp32
