"""In which order programs that stay walk over tiles of unequal length: such that all end together.

A causal tile reads as many blocks of keys as lie before it. Program p of P takes, in its turns r = 0, 1, …

    pairs    the tiles of pair r // 2 · P + p, the longer one first; a head's pairs are its longest tile with its
             shortest and so on, so all cost the same. For an even number of tiles
    rounds   tile r · P + p, in every other round P − 1 − p, of sets of `together` heads, a set's longest tiles first

Heads that are under way at the same time should have their keys in the L2: pairs see to that by themselves. Which one
ends first is worked out, once per shape; it is worth up to a fifth (benchmarks/hopper_prefill.md).
"""

from __future__ import annotations

import functools

import numpy as np

PAIRS = 0
OVERHEAD = 0.75  # of a tile beside its blocks of keys, in blocks
WORTH = 1.04  # rounds must be so much better than pairs, which read less: measured
MOST_TURNS = 64  # per program: past this all orders are even enough


@functools.lru_cache(maxsize=4096)
def choose(
    tokens: int, keys: int, causal: bool, rows: int, block_n: int, heads: int, group: int, most: int, programs: int
) -> int:
    """PAIRS, or how many heads belong together: a multiple of `group`, at most `most` unless that is less than a group.

    rows: query tokens of a tile. heads: of all sequences. group: heads that share keys. programs: at most so many.
    """
    costs = _costs(tokens, keys, causal, rows, block_n)
    fitting = [min(n, heads) for n in range(group, max(group, most) + 1, group)]
    even = len(costs) % 2 == 0
    if len(costs) * heads > MOST_TURNS * programs:
        return PAIRS if even else fitting[-1]
    best = min(fitting, key=lambda together: last_to_end(costs, heads, together, programs))
    if even and last_to_end(costs, heads, PAIRS, programs) <= WORTH * last_to_end(costs, heads, best, programs):
        return PAIRS
    return best


def last_to_end(costs: np.ndarray, heads: int, together: int, programs: int) -> float:
    """What the busiest program has to do; costs: of a head's tiles, the shortest first."""
    if together == PAIRS:
        half = len(costs) // 2
        turns = _turns(np.tile(costs[:half] + costs[: half - 1 : -1], heads), programs)
    else:
        sets, rest = divmod(heads, together)
        longest_first = costs[::-1]
        of_sets = [np.tile(np.repeat(longest_first, together), sets), np.repeat(longest_first, rest)]
        turns = _turns(np.concatenate(of_sets), programs)
        turns[1::2] = turns[1::2, ::-1]
    return float(turns.sum(axis=0).max())


def _costs(tokens: int, keys: int, causal: bool, rows: int, block_n: int) -> np.ndarray:
    ends = np.arange(1, -(-tokens // rows) + 1) * rows + (keys - tokens)
    seen = np.minimum(ends, keys) if causal else np.full(len(ends), keys)
    return np.maximum(1, -(-seen // block_n)) + OVERHEAD


def _turns(costs: np.ndarray, programs: int) -> np.ndarray:
    """[turns, programs], zeros behind the last."""
    turns = np.zeros((-(-len(costs) // programs), programs))
    turns.flat[: len(costs)] = costs
    return turns
