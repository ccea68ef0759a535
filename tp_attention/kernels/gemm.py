"""y = x @ weightᵀ + bias + residual for more than 64 rows, or the sum of such products over ranks.

A program per SM walks over tiles, in groups of rows so that what neighbours read is still in the L2. On Hopper operands
and results go through the hardware's tile loads and stores, and one product is always in flight while the next step's
operands arrive. Tiles of 128 x 256 in 8 warps take 167 registers (128 of them sums) and 176 of 227 KB of shared memory:
3 stages, and half a tile on its way out. There the loops over tiles and over K are flattened into one: a tile is stored
while the next one's first operands are loaded. Warp specialisation is not to be had (8 warps: ignored; 4: Triton 3.6
and 3.7 fail to compile these loops).

Few rows make few tiles, and a last wave that is half empty costs as much as a full one. So tiles come in several
widths, 192 and 160 among them (a tail of 64 or 32 columns has sums of its own), and the launcher takes the width whose
waves cover the smallest area: M 512, N 6144 is 128 tiles of 192 columns, one wave of 132 SMs. A tail and flattened
loops do not go together: ptxas then waits for every single product. There are 5 widths, so at most 5 kernels to
compile for a weight and what is added, whatever the values of M.

Where the product is one rank's part of a sum, and the other parts lie here (comm/symmetric/overlap.py), they are added
before a tile is stored, half a tile at a time: that saves the sum a reading and a writing, and a kernel.

int8 weights are widened and scaled in registers, rounded to x's type, and are the product's left operand, which may
stay there: they never return to shared memory. A matrix whose rows do not start at multiples of 16 bytes is copied
first. Limit: K is not split, so few rows and columns (M 128, N 4096) leave SMs idle; fp32 takes no tensor cores.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from tp_attention.kernels import configs
from tp_attention.kernels.launch import launch


@dataclass(frozen=True)
class Config:
    """A tile has block_m rows and block_n + tail columns. store: columns that are stored at a time.

    blocks: programs per SM. group_m: tiles of rows done for one tile of columns before the next. tma: tile loads and
    stores where alignment allows. flatten: one loop over all steps of all tiles.
    """

    block_m: int
    block_n: int
    tail: int
    block_k: int
    warps: int
    stages: int
    blocks: int = 1
    group_m: int = 8
    store: int = 128
    tma: bool = False
    flatten: bool = False


# (architecture, what the weights are, columns of a tile)
CONFIGS = {
    (90, "half", 256): Config(128, 256, 0, 64, 8, 3, group_m=16, tma=True, flatten=True),
    (90, "half", 192): Config(128, 128, 64, 64, 8, 4, tma=True),
    (90, "half", 160): Config(128, 128, 32, 64, 8, 5, group_m=16, tma=True),
    (90, "half", 128): Config(128, 128, 0, 64, 8, 5, group_m=16, tma=True),
    (90, "half", 64): Config(128, 64, 0, 64, 4, 6, tma=True, flatten=True),
    (90, "int8", 128): Config(256, 128, 0, 64, 8, 4, tma=True),
    (90, "int8", 64): Config(128, 64, 0, 64, 4, 3, blocks=2, group_m=16, tma=True),
    (90, "float32", 64): Config(64, 64, 0, 16, 4, 3, blocks=2),
    (80, "half", 128): Config(128, 128, 0, 32, 8, 4, blocks=2),
    (80, "half", 64): Config(128, 64, 0, 32, 4, 4, blocks=2),
    (80, "int8", 128): Config(128, 128, 0, 64, 8, 3),
    (80, "float32", 64): Config(64, 64, 0, 16, 4, 3, blocks=2),
    (0, "half", 64): Config(64, 64, 0, 32, 4, 3, blocks=2),
    (0, "int8", 64): Config(64, 64, 0, 64, 4, 3, blocks=2),
    (0, "float32", 64): Config(64, 64, 0, 16, 4, 2, blocks=2),
}
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
POINTER_STORE = 32  # columns stored at a time through pointers, which take two registers each
TILE_COST = 32  # what a tile costs beyond its columns (it is filled and drained once), in columns
MOST_PARTS = 5  # ranks' parts, this one's among them, that registers hold beside a block of `store` columns


@triton.jit
def _load(
    p, row, k, rows, end, stride_row, stride_k,
    TMA: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK_K] of a matrix [rows, K]: past its last row anything, zeros past `end` of K."""
    if TMA:
        return p.load([k, row]).T if TRANSPOSED else p.load([row, k])
    else:
        o_row, o_k = row + tl.arange(0, ROWS), k + tl.arange(0, BLOCK_K)
        m_k = (o_k < end)[None, :]
        if TRANSPOSED:  # masked, so that neighbours stay neighbours and are loaded together
            m = (o_row < rows)[:, None] if EVEN_K else (o_row < rows)[:, None] & m_k
        else:
            o_row = tl.minimum(o_row, rows - 1)
            m = None if EVEN_K else m_k
        p_block = p + o_row.to(tl.int64)[:, None] * stride_row + o_k.to(tl.int64)[None, :] * stride_k
        return tl.load(p_block, mask=m, other=None if m is None else 0.0)


