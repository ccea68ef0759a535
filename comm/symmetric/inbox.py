"""The memory that ranks send values to each other through, and the launches of the kernels that do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from tp_attention.comm.norm import Norm
from tp_attention.comm.symmetric.kernels import gather_kernel, one_shot_kernel, two_shot_kernel
from tp_attention.comm.symmetric.memory import MOST_RANKS
from tp_attention.kernels import configs
from tp_attention.kernels.gemm import DTYPES
from tp_attention.kernels.launch import launch
from tp_attention.kernels.skinny_gemm import NORMS

INBOX_BYTES = 64 << 20  # of every rank; longer tensors go through it piece by piece
MOST_ROWS = 65535  # that a grid's second dimension holds
MOST_NORM_WORDS = 16384  # of a row or a cluster's part of it, from every rank, that a program holds in its registers
WORD = 4  # bytes, as in kernels.py
CLUSTER = 8  # programs of a Hopper GPU at most that make a row's norm together, and twice as many of one with more SMs
ROOM = 120  # than so: one of its at most 8 GPCs, which a cluster does not leave, then has 16
PROGRAMS = 512  # of a GPU that run at the same time: each has as small a part of a row as makes no more of them
PARTS = 128, 512  # words of a row, the least and the most of these
ALIGNMENT = 64  # words: where a sender's part of an inbox may begin


@dataclass(frozen=True)
class Config:
    """nbytes: of x, that a program sends to one rank."""

    nbytes: int
    warps: int


WORDS_OF_A_WARP = 256  # of a row; half as many where it also has those of three ranks and more
PROGRAM = Config(2048, 4)  # the best, or within 2% of it, at every size and of both kernels


class Inboxes:
    """Every rank's inbox, all of one size, seen from rank `rank`. They are EMPTY, all bits set, between calls.

    inboxes: uint8 [size] each, one a rank, in rank order; the others' may be written by this process too. patience: how
    often a program looks for values that do not come before it gives up, which ends the process's use of the GPU. If
    negative, `failed` says so and results are wrong, as on a CPU.

    Tensors are contiguous, begin at multiples of 4 bytes and hold whole words of 4 bytes: `in_words` says whether.
    """

    def __init__(self, rank: int, inboxes: Sequence[Tensor], *, patience: int) -> None:
        self.rank, self.size, self.device = rank, len(inboxes), inboxes[rank].device
        self.patience = patience
        self._half = inboxes[rank].numel() // 2 // WORD
        self.room = self._half // (self.size - 1) // ALIGNMENT * ALIGNMENT * WORD  # bytes of x that go at once
        if not self.room:
            raise ValueError(f"an inbox of {2 * self._half * WORD} bytes is too small for {self.size} ranks")
        spare = [None] * (MOST_RANKS - len(inboxes))
        self._inboxes: list[Any] = [inbox.view(torch.int32) for inbox in inboxes] + spare
        self._ranks = dict(RANK=rank, WORLD=self.size, RANKS=triton.next_power_of_2(self.size))
        self._state = torch.zeros(3, dtype=torch.int32, device=self.device)
        self.memory = [self._state, *inboxes]  # what the kernels use beside their arguments

    def holds(self, columns: int, itemsize: int) -> bool:
        """Whether a program that norms a row of so many columns has registers for it."""
        row = columns * itemsize // WORD
        return self._parts(row, row)[1] * triton.next_power_of_2(self.size) <= MOST_NORM_WORDS

    def failed(self) -> bool:
        """Whether a rank was waited for in vain. Waits for the GPU."""
        return bool(self._state[2].item())

    def one_shot(
        self,
        x: Tensor,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        norm: Norm | None = None,
        normed: Tensor | None = None,
        config: Config | None = None,
    ) -> None:
        """out <- sum of x over the ranks, + bias + residual; normed <- norm of that. out may be x or residual.

        x: out's shape and dtype, or fp32 [splits, *out.shape], added up and rounded to out's dtype before it is sent.
        The sum is rounded to out's dtype before anything is added to it.
        """
        splits = x.shape[0] if x.dim() > out.dim() else 0
        target, row = _words(out), _row(out)
        words, most = target.numel(), self.room // WORD
        if words == 0:
            return
        whole = words if splits else row if norm is not None or bias is not None else 1
        if whole > most:
            raise ValueError(f"{whole * WORD} bytes must go at once and an inbox has room for {self.room}")
        step = most // row * row if norm is not None or bias is not None else most  # pieces are whole rows
        if norm is not None:
            step = min(step, MOST_ROWS * row)
            cluster, block = self._parts(row, words)
            warps = config.warps if config else max(1, min(16, (1 if self.size < 3 else 2) * block // WORDS_OF_A_WARP))
        else:
            config = config or PROGRAM
            cluster, block, warps = 1, config.nbytes // WORD, config.warps
        source, rest, normed_words = x if splits else _words(x), _words(residual), _words(normed)
        rows = _words(bias), *((_words(norm.weight), _words(norm.bias)) if norm else (None, None))
        constexprs = self._ranks | dict(
            SPLITS=splits,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, NORM=NORMS[norm.kind if norm else None],
            HAS_NORM_WEIGHT=rows[1] is not None, HAS_NORM_BIAS=rows[2] is not None, CLUSTER=cluster,
            DTYPE=DTYPES[out.dtype], BLOCK=block,
        )  # fmt: skip
        for start in range(0, words, step):
            count = min(step, words - start)
            part = slice(start, start + count)
            args = (
                source if splits else source[part], rows[0], None if rest is None else rest[part], *rows[1:],
                target[part], None if normed_words is None else normed_words[part],
                self._state, *self._inboxes, count, row, self._half, _aligned(count),
                1 / out.shape[-1] if norm else 0.0, norm.eps if norm else 0.0, self.patience,
            )  # fmt: skip
            grid = (cluster, count // row) if norm is not None else (triton.cdiv(count, block), 1)
            self._launch(one_shot_kernel, grid, args, constexprs, warps, cluster)

    def two_shot(
        self,
        x: Tensor,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        config: Config | None = None,
    ) -> None:
        """out <- sum of x over the ranks, + bias + residual, as one_shot adds them. out may be x or residual."""
        source, target, row_bias, rest = _words(x), _words(out), _words(bias), _words(residual)
        words, row = source.numel(), _row(out)
        most = self._half // (2 * (self.size - 1)) // ALIGNMENT * ALIGNMENT * self.size
        if not most:
            raise ValueError(
                f"an inbox of {2 * self._half * WORD} bytes is too small for two shots of {self.size} ranks"
            )
        config = config or PROGRAM
        block = config.nbytes // WORD
        constexprs = self._ranks | dict(
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, DTYPE=DTYPES[x.dtype], BLOCK=block
        )
        for start in range(0, words, most):
            count = min(most, words - start)
            part = slice(start, start + count)
            chunk = _aligned(triton.cdiv(count, self.size))
            args = (
                source[part], row_bias, None if rest is None else rest[part], target[part],
                self._state, *self._inboxes, count, row, start % row, self._half, chunk, self.patience,
            )  # fmt: skip
            grid = triton.cdiv(chunk, block), 1
            self._launch(two_shot_kernel, grid, args, constexprs, config.warps)

    def gather(self, out: Tensor, chunk: int, stride: int) -> None:
        """out [rows, columns] <- every rank's rows: `chunk` of them from rank * stride on, as far as there are so many.

        Rows hold whole words (and are looked at 16 bytes at a time where chunk * columns are a multiple of 64), and
        stride is at least chunk. Whatever comes after it on this stream runs after what was before it on every rank's.
        """
        words, row = _words(out), _row(out)
        most, block = self.room // WORD, PROGRAM.nbytes // WORD
        for start in range(0, chunk * row, most):
            count, rest = min(most, chunk * row - start), words[start:]
            args = rest, self._state, *self._inboxes, len(rest), self._half, count, stride * row, self.patience
            grid = triton.cdiv(count, block), 1
            self._launch(gather_kernel, grid, args, self._ranks | dict(BLOCK=block), PROGRAM.warps)

    def _parts(self, row: int, words: int) -> tuple[int, int]:
        """How many programs share a row to norm, and how many words of it each has, of a tensor of so many.

        So a norm's last bit may depend on the number of rows beside it.
        """
        most = 1
        if configs.architecture(self.device) == 90:
            most = CLUSTER if configs.multiprocessors(self.device) <= ROOM else 2 * CLUSTER
        least, largest = PARTS
        part = min(max(least, triton.next_power_of_2(triton.cdiv(words, PROGRAMS))), largest)
        programs = min(most, triton.next_power_of_2(triton.cdiv(row, part)))
        return programs, triton.next_power_of_2(triton.cdiv(row, programs))

    def _launch(
        self,
        kernel: Any,
        grid: tuple[int, int],
        args: Sequence[Any],
        constexprs: dict[str, Any],
        warps: int,
        cluster: int = 1,
    ) -> None:
        pdl = configs.architecture(self.device) == 90
        constexprs = constexprs | dict(PDL=pdl, PTX=not configs.interpreted())
        options = {"launch_pdl": True} if pdl else {}
        launch(kernel, grid, self.device, args, constexprs, cluster=cluster, num_warps=warps, **options)


def in_words(x: Tensor) -> bool:
    """Whether the kernels can read x as it lies: contiguous, of whole words, at a multiple of their size."""
    return x.is_contiguous() and x.data_ptr() % WORD == 0 and x.numel() * x.element_size() % WORD == 0


def _aligned(words: int) -> int:
    return triton.cdiv(words, ALIGNMENT) * ALIGNMENT


def _row(x: Tensor) -> int:
    """Words in a row of x; what is less than a word counts as one."""
    return max(1, x.shape[-1] * x.element_size() // WORD) if x.dim() else 1


def _words(x: Any) -> Any:  # Tensor | None
    return x if x is None else x.view(-1).view(torch.int32)
