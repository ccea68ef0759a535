"""A projection of many tokens and its sum over the ranks, the one behind the other.

Rank r sums rows of its own, `owned` of them. Everyone multiplies the other ranks' rows first, in two goes, while copy
engines, which take no SM, bring them to their owner. Then its own rows, chunk by chunk: the product's last step adds
what has come, and copy engines fetch every rank's sums. Those of the last chunk, which no product hides, ranks send
each other by a kernel (Inboxes.gather), for which nobody has to wait first. Over a link go 2 (size - 1) / size times
the result, as little as an all-reduce can do with, and all but the last chunk of it under the products.

Before a chunk is added up ranks meet, in a one-word sum on the stream of the products. A rank's stage holds the other
ranks' parts of its rows, by who sent them; in the place of the first ones come the sums, which the others fetch. It may
be written anew after the last chunk: a rank sends that when it has added up and fetched everything, so whoever has it
from all of them knows that no stage is read any more.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from tp_attention.comm.symmetric.inbox import Inboxes
from tp_attention.kernels import configs
from tp_attention.kernels.gemm import Others

STAGE_BYTES = 128 << 20  # of every rank: results of up to size / (size - 1) times as much go at once
TILE = 128, 256  # rows and columns that an SM multiplies at a time
OVERLAP_BYTES = 32 << 20  # of the result, from where on this is worth its barriers
CHUNKS = 4  # at most, of each rank's rows: more of them hide more, and cost a barrier each


class Overlap:
    """stages: every rank's, uint8, in rank order."""

    def __init__(self, inboxes: Inboxes, stages: list[Tensor]) -> None:
        self.inboxes, self.rank, self.size, self.device = inboxes, inboxes.rank, inboxes.size, inboxes.device
        self._stages = stages
        self._word = torch.zeros(1, dtype=torch.float32, device=self.device)
        self._side = _Side(self.device)
        self._processors = configs.multiprocessors(self.device)

    def pays(self, rows: int, columns: int, itemsize: int) -> bool:
        """Whether the result is so large, and the rows so many that every rank's fill the SMs with tiles."""
        large = rows * columns * itemsize >= OVERLAP_BYTES and rows >= self.size * rows_in(1, columns, self._processors)
        return large and self._room(columns * itemsize) > 0

    def project(
        self, multiply: Callable[..., object], x: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> None:
        """out [rows, columns] <- sum over the ranks of multiply(x), + bias + residual.

        multiply(rows of x, out=...) is this rank's part of those rows, and takes `others`, bias and residual as gemm.
        """
        rows, columns = out.shape
        pieces = triton.cdiv(rows, self.size * self._room(columns * out.element_size()))
        owned = triton.cdiv(rows, pieces * self.size)
        ends = chunk_ends(owned, columns, self._processors)
        for start in range(0, rows, owned * self.size):
            part = slice(start, start + owned * self.size)
            added = None if residual is None else residual[part]
            try:
                self._add_up(multiply, x[part], out[part], bias, added, owned, ends)
            finally:  # what comes after this is not to meet a copy that still runs
                self._side.main_waits_for(self._side.mark())
            self.inboxes.gather(out[part][ends[-2] :], owned - ends[-2], owned)

    def _room(self, nbytes: int) -> int:
        """How many rows of so many bytes from each other rank a stage holds."""
        return self._stages[0].numel() // ((self.size - 1) * nbytes) if self._stages else 0

    def _add_up(
        self,
        multiply: Callable[..., object],
        x: Tensor,
        out: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        owned: int,
        ends: tuple[int, ...],
    ) -> None:
        """All rows of out, but for the others' last chunks."""
        rows, columns = out.shape
        stages = [
            stage.view(out.dtype)[: (self.size - 1) * owned * columns].view(self.size - 1, owned, columns)
            for stage in self._stages
        ]
        others, side = [(self.rank + step) % self.size for step in range(1, self.size)], self._side
        count = len(ends) - 1

        def of(owner: int, i: int, many: int = 1) -> slice:
            """Chunk i of a rank's rows, or so many from it on."""
            return slice(*(min(owner * owned + end, rows) for end in (ends[i], ends[i + many])))

        def staged(owner: int, i: int, many: int = 1) -> Tensor:
            """These in the rank's stage: [size - 1, rows, columns]."""
            chunk = of(owner, i, many)
            return stages[owner][:, ends[i] :][:, : chunk.stop - chunk.start]

        sent: dict[int, Any] = {}
        for owner in others:
            for i, many in sendings(ends):
                theirs = of(owner, i, many)
                multiply(x[theirs], out=out[theirs])
                with side.after_main():
                    staged(owner, i, many)[self.rank - (self.rank > owner)].copy_(out[theirs])
                sent[i] = side.mark()
        for i in range(count):
            side.main_waits_for(sent.get(i))
            self.barrier()  # every rank's parts of chunk i are staged, and its sums of the chunk before
            if i:
                with side.after_main():
                    for owner in others:
                        out[of(owner, i - 1)].copy_(staged(owner, i - 1)[0])
            mine, parts = of(self.rank, i), staged(self.rank, i)
            added = None if residual is None else residual[mine]
            summed = Others(self.rank, parts, parts[0] if i < count - 1 else None)
            multiply(x[mine], out=out[mine], bias=bias, residual=added, others=summed)

    def barrier(self) -> None:
        """Whatever comes after it on this stream runs after what was before it on every rank's."""
        self.inboxes.one_shot(self._word, self._word)


def rows_in(waves: int, columns: int, processors: int) -> int:
    """Rows whose tiles so many SMs make in so many goes; where a go is not even a row of tiles, one for each."""
    return max(waves, waves * processors // triton.cdiv(columns, TILE[1])) * TILE[0]


@functools.lru_cache(4096)
def chunk_ends(owned: int, columns: int, processors: int) -> tuple[int, ...]:
    """Where the chunks of a rank's rows end, after 0: whole waves, one in the last chunk, which nothing hides.

    The chunks before it are CHUNKS - 1 at most, and as few waves as can be.
    """
    wave = rows_in(1, columns, processors)
    least = triton.cdiv(owned, TILE[0]) * TILE[0] - wave  # rows before the last chunk
    if least <= 0:
        return 0, owned
    plans = (
        [rows_in(waves // chunks + (i < waves % chunks), columns, processors) for i in range(chunks)]
        for waves in itertools.count(max(1, least // (wave + TILE[0])))
        for chunks in range(min(CHUNKS - 1, waves), 0, -1)
    )
    ends = [0, *itertools.accumulate(next(plan for plan in plans if sum(plan) >= least))]
    most = owned if ends[-1] < owned else least  # so that there is something left for the last chunk
    return *dict.fromkeys(min(end, most) for end in ends), owned


@functools.lru_cache(4096)
def sendings(ends: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Chunks of another rank's rows that are multiplied and sent at a time: the first of them, and how many.

    In two goes as equal as can be: the first ones are on their way while the others are multiplied.
    """
    count = len(ends) - 1
    if count == 1:
        return ((0, 1),)
    first = min(range(1, count), key=lambda i: abs(2 * ends[i] - ends[-1]))
    return (0, first), (first, count - first)


class _Side:
    """A stream beside the current one; on a CPU there is none, and everything happens in order."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after_main(self) -> Any:
        """What is inside runs on it, after all that the current stream has been given so far."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return torch.cuda.stream(self.stream)

    def mark(self) -> torch.cuda.Event | None:
        return None if self.stream is None else self.stream.record_event()

    def main_waits_for(self, event: torch.cuda.Event | None) -> None:
        if self.stream is not None and event is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(event)
