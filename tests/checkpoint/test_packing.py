"""Packings move every bit to where reshape and cat would put it: any ranks to any ranks, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.checkpoint.oracles import (
    PACKED,
    PAIRED,
    SPLIT,
    Heads,
    bits,
    head_counts,
    neighbours,
    one_after_another,
    poison,
    random_bits,
)
from tp_attention.checkpoint.families import LAYOUTS
from tp_attention.checkpoint.layouts import native_packing
from tp_attention.checkpoint.packing import Packing, copy_parts, pieces, same_bits
from tp_attention.sharding import ShardPlan

NATIVE_TP = (1, 2, 3, 4, 6, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def plan(tp: int, heads: int, kv_heads: int, head_dim: int = 4, **sizes: int) -> ShardPlan:
    return ShardPlan(tp=tp, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden_size=5, **sizes)


def qkv_tensors(layout: str) -> list[tuple[str, Packing]]:
    """Names and packings of the tensors that hold the parts of one layer's qkv weight in a file of the layout."""
    parts = {"q", "k", "v"} | ({"query_gate"} if "output-gate" in layout else set())
    return LAYOUTS[layout].tensors_for("layers.0.attention.qkv_weight", parts)


def oracle(layout: str, packing: Packing, heads: Heads) -> Tensor:
    """A file's tensor, of one rank's heads, without asking the packing for more than its parts and orientation."""
    if layout in PAIRED:
        heads = {part: rows if part == "v" else neighbours(rows) for part, rows in heads.items()}
    packed = heads[packing.parts[0]].flatten(0, 1) if layout in SPLIT else PACKED[layout](heads)
    return packed.t().contiguous() if packing.transposed else packed


def local(whole: Heads, cut: ShardPlan, rank: int) -> Heads:
    ranges = {"q": cut.q_heads(rank), "k": cut.kv_head_range(rank)}
    ranges |= {"query_gate": ranges["q"], "v": ranges["k"]}
    return {part: rows[slice(*ranges[part])] for part, rows in whole.items()}


def whole_heads(layout: str, cut: ShardPlan, dtype: torch.dtype, seed: int) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    parts = {part for _, packing in qkv_tensors(layout) for part in packing.parts}
    counts = {"q": cut.heads, "query_gate": cut.heads, "k": cut.kv_heads, "v": cut.kv_heads}
    return {
        part: random_bits(counts[part], cut.head_dim, cut.hidden_size, dtype=dtype, generator=generator)
        for part in counts
        if part in parts
    }


