"""A checkpoint as our own tensors, whatever its layout and however many ranks it is cut for.

LogicalTensors knows which of a checkpoint's tensors make up each of ours, and fills any rank's share of any cut of
them, in any packing. Loading, resharding and verifying are all this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tp_attention.checkpoint.layouts import Layout, native_packing
from tp_attention.checkpoint.packing import Packing, Piece, copy_parts, length, pieces
from tp_attention.sharding import ShardPlan


class Checkpoint(Protocol):
    """Tensors by rank and name, on disk or in memory. One class per format, in formats/.

    path: where it is. layout: how its names and packings read. plan: how it is cut; plan.tp ranks. metadata: what
    else is known of it and must survive a reshard, as JSON. tensor() is a memory-mapped view wherever the format
    allows, so that reading a slice costs its own bytes and shape and dtype cost nothing.
    """

    path: Path
    layout: Layout
    plan: ShardPlan
    metadata: dict[str, Any]

    def names(self, rank: int) -> list[str]: ...
    def tensor(self, rank: int, name: str) -> Tensor: ...


class StateDict:
    """The tensors of a model that is in memory, uncut."""

    path = Path("(in memory)")

    def __init__(self, tensors: dict[str, Tensor], layout: Layout, plan: ShardPlan) -> None:
        self.tensors, self.layout, self.plan = tensors, layout, plan
        self.metadata: dict[str, Any] = {}

    def names(self, rank: int) -> list[str]:
        return list(self.tensors)

    def tensor(self, rank: int, name: str) -> Tensor:
        return self.tensors[name]


class LogicalTensors:
    """Our tensors of one checkpoint.

    prefixed: whether its names have the optional prefix of their layout.
    Raises ValueError when a tensor is unknown, held twice by a rank, or missing on some ranks.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.prefixed = True
        self._holders: dict[str, list[tuple[int, str, Packing]]] = {}
        for rank in range(checkpoint.plan.tp):
            taken: dict[tuple[str, str], str] = {}
            for name in checkpoint.names(rank):
                match = checkpoint.layout.match(name)
                if match.prefixed is False:
                    self.prefixed = False
                for part in match.packing.parts:
                    if (other := taken.setdefault((match.native, part), name)) != name:
                        raise ValueError(f"{name} is in the checkpoint twice, or under two names: {other} is it too")
                self._holders.setdefault(match.native, []).append((rank, name, match.packing))
        for native, holders in self._holders.items():
            for part in self.parts(native):
                ranks = {rank for rank, _, packing in holders if part in packing.parts}
                if lacking := set(range(checkpoint.plan.tp)) - ranks:
                    raise ValueError(f"{native} ({part}) is missing on ranks {sorted(lacking)} of {checkpoint.path}")

    @property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary without the zeros with which Megatron's files pad it, where they say so."""
        return self.checkpoint.metadata.get("vocab_size", self.checkpoint.plan.vocab_size)

    def check_sizes(self, plan: ShardPlan, whose: str) -> None:
        """Raises ValueError when `plan`, which `whose` names, is of a model of other sizes."""
        own = replace(self.checkpoint.plan, vocab_size=self.vocab_rows)
        for name in ("heads", "kv_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size"):
            if (held := getattr(own, name)) != (wanted := getattr(plan, name)):
                raise ValueError(f"{name} is {held} in {self.checkpoint.path}, {wanted} in {whose}")

    def names(self) -> list[str]:
        """Our names, in the order of rank 0's file, so that reading in this order reads it from front to back."""
        return list(self._holders)

    def parts(self, native: str) -> set[str]:
        """The parts of our tensor that this checkpoint has."""
        return {part for _, _, packing in self._holders[native] for part in packing.parts}

    def packing(self, native: str) -> Packing:
        """How our own form packs the tensor."""
        divisor = self._holders[native][0][2].divisor
        return replace(native_packing(self.parts(native)), divisor=divisor)

    def sources(self, native: str) -> Iterator[tuple[str, Tensor]]:
        """Every file tensor that holds some of it: "rank R: name", and its tensor."""
        for rank, name, _ in self._holders[native]:
            yield f"rank {rank}: {name}", self.checkpoint.tensor(rank, name)

    def dtype(self, native: str) -> torch.dtype:
        """Its dtype. Raises ValueError when its holders disagree."""
        dtypes = {tensor.dtype for _, tensor in self.sources(native)}
        if len(dtypes) > 1:
            said = " and ".join(sorted(map(str, dtypes)))
            raise ValueError(f"{native} of {self.checkpoint.path} is {said} on different ranks or parts")
        return dtypes.pop()

    def shape(self, native: str, packing: Packing, plan: ShardPlan, rank: int) -> tuple[int, ...]:
        """Shape of `rank`'s share under `plan`, in `packing`."""
        _, name, held = self._holders[native][0]
        whole = self.checkpoint.tensor(self._holders[native][0][0], name)
        if packing.parts == ("whole",):
            return tuple(reversed(whole.shape)) if packing.transposed != held.transposed else tuple(whole.shape)
        size = length(packing, plan, rank)
        if whole.dim() == 1:
            return (size,)
        other = whole.shape[1 - held.dim if not held.transposed else held.dim]
        return (size, other) if (packing.dim == 0) != packing.transposed else (other, size)

    def fill(self, out: Tensor, native: str, packing: Packing, plan: ShardPlan, rank: int) -> Tensor:
        """Copy `rank`'s share under `plan` into `out`, packed like `packing`; copies held twice are compared.

        Rows past the checkpoint's own vocabulary, with which some formats pad theirs, become zeros.
        Raises ValueError, naming the tensor, when shapes do not fit, something is missing or copies differ.
        """
        target = [self._without_padding(piece) for piece in _named(native, out, packing, plan, rank)]
        try:
            copy_parts(self._pieces(native, packing.parts), target)
        except ValueError as error:
            raise ValueError(f"{native} of {self.checkpoint.path}: {error}") from None
        return out

    def share(self, native: str, plan: ShardPlan, rank: int, packing: Packing | None = None) -> Tensor:
        """`rank`'s share as a new tensor, in `packing`; None is our own."""
        packing = packing or self.packing(native)
        out = torch.empty(self.shape(native, packing, plan, rank), dtype=self.dtype(native))
        return self.fill(out, native, packing, plan, rank)

    def _without_padding(self, piece: Piece) -> Piece:
        stop = max(piece.start, self.checkpoint.plan.vocab_size)
        if piece.part not in ("vocab", "head") or piece.stop <= stop:
            return piece
        piece.view[stop - piece.start :].zero_()
        return Piece(piece.part, piece.start, stop, piece.view[: stop - piece.start])

    def _pieces(self, native: str, parts: tuple[str, ...]) -> list[Piece]:
        found: list[Piece] = []
        for rank, name, packing in self._holders[native]:
            if set(parts) & set(packing.parts):
                tensor = self.checkpoint.tensor(rank, name)
                found += _named(f"{name} of rank {rank}", tensor, packing, self.checkpoint.plan, rank)
        return found


def _named(name: str, tensor: Tensor, packing: Packing, plan: ShardPlan, rank: int) -> list[Piece]:
    try:
        return pieces(tensor, packing, plan, rank)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
