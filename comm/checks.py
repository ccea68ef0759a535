"""TP_ATTENTION_CHECK=1: the ranks of a group compare each collective before they start it.

Without it, ranks that call different things read each other's bytes as their own or wait for what never comes. With
it, all of them raise, and each error has every rank's call. The price is a meeting more per collective.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch

SWITCH = "TP_ATTENTION_CHECK"
DIGEST, RECORD = 32, 512  # bytes: every rank's record has one size, whatever it calls


class Call(NamedTuple):
    """One collective of one rank. `free`: the dimension whose size may differ by rank."""

    number: int = 0
    operation: str = "none"
    dtype: torch.dtype | None = None
    shape: Sequence[int] = ()
    free: int | None = None
    arguments: Mapping[str, Any] = {}

    def __str__(self) -> str:
        return self.operation if self.dtype is None else f"{self.operation} of {self.dtype} {list(self.shape)}"

    @property
    def agreed(self) -> str:
        """What every rank must say alike."""
        shape: list[int | str] = list(self.shape)
        if self.free is not None:
            shape[self.free] = "*"
        words = [f"call {self.number}: {self.operation}"]
        if self.dtype is not None:
            words.append(f"of {self.dtype} [{', '.join(map(str, shape))}]")
        return " ".join([*words, *(f"{name}={value}" for name, value in self.arguments.items())])


def wanted() -> bool:
    """Whether the environment asks for the comparison."""
    return os.environ.get(SWITCH, "") not in ("", "0")


def record(call: Call) -> bytes:
    """RECORD bytes that are equal exactly where two calls agree: the text as far as there is room, and its digest."""
    text = call.agreed.encode()
    return text[: RECORD - DIGEST].ljust(RECORD - DIGEST) + blake2b(text, digest_size=DIGEST).digest()


def difference(records: Sequence[bytes]) -> str | None:
    """Who calls what, where the ranks' records differ; None where they agree."""
    ranks: dict[bytes, list[int]] = {}
    for rank, said in enumerate(records):
        ranks.setdefault(said, []).append(rank)
    if len(ranks) == 1:
        return None
    return "; ".join(
        f"ranks {who} want {said[:-DIGEST].decode(errors='replace').rstrip()}" for said, who in ranks.items()
    )
