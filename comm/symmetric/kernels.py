"""All-reduce over memory that every rank of a host can write: values that are their own flags.

Each rank has an inbox. A rank stores its values into the others' inboxes, in words of 4 bytes (a float, or two halves),
and reads its own until no word is EMPTY, all bits set: NaNs that no arithmetic makes, and what is sent is never EMPTY.
So there is no flag to wait for, no fence and no barrier, and a word may be used as soon as it is there. This is the LL
protocol of NCCL with a sentinel in place of its flag words, as in TensorRT-LLM's Lamport kernels. Whoever has read a
word empties it again.

The inbox has two halves, used in turns. A half may be written again two calls later, and nobody can be there sooner
than its owner has emptied it: a rank ends call n + 1 only with this rank's values of n + 1, which it sends after its
call n is over. The turn is counted on the device, so that a captured graph may be replayed.

A program waits for programs of the same index on other ranks, which send before they wait, and for those of its
cluster, which run at the same time: the first ones that are not done can always go on. Sums are fp32, in rank order,
rounded once.

Limit: ranks must make the same calls in the same order, one at a time, each stream waiting for the one before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tp_attention.comm.symmetric import cluster
from tp_attention.comm.symmetric.words import add, multiply, pack, unpack

_TRAP = tl.constexpr("trap; mov.u32 $0, $1;")


@triton.jit
def _begin(p_state, half, PDL: tl.constexpr):
    """After all that this stream did before: the call's number, and where its half of an inbox begins."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    turn = tl.load(p_state, volatile=True)
    return turn, (turn & 1) * tl.cast(half, tl.int64)


@triton.jit
def _send_round(inboxes, o, segment, b_words, m, RANK: tl.constexpr, WORLD: tl.constexpr):
    """To every other rank."""
    for i in tl.static_range(1, WORLD):
        _send(inboxes, o, segment, b_words, m, RANK, (RANK + i) % WORLD)


@triton.jit
def _send(inboxes, o, segment, b_words, m, RANK: tl.constexpr, TO: tl.constexpr):
    """To rank TO, whose inbox has a segment for each other rank. What looks EMPTY, NaNs, is sent as other NaNs."""
    PLACE: tl.constexpr = RANK - (RANK > TO)
    tl.store(inboxes[TO] + PLACE * segment + o, tl.where(b_words == -1, 0x7FFF7FFF, b_words), mask=m)


@triton.jit
def _count(p_state, turn):
    """Say that this program has read the call's number. The last to say so counts on: nobody here reads it any more."""
    tl.debug_barrier()  # all warps of this one have, and used it
    arrived = tl.atomic_add(p_state + 1, 1, sem="relaxed")  # a release would wait for all that was sent
    if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(p_state + 1, 0)
        tl.store(p_state, turn + 1)


