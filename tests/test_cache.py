"""KVCache: holds this rank's kv heads, appends in order, refuses what does not fit without writing."""

import pytest
import torch

from tp_attention import KVCache, ShardPlan

PLAN = ShardPlan(tp=2, heads=9, kv_heads=3, head_dim=4, hidden_size=36, layers=2)


def test_holds_only_this_ranks_kv_heads():
    for rank in range(2):
        cache = KVCache(PLAN, rank, batch=2, max_length=5)
        assert cache.layers[1].keys.shape == (2, 5, 2, 4)
        assert cache.nbytes() == 2 * PLAN.cache_bytes(rank, 5)


def test_append_returns_all_so_far():
    cache = KVCache(PLAN, 0, batch=2, max_length=5)
    parts = [(torch.randn(2, n, 2, 4), torch.randn(2, n, 2, 4)) for n in (3, 1, 1)]
    for k, v in parts:
        keys, values = cache.layers[0].append(k, v)
    assert torch.equal(keys, torch.cat([k for k, _ in parts], 1))
    assert torch.equal(values, torch.cat([v for _, v in parts], 1))
    assert cache.length == 5 and cache.layers[1].length == 0
    cache.reset()
    assert cache.length == 0


def test_overrun_is_refused_and_nothing_is_written():
    cache = KVCache(PLAN, 0, batch=1, max_length=4)
    layer = cache.layers[0]
    layer.append(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4))
    layer.keys[:, 3:] = 7
    with pytest.raises(ValueError, match=r"3 \+ 2 tokens exceed max_length=4"):
        layer.append(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4))
    assert layer.length == 3 and (layer.keys[:, 3:] == 7).all()


def test_wrong_shapes_are_refused():
    cache = KVCache(PLAN, 0, batch=1, max_length=4)
    with pytest.raises(ValueError, match=r"keys \[1, 1, 3, 4\] do not fit"):
        cache.layers[0].append(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    with pytest.raises(ValueError, match="batch=0"):
        KVCache(PLAN, 0, batch=0, max_length=4)


def test_another_dtype_is_refused_before_anything_is_written():
    layer = KVCache(PLAN, 0, batch=1, max_length=4).layers[0]
    with pytest.raises(ValueError, match=r"keys are torch\.bfloat16 on cpu, the cache torch\.float32 on cpu"):
        layer.append(*(torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16) for _ in range(2)))
    assert layer.length == 0
