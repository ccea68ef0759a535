"""How one tensor holds its logical parts: as views, so that moving a part between two packings is one copy.

A part (`q`, `k`, `up`, …) is a logical matrix seen [out, in] and cut along one axis. A Packing says where a tensor
keeps its parts; `pieces` turns a tensor into views of runs of them; `copy_parts` moves what two lists of pieces share.
Which run of a part a rank holds is ShardPlan's to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tp_attention.sharding import Range, ShardPlan

HEAD_PARTS = ("q", "query_gate", "k", "v")  # packed by heads, and in this order in our own form
PARTS = (*HEAD_PARTS, "out", "gate", "up", "down", "vocab", "head", "sinks", "whole")
ORDERS = ("parts", "groups", "elements")


@dataclass(frozen=True)
class Packing:
    """Where a tensor keeps its parts, along the axis that tensor parallelism cuts.

    parts: in the file's order. q, query_gate, k, v: rows by heads. out: columns by query heads. gate, up: rows, and
    down: columns, of the MLP. vocab, head: vocabulary rows. sinks: one entry a query head. whole: not cut.
    dim: the axis of the weight, seen [out, in], that is cut: 1 for out and down.
    transposed: the file keeps [in, out] (GPT-2's Conv1D, DeepSpeed). Vectors are never transposed.
    order: "parts": one part after another. "groups": kv group by kv group, in each its heads of q, then of the
    query_gate, its k, its v; with one query head a group that is [heads, 3, D]. "elements": [heads, D, parts].
    blocks: the heads lie in so many equal blocks, each packed like this by itself (CodeGen: 4).
    rope_pairs: q's and k's rows lie in each head as 0, D/2, 1, D/2 + 1, … (Meta's and GGUF's files of Llama).
    divisor: one entry stands for so many elements of the axis (a row-parallel weight's group scales).
    Raises ValueError for a part or order that does not exist, or a combination that means nothing.
    """

    parts: tuple[str, ...]
    dim: int = 0
    transposed: bool = False
    order: str = "parts"
    blocks: int = 1
    rope_pairs: bool = False
    divisor: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
        if not self.parts or len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts {self.parts} must name each part once, and at least one")
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r}; known: {', '.join(ORDERS)}")
        if self.dim not in (0, 1) or self.blocks < 1 or self.divisor < 1:
            raise ValueError(f"dim={self.dim} must be 0 or 1, blocks={self.blocks} and divisor={self.divisor} positive")
        if not set(self.parts) <= set(HEAD_PARTS) and (self.order != "parts" or self.blocks > 1 or self.rope_pairs):
            raise ValueError(f"parts {self.parts} have no heads to be packed by; only {', '.join(HEAD_PARTS)} do")
        if (self.dim == 1) != bool({"out", "down"} & set(self.parts)):
            raise ValueError(f"dim={self.dim} for {self.parts}: out and down are cut along dim 1, all others along 0")
        if "whole" in self.parts and len(self.parts) > 1:
            raise ValueError(f"parts {self.parts}: a whole tensor has no other part")


WHOLE = Packing(("whole",))


@dataclass(frozen=True)
class Piece:
    """Units [start, stop) of a part, and a view of them: [stop - start, rows of a unit…, the other axis].

    The unit of q, query_gate, k and v is a head; of a whole tensor, the tensor; of the others one element of the axis.
    """

    part: str
    start: int
    stop: int
    view: Tensor


def spans(packing: Packing, plan: ShardPlan, rank: int) -> dict[str, Range]:
    """Range of each part of `packing` that `rank` holds, in elements of the axis (in entries, with a divisor).

    Raises ValueError when a cut would divide an entry.
    """
    q, kv = plan.q_rows(rank), plan.kv_rows(rank)
    mlp, vocab = plan.mlp_columns(rank), plan.vocab_rows(rank)
    everything = {
        **dict.fromkeys(("q", "query_gate", "out"), q),
        **dict.fromkeys(("k", "v"), kv),
        **dict.fromkeys(("gate", "up", "down"), mlp),
        **dict.fromkeys(("vocab", "head"), vocab),
        "sinks": plan.q_heads(rank),
        "whole": (0, 1),
    }
    found = {}
    for part in packing.parts:
        start, stop = everything[part]
        sizes = {"out": plan.heads * plan.head_dim, "down": plan.intermediate_size}
        cut_inside = start % packing.divisor or (stop % packing.divisor and stop != sizes.get(part))
        if packing.divisor > 1 and cut_inside:
            raise ValueError(
                f"tp={plan.tp} cuts {part} at {start} and {stop}, inside a quantisation group of {packing.divisor}"
            )
        found[part] = start // packing.divisor, -(-stop // packing.divisor)
    return found


def length(packing: Packing, plan: ShardPlan, rank: int) -> int:
    """What a tensor so packed measures along its cut axis on `rank`."""
    return sum(stop - start for start, stop in spans(packing, plan, rank).values())


def pieces(tensor: Tensor, packing: Packing, plan: ShardPlan, rank: int) -> list[Piece]:
    """Views of everything that `rank`'s `tensor`, so packed, holds. Works on meta tensors too.

    Raises ValueError when the tensor's shape does not fit plan and packing.
    """
    if packing.parts == WHOLE.parts:
        return [Piece("whole", 0, 1, (tensor.t() if packing.transposed and tensor.dim() == 2 else tensor)[None])]
    axis = packing.dim if tensor.dim() > 1 else 0
    if packing.transposed and tensor.dim() > 1:
        axis = 1 - axis
    expected = length(packing, plan, rank)
    if not 0 < tensor.dim() <= 2 or tensor.shape[axis] != expected:
        raise ValueError(f"has shape {list(tensor.shape)}; dimension {axis} should measure {expected}")
    rows = tensor.movedim(axis, 0)
    ranges = spans(packing, plan, rank)
    if packing.parts[0] not in HEAD_PARTS:
        return _one_after_another(rows, ranges, unit=1)
    heads = {part: (start // plan.head_dim, stop // plan.head_dim) for part, (start, stop) in ranges.items()}
    found: list[Piece] = []
    for block, chunk in enumerate(rows.chunk(packing.blocks)):
        found += _by_heads(chunk, packing, {part: _block(span, packing, block) for part, span in heads.items()}, plan)
    return [_in_halves(piece, packing, plan.head_dim) for piece in found]


def _block(span: Range, packing: Packing, block: int) -> Range:
    start, stop = span
    each, extra = divmod(stop - start, packing.blocks)
    if extra:
        raise ValueError(f"has {stop - start} heads, which do not divide into {packing.blocks} blocks")
    return start + block * each, start + (block + 1) * each


def _one_after_another(rows: Tensor, spans: dict[str, Range], unit: int) -> list[Piece]:
    found, at = [], 0
    for part, (start, stop) in spans.items():
        size = (stop - start) * unit
        found.append(Piece(part, start, stop, rows[at : at + size].unflatten(0, (stop - start, unit))))
        at += size
    return found


def _by_heads(rows: Tensor, packing: Packing, heads: dict[str, Range], plan: ShardPlan) -> list[Piece]:
    if packing.order == "parts":
        return _one_after_another(rows, heads, plan.head_dim)
    # The other orders weave all parts together: a rank has whole groups, or they could not be told apart.
    counts = {part: (plan.group_size if part in ("q", "query_gate") else 1) for part in packing.parts}
    groups = {(start / counts[part], stop / counts[part]) for part, (start, stop) in heads.items()}
    if len(groups) != 1 or (packing.order == "elements" and set(counts.values()) != {1}):
        raise ValueError(f"tp={plan.tp} cuts kv groups of {plan.group_size} heads apart; {packing.order!r} keeps them")
    first, last = (int(bound) for bound in groups.pop())
    if packing.order == "elements":
        woven = rows.unflatten(0, (last - first, plan.head_dim, len(counts)))
        return [Piece(part, first, last, woven[:, :, index]) for index, part in enumerate(packing.parts)]
    woven = rows.unflatten(0, (last - first, sum(counts.values()), plan.head_dim))
    found, at = [], 0
    for part, count in counts.items():
        if count == 1:
            found.append(Piece(part, first, last, woven[:, at]))
        else:  # heads of one group lie together, those of the next a stride away: a piece each
            found += [
                Piece(part, group * count, (group + 1) * count, woven[group - first, at : at + count])
                for group in range(first, last)
            ]
        at += count
    return found


def _in_halves(piece: Piece, packing: Packing, head_dim: int) -> Piece:
    """q's and k's heads as [heads, 2, D/2, …], in whichever order the file has the rows."""
    if piece.part not in ("q", "k") or head_dim % 2:
        return piece
    if packing.rope_pairs:
        view = piece.view.unflatten(1, (head_dim // 2, 2)).transpose(1, 2)
    else:
        view = piece.view.unflatten(1, (2, head_dim // 2))
    return Piece(piece.part, piece.start, piece.stop, view)


def copy_parts(source: Sequence[Piece], destination: Iterable[Piece]) -> None:
    """Fill `destination` from `source`; where the source holds a unit more than once, its copies are compared.

    Raises ValueError when a unit is in no source piece, or two copies differ in a bit.
    """
    for target in destination:
        covered = target.start  # source pieces of a part are in the order of their units
        for piece in sorted((p for p in source if p.part == target.part), key=lambda p: (p.start, p.stop)):
            start, stop = max(piece.start, target.start), min(piece.stop, target.stop)
            if start >= stop:
                continue
            if piece.view.shape[1:] != target.view.shape[1:]:  # copy_ would broadcast ones
                shapes = list(piece.view.shape[1:]), list(target.view.shape[1:])
                raise ValueError(f"shape of {_name(target.part, start, stop)} is {shapes[0]}; expected {shapes[1]}")
            if start > covered:
                break
            if start < covered:
                until = min(stop, covered)
                if not same_bits(_units(target, start, until), _units(piece, start, until)):
                    raise ValueError(f"ranks disagree about {_name(target.part, start, until)}, which several hold")
                start = until
            if start < stop:
                _units(target, start, stop).copy_(_units(piece, start, stop))
                covered = stop
        if covered < target.stop:
            raise ValueError(f"{_name(target.part, covered, target.stop)} are in no tensor of the checkpoint")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; NaNs included."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def _units(piece: Piece, start: int, stop: int) -> Tensor:
    return piece.view[start - piece.start : stop - piece.start]


def _name(part: str, start: int, stop: int) -> str:
    unit = "heads" if part in HEAD_PARTS else "entries"
    return "it" if part == "whole" else f"{unit} {start} to {stop - 1} of {part}"