@triton.jit
def _store(
    acc, out, row, column, M, N, stride_out, p_bias, p_residual, p_copy, p_parts, stride_part,
    RANKS: tl.constexpr, RANK: tl.constexpr, TMA: tl.constexpr, STORE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    if COLUMNS > STORE:  # by halves: their way out takes shared memory, which the stages of the loop need
        b_halves = acc.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            _store(
                b_halves[half], out, row, column + half * (COLUMNS // 2), M, N, stride_out,
                p_bias, p_residual, p_copy, p_parts, stride_part, RANKS, RANK, TMA, STORE, DTYPE,
            )  # fmt: skip
    else:
        o_m, o_n = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        m = (o_m < M)[:, None] & (o_n < N)[None, :]
        o_wide = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        if RANKS:  # as all_reduce rounds
            b_own = acc.to(DTYPE).to(tl.float32)
            for rank in tl.static_range(RANKS):
                if rank == RANK:
                    b_part = b_own
                else:
                    p_part = p_parts + (rank - (rank > RANK)) * tl.cast(stride_part, tl.int64)
                    b_part = tl.load(p_part + o_wide, mask=m, other=0.0).to(tl.float32)
                acc = b_part if rank == 0 else acc + b_part
            acc = acc.to(DTYPE).to(tl.float32)
        if p_bias is not None:
            acc += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        if p_residual is not None:
            acc += tl.load(p_residual + o_wide, mask=m, other=0.0).to(tl.float32)
        b_out = acc.to(DTYPE)
        if p_copy is not None:
            tl.store(p_copy + o_wide, b_out, mask=m)
        if TMA:
            out.store([row, column], b_out)
        else:
            tl.store(out + o_m.to(tl.int64)[:, None] * stride_out + o_n[None, :], b_out, mask=m)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["M"])
def gemm_kernel(
    x,  # [M, K]; this, w, w_tail, out and out_tail are descriptors or pointers
    w,  # [N, K] ([K, N] where W_TRANSPOSED), read by blocks of BLOCK_N
    w_tail,  # the same, read by blocks of TAIL
    out,  # [M, N], written by blocks of STORE
    out_tail,
    p_bias,  # [N]
    p_scale,  # [N, K / GROUP] fp32
    p_residual,  # [M, N], as all from here on contiguous
    p_copy,  # [M, N], written too
    p_parts,  # [RANKS - 1, M, N], matrices stride_part apart: other ranks' products, in rank order
    M, N, K, stride_x, stride_wn, stride_wk, stride_out, stride_part,
    GROUP: tl.constexpr,  # columns per scale; 0: w is of x's type
    RANKS: tl.constexpr,  # 0: the product is no part of a sum
    RANK: tl.constexpr, W_TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, OUT_TMA: tl.constexpr, PDL: tl.constexpr, UPCAST: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STORE: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    if PDL:  # let in while the kernel before it was ending, a norm mostly, and letting in the next
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # A step never crosses the end of a group of columns that share a scale.
    SPAN: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K if GROUP else 1  # steps per group
    steps = K // GROUP * SPAN if GROUP else tl.cdiv(K, BLOCK_K)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N + TAIL)
    for i_tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        i_group, i_inside = i_tile // (GROUP_M * tiles_n), i_tile % (GROUP_M * tiles_n)
        height = tl.minimum(tiles_m - i_group * GROUP_M, GROUP_M)
        row = (i_group * GROUP_M + i_inside % height) * BLOCK_M
        column = i_inside // height * (BLOCK_N + TAIL)

        acc = tl.zeros((BLOCK_N, BLOCK_M) if GROUP else (BLOCK_M, BLOCK_N), tl.float32)
        if TAIL:
            acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
        if GROUP:
            o_n = tl.minimum(column + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        for i_k in range(steps):
            if GROUP:
                k, end = i_k // SPAN * GROUP + i_k % SPAN * BLOCK_K, (i_k // SPAN + 1) * GROUP
            else:
                k, end = i_k * BLOCK_K, K
            b_x = _load(x, row, k, M, end, stride_x, 1, X_TMA, False, EVEN_K, BLOCK_M, BLOCK_K)
            b_w = _load(w, column, k, N, end, stride_wn, stride_wk, W_TMA, W_TRANSPOSED, EVEN_K, BLOCK_N, BLOCK_K)
            if UPCAST:
                b_x = b_x.to(tl.float32)
            if GROUP:
                b_scale = tl.load(p_scale + o_n * (K // GROUP) + i_k // SPAN)
                b_w = (b_w.to(tl.float32) * b_scale[:, None]).to(b_x.dtype)
                acc = tl.dot(b_w, b_x.T, acc, input_precision="ieee")
            else:
                acc = tl.dot(b_x, b_w.to(b_x.dtype).T, acc, input_precision="ieee")
            if TAIL:
                column_tail = column + BLOCK_N
                b_w = _load(
                    w_tail, column_tail, k, N, end, stride_wn, stride_wk, W_TMA, W_TRANSPOSED, EVEN_K, TAIL, BLOCK_K
                )
                acc_tail = tl.dot(b_x, b_w.to(b_x.dtype).T, acc_tail, input_precision="ieee")
        _store(
            acc.T if GROUP else acc, out, row, column, M, N, stride_out,
            p_bias, p_residual, p_copy, p_parts, stride_part, RANKS, RANK, OUT_TMA, STORE, DTYPE,
        )  # fmt: skip
        if TAIL:
            _store(
                acc_tail, out_tail, row, column + BLOCK_N, M, N, stride_out,
                p_bias, p_residual, p_copy, p_parts, stride_part, RANKS, RANK, OUT_TMA, STORE, DTYPE,
            )  # fmt: skip


@dataclass(frozen=True)
class Others:
    """What other ranks have of a sum that a product is rank `rank`'s part of.

    parts: [ranks - 1, M, N], theirs in rank order; contiguous but for the first stride. copy: [M, N] contiguous, where
    the sum is written too. The product's out or the copy may be the first of the parts.
    """

    rank: int
    parts: Tensor
    copy: Tensor | None = None


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    transposed: bool = False,
    out: Tensor | None = None,
    residual: Tensor | None = None,
    others: Others | None = None,
    config: Config | None = None,
) -> Tensor:
    """x [M, K], weight [N, K] ([K, N] where transposed), bias [N], residual [M, N] -> [M, N] in x's dtype.

    weight_scale: fp32 [N, K / group] of an int8 weight. out: [M, N] with unit stride in a row, written and returned.
    residual: contiguous. others: all parts are rounded to x's dtype and summed in fp32, in rank order; the sum is
    rounded before bias and residual are added in fp32.
    """
    (rows, depth), columns = x.shape, weight.shape[1 if transposed else 0]
    if out is None:
        out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    _check_added(residual, others, (rows, columns))
    if not rows or not columns:
        return out
    if weight.stride(0) == 1 != weight.stride(1):
        weight, transposed = weight.T, not transposed
    if weight_scale is None:  # a copy costs less than loads of an element at a time
        unit = 16 // x.element_size()
        short, short_out = -depth % unit, -columns % unit
        if short or not _aligned(x):
            x = F.pad(x, (0, short)).contiguous()
        if short or not _aligned(weight):
            weight = F.pad(weight, (0, short_out, 0, short) if transposed else (0, short)).contiguous()
        depth += short
    elif x.stride(1) != 1:
        x = x.contiguous()
    architecture = configs.architecture(x.device)
    kind = "int8" if weight_scale is not None else "float32" if x.dtype == torch.float32 else "half"
    processors = configs.multiprocessors(x.device)
    width = tile_width(rows, columns, architecture, kind, processors)
    config = configs.choose("gemm", CONFIGS, (architecture, kind, width), config)
    block_m, block_n, tail, block_k = config.block_m, config.block_n, config.tail, config.block_k

    group = 0
    if weight_scale is not None:
        weight_scale = weight_scale.contiguous()
        group = depth // weight_scale.shape[1]
        block_k = max(32, min(block_k, triton.next_power_of_2(group)))
    even = (group or depth) % block_k == 0
    stride_n, stride_k = weight.stride()[::-1] if transposed else weight.stride()
    x_tma, w_tma, out_tma = (config.tma and _aligned(matrix) for matrix in (x, weight, out))
    if tail and not w_tma and architecture:  # Triton 3.6 mistakes the addresses of a second, narrower block of weights
        raise ValueError(f"a configuration with tail={tail} needs tile loads: tma={config.tma}; use tail=0")
    if group:  # x must be masked past the end of a group; tiles are to start at multiples of 16 bytes
        x_tma, w_tma = x_tma and even, w_tma and group % 16 == 0
    ranks = len(others.parts) + 1 if others else 0
    store = min(block_n, config.store if out_tma else POINTER_STORE)
    if ranks > MOST_PARTS:
        store = max(store // 2, tail)
    pdl = architecture == 90
    tiles = -(-rows // block_m) * -(-columns // (block_n + tail))

    def weight_blocks(width: int) -> Tensor | TensorDescriptor:
        return _descriptor(weight, *((block_k, width) if transposed else (width, block_k))) if w_tma else weight

    args = (
        _descriptor(x, block_m, block_k) if x_tma else x,
        weight_blocks(block_n), weight_blocks(tail) if tail else None,
        _descriptor(out, block_m, store) if out_tma else out,
        (_descriptor(out, block_m, tail) if out_tma else out) if tail else None,
        None if bias is None else bias.contiguous(), weight_scale, residual,
        *((None, None) if others is None else (others.copy, others.parts)),
        rows, columns, depth, x.stride(0), stride_n, stride_k, out.stride(0),
        others.parts.stride(0) if others else 0,
    )  # fmt: skip
    constexprs = dict(
        GROUP=group, RANKS=ranks, RANK=others.rank if others else 0, W_TRANSPOSED=transposed, EVEN_K=even,
        X_TMA=x_tma, W_TMA=w_tma, OUT_TMA=out_tma, PDL=pdl, UPCAST=configs.interpreted(),
        DTYPE=DTYPES[x.dtype], BLOCK_M=block_m, BLOCK_N=block_n, TAIL=tail, BLOCK_K=block_k,
        GROUP_M=config.group_m, STORE=store, FLATTEN=config.flatten,
    )  # fmt: skip
    grid = (min(tiles, processors * config.blocks),)
    options = {"launch_pdl": True} if pdl else {}
    launch(gemm_kernel, grid, x.device, args, constexprs, num_warps=config.warps, num_stages=config.stages, **options)
    return out


@functools.lru_cache(4096)
def tile_width(rows: int, columns: int, architecture: int, kind: str, processors: int) -> int:
    """The width in CONFIGS whose waves of tiles, one per SM, cover the smallest area."""
    if (architecture, kind) not in {key[:2] for key in CONFIGS}:
        architecture = 0

    def cost(width: int) -> int:
        config = CONFIGS[architecture, kind, width]
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, width)
        return triton.cdiv(tiles, processors) * config.block_m * (width + TILE_COST)

    return min((width for a, k, width in CONFIGS if (a, k) == (architecture, kind)), key=cost)


def _aligned(matrix: Tensor) -> bool:
    """Tile loads want unit stride within a row, and rows that start at multiples of 16 bytes."""
    row, column = matrix.stride()
    return column == 1 and row > 0 and matrix.data_ptr() % 16 == 0 and row * matrix.element_size() % 16 == 0


def _check_added(residual: Tensor | None, others: Others | None, shape: tuple[int, int]) -> None:
    """The kernel takes it to lie as it should. Raises ValueError where it does not."""
    added = {"residual": residual}
    if others is not None:
        ranks = len(others.parts) + 1
        if not 0 <= others.rank < ranks:
            raise ValueError(f"rank {others.rank} is none of {ranks}; use 0 to {ranks - 1}")
        added |= {"copy": others.copy, "part": others.parts[0]}  # the others lie like it
    for name, each in added.items():
        if each is not None and (each.shape != shape or not each.is_contiguous()):
            raise ValueError(f"{name} is {list(each.shape)} with strides {each.stride()}; use contiguous {list(shape)}")


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
