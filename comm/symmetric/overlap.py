"""A projection of many tokens and its sum over the ranks, the one behind the other.

Rank r sums rows of its own, `owned` of them. Everyone multiplies the other ranks' rows first, chunk by chunk, while
copy engines, which take no SM, bring each chunk to its owner; then its own rows, to which it adds what has come, and
the copy engines bring the sums to the others. Over a link go 2 (size - 1) / size times the result, as little as an
all-reduce can do with, and all but the last chunk of it under the products.

Barriers are one-word sums on the stream of the products. What comes lies in a stage, by who sent it: parts of this
rank's rows first, then the others' sums.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from tp_attention.comm.symmetric.inbox import DTYPES, WORD, Inboxes
from tp_attention.comm.symmetric.kernels import add_kernel
from tp_attention.kernels import configs
from tp_attention.kernels.launch import launch

STAGE_BYTES = 128 << 20  # of every rank: half for parts, half for sums
TILE = 128, 256  # rows and columns that an SM multiplies at a time
OVERLAP_BYTES = 32 << 20  # of the result, from where on this is worth its barriers
CHUNKS = 4  # at most, of each rank's rows: more of them hide more, and cost a barrier each
ADD_BYTES = 8192  # that a program of add_kernel makes


class Overlap:
    """stages: every rank's, uint8, in rank order."""

    def __init__(self, inboxes: Inboxes, stages: list[Tensor]) -> None:
        self.inboxes, self.rank, self.size, self.device = inboxes, inboxes.rank, inboxes.size, inboxes.device
        self._stages = stages
        self._word = torch.zeros(1, dtype=torch.float32, device=self.device)
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def pays(self, rows: int, columns: int, itemsize: int) -> bool:
        """Whether the result is so large, and the rows so many that every rank's fill the SMs with tiles."""
        return rows * columns * itemsize >= OVERLAP_BYTES and rows >= self.size * self._wave(columns)

    def project(
        self, multiply: Callable[[slice, Tensor], None], out: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> None:
        """out [rows, columns] <- sum over the ranks of what multiply(rows, out[rows]) makes, + bias + residual."""
        rows, columns = out.shape
        most = self._stages[0].numel() // (2 * (self.size - 1) * columns * out.element_size()) * self.size
        for start in range(0, rows, most):
            part = slice(start, min(start + most, rows))

            def inside(rows: slice, to: Tensor, start: int = start) -> None:
                multiply(_shifted(rows, start), to)

            self._piece(inside, out[part], bias, None if residual is None else residual[part])

    def _piece(
        self, multiply: Callable[[slice, Tensor], None], out: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> None:
        rows, columns = out.shape
        wave = self._wave(columns)
        owned = triton.cdiv(rows, self.size)
        chunk = wave * triton.cdiv(owned, wave * CHUNKS)
        count = triton.cdiv(owned, chunk)
        stages = [
            stage.view(out.dtype)[: 2 * (self.size - 1) * owned * columns].view(2, self.size - 1, owned, columns)
            for stage in self._stages
        ]

        def inside(i: int) -> slice:
            """Chunk i among a rank's rows."""
            return slice(i * chunk, min((i + 1) * chunk, owned))

        def of(owner: int, i: int) -> slice:
            """Chunk i of a rank's rows, among all."""
            return _shifted(inside(i), owner * owned, rows)

        def send(to: int, kind: int, i: int, part: slice) -> None:
            """Rows of out to another rank's stage: 0 parts of its rows, 1 sums of ours."""
            place = self.rank - (self.rank > to)
            stages[to][kind, place, inside(i)][: part.stop - part.start].copy_(out[part])

        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        side = _Side(self._side)
        self.barrier()  # nobody reads any more what came the last time
        sent: list[Any] = [None] * count
        for owner in others:
            for i in range(count):
                multiply(of(owner, i), out[of(owner, i)])
                with side.after_main():
                    send(owner, 0, i, of(owner, i))
                sent[i] = side.mark()
        told: list[Any] = []
        for i in range(count):
            mine = of(self.rank, i)
            multiply(mine, out[mine])
            side.main_waits_for(sent[i])
            if i > 1:
                side.main_waits_for(told[i - 2])
            self.barrier()  # parts of chunk i have come, and sums of chunk i - 2
            self._add(out[mine], stages[self.rank][0, :, inside(i)], bias, None if residual is None else residual[mine])
            with side.after_main():
                for reader in others:
                    send(reader, 1, i, mine)
                if i > 1:
                    self._take(out, stages[self.rank][1], others, of, inside, i - 2)
            told.append(side.mark())
        side.main_waits_for(told[-1])
        self.barrier()
        for i in range(max(0, count - 2), count):
            self._take(out, stages[self.rank][1], others, of, inside, i)

    def _take(
        self,
        out: Tensor,
        sums: Tensor,
        others: list[int],
        of: Callable[[int, int], slice],
        inside: Callable[[int], slice],
        i: int,
    ) -> None:
        """Sums of chunk i that have come, to where they belong."""
        for owner in others:
            target = out[of(owner, i)]
            target.copy_(sums[owner - (owner > self.rank), inside(i)][: target.shape[0]])

    def barrier(self) -> None:
        """Whatever comes after it on this stream runs after what was before it on every rank's."""
        self.inboxes.one_shot(self._word, self._word)

    def _wave(self, columns: int) -> int:
        """Rows whose tiles the SMs make at once."""
        return max(1, configs.multiprocessors(self.device) // triton.cdiv(columns, TILE[1])) * TILE[0]

    def _add(self, own: Tensor, parts: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
        """own [rows, columns] <- the sum with parts [size - 1, rows or more, columns], + bias + residual."""
        if not own.numel():
            return
        words = [None if x is None else x.view(-1).view(torch.int32) for x in (own, bias, residual)]
        count, pdl = own.nbytes // WORD, configs.architecture(self.device) == 90
        stride, row = (size * own.element_size() // WORD for size in (parts.stride(0), own.shape[1]))
        args = words[0], parts.view(torch.int32), *words[1:], words[0], count, stride, row
        constexprs = dict(
            RANK=self.rank, WORLD=self.size, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, PDL=pdl,
            DTYPE=DTYPES[own.dtype], BLOCK=ADD_BYTES // WORD,
        )  # fmt: skip
        options = {"launch_pdl": True} if pdl else {}
        grid = (triton.cdiv(count, ADD_BYTES // WORD),)
        launch(add_kernel, grid, self.device, args, constexprs, num_warps=8, **options)


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


def _shifted(part: slice, start: int, end: int | None = None) -> slice:
    """part, `start` further on and not beyond `end`."""
    first, last = part.start + start, part.stop + start
    return slice(first, last) if end is None else slice(min(first, end), min(last, end))
