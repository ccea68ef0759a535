"""A projection of many tokens and its sum over the ranks, the one behind the other.

Rank r sums rows of its own, `owned` of them. Everyone multiplies the other ranks' rows first, chunk by chunk, while
copy engines, which take no SM, bring each chunk to its owner; then its own rows, to which it adds what has come, and
the copy engines bring the sums to the others. Over a link go 2 (size - 1) / size times the result, as little as an
all-reduce can do with, and all but the last chunk of it under the products.

Ranks meet in one-word sums, and in the addition, on the stream of the products. What comes lies in a stage, by who sent
it: parts of this rank's rows first, then the others' sums.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from tp_attention.comm.symmetric.inbox import Inboxes
from tp_attention.kernels import configs

STAGE_BYTES = 128 << 20  # of every rank: half for parts, half for sums
TILE = 128, 256  # rows and columns that an SM multiplies at a time
OVERLAP_BYTES = 32 << 20  # of the result, from where on this is worth its barriers
CHUNKS = 4  # at most, of each rank's rows: more of them hide more, and cost a barrier each


Multiply = Callable[[Tensor, Tensor], None]


class Overlap:
    """stages: every rank's, uint8, in rank order."""

    def __init__(self, inboxes: Inboxes, stages: list[Tensor]) -> None:
        self.inboxes, self.rank, self.size, self.device = inboxes, inboxes.rank, inboxes.size, inboxes.device
        self._stages = stages
        self._word = torch.zeros(1, dtype=torch.float32, device=self.device)
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def pays(self, rows: int, columns: int, itemsize: int) -> bool:
        """Whether the result is so large, and the rows so many that every rank's fill the SMs with tiles."""
        large = rows * columns * itemsize >= OVERLAP_BYTES and rows >= self.size * self._wave(columns)
        return large and bool(self._stages)

    def project(self, multiply: Multiply, x: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
        """out [rows, columns] <- sum over the ranks of what multiply(x, out) makes of rows of x, + bias + residual."""
        rows, columns = out.shape
        most = self._stages[0].numel() // (2 * (self.size - 1) * columns * out.element_size()) * self.size
        side = _Side(self._side)
        for start in range(0, rows, most):
            part = slice(start, start + most)
            try:
                self._piece(side, multiply, x[part], out[part], bias, None if residual is None else residual[part])
            finally:  # neither the next piece nor whoever gets out's memory is to meet a copy that still reads
                side.main_waits_for(side.mark())

    def _piece(
        self, side: _Side, multiply: Multiply, x: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> None:
        rows, columns = out.shape
        owned = triton.cdiv(rows, self.size)
        ends = self._ends(owned, columns)
        count = len(ends) - 1
        stages = [
            stage.view(out.dtype)[: 2 * (self.size - 1) * owned * columns].view(2, self.size - 1, owned, columns)
            for stage in self._stages
        ]

        def of(owner: int, i: int) -> slice:
            """Chunk i of a rank's rows."""
            return slice(*(min(owner * owned + end, rows) for end in (ends[i], ends[i + 1])))

        def staged(at: int, kind: int, other: int, i: int, many: int) -> Tensor:
            """On rank `at`, of chunk i so many rows: 0 parts that `other` has of at's rows, 1 other's sums."""
            return stages[at][kind, other - (other > at), ends[i] :][:many]

        def send(to: int, kind: int, i: int, part: slice) -> None:
            staged(to, kind, self.rank, i, part.stop - part.start).copy_(out[part])

        def take(i: int) -> None:
            """Sums of chunk i that have come, to where they belong."""
            for owner in others:
                target = out[of(owner, i)]
                target.copy_(staged(self.rank, 1, owner, i, target.shape[0]))

        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        self.barrier()  # nobody reads any more what came the last time
        sent: list[Any] = [None] * count
        for owner in others:
            for i in range(count):
                theirs = of(owner, i)
                multiply(x[theirs], out[theirs])
                with side.after_main():
                    send(owner, 0, i, theirs)
                sent[i] = side.mark()
        told: list[Any] = []
        for i in range(count):
            mine = of(self.rank, i)
            multiply(x[mine], out[mine])
            side.main_waits_for(sent[i])
            if i > 1:
                side.main_waits_for(told[i - 2])
            # every rank comes here: parts of chunk i are here, and sums of chunk i - 2
            parts = stages[self.rank][0, :, ends[i] : ends[i + 1]]
            self.inboxes.add(out[mine], parts, bias, None if residual is None else residual[mine])
            with side.after_main():
                for reader in others:
                    send(reader, 1, i, mine)
                told.append(side.mark())
                if i > 1:
                    take(i - 2)
        side.main_waits_for(told[-1])
        self.barrier()
        for i in range(max(0, count - 2), count):
            take(i)

    def barrier(self) -> None:
        """Whatever comes after it on this stream runs after what was before it on every rank's."""
        self.inboxes.one_shot(self._word, self._word)

    def _ends(self, owned: int, columns: int) -> list[int]:
        """Where the chunks of a rank's rows end, after 0: whole waves, one in the last chunk, which nothing hides."""
        wave = self._wave(columns)
        waves = triton.cdiv(owned, wave)
        ends, left = [0], waves - 1
        for chunks in range(min(CHUNKS - 1, left), 0, -1):
            most = triton.cdiv(left, chunks)
            ends.append(ends[-1] + most * wave)
            left -= most
        return [*ends, owned]

    def _wave(self, columns: int) -> int:
        """Rows whose tiles the SMs make at once."""
        return max(1, configs.multiprocessors(self.device) // triton.cdiv(columns, TILE[1])) * TILE[0]


class _Side:
    """A second stream beside the current one; on a CPU there is none, and everything happens in order."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream

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
