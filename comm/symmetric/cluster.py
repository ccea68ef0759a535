"""Sums over the programs of a thread block cluster, which launch.py forms of neighbours in the grid. From Hopper on.

They send each other numbers as ranks do: a word in the other's shared memory is EMPTY, all bits set, until it has come.
Each word is written once, by one thread, so whoever has all of its words may end: none comes later. Triton has no such
exchange (num_ctas splits tensors instead, and Triton 3.6 cannot reduce over the parts), so this is PTX. All threads run
it, with the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

# For each of two sums 8 words: EMPTY where a program of the cluster will write, 0 behind these.
_BEGIN = tl.constexpr("""{
    .shared .align 16 .b32 words[16];
    .reg .pred p;
    .reg .b32 place, sender, senders, word;
    mov.u32 place, %tid.x;
    mov.u32 senders, %cluster_nctarank;
    and.b32 sender, place, 7;
    setp.lt.u32 p, sender, senders;
    selp.b32 word, -1, 0, p;
    setp.lt.u32 p, place, 16;
    mov.u32 $0, words;
    mad.lo.u32 place, place, 4, $0;
    @p st.shared.b32 [place], word;
    barrier.cluster.arrive.release;
}""")

_MEET = tl.constexpr("barrier.cluster.wait.acquire; mov.u32 $0, $1;")

# Thread i writes to program i. Where the largest of 8 words is not EMPTY, all have come; others are bounded in their
# waits for other ranks, and so this wait is. A warp votes: 16 bytes are loaded by 8 threads at a time, which may see
# more than those before them, while ptxas takes what lies at one address to be the same for all of them.
_SUM = tl.constexpr("""{
    .reg .pred p;
    .reg .b32 to, senders, place, number, most, w<8>;
    mov.u32 to, %tid.x;
    mov.u32 senders, %cluster_nctarank;
    mov.u32 place, %cluster_ctarank;
    mad.lo.u32 place, place, 4, $2;
    min.u32 number, $1, 0xfffffffe;
    setp.lt.u32 p, to, senders;
    @p mapa.shared::cluster.u32 place, place, to;
    @p st.relaxed.cluster.shared::cluster.b32 [place], number;
look:
    ld.relaxed.cluster.shared::cta.v4.b32 {w0, w1, w2, w3}, [$2];
    ld.relaxed.cluster.shared::cta.v4.b32 {w4, w5, w6, w7}, [$2 + 16];
    max.u32 most, w0, w1;
    max.u32 most, most, w2;
    max.u32 most, most, w3;
    max.u32 most, most, w4;
    max.u32 most, most, w5;
    max.u32 most, most, w6;
    max.u32 most, most, w7;
    setp.eq.u32 p, most, 0xffffffff;
    vote.sync.any.pred p, p, 0xffffffff;
    @p bra look;
    add.f32 $0, w0, w1;
    add.f32 $0, $0, w2;
    add.f32 $0, $0, w3;
    add.f32 $0, $0, w4;
    add.f32 $0, $0, w5;
    add.f32 $0, $0, w6;
    add.f32 $0, $0, w7;
}""")


@triton.jit
def begin():
    """Make room for two sums: where it is. Programs need not wait for each other yet."""
    return tl.inline_asm_elementwise(_BEGIN, "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def meet(room):
    """Before the first sum: every program of the cluster has begun."""
    tl.inline_asm_elementwise(_MEET, "=r,r", [room], tl.int32, is_pure=False, pack=1)


@triton.jit
def sum(number, room, i: tl.constexpr):
    """Sum i, 0 or 1, of a number (fp32) over at most 8 programs, in their order: the same bits in each."""
    return tl.inline_asm_elementwise(_SUM, "=&f,r,r", [number, room + 32 * i], tl.float32, is_pure=False, pack=1)
