"""The order of tiles: that what it predicts is what programs have to do, and that they end together."""

import random

import numpy as np
import pytest

from tp_attention.bench.attention import PREFILL, Shape
from tp_attention.kernels import tile_order


def busiest(costs: np.ndarray, heads: int, together: int, programs: int) -> float:
    """last_to_end, tile by tile as the kernel's _tile says it."""
    tiles, loads = len(costs), [0.0] * programs
    if together == tile_order.PAIRS:
        for pair in range(tiles // 2 * heads):
            short = pair % (tiles // 2)
            loads[pair % programs] += costs[short] + costs[tiles - 1 - short]
    else:
        for place in range(tiles * heads):
            turn, program = divmod(place, programs)
            in_set = min(together, heads - place // (tiles * together) * together)
            tile = tiles - 1 - place % (tiles * together) // in_set
            loads[program if turn % 2 == 0 else programs - 1 - program] += costs[tile]
    return max(loads)


@pytest.mark.parametrize("seed", range(20))
def test_prediction(seed: int) -> None:
    draw = random.Random(seed)
    costs = np.sort([draw.random() for _ in range(draw.randint(1, 20))])
    heads, programs = draw.randint(1, 30), draw.randint(1, 40)
    for together in (tile_order.PAIRS, 1, 3, heads):
        if together <= heads and (together or len(costs) % 2 == 0):
            assert tile_order.last_to_end(costs, heads, together, programs) == pytest.approx(
                busiest(costs, heads, together, programs)
            )


@pytest.mark.parametrize("shape", [shape for shape in PREFILL if shape.tokens > 256], ids=lambda shape: shape.name)
def test_programs_end_together(shape: Shape) -> None:
    rows, block_n = (192 if shape.head_dim == 64 and shape.causal else 128), (64 if shape.head_dim == 256 else 128)
    group, heads = shape.heads // shape.kv_heads, shape.batch * shape.heads
    most = group * ((32 << 20) // (4 * shape.tokens * shape.head_dim))
    tokens = shape.tokens
    order = tile_order.choose(tokens, tokens, shape.causal, rows, block_n, heads, group, most, 132)
    costs = tile_order._costs(tokens, tokens, shape.causal, rows, block_n)
    assert tile_order.last_to_end(costs, heads, order, 132) <= 1.035 * costs.sum() * heads / 132
    assert order % group == 0


def test_more_heads_than_fit_and_fewer_than_a_group() -> None:
    assert tile_order.choose(100, 100, True, 128, 128, 3, 4, 0, 132) == 3  # one tile a head: no pairs
    assert tile_order.choose(128 * 999, 128 * 999, True, 128, 128, 64, 1, 5, 132) == 5  # too many to try