def legal(layout: str, heads: int, kv_heads: int) -> list[int]:
    """Even cuts that the layout's files can hold: whole kv heads, and whole blocks of a rank's heads."""
    blocks = max(packing.blocks for _, packing in qkv_tensors(layout))
    return [tp for tp in range(1, kv_heads + 1) if heads % tp == kv_heads % tp == 0 and heads // tp % blocks == 0]


CASES = [(layout, *counts) for layout in (*PACKED, *SPLIT) for counts in head_counts(layout)]


def test_every_layout_that_ships_has_an_oracle() -> None:
    assert {*PACKED, *SPLIT} == LAYOUTS.keys()


@pytest.mark.parametrize("layout", [*PACKED, *SPLIT])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_cut_of_a_layout_to_any_of_ours_and_to_any_of_its_own(layout: str, data: st.DataObject) -> None:
    heads, kv_heads = data.draw(st.sampled_from(head_counts(layout)), "heads")
    head_dim = data.draw(st.sampled_from([2, 4, 6]), "head_dim")
    tp, back = (data.draw(st.sampled_from(legal(layout, heads, kv_heads)), name) for name in ("from", "back"))
    native_tp = data.draw(st.sampled_from([tp for tp in NATIVE_TP if tp <= heads]), "native")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    cuts = {name: plan(tp, heads, kv_heads, head_dim) for name, tp in (("from", tp), ("back", back), ("to", native_tp))}
    whole = whole_heads(layout, cuts["from"], dtype, data.draw(st.integers(0, 999), "seed"))
    files = qkv_tensors(layout)

    def packed(cut: ShardPlan, rank: int) -> list[tuple[Packing, Tensor]]:
        return [(packing, oracle(layout, packing, local(whole, cut, rank))) for _, packing in files]

    source = [
        piece
        for rank in range(tp)
        for packing, tensor in packed(cuts["from"], rank)
        for piece in pieces(tensor, packing, cuts["from"], rank)
    ]
    ours, ours_packing = [], native_packing(set(whole))
    for rank in range(native_tp):
        expected = one_after_another(local(whole, cuts["to"], rank))
        ours.append(poison(tuple(expected.shape), dtype))
        copy_parts(source, pieces(ours[-1], ours_packing, cuts["to"], rank))
        assert torch.equal(bits(ours[-1]), bits(expected))

    held = [piece for rank, tensor in enumerate(ours) for piece in pieces(tensor, ours_packing, cuts["to"], rank)]
    for origin in (held, source):  # back out of our form, and straight from cut to cut
        for rank in range(back):
            for packing, expected in packed(cuts["back"], rank):
                out = poison(tuple(expected.shape), dtype)
                copy_parts(origin, pieces(out, packing, cuts["back"], rank))
                assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize(("layout", "heads", "kv_heads"), CASES)
def test_biases_are_packed_like_rows(layout: str, heads: int, kv_heads: int) -> None:
    cut = plan(1, heads, kv_heads)
    whole = {part: rows[:, :, :1] for part, rows in whole_heads(layout, cut, torch.float32, 1).items()}
    parts = set(whole)
    source = []
    for _, packing in LAYOUTS[layout].tensors_for("layers.0.attention.qkv_bias", parts):
        source += pieces(oracle(layout, packing, whole).flatten(), packing, cut, 0)
    expected = one_after_another(whole).flatten()
    out = poison(tuple(expected.shape), torch.float32)
    copy_parts(source, pieces(out, native_packing(parts), cut, 0))
    assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("parts", "dim"), [(("gate", "up"), 0), (("up",), 0), (("down",), 1), (("vocab",), 0), (("out",), 1)]
)
def test_what_has_no_heads_is_cut_by_its_own_ranges(parts: tuple[str, ...], dim: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    cuts = {tp: plan(tp, 6, 2, intermediate_size=40, vocab_size=31, mlp_unit=4) for tp in (1, 3, 4)}
    size = {"gate": 40, "up": 40, "down": 40, "vocab": 31, "out": 24}[parts[0]]
    spans = {"gate": "mlp_columns", "up": "mlp_columns", "down": "mlp_columns", "vocab": "vocab_rows", "out": "q_rows"}
    whole = [
        random_bits(*((size, 5) if dim == 0 else (5, size)), dtype=torch.float16, generator=generator) for _ in parts
    ]

    def share(tp: int, rank: int) -> Tensor:
        start, stop = getattr(cuts[tp], spans[parts[0]])(rank)
        packed = torch.cat([tensor.narrow(dim, start, stop - start) for tensor in whole])
        return packed.t().contiguous() if transposed else packed

    packing = Packing(parts, dim=dim, transposed=transposed)
    for before, after in ((1, 3), (3, 4), (4, 1)):
        source = [p for rank in range(before) for p in pieces(share(before, rank), packing, cuts[before], rank)]
        for rank in range(after):
            out = poison(tuple(share(after, rank).shape), torch.float16)
            copy_parts(source, pieces(out, packing, cuts[after], rank))
            assert torch.equal(bits(out), bits(share(after, rank)))


def test_whole_tensors_and_sinks() -> None:
    generator = torch.Generator().manual_seed(3)
    cut, whole = plan(3, 7, 7), random_bits(4, 3, dtype=torch.float32, generator=generator)
    out = poison((4, 3), torch.float32)
    copy_parts(
        pieces(whole.t(), Packing(("whole",), transposed=True), cut, 0), pieces(out, Packing(("whole",)), cut, 2)
    )
    assert torch.equal(bits(out), bits(whole))
    sinks = random_bits(7, dtype=torch.float32, generator=generator)
    source = pieces(sinks, Packing(("sinks",)), plan(1, 7, 7), 0)
    for rank, expected in enumerate((sinks[:3], sinks[3:5], sinks[5:])):
        out = poison((len(expected),), torch.float32)
        copy_parts(source, pieces(out, Packing(("sinks",)), cut, rank))
        assert torch.equal(bits(out), bits(expected))


def test_group_scales_follow_their_columns_and_are_never_cut() -> None:
    scales = torch.randn(5, 6)  # 24 columns in groups of 4
    packing = Packing(("down",), dim=1, divisor=4)
    source = pieces(scales, packing, plan(1, 6, 6, intermediate_size=24, mlp_unit=4), 0)
    halves = plan(2, 6, 6, intermediate_size=24, mlp_unit=4)
    for rank in range(2):
        out = poison((5, 3), torch.float32)
        copy_parts(source, pieces(out, packing, halves, rank))
        assert torch.equal(out, scales[:, 3 * rank : 3 * rank + 3])
    with pytest.raises(ValueError, match="tp=4 cuts down at 0 and 6, inside a quantisation group of 4"):
        pieces(torch.empty(5, 2), packing, plan(4, 6, 6, intermediate_size=24, mlp_unit=1), 0)
    ragged = plan(2, 6, 6, intermediate_size=22, mlp_unit=4)  # the last group has 2 columns
    assert [pieces(torch.empty(5, 3), packing, ragged, rank)[0].stop for rank in range(2)] == [3, 6]


def test_replicas_are_compared_bit_for_bit() -> None:
    cut, packing = plan(2, 4, 1), Packing(("q", "k", "v"))
    first, second = torch.randn(16, 5), torch.randn(16, 5)
    second[8:] = first[8:]
    second[9, 0] = first[9, 0] = float("nan")  # equal bits, though not equal numbers
    whole = plan(1, 4, 1)
    out = poison((24, 5), torch.float32)
    copy_parts(pieces(first, packing, cut, 0) + pieces(second, packing, cut, 1), pieces(out, packing, whole, 0))
    assert torch.equal(bits(out), bits(torch.cat([first[:8], second[:8], first[8:]])))
    second[15, 4] = -second[15, 4]
    with pytest.raises(ValueError, match="disagree about heads 0 to 0 of v"):
        copy_parts(pieces(first, packing, cut, 0) + pieces(second, packing, cut, 1), pieces(out, packing, whole, 0))


def test_zeros_of_two_signs_are_different_bits() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([0], dtype=torch.int32))


