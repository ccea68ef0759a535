"""The device code of flash_prefill_hopper.py, which says what its warpgroups do; the launcher is there too."""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)  # of a consumer: what one wgmma makes
TURN, CLEARED = gl.constexpr(10), gl.constexpr(13)  # named barriers, one a consumer; Triton uses the lowest ones
LOWEST = gl.constexpr(-3.0e38)  # below every score that is kept, but finite: −inf − LOWEST stays −inf
LN2 = gl.constexpr(math.log(2))


@gluon.constexpr_function
def _barrier_asm(operation, number, threads):
    return f"bar.{operation} {number}, {threads};\nmov.u32 $0, $1;"


@gluon.jit
def _turn(operation: gl.constexpr, consumer: gl.constexpr, TURNS: gl.constexpr):
    """sync: wait for the consumer's turn. arrive: it is its turn."""
    if TURNS:
        asm: gl.constexpr = _barrier_asm(operation, TURN + consumer, 256)
        gl.inline_asm_elementwise(asm, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _place(i_round):
    """This program's place in a round: every other one goes backwards, so that all programs end together."""
    place = gl.program_id(0)
    if i_round % 2 == 1:
        place = gl.num_programs(0) - 1 - place
    return place


@gluon.jit
def _tile(
    i_round, problem, consumer: gl.constexpr, CAUSAL: gl.constexpr, HAS_LENGTHS: gl.constexpr, PACK: gl.constexpr,
    BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """A round's tile: batch, head, kv head, the consumer's first token, keys of the sequence, position of token 0,
    blocks of keys that some consumer reads.
    """
    p_lengths, tokens, keys, heads, tiles, batch_heads, together, q_start, group_size, kv_start = problem
    BLOCK_T: gl.constexpr = CONSUMERS * (ROWS // PACK)
    if together == 0:  # in pairs
        pair = i_round // 2 * gl.num_programs(0) + gl.program_id(0)
        i_head = pair // (tiles // 2)
        i_tile = pair % (tiles // 2)
        if i_round % 2 == 0:  # the long one first
            i_tile = tiles - 1 - i_tile
    else:
        i_place = i_round * gl.num_programs(0) + _place(i_round)
        i_set = i_place // (tiles * together)
        inside = i_place % (tiles * together)
        in_set = gl.minimum(together, batch_heads - i_set * together)  # the last set has fewer
        i_head = i_set * together + inside % in_set
        i_tile = tiles - 1 - inside // in_set
    token = i_tile * BLOCK_T
    i_b = i_head // heads
    i_h = i_head % heads
    length = keys
    if HAS_LENGTHS:
        length = gl.load(p_lengths + i_b)
    offset = length - tokens
    seen = gl.minimum(length, keys)
    blocks = gl.cdiv(gl.minimum(seen, token + BLOCK_T + offset) if CAUSAL else seen, BLOCK_N)
    # a tile that sees no key has one block all the same, hidden: its rows are made 0 at the end
    i_kv = (q_start + i_h * PACK) // group_size - kv_start
    return i_b, i_h, i_kv, token + consumer * (ROWS // PACK), seen, offset, gl.maximum(blocks, 1)


@gluon.jit
def _reach(token, seen, offset, CAUSAL: gl.constexpr, PACK: gl.constexpr, BLOCK_N: gl.constexpr):
    """Blocks of keys that some row of a consumer sees, and how many of these hide a key from some row.

    Worked out wherever it is needed: the loop-aware CSE of Triton 3.6 and 3.7 takes a carried one for constant.
    """
    last = gl.minimum(seen, token + ROWS // PACK + offset) if CAUSAL else seen
    whole = gl.minimum(seen, token + offset + 1) if CAUSAL else seen
    blocks = gl.maximum(1, gl.cdiv(last, BLOCK_N))
    return blocks, blocks - gl.minimum(blocks, gl.maximum(whole, 0) // BLOCK_N)


@gluon.jit
def _producer(
    q, k, v, queries, ring, rounds, problem, CAUSAL: gl.constexpr, HAS_LENGTHS: gl.constexpr, PACK: gl.constexpr,
    BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, Q_TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_q, q_full, q_free = queries
    s_k, s_v, k_full, k_free, v_full, v_free = ring
    step = 0
    for i_round in range(rounds):
        i_b, i_h, i_kv, token, _, _, blocks = _tile(
            i_round, problem, 0, CAUSAL, HAS_LENGTHS, PACK, BLOCK_N, CONSUMERS
        )  # fmt: skip
        for i in range(blocks):
            key = (blocks - 1 - i) * BLOCK_N
            stage = step % STAGES
            parity = (step // STAGES) & 1
            mbarrier.wait(k_free.index(stage), parity ^ 1)
            mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
            tma.async_copy_global_to_shared(k, [i_b, i_kv, key, 0], k_full.index(stage), s_k.index(stage))
            if i == 0:  # after the first keys, which need not wait for the last tile's end
                for consumer in gl.static_range(CONSUMERS):
                    slot = i_round % Q_TILES * CONSUMERS + consumer
                    mbarrier.wait(q_free.index(slot), ((i_round // Q_TILES) & 1) ^ 1)
                    mbarrier.expect(q_full.index(slot), q.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        q, [i_b, i_h, token + consumer * (ROWS // PACK), 0, 0], q_full.index(slot), s_q.index(slot)
                    )
            mbarrier.wait(v_free.index(stage), parity ^ 1)
            mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
            tma.async_copy_global_to_shared(v, [i_b, i_kv, key, 0], v_full.index(stage), s_v.index(stage))
            step += 1


@gluon.jit
def _hide(b_s, key, seen, limit, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """Scores [ROWS, BLOCK_N] of the keys from `key` on, −inf from `seen` on and, CAUSAL, from the row's limit on."""
    o_n = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
    kept = o_n[None, :] < gl.minimum(limit, seen)[:, None] if CAUSAL else (o_n < seen)[None, :]
    return gl.where(kept, b_s, -float("inf"))


@gluon.jit
def _clear(s_v, kept, consumer: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr):
    """Zeros for the values [BLOCK_N, D] from row `kept` on: behind a sequence may lie NaN, and 0 · NaN is NaN.

    Every consumer does it for itself, so none has to wait for another.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_n = gl.arange(0, 16, layout=gl.SliceLayout(1, LAYOUT))
    for row in gl.static_range(0, BLOCK_N, 16):
        rows = s_v.slice(row, 16, dim=0)
        rows.store(gl.where((row + o_n < kept)[:, None], rows.load(LAYOUT), 0.0))
    fence_async_shared()
    asm: gl.constexpr = _barrier_asm("sync", CLEARED + consumer, 128)
    gl.inline_asm_elementwise(asm, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _block(
    acc, b_p, top, total, b_q, ring, step, before, key, hide, seen, limit, scale,
    consumer: gl.constexpr, FIRST: gl.constexpr, AFTER: gl.constexpr, CAUSAL: gl.constexpr, HAS_LENGTHS: gl.constexpr,
    D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Scores and probabilities of one more block of keys; beside the softmax, P·V of the block `before` it.

    FIRST: of its tile, so top and total begin anew, and what P·V completes is the tile before. AFTER: there is a block
    before it. hide: some rows do not see all of its keys.
    """
    s_k, s_v, k_full, k_free, v_full, v_free = ring
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    stage = step % STAGES
    parity = (step // STAGES) & 1
    mbarrier.wait(k_full.index(stage), parity)
    _turn("sync", consumer, TURNS)
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, layout=SCORES)
    k_t = s_k.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
    scores = warpgroup_mma(b_q, k_t, zeros, use_acc=False, is_async=True)
    if AFTER:
        mbarrier.wait(v_full.index(before % STAGES), (before // STAGES) & 1)
        sums = warpgroup_mma(b_p, s_v.index(before % STAGES).reshape([BLOCK_N, D]), acc, is_async=True)
    _turn("arrive", (consumer + 1) % CONSUMERS, TURNS)
    b_s = warpgroup_mma_wait(1 if AFTER else 0, deps=[scores])
    mbarrier.arrive(k_free.index(stage), count=1)
    if hide:
        b_s = _hide(b_s, key, seen, limit, CAUSAL, BLOCK_N, SCORES)
    if FIRST:
        top = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, SCORES))
    # probabilities are relative to exp2(top); what was summed before shrinks as top grows
    top_new = gl.maximum(top, gl.max(b_s, 1) * scale)
    b_new = gl.exp2(b_s * scale - top_new[:, None])
    shrink = gl.exp2(top - top_new)
    total = gl.sum(b_new, 1) if FIRST else total * shrink + gl.sum(b_new, 1)
    if AFTER:
        # Long over, but it ends a basic block: otherwise ptxas moves the wait for P·V to before the softmax.
        mbarrier.wait(v_full.index(before % STAGES), (before // STAGES) & 1)
        acc, b_p = warpgroup_mma_wait(0, deps=[sums, b_p])
        mbarrier.arrive(v_free.index(before % STAGES), count=1)
    if HAS_LENGTHS and FIRST:
        mbarrier.wait(v_full.index(stage), parity)  # not sooner: its place may be that of the block before
        if key + BLOCK_N > seen:  # the first block that is read of a sequence has its end
            _clear(s_v.index(stage).reshape([BLOCK_N, D]), seen - key, consumer, D, BLOCK_N)
    if not FIRST:
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
    return acc, gl.convert_layout(b_new.to(s_v.dtype), OPERAND), top_new, total


@gluon.jit
def _skip(
    ring, step, count, consumer: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr
):  # fmt: skip
    """Pass over blocks of keys that only later consumers' rows see; they are fewer than there are stages."""
    k_full, k_free, v_full, v_free = ring[2], ring[3], ring[4], ring[5]
    for i in range(count):
        stage = (step + i) % STAGES
        parity = ((step + i) // STAGES) & 1
        _turn("sync", consumer, TURNS)
        _turn("arrive", (consumer + 1) % CONSUMERS, TURNS)
        # waited for all the same: the next wait for this stage would be taken for this one
        mbarrier.wait(k_full.index(stage), parity)
        mbarrier.arrive(k_free.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), parity)
        mbarrier.arrive(v_free.index(stage), count=1)
    return step + count


@gluon.jit
def _begin(
    acc, b_p, queries, ring, i_round, step, token, seen, offset, blocks, scale, consumer: gl.constexpr,
    AFTER: gl.constexpr, CAUSAL: gl.constexpr, HAS_LENGTHS: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, Q_TILES: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """A tile's first block of keys, its last ones; AFTER: beside the end of the tile before, which it returns first."""
    s_q, q_full = queries[0], queries[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    before = step - 1
    mine, hidden = _reach(token, seen, offset, CAUSAL, PACK, BLOCK_N)
    step = _skip(ring, step, blocks - mine, consumer, CONSUMERS, STAGES, TURNS)
    slot = i_round % Q_TILES * CONSUMERS + consumer
    mbarrier.wait(q_full.index(slot), (i_round // Q_TILES) & 1)
    limit = token + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES)) // PACK + offset + 1
    none = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    acc, b_p, top, total = _block(
        acc, b_p, none, none, s_q.index(slot).reshape([ROWS, D]), ring, step, before, (mine - 1) * BLOCK_N,
        hidden > 0, seen, limit, scale, consumer,
        True, AFTER, CAUSAL, HAS_LENGTHS, D, BLOCK_N, CONSUMERS, STAGES, TURNS,
    )  # fmt: skip
    return acc, b_p, top, total, step + 1


@gluon.jit
def _finish(
    acc, top, total, out, s_out, p_lse, i_b, i_h, token, seen, offset, tokens, heads,
    CAUSAL: gl.constexpr, HAS_LSE: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Divide by the sums of probabilities, and send a consumer's rows on their way out."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    o_r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    o_t = token + o_r // PACK
    kept = gl.minimum(o_t + offset + 1 if CAUSAL else o_t * 0 + seen, seen) > 0  # sees any key
    b_out = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, SUMS))[:, None]
    b_out = gl.where(gl.convert_layout(kept, gl.SliceLayout(1, SUMS))[:, None], b_out, 0.0)
    tma.store_wait(0)  # the tile before has left
    s_out.reshape([ROWS, D]).store(b_out.to(s_out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [i_b, i_h, token, 0, 0], s_out)
    if HAS_LSE:
        o_lse = (gl.cast(i_b * heads + i_h, gl.int64) * PACK + o_r % PACK) * tokens + o_t
        b_lse = gl.where(kept, (top + gl.log2(total)) * LN2, -float("inf"))
        gl.store(p_lse + o_lse, b_lse, mask=o_t < tokens)


@gluon.jit
def _consumer(
    out, s_out, queries, ring, p_lse, scale, rounds, problem, consumer: gl.constexpr, CAUSAL: gl.constexpr,
    UNALIGNED: gl.constexpr, HAS_LENGTHS: gl.constexpr, HAS_LSE: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, Q_TILES: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    s_q, q_free = queries[0], queries[2]
    s_v, v_full, v_free = ring[1], ring[4], ring[5]
    tokens, heads = problem[1], problem[3]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    AHEAD: gl.constexpr = Q_TILES == 2
    o_t = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES)) // PACK
    if consumer == CONSUMERS - 1:  # the first one begins
        _turn("arrive", 0, TURNS)
    step = 0
    if AHEAD:
        i_b, i_h, _i_kv, token, seen, offset, blocks = _tile(
            0, problem, consumer, CAUSAL, HAS_LENGTHS, PACK, BLOCK_N, CONSUMERS
        )  # fmt: skip
        _none, b_p, top, total, step = _begin(
            o_t, o_t, queries, ring, 0, step, token, seen, offset, blocks, scale, consumer, False,
            CAUSAL, HAS_LENGTHS, PACK, D, BLOCK_N, CONSUMERS, Q_TILES, STAGES, TURNS,
        )  # fmt: skip
    for i_round in range(rounds):
        if not AHEAD:
            i_b, i_h, _i_kv, token, seen, offset, blocks = _tile(
                i_round, problem, consumer, CAUSAL, HAS_LENGTHS, PACK, BLOCK_N, CONSUMERS
            )  # fmt: skip
            _none, b_p, top, total, step = _begin(
                o_t, o_t, queries, ring, i_round, step, token, seen, offset, blocks, scale, consumer,
                False, CAUSAL, HAS_LENGTHS, PACK, D, BLOCK_N, CONSUMERS, Q_TILES, STAGES, TURNS,
            )  # fmt: skip
        slot = i_round % Q_TILES * CONSUMERS + consumer
        b_q = s_q.index(slot).reshape([ROWS, D])
        limit = token + o_t + offset + 1  # first key that the row does not see
        mine, hidden = _reach(token, seen, offset, CAUSAL, PACK, BLOCK_N)
        acc = gl.zeros((ROWS, D), gl.float32, layout=SUMS)
        for i in range(1, mine):
            acc, b_p, top, total = _block(
                acc, b_p, top, total, b_q, ring, step, step - 1, (mine - 1 - i) * BLOCK_N,
                i < hidden if UNALIGNED else False, seen, limit, scale, consumer,
                False, True, CAUSAL, HAS_LENGTHS, D, BLOCK_N, CONSUMERS, STAGES, TURNS,
            )  # fmt: skip
            step += 1

        done_b, done_h, done_token, done_seen, done_offset = i_b, i_h, token, seen, offset
        done_top, done_total = top, total
        if AHEAD:
            mbarrier.arrive(q_free.index(slot), count=1)
        if (i_round + 1 < rounds) & AHEAD:
            i_b, i_h, _i_kv, token, seen, offset, blocks = _tile(
                i_round + 1, problem, consumer, CAUSAL, HAS_LENGTHS, PACK, BLOCK_N, CONSUMERS
            )  # fmt: skip
            acc, b_p, top, total, step = _begin(
                acc, b_p, queries, ring, i_round + 1, step, token, seen, offset, blocks, scale, consumer,
                True, CAUSAL, HAS_LENGTHS, PACK, D, BLOCK_N, CONSUMERS, Q_TILES, STAGES, TURNS,
            )  # fmt: skip
        else:
            last = (step - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
            sums = warpgroup_mma(b_p, s_v.index(last).reshape([BLOCK_N, D]), acc, is_async=True)
            acc, b_p = warpgroup_mma_wait(0, deps=[sums, b_p])
            mbarrier.arrive(v_free.index(last), count=1)
        _finish(
            acc, done_top, done_total, out, s_out.index(consumer), p_lse, done_b, done_h, done_token, done_seen,
            done_offset, tokens, heads, CAUSAL, HAS_LSE, PACK, D, BLOCK_N,
        )  # fmt: skip
        if not AHEAD:  # the output lies where the next queries will
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(slot), count=1)
    tma.store_wait(0)


# Nothing that grows with a sequence is specialised on: it would be compiled again and again.
_GROWING = ["tokens", "keys", "tiles", "batch_heads", "together"]


@gluon.jit(do_not_specialize=_GROWING)
def flash_prefill_hopper_kernel(
    q, k, v,  # descriptors: [B, heads, T, PACK, D], [B, Hkv, S, D]
    out,  # descriptor like q's
    p_lse, p_lengths,  # [B, heads, PACK, T], [B]
    tokens, keys, heads, tiles, batch_heads, together, q_start, group_size, kv_start, scale,
    CAUSAL: gl.constexpr, UNALIGNED: gl.constexpr, HAS_LENGTHS: gl.constexpr, HAS_LSE: gl.constexpr,
    PACK: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, Q_TILES: gl.constexpr,
    STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Grid: programs that stay, for `tiles` tiles of each head between them, which are at least as many."""
    s_q = gl.allocate_shared_memory(q.dtype, [CONSUMERS * Q_TILES, 1, 1, ROWS // PACK, PACK, D], q.layout)
    s_k = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, D], k.layout)
    s_v = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, D], v.layout)
    s_out = s_q
    if Q_TILES == 2:
        s_out = gl.allocate_shared_memory(q.dtype, [CONSUMERS, 1, 1, ROWS // PACK, PACK, D], out.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS * Q_TILES, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS * Q_TILES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(CONSUMERS * Q_TILES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
        mbarrier.init(v_free.index(i), count=CONSUMERS)

    if together == 0:
        rounds = gl.cdiv(tiles // 2 * batch_heads - gl.program_id(0), gl.num_programs(0)) * 2
    else:
        rounds = tiles * batch_heads // gl.num_programs(0)
        if _place(rounds) < tiles * batch_heads % gl.num_programs(0):  # the last round is not a full one
            rounds += 1
    problem = (p_lengths, tokens, keys, heads, tiles, batch_heads, together, q_start, group_size, kv_start)
    ring = (s_k, s_v, k_full, k_free, v_full, v_free)
    queries = (s_q, q_full, q_free)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consumer, (
                out, s_out, queries, ring, p_lse, scale, rounds, problem, gl.constexpr(0),
                CAUSAL, UNALIGNED, HAS_LENGTHS, HAS_LSE, PACK, D, BLOCK_N, CONSUMERS, Q_TILES, STAGES, TURNS,
            )),
            (_consumer, (
                out, s_out, queries, ring, p_lse, scale, rounds, problem, gl.constexpr(1),
                CAUSAL, UNALIGNED, HAS_LENGTHS, HAS_LSE, PACK, D, BLOCK_N, CONSUMERS, Q_TILES, STAGES, TURNS,
            )),
            (_producer, (
                q, k, v, queries, ring, rounds, problem,
                CAUSAL, HAS_LENGTHS, PACK, BLOCK_N, CONSUMERS, Q_TILES, STAGES,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (
                out, s_out, queries, ring, p_lse, scale, rounds, problem, gl.constexpr(0),
                CAUSAL, UNALIGNED, HAS_LENGTHS, HAS_LSE, PACK, D, BLOCK_N, CONSUMERS, Q_TILES, STAGES, TURNS,
            )),
            (_consumer, (
                out, s_out, queries, ring, p_lse, scale, rounds, problem, gl.constexpr(1),
                CAUSAL, UNALIGNED, HAS_LENGTHS, HAS_LSE, PACK, D, BLOCK_N, CONSUMERS, Q_TILES, STAGES, TURNS,
            )),
            (_consumer, (
                out, s_out, queries, ring, p_lse, scale, rounds, problem, gl.constexpr(2),
                CAUSAL, UNALIGNED, HAS_LENGTHS, HAS_LSE, PACK, D, BLOCK_N, CONSUMERS, Q_TILES, STAGES, TURNS,
            )),
            (_producer, (
                q, k, v, queries, ring, rounds, problem,
                CAUSAL, HAS_LENGTHS, PACK, BLOCK_N, CONSUMERS, Q_TILES, STAGES,
            )),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
