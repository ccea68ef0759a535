"""Sums over the programs of a thread block cluster, which launch.py forms of neighbours in the grid. From Hopper on.

They send each other numbers as ranks do: a word in the other's shared memory is EMPTY, all bits set, until it has come.
So a sum takes one way's delay, and no barrier. Triton has no such exchange (num_ctas splits tensors instead, and 3.6
cannot reduce over the parts), so this is PTX. Which threads hold a number, and how many of them, makes no difference.
"""

from __future__ import annotations

import triton
import triton.language as tl

SUMS = 2  # that there is room for


@triton.constexpr_function
def _words(programs: int, warps: int) -> int:
    """For one sum: a word for each warp of each program, whole vectors of them."""
    return max(4, programs * warps)


@triton.constexpr_function
def _begin(programs: int, warps: int) -> str:
    """The first threads, of which there are enough, empty a word each."""
    words = _words(programs, warps)
    return f"""{{
        .shared .align 16 .b32 room[{SUMS * words}];
        .reg .pred mine;
        .reg .b32 thread, index, word;
        mov.u32 thread, %tid.x;
        rem.u32 index, thread, {words};
        setp.lt.u32 mine, index, {programs * warps};
        selp.b32 word, -1, 0, mine;
        setp.lt.u32 mine, thread, {SUMS * words};
        mov.u32 $0, room;
        mad.lo.u32 thread, thread, 4, $0;
        @mine st.shared.b32 [thread], word;
        barrier.cluster.arrive.release;
    }}"""


@triton.constexpr_function
def _send(index: int, programs: int, warps: int) -> str:
    """$1, number $2 of this program's, to all of them. What looks EMPTY, a NaN, is sent as another NaN."""
    to_all = "\n".join(
        f"""
        mapa.shared::cluster.u32 there, place, {program};
        st.relaxed.cluster.shared::cluster.b32 [there], number;"""
        for program in range(programs)
    )
    return f"""{{
        .reg .b32 place, there, number;
        min.u32 number, $1, 0xfffffffe;
        mov.u32 place, %cluster_ctarank;
        mad.lo.u32 place, place, {warps}, $2;
        mad.lo.u32 place, place, 4, $3;
        add.u32 place, place, {4 * index * _words(programs, warps)};
        {to_all}
        mov.u32 $0, 0;
    }}"""


@triton.constexpr_function
def _gather(index: int, programs: int, warps: int) -> str:
    """All words, once the largest of them is not EMPTY; the others are bounded in their waits, and so this one is.

    A warp votes: 16 bytes are loaded by 8 threads at a time, which may see more than those before them, while ptxas
    takes what lies at one address to be the same for all of them.
    """
    words = _words(programs, warps)
    look = "\n".join(
        f"""
        ld.relaxed.cluster.shared::cta.v4.b32 {{w0, w1, w2, w3}}, [$1 + {4 * (index * words + first)}];
        """
        + "\n".join(f"max.u32 most, most, w{i}; add.f32 s{i}, s{i}, w{i};" for i in range(4))
        for first in range(0, words, 4)
    )
    return f"""{{
        .reg .pred missing;
        .reg .b32 most, w<4>;
        .reg .f32 s<4>;
    look:
        mov.u32 most, 0;
        mov.f32 s0, 0f00000000;
        mov.f32 s1, s0;
        mov.f32 s2, s0;
        mov.f32 s3, s0;
        {look}
        setp.eq.u32 missing, most, 0xffffffff;
        vote.sync.any.pred missing, missing, 0xffffffff;
        @missing bra look;
        add.f32 s0, s0, s1;
        add.f32 s2, s2, s3;
        add.f32 $0, s0, s2;
    }}"""


@triton.jit
def begin(PROGRAMS: tl.constexpr):
    """Make room: where it is. Programs need not wait for each other yet."""
    text: tl.constexpr = _begin(PROGRAMS, tl.extra.cuda.num_warps())
    return tl.inline_asm_elementwise(text, "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def meet(room):
    """Before the first sum: every program of the cluster has begun."""
    text: tl.constexpr = "barrier.cluster.wait.acquire; mov.u32 $0, $1;"
    tl.inline_asm_elementwise(text, "=r,r", [room], tl.int32, is_pure=False, pack=1)


@triton.jit
def sum(b_x, room, INDEX: tl.constexpr, PROGRAMS: tl.constexpr):
    """Sum INDEX, of all of a cluster's fp32 values: the same bits in each of its programs."""
    WARPS: tl.constexpr = tl.extra.cuda.num_warps()
    b_part = tl.sum(tl.reshape(b_x, (WARPS, b_x.numel // WARPS)), 1)  # a warp's own, as tensors lie
    send: tl.constexpr = _send(INDEX, PROGRAMS, WARPS)
    tl.inline_asm_elementwise(send, "=r,f,r,r", [b_part, tl.arange(0, WARPS), room], tl.int32, is_pure=False, pack=1)
    gather: tl.constexpr = _gather(INDEX, PROGRAMS, WARPS)
    return tl.inline_asm_elementwise(gather, "=f,r", [room], tl.float32, is_pure=False, pack=1)