def test_what_no_source_holds_is_an_error() -> None:
    cut, packing = plan(3, 6, 6), Packing(("q", "k", "v"))
    held = [piece for rank in (0, 2) for piece in pieces(torch.zeros(24, 5), packing, cut, rank)]
    with pytest.raises(ValueError, match="heads 2 to 5 of q are in no tensor"):
        copy_parts(held, pieces(torch.empty(72, 5), packing, plan(1, 6, 6), 0))


def test_other_sizes_are_an_error_not_a_broadcast() -> None:
    packing, cut = Packing(("q",)), plan(1, 2, 2)
    with pytest.raises(ValueError, match=r"is \[2, 2, 1\]; expected \[2, 2, 5\]"):
        copy_parts(pieces(torch.zeros(8, 1), packing, cut, 0), pieces(torch.zeros(8, 5), packing, cut, 0))


@pytest.mark.parametrize(
    ("packing", "cut", "shape", "message"),
    [
        (Packing(("q", "k", "v")), plan(2, 8, 4), (31, 5), r"has shape \[31, 5\]; dimension 0 should measure 32"),
        (Packing(("q", "k", "v"), transposed=True), plan(2, 8, 4), (32, 5), "dimension 1 should measure 32"),
        (Packing(("down",), dim=1), plan(1, 8, 4, intermediate_size=7), (5, 8), "dimension 1 should measure 7"),
        (Packing(("vocab",)), plan(1, 8, 4, vocab_size=7), (7, 5, 1), r"has shape \[7, 5, 1\]"),
        (Packing(("q", "k", "v"), order="groups"), plan(4, 12, 2), (20, 5), "cuts kv groups of 6 heads apart"),
        (Packing(("q", "k", "v"), order="elements"), plan(1, 12, 2), (64, 5), "cuts kv groups of 6 heads apart"),
        (Packing(("q", "v", "k"), blocks=4), plan(2, 12, 12), (72, 5), "6 heads, which do not divide into 4 blocks"),
    ],
)
def test_tensors_that_do_not_fit(packing: Packing, cut: ShardPlan, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pieces(torch.empty(shape), packing, cut, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": ("q", "x")}, "unknown part 'x'; known: q"),
        ({"parts": ()}, "at least one"),
        ({"parts": ("q", "q")}, "each part once"),
        ({"parts": ("q",), "order": "rows"}, "unknown order 'rows'; known: parts, groups, elements"),
        ({"parts": ("q",), "dim": 2}, "dim=2 must be 0 or 1"),
        ({"parts": ("q",), "blocks": 0}, "blocks=0"),
        ({"parts": ("up",), "rope_pairs": True}, "have no heads"),
        ({"parts": ("whole", "q")}, "have no heads|a whole tensor has no other part"),
    ],
)
def test_packings_that_mean_nothing(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Packing(**arguments)