@triton.jit
def _received(p_in, m_in, p_state, patience, PTX: tl.constexpr):
    """The words at p_in once all of them have come; then they are emptied. Only where m_in."""
    b_in = tl.load(p_in, mask=m_in, other=0, volatile=True)
    missing = tl.max((b_in == -1).to(tl.int32))
    looks = 0
    while (missing > 0) & (looks < tl.abs(patience)):
        b_in = tl.load(p_in, mask=m_in, other=0, volatile=True)
        missing = tl.max((b_in == -1).to(tl.int32))
        looks += 1
    if missing > 0:  # a rank is dead or elsewhere: better an error than a wait for ever
        tl.store(p_state + 2, 1)
        if PTX & (patience > 0):
            tl.inline_asm_elementwise(_TRAP, "=r,r", [missing], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()  # of a block smaller than the program several warps look at the same word
    tl.store(p_in, tl.full(b_in.shape, -1, tl.int32), mask=m_in)
    return b_in


@triton.jit
def _summed(
    p_in, segment, o, m, b_own, p_state, patience, RANK: tl.constexpr, WORLD: tl.constexpr, RANKS: tl.constexpr,
    PTX: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[BLOCK] words: the sum over the ranks, first to last."""
    if WORLD == 2:
        b_in = _received(p_in + o, m, p_state, patience, PTX)
        return add(b_own, b_in, PTX, DTYPE)  # whichever is first
    else:
        o_rank = tl.arange(0, RANKS)[:, None]
        p_in += (o_rank - (o_rank > RANK).to(tl.int32)).to(tl.int64) * segment + o[None, :]
        b_in = _received(p_in, (o_rank != RANK) & (o_rank < WORLD) & m[None, :], p_state, patience, PTX)
        b_in = tl.where(o_rank == RANK, b_own[None, :], b_in)
        for rank in tl.static_range(WORLD):
            b_row = tl.sum(tl.where(o_rank == rank, b_in, 0), 0)  # picks one row: the others are 0
            if rank == 0:
                b_sum = unpack(b_row, DTYPE)
            else:
                b_sum += unpack(b_row, DTYPE)
        return pack(b_sum, PTX, DTYPE)


@triton.jit
def _own(
    p_x, start, end, words, SPLITS: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This rank's words from start on: as they are, or of fp32 partial sums [SPLITS, values] of a projection."""
    if SPLITS:
        PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth
        o = start * PER + tl.arange(0, BLOCK * PER)
        m = o < end * PER
        b_sum = tl.load(p_x + o, mask=m, other=0.0)
        for i in tl.static_range(1, SPLITS):
            b_sum += tl.load(p_x + i * words * PER + o, mask=m, other=0.0)
        return pack(tl.reshape(b_sum, (BLOCK, PER)), PTX, DTYPE)
    else:
        o = start + tl.arange(0, BLOCK)
        return tl.load(p_x + o, mask=o < end, other=0)


@triton.jit
def _plus(
    b_sum, b_bias, b_residual, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PTX: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """[BLOCK] words and what comes on top, in fp32, rounded once."""
    if HAS_BIAS and HAS_RESIDUAL:
        return pack(unpack(b_sum, DTYPE) + unpack(b_bias, DTYPE) + unpack(b_residual, DTYPE), PTX, DTYPE)
    elif HAS_BIAS:
        return add(b_sum, b_bias, PTX, DTYPE)
    elif HAS_RESIDUAL:
        return add(b_sum, b_residual, PTX, DTYPE)
    else:
        return b_sum


@triton.jit
def one_shot_kernel(
    p_x,  # [words], or fp32 [SPLITS, values]; the other tensors are words too
    p_bias,  # [row]
    p_residual,  # [words]
    p_norm_weight,  # [row]
    p_norm_bias,
    p_out,  # [words]
    p_normed,  # [words], where NORM
    p_state,  # int32 [3]: calls so far, programs that know that in this one, whether one waited in vain
    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7,  # every rank's inbox
    words,
    row,  # words in a row
    half,  # words in half an inbox
    segment,  # words between the senders' parts of it
    inverse,  # 1 / values in a row
    eps,
    patience,  # looks at words that have not come; if negative, giving up only sets p_state[2]
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    RANKS: tl.constexpr,  # WORLD, as a power of two
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,  # 0 none, 1 RMSNorm, 2 LayerNorm: then a program makes a row, or a cluster of them does
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    CLUSTER: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,  # whether this runs on a GPU, which knows more than Triton does
):  # fmt: skip
    """Everyone sends all to everyone: size - 1 times x over each link, one way's delay.

    What one SM can load and store in time is little, so rows to norm are parted among the programs of a cluster.
    """
    if CLUSTER > 1:
        room = cluster.begin()
    inboxes = (p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7)
    i_row = tl.program_id(1).to(tl.int64)  # 0 without a norm
    o_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start, end = i_row * row + tl.program_id(0).to(tl.int64) * BLOCK, (i_row + 1) * row if NORM else words
    o = start + tl.arange(0, BLOCK)
    m = o < end
    turn, inbox = _begin(p_state, half, PDL)
    segment = tl.cast(segment, tl.int64)
    b_own = _own(p_x, start, end, words, SPLITS, PTX, DTYPE, BLOCK)
    _send_round(inboxes, inbox + o, segment, b_own, m, RANK, WORLD)
    _count(p_state, turn)

    # What does not wait for the others is fetched while their values are on the way.
    b_bias = tl.load(p_bias + (o_row if NORM else o % row), mask=m, other=0) if HAS_BIAS else 0
    b_residual = tl.load(p_residual + o, mask=m, other=0) if HAS_RESIDUAL else 0
    if HAS_NORM_WEIGHT:
        b_norm_weight = tl.load(p_norm_weight + o_row, mask=m, other=0)
    if CLUSTER > 1:
        cluster.meet(room)

    b_out = _summed(inboxes[RANK] + inbox, segment, o, m, b_own, p_state, patience, RANK, WORLD, RANKS, PTX, DTYPE)
    b_out = _plus(b_out, b_bias, b_residual, HAS_BIAS, HAS_RESIDUAL, PTX, DTYPE)
    if CLUSTER == 1:
        tl.store(p_out + o, b_out, mask=m)
    if NORM:
        if HAS_NORM_BIAS:  # only now that there are registers for it
            b_norm_bias = tl.load(p_norm_bias + o_row, mask=m, other=0)
        b_y = unpack(b_out, DTYPE)  # 0 where not m
        if NORM == 2:
            total = tl.sum(tl.sum(b_y, 1))
            if CLUSTER > 1:
                total = cluster.sum(cluster.send(total, room, 0))
            b_y = tl.where(m[:, None], b_y - total * inverse, 0.0)
        total = tl.sum(tl.sum(b_y * b_y, 1))
        if CLUSTER > 1:
            place = cluster.send(total, room, 1)
            tl.store(p_out + o, b_out, mask=m)  # while that is on its way
            total = cluster.sum(place)
        b_y *= tl.rsqrt(total * inverse + eps)
        # As in functional.norm and Hugging Face's Llama, what an RMSNorm multiplies is rounded.
        if NORM == 1 and HAS_NORM_WEIGHT and not HAS_NORM_BIAS:
            b_normed = multiply(pack(b_y, PTX, DTYPE), b_norm_weight, PTX, DTYPE)
        else:
            if HAS_NORM_WEIGHT:
                if NORM == 1:
                    b_y = b_y.to(DTYPE).to(tl.float32)
                b_y *= unpack(b_norm_weight, DTYPE)
            if HAS_NORM_BIAS:
                b_y += unpack(b_norm_bias, DTYPE)
            b_normed = pack(b_y, PTX, DTYPE)
        tl.store(p_normed + o, b_normed, mask=m)


@triton.jit
def _gather(
    p_in, p_out, o, chunk, stride, words, p_state, patience, RANK: tl.constexpr, WORLD: tl.constexpr,
    RANKS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Store the words o of every other rank's chunk, which come to p_in by rank, from rank * stride on.

    Of a chunk all words come, past the end of the tensor too.
    """
    o_rank = tl.arange(0, RANKS)[:, None]
    p_in += (o_rank - (o_rank > RANK).to(tl.int32)).to(tl.int64) * chunk + o[None, :]
    m_in = (o_rank != RANK) & (o_rank < WORLD) & (o < chunk)[None, :]
    o_out = o_rank.to(tl.int64) * stride + o[None, :]
    tl.store(p_out + o_out, _received(p_in, m_in, p_state, patience, PTX), mask=m_in & (o_out < words))


@triton.jit
def two_shot_kernel(
    p_x,  # [words]
    p_bias,  # [row]
    p_residual,  # [words]
    p_out,
    p_state,  # as above
    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7,
    words,
    row,  # words in a row
    first,  # where in a row x begins
    half,
    chunk,  # words that one rank sums: rank r those from r * chunk on
    patience,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Each rank sums a chunk and sends the sum round: 2 (size - 1) / size times x over each link, twice the delay.

    What comes on top, each rank adds to its own chunk. A half of the inbox holds the parts of this rank's chunk by
    sender, then the other ranks' sums by rank.
    """
    inboxes = (p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    turn, inbox = _begin(p_state, half, PDL)
    chunk = tl.cast(chunk, tl.int64)
    sums = inbox + (WORLD - 1) * chunk
    for i in tl.static_range(1, WORLD):
        o_x = (RANK + i) % WORLD * chunk + o
        m = (o < chunk) & (o_x < words)
        _send(inboxes, inbox + o, chunk, tl.load(p_x + o_x, mask=m, other=0), m, RANK, (RANK + i) % WORLD)
    o_own = RANK * chunk + o
    m = (o < chunk) & (o_own < words)
    b_own = tl.load(p_x + o_own, mask=m, other=0)
    _count(p_state, turn)
    b_bias = tl.load(p_bias + (first + o_own) % row, mask=m, other=0) if HAS_BIAS else 0
    b_residual = tl.load(p_residual + o_own, mask=m, other=0) if HAS_RESIDUAL else 0

    b_sum = _summed(inboxes[RANK] + inbox, chunk, o, m, b_own, p_state, patience, RANK, WORLD, RANKS, PTX, DTYPE)
    b_sum = _plus(b_sum, b_bias, b_residual, HAS_BIAS, HAS_RESIDUAL, PTX, DTYPE)
    _send_round(inboxes, sums + o, chunk, b_sum, o < chunk, RANK, WORLD)
    tl.store(p_out + o_own, b_sum, mask=m)
    _gather(inboxes[RANK] + sums, p_out, o, chunk, chunk, words, p_state, patience, RANK, WORLD, RANKS, PTX)


@triton.jit
def gather_kernel(
    p_out,  # [words]
    p_state,  # as above
    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7,
    words,
    half,
    chunk,  # words that a rank sends: rank r those from r * stride on, where the others put them
    stride,
    patience,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The second of two shots by itself, in place. Whoever is done knows that every rank has begun."""
    inboxes = (p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    turn, inbox = _begin(p_state, half, PDL)
    chunk, stride = tl.cast(chunk, tl.int64), tl.cast(stride, tl.int64)
    b_own = tl.load(p_out + RANK * stride + o, mask=(o < chunk) & (RANK * stride + o < words), other=0)
    _send_round(inboxes, inbox + o, chunk, b_own, o < chunk, RANK, WORLD)
    _count(p_state, turn)
    _gather(inboxes[RANK] + inbox, p_out, o, chunk, stride, words, p_state, patience, RANK, WORLD, RANKS, PTX)
