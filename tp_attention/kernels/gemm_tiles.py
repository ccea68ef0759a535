"""How gemm.py cuts a product into tiles.

Few rows make few tiles, and a last wave that is half empty costs as much as a full one. So tiles come in several
widths, 192 and 160 among them (a tail of 64 or 32 columns has sums of its own), and the launcher takes the width whose
waves cover the smallest area: M 512, N 6144 is 128 tiles of 192 columns, one wave of 132 SMs. A tail and flattened
loops do not go together: ptxas then waits for every single product. There are 5 widths, so at most 5 kernels to
compile for a weight, whatever the values of M.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Config:
    """A tile has block_m rows and block_n + tail columns. store: columns that are stored at a time.

    blocks: programs per SM. group_m: tiles of rows done for one tile of columns before the next. tma: tile loads and
    stores where alignment allows. flatten: one loop over all steps of all tiles.
    """

    block_m: int
    block_n: int
    tail: int
    block_k: int
    warps: int
    stages: int
    blocks: int = 1
    group_m: int = 8
    store: int = 128
    tma: bool = False
    flatten: bool = False


# (architecture, what the weights are, columns of a tile)
CONFIGS = {
    (90, "half", 256): Config(128, 256, 0, 64, 8, 3, group_m=16, tma=True, flatten=True),
    (90, "half", 192): Config(128, 128, 64, 64, 8, 4, tma=True),
    (90, "half", 160): Config(128, 128, 32, 64, 8, 5, group_m=16, tma=True),
    (90, "half", 128): Config(128, 128, 0, 64, 8, 5, group_m=16, tma=True),
    (90, "half", 64): Config(128, 64, 0, 64, 4, 6, tma=True, flatten=True),
    (90, "int8", 128): Config(256, 128, 0, 64, 8, 4, tma=True),
    (90, "int8", 64): Config(128, 64, 0, 64, 4, 3, blocks=2, group_m=16, tma=True),
    (90, "float32", 64): Config(64, 64, 0, 16, 4, 3, blocks=2),
    (80, "half", 128): Config(128, 128, 0, 32, 8, 4, blocks=2),
    (80, "half", 64): Config(128, 64, 0, 32, 4, 4, blocks=2),
    (80, "int8", 128): Config(128, 128, 0, 64, 8, 3),
    (80, "float32", 64): Config(64, 64, 0, 16, 4, 3, blocks=2),
    (0, "half", 64): Config(64, 64, 0, 32, 4, 3, blocks=2),
    (0, "int8", 64): Config(64, 64, 0, 64, 4, 3, blocks=2),
    (0, "float32", 64): Config(64, 64, 0, 16, 4, 2, blocks=2),
}
TILE_COST = 32  # what a tile costs beyond its columns (it is filled and drained once), in columns


@functools.lru_cache(4096)
def tile_width(rows: int, columns: int, architecture: int, kind: str, processors: int) -> int:
    """The width in CONFIGS whose waves of tiles, one per SM, cover the smallest area."""
    if (architecture, kind) not in {key[:2] for key in CONFIGS}:
        architecture = 0

    def cost(width: int) -> int:
        config = CONFIGS[architecture, kind, width]
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, width)
        return triton.cdiv(tiles, processors) * config.block_m * (width + TILE_COST)

    return min((width for a, k, width in CONFIGS if (a, k) == (architecture, kind)), key=cost)
