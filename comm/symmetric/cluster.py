"""Sums over the programs of a thread block cluster, which launch.py forms of neighbours in the grid. From Hopper on.

They send each other numbers as ranks do: a word in the other's shared memory is EMPTY, all bits set, until it has come.
Each word is written once, by one thread, so whoever has all of its words may end: none comes later. Triton has no such
exchange (num_ctas splits tensors instead, and Triton 3.6 cannot reduce over the parts), so this is PTX. All threads run
it, with the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST = 16  # programs of a cluster
_MOST = tl.constexpr(MOST)

# For each of two sums MOST words: EMPTY where a program of the cluster will write, 0 behind these.
_BEGIN = tl.constexpr(f"""{{
    .shared .align 16 .b32 words[{2 * MOST}];
    .reg .pred p;
    .reg .b32 place, sender, senders, word;
    mov.u32 place, %tid.x;
    mov.u32 senders, %cluster_nctarank;
    and.b32 sender, place, {MOST - 1};
    setp.lt.u32 p, sender, senders;
    selp.b32 word, -1, 0, p;
    setp.lt.u32 p, place, {2 * MOST};
    mov.u32 $0, words;
    mad.lo.u32 place, place, 4, $0;
    @p st.shared.b32 [place], word;
    barrier.cluster.arrive.release;
}}""")

_MEET = tl.constexpr("barrier.cluster.wait.acquire; mov.u32 $0, $1;")


def _pairwise(instruction: str, source: str, target: str) -> str:
    """target0 <- the instruction over source0 to the last one, as a tree: less deep than one after the other."""
    lines, half = [], MOST // 2
    while half:
        lines += [f"{instruction} {target}{i}, {source}{i}, {source}{i + half};" for i in range(half)]
        source, half = target, half // 2
    return "\n    ".join(lines)


_LOAD = "\n    ".join(
    f"ld.relaxed.cluster.shared::cta.v4.b32 {{w{i}, w{i + 1}, w{i + 2}, w{i + 3}}}, [$1 + {4 * i}];"
    for i in range(0, MOST, 4)
)

# Thread i writes to program i.
_SEND = tl.constexpr("""{
    .reg .pred p;
    .reg .b32 to, senders, place, number;
    mov.u32 to, %tid.x;
    mov.u32 senders, %cluster_nctarank;
    mov.u32 place, %cluster_ctarank;
    mad.lo.u32 place, place, 4, $2;
    min.u32 number, $1, 0xfffffffe;
    setp.lt.u32 p, to, senders;
    @p mapa.shared::cluster.u32 place, place, to;
    @p st.relaxed.cluster.shared::cluster.b32 [place], number;
    mov.u32 $0, $2;
}""")

# Where the largest of the words is not EMPTY, all have come; others are bounded in their waits for other ranks, and so
# this wait is. A warp votes: 16 bytes are loaded by 8 threads at a time, which may see more than those before them,
# while ptxas takes what lies at one address to be the same for all of them.
_SUM = tl.constexpr(f"""{{
    .reg .pred p;
    .reg .b32 w<{MOST}>, most<{MOST // 2}>;
look:
    {_LOAD}
    {_pairwise("max.u32", "w", "most")}
    setp.eq.u32 p, most0, 0xffffffff;
    vote.sync.any.pred p, p, 0xffffffff;
    @p bra look;
    {_pairwise("add.f32", "w", "w")}
    mov.b32 $0, w0;
}}""")


@triton.jit
def begin():
    """Make room for two sums: where it is. Programs need not wait for each other yet."""
    return tl.inline_asm_elementwise(_BEGIN, "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def meet(room):
    """Before the first sum: every program of the cluster has begun."""
    tl.inline_asm_elementwise(_MEET, "=r,r", [room], tl.int32, is_pure=False, pack=1)


@triton.jit
def send(number, room, i: tl.constexpr):
    """To every program of the cluster, number (fp32) for sum i, 0 or 1: where that will be."""
    return tl.inline_asm_elementwise(_SEND, "=r,f,r", [number, room + 4 * _MOST * i], tl.int32, is_pure=False, pack=1)


@triton.jit
def sum(place):
    """The sum over at most MOST programs, in one order: the same bits in each."""
    return tl.inline_asm_elementwise(_SUM, "=&f,r", [place], tl.float32, is_pure=False, pack=1)
