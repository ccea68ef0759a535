"""ShardPlan: which heads, rows and columns each rank owns. Pure integers, no torch.

The one place that knows the rule: layer, cache, checkpoints and models all ask here. Ranges are half-open
(start, stop) pairs of global indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tp_attention.config import AttentionConfig

Range = tuple[int, int]


def split_evenly(count: int, parts: int, part: int) -> Range:
    """Range of `count` items that `part` of `parts` owns; the first parts own one more when it does not divide."""
    each, extra = divmod(count, parts)
    start = part * each + min(part, extra)
    return start, start + each + (part < extra)


@dataclass(frozen=True)
class ShardPlan:
    """How a model (or one layer of it) is cut over `tp` ranks.

    Query heads split as evenly as they go, the first ranks one head more. A rank holds every kv head that its query
    heads read, so a kv head is replicated where two ranks need it. MLP columns split in units of `mlp_unit` (the
    quantisation group if quantised), the first ranks one unit more, the remainder on the last rank. Vocabulary rows
    split in units of 1. Everything else is held whole by each rank.

    The fields after `vocab_size` only say how many bytes that makes. `mlp_in_matrices` is 2 for a gated MLP, 1
    otherwise, `vocab_matrices` 2 where the head is not tied to the embedding, `whole_elements` counts norms, position
    embeddings and whatever else is not cut, over all layers.
    Raises ValueError when tp is not in 1..heads, or heads is no multiple of kv_heads.
    """

    tp: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int = 0
    vocab_size: int = 0
    mlp_unit: int = 16
    layers: int = 1
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    mlp_in_matrices: int = 2
    mlp_in_bias: bool = False
    mlp_out_bias: bool = False
    vocab_matrices: int = 1
    whole_elements: int = 0
    element_bytes: int = 4

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "hidden_size", "mlp_unit", "layers", "element_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("intermediate_size", "vocab_size", "whole_elements"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}; use a divisor of heads")
        if self.tp < 1:
            raise ValueError(f"tp={self.tp} must be at least 1; heads={self.heads} allow tp = 1 to {self.heads}")
        if self.tp > self.heads:
            raise ValueError(f"tp={self.tp} exceeds heads={self.heads}; use tp <= {self.heads}")

    @classmethod
    def for_layer(cls, config: AttentionConfig, tp: int) -> ShardPlan:
        """The plan of one attention layer alone."""
        norm_vectors = {None: 0, "rmsnorm": 1, "layernorm": 2}
        return cls(
            tp=tp,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            sinks=config.sinks,
            whole_elements=norm_vectors[config.norm] * config.hidden_size
            + 2 * norm_vectors[config.qk_norm] * config.head_dim,
            element_bytes=config.dtype.itemsize,
        )

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head, G."""
        return self.heads // self.kv_heads

    def q_heads(self, rank: int) -> Range:
        """Query heads of `rank`."""
        return split_evenly(self.heads, self.tp, self._check(rank))

    def kv_head_range(self, rank: int) -> Range:
        """kv heads that the query heads of `rank` read."""
        start, stop = self.q_heads(rank)
        return start // self.group_size, (stop - 1) // self.group_size + 1

    def local_heads(self, rank: int) -> int:
        """Number of query heads of `rank`."""
        start, stop = self.q_heads(rank)
        return stop - start

    def local_kv_heads(self, rank: int) -> int:
        """Number of kv heads of `rank`."""
        start, stop = self.kv_head_range(rank)
        return stop - start

    def kv_owners(self, kv_head: int) -> tuple[int, ...]:
        """Ranks that hold `kv_head`; more than one where it is replicated."""
        return tuple(r for r in range(self.tp) if self.kv_head_range(r)[0] <= kv_head < self.kv_head_range(r)[1])

    def q_rows(self, rank: int) -> Range:
        """Rows of the global [heads·D, E] query weight; columns of the global [E, heads·D] output weight."""
        start, stop = self.q_heads(rank)
        return start * self.head_dim, stop * self.head_dim

    def kv_rows(self, rank: int) -> Range:
        """Rows of the global [kv_heads·D, E] key weight, and of the value weight."""
        start, stop = self.kv_head_range(rank)
        return start * self.head_dim, stop * self.head_dim

    def out_columns(self, rank: int) -> Range:
        """Columns of the global [E, heads·D] output projection."""
        return self.q_rows(rank)

    def qkv_rows(self, rank: int) -> int:
        """Rows of the packed [q; k; v] weight that `rank` holds."""
        return (self.local_heads(rank) + 2 * self.local_kv_heads(rank)) * self.head_dim

    def mlp_columns(self, rank: int) -> Range:
        """Intermediate columns of `rank`: rows of the MLP's first weights, columns of its last."""
        units, remainder = divmod(self.intermediate_size, self.mlp_unit)
        start, stop = split_evenly(units, self.tp, self._check(rank))
        return start * self.mlp_unit, stop * self.mlp_unit + (remainder if rank == self.tp - 1 else 0)

    def vocab_rows(self, rank: int) -> Range:
        """Vocabulary rows of `rank`, of the embedding and of the head."""
        return split_evenly(self.vocab_size, self.tp, self._check(rank))

    def sizes(self, ranges: str) -> list[int]:
        """Length of a range on every rank, for uneven gathers: `plan.sizes("vocab_rows")`."""
        return [stop - start for start, stop in (getattr(self, ranges)(rank) for rank in range(self.tp))]

    def weight_bytes(self, rank: int) -> int:
        """Bytes of the weights that `rank` holds."""
        hidden, rows = self.hidden_size, self.qkv_rows(rank)
        q_start, q_stop = self.q_rows(rank)
        mlp_start, mlp_stop = self.mlp_columns(rank)
        vocab_start, vocab_stop = self.vocab_rows(rank)
        mlp = mlp_stop - mlp_start
        layer = rows * hidden + self.qkv_bias * rows
        layer += (q_stop - q_start) * hidden + self.out_bias * hidden + self.sinks * self.local_heads(rank)
        layer += (self.mlp_in_matrices + 1) * mlp * hidden + self.mlp_in_matrices * self.mlp_in_bias * mlp
        layer += self.mlp_out_bias * hidden
        vocab = self.vocab_matrices * (vocab_stop - vocab_start) * hidden
        return self.element_bytes * (self.layers * layer + vocab + self.whole_elements)

    def cache_bytes(self, rank: int, tokens: int) -> int:
        """Bytes of the keys and values of `tokens` tokens in all layers, in the weights' dtype."""
        return 2 * self.layers * tokens * self.local_kv_heads(rank) * self.head_dim * self.element_bytes

    def describe(self) -> str:
        """A table of who owns what and the bytes each rank will hold."""
        header = ["rank", "query heads", "kv heads", "MLP columns", "vocabulary rows", "weight bytes", "KV bytes/token"]
        rows = [header]
        for rank in range(self.tp):
            ranges = [self.q_heads(rank), self.kv_head_range(rank), self.mlp_columns(rank), self.vocab_rows(rank)]
            rows.append(
                [
                    str(rank),
                    *map(format_range, ranges),
                    f"{self.weight_bytes(rank):,}",
                    f"{self.cache_bytes(rank, 1):,}",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        replicated = [head for head in range(self.kv_heads) if len(self.kv_owners(head)) > 1]
        note = f"kv heads held by more than one rank: {', '.join(map(str, replicated)) or 'none'}"
        title = f"{self.heads} query heads, {self.kv_heads} kv heads of {self.head_dim} on {self.tp} ranks"
        return "\n".join([title, *lines, note])

    def _check(self, rank: int) -> int:
        if not 0 <= rank < self.tp:
            raise ValueError(f"rank={rank} is outside tp={self.tp}; ranks are 0 to {self.tp - 1}")
        return rank


def format_range(span: Range) -> str:
    """`0–4 (5)`: first and last index with the count; `–` when empty."""
    start, stop = span
    return f"{start}–{stop - 1} ({stop - start})" if stop > start else "–"
