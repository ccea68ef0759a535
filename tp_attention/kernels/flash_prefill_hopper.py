"""Flash attention of many query tokens on Hopper, in Gluon: flash_prefill.py for the shapes that matter most.

Each program is three warpgroups. A producer warp brings query tiles and blocks of keys and values to shared memory by
TMA. Two consumers of 64 query rows each keep the tensor cores busy: while one is in its softmax the other multiplies,
and within one the product QKᵀ of a block runs beside P·V of the block before and that beside the softmax. P never
leaves the registers; a consumer has 240 of them, the producer 24. There is one program per multiprocessor, which walks
over tiles in the order of tile_order.py: all end together, and the heads under way have their keys in the L2.
flash_prefill_hopper_kernel.py has the device code.

Takes fp16 and bf16, head dims 64, 128 and 256, causal or full, any lengths and strides, grouped heads (packed into one
tile where queries are short), a length per sequence, the log-sum-exp. All else is flash_prefill.py's.

Shared memory, D 128: query tiles of this and the next tile 64 KB, two stages of keys and of values 128 KB, output
32 KB. D 256 has no room for an output: it takes the place of the queries, so the next ones come late.
benchmarks/hopper_prefill.md has what each step brought.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tp_attention.kernels import configs, tile_order
from tp_attention.kernels.flash_prefill_hopper_kernel import ROWS, flash_prefill_hopper_kernel
from tp_attention.kernels.launch import launch
from tp_attention.kernels.operands import aligned, strides_of

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """block_n keys a step, in `stages` of shared memory. turns: the consumers issue their products in turn.

    ahead: a tile's first block runs beside the end of the tile before; both tiles' queries are in shared memory then.
    """

    consumers: int
    block_n: int
    stages: int
    turns: bool
    ahead: bool


KINDS = ("full", "diagonal", "edges", "lengths")
# (architecture, head dim, what is masked: nothing; the diagonal, through the corners of blocks; any edge; lengths too)
CONFIGS = {
    (90, 64, "full"): Config(2, 128, 3, turns=True, ahead=True),
    (90, 64, "diagonal"): Config(3, 128, 3, turns=True, ahead=True),
    (90, 64, "edges"): Config(3, 128, 3, turns=False, ahead=True),
    (90, 64, "lengths"): Config(2, 128, 3, turns=False, ahead=True),
    **{(90, 128, kind): Config(2, 128, 2, turns=True, ahead=True) for kind in KINDS},
    **{(90, 256, kind): Config(2, 64, 2, turns=False, ahead=False) for kind in KINDS},
    (90, 256, "lengths"): Config(2, 32, 4, turns=False, ahead=False),  # with blocks of 64 its registers spill
}
KEYS = 128  # blocks of keys divide it


L2_BYTES = 32 << 20  # of keys and values of the heads that are under way together: two thirds of the L2


def flash_attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    q_start: int = 0,
    group_size: int,
    kv_start: int = 0,
    lengths: Tensor | None = None,
    return_lse: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """flash_attention for what this kernel takes: q [B, T, Hq, D], k, v [B, S, Hkv, D] -> out, lse [B, Hq, T].

    lengths: int32 [B], the keys of each sequence; query t sits at position lengths − T + t.
    """
    (batch, tokens, heads, head_dim), keys = q.shape, k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device) if return_lse else None
    q, k, v = aligned(q), aligned(k), aligned(v)
    unaligned = causal and (lengths is not None or (keys - tokens) % KEYS != 0)
    kind = "lengths" if lengths is not None else "edges" if unaligned else "diagonal" if causal else "full"
    config = configs.choose("flash_prefill_hopper", CONFIGS, (90, head_dim, kind), config)
    unaligned = unaligned or (causal and config.block_n < ROWS.value)  # the diagonal crosses several blocks
    rows = config.consumers * ROWS.value
    pack = _pack(tokens, heads, q_start, group_size)
    packed_heads, tiles = heads // pack, -(-tokens * pack // rows)
    kv_bytes = 2 * keys * head_dim * q.element_size()
    group = group_size // pack
    order = tile_order.choose(
        tokens, keys, causal, rows // pack, config.block_n, batch * packed_heads, group,
        group * (L2_BYTES // max(1, kv_bytes)), configs.multiprocessors(q.device),
    )  # fmt: skip
    units = (tiles // 2 if order == tile_order.PAIRS else tiles) * batch * packed_heads
    args = (
        _queries(q, pack), _keys(k, config.block_n), _keys(v, config.block_n), _queries(out, pack), lse, lengths,
        tokens, keys, packed_heads, tiles, batch * packed_heads, order, q_start, group_size, kv_start, scale * LOG2E,
    )  # fmt: skip
    constexprs = dict(
        CAUSAL=causal, UNALIGNED=unaligned, HAS_LENGTHS=lengths is not None, HAS_LSE=return_lse, PACK=pack, D=head_dim,
        BLOCK_N=config.block_n, CONSUMERS=config.consumers, Q_TILES=1 + config.ahead, STAGES=config.stages,
        TURNS=config.turns,
    )  # fmt: skip
    programs = min(configs.multiprocessors(q.device), units)
    registers = 65536 // (128 * (config.consumers + 1)) // 8 * 8  # of a thread at launch, before they are dealt out
    launch(flash_prefill_hopper_kernel, (programs,), q.device, args, constexprs, num_warps=4, maxnreg=registers)
    return out, lse


def _pack(tokens: int, heads: int, q_start: int, group_size: int) -> int:
    """Query heads of one group that share a tile: all where queries are too short to fill one, else 1."""
    whole = group_size & (group_size - 1) == 0 and group_size <= 64 and q_start % group_size == heads % group_size == 0
    return group_size if tokens < 2 * ROWS.value and whole else 1


def _queries(x: Tensor, pack: int) -> TensorDescriptor:
    """x [B, T, H, D] as [B, H / pack, T, pack, D], taken by 64 rows of tokens times pack heads."""
    batch, tokens, heads, head_dim = x.shape
    stride_b, stride_t, stride_h = strides_of(x)
    return _descriptor(
        x, [batch, heads // pack, tokens, pack, head_dim], [stride_b, pack * stride_h, stride_t, stride_h, 1],
        [1, 1, ROWS.value // pack, pack, head_dim],
    )  # fmt: skip


def _keys(x: Tensor, block: int) -> TensorDescriptor:
    """x [B, S, H, D] as [B, H, S, D], taken by blocks of keys of one head."""
    batch, tokens, heads, head_dim = x.shape
    stride_b, stride_t, stride_h = strides_of(x)
    return _descriptor(x, [batch, heads, tokens, head_dim], [stride_b, stride_h, stride_t, 1], [1, 1, block, head_dim])


def _descriptor(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor(x, shape, strides, block, layout)
