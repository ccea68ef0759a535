"""ShardPlan: every head, row and column is owned, once where it must be, for any tp."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tp_attention import AttentionConfig, ShardPlan


@st.composite
def plans(draw: st.DrawFn) -> ShardPlan:
    kv_heads = draw(st.integers(1, 12))
    heads = kv_heads * draw(st.integers(1, 8))
    return ShardPlan(
        tp=draw(st.integers(1, heads)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 8)),
        hidden_size=draw(st.integers(1, 64)),
        intermediate_size=draw(st.integers(0, 300)),
        vocab_size=draw(st.integers(0, 100)),
        mlp_unit=draw(st.sampled_from([1, 16, 128])),
        layers=draw(st.integers(1, 3)),
    )


def contiguous_cover(ranges: list[tuple[int, int]], count: int) -> bool:
    edges = [0, *(stop for _, stop in ranges)]
    return [start for start, _ in ranges] == edges[:-1] and edges[-1] == count


@given(plans())
def test_query_heads_are_owned_exactly_once_and_evenly(plan):
    ranges = [plan.q_heads(rank) for rank in range(plan.tp)]
    assert contiguous_cover(ranges, plan.heads)
    counts = [plan.local_heads(rank) for rank in range(plan.tp)]
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@given(plans())
def test_a_rank_holds_just_the_kv_heads_its_query_heads_read(plan):
    for rank in range(plan.tp):
        read = {head // plan.group_size for head in range(*plan.q_heads(rank))}
        assert set(range(*plan.kv_head_range(rank))) == read
    owners = [plan.kv_owners(head) for head in range(plan.kv_heads)]
    assert all(owners)
    assert sum(map(len, owners)) == sum(plan.local_kv_heads(rank) for rank in range(plan.tp))


@given(plans())
def test_columns_and_vocabulary_are_covered(plan):
    columns = [plan.mlp_columns(rank) for rank in range(plan.tp)]
    assert contiguous_cover(columns, plan.intermediate_size)
    assert all(start % plan.mlp_unit == 0 for start, _ in columns)
    assert contiguous_cover([plan.vocab_rows(rank) for rank in range(plan.tp)], plan.vocab_size)


@given(plans())
def test_ranks_hold_the_whole_model_and_the_replicas(plan):
    whole = ShardPlan(**{**vars(plan), "tp": 1})
    replicas = sum(len(plan.kv_owners(head)) - 1 for head in range(plan.kv_heads))
    extra = plan.layers * 2 * replicas * plan.head_dim * plan.hidden_size * plan.element_bytes
    assert sum(plan.weight_bytes(rank) for rank in range(plan.tp)) == whole.weight_bytes(0) + extra


def test_nine_heads_over_three_on_two_ranks():
    plan = ShardPlan(tp=2, heads=9, kv_heads=3, head_dim=64, hidden_size=576)
    assert [plan.q_heads(r) for r in range(2)] == [(0, 5), (5, 9)]
    assert [plan.kv_head_range(r) for r in range(2)] == [(0, 2), (1, 3)]
    assert plan.kv_owners(1) == (0, 1)
    assert plan.qkv_rows(0) == (5 + 2 + 2) * 64
    assert plan.out_columns(1) == (5 * 64, 9 * 64)


def test_mlp_remainder_goes_to_the_last_rank():
    plan = ShardPlan(tp=3, heads=3, kv_heads=3, head_dim=1, hidden_size=1, intermediate_size=16 * 4 + 5)
    assert [plan.mlp_columns(r) for r in range(3)] == [(0, 32), (32, 48), (48, 69)]


def test_describe_names_ranges_bytes_and_replicas():
    plan = ShardPlan(tp=2, heads=9, kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536, vocab_size=49152)
    text = plan.describe()
    for rank in range(2):
        assert f"{plan.weight_bytes(rank):,}" in text
    assert "0–4 (5)" in text and "5–8 (4)" in text
    assert "held by more than one rank: 1" in text


def test_for_layer_counts_every_weight_of_the_layer():
    config = AttentionConfig(
        hidden_size=40, heads=6, kv_heads=2, head_dim=8, norm="layernorm", qk_norm="rmsnorm", qkv_bias=True,
        out_bias=True, sinks=True,
    )  # fmt: skip
    weights = (48 + 16 + 16) * 40 + 80 + 48 * 40 + 40 + 2 * 40 + 2 * 8 + 6
    assert ShardPlan.for_layer(config, 1).weight_bytes(0) == 4 * weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tp": 10}, "tp=10 exceeds heads=9; use tp <= 9"),
        ({"tp": 0}, "tp=0 must be at least 1"),
        ({"kv_heads": 2}, "heads=9 is no multiple of kv_heads=2"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
    ],
)
def test_impossible_plans_are_refused(change, message):
    good = {"tp": 2, "heads": 9, "kv_heads": 3, "head_dim": 64, "hidden_size": 576}
    with pytest.raises(ValueError, match=message):
        ShardPlan(**{**good, **change})


def test_unknown_rank_is_refused():
    plan = ShardPlan(tp=2, heads=9, kv_heads=3, head_dim=64, hidden_size=576)
    with pytest.raises(ValueError, match="rank=2 is outside tp=2; ranks are 0 to 1"):
        plan.q_heads(2)
