"""The memory that ranks send values to each other through, and the launches of the kernels that do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_attention.comm.symmetric.kernels import one_shot_kernel, two_shot_kernel
from tp_attention.kernels import configs
from tp_attention.kernels.launch import launch

MOST_RANKS = 8
INBOX_BYTES = 64 << 20  # of every rank; longer tensors go through it piece by piece
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
NORMS = {None: 0, "rmsnorm": 1, "layernorm": 2}  # the kernel's constexpr NORM
MOST_NORM_COLUMNS = 16384  # of a row that one program holds
WORD = 4  # bytes, as in kernels.py
ALIGNMENT = 64  # words: where a sender's part of an inbox may begin


@dataclass(frozen=True)
class Config:
    """nbytes: of x, that a program sends to one rank."""

    nbytes: int
    warps: int


@dataclass(frozen=True)
class Norm:
    """What follows the sum: kind "rmsnorm" or "layernorm" over the last dimension, weight and bias [columns] or None."""

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


class Inboxes:
    """Every rank's inbox, all of one size, seen from rank `rank`. They are EMPTY, all bits set, between calls.

    inboxes: uint8 [size] each, one a rank, in rank order; the others' may be written by this process too. patience: how
    often a program looks for values that do not come before it gives up. trap: giving up ends the process's use of the
    GPU; otherwise `failed` says so and results are wrong.

    Tensors are contiguous, begin at multiples of 4 bytes and hold whole words of 4 bytes: `in_words` says whether.
    """

    def __init__(self, rank: int, inboxes: Sequence[Tensor], *, patience: int, trap: bool = True) -> None:
        self.rank, self.size, self.device = rank, len(inboxes), inboxes[rank].device
        self.patience, self.trap = patience, trap
        self._half = inboxes[rank].numel() // 2 // WORD
        spare = [None] * (MOST_RANKS - len(inboxes))
        self._inboxes: list[Any] = [inbox.view(torch.int32) for inbox in inboxes] + spare
        self._state = torch.zeros(3, dtype=torch.int32, device=self.device)

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
        target, row = _words(out), out.shape[-1] * out.element_size() // WORD if out.dim() else 1
        words = target.numel()
        most = self._half // (self.size - 1) // ALIGNMENT * ALIGNMENT
        if splits and words > most:
            raise ValueError(f"partial sums of {words} words do not fit in an inbox, which has room for {most}")
        step = most // row * row if norm is not None or bias is not None else most  # pieces are whole rows
        config = config or one_shot_config(min(words, step) * WORD)
        block, warps = config.nbytes // WORD, config.warps
        if norm is not None:
            block = triton.next_power_of_2(row)
            warps = min(32, max(4, block * WORD // 512))
        source, rest, normed_words = x if splits else _words(x), _words(residual), _words(normed)
        for start in range(0, words, step):
            count = min(step, words - start)
            part = slice(start, start + count)
            args = (
                source if splits else source[part], _words(bias), None if rest is None else rest[part],
                _words(norm.weight) if norm else None, _words(norm.bias) if norm else None,
                target[part], None if normed_words is None else normed_words[part],
                self._state, *self._inboxes, count, row, self._half, -(-count // ALIGNMENT) * ALIGNMENT,
                norm.eps if norm else 0.0, self.patience,
            )  # fmt: skip
            constexprs = dict(
                RANK=self.rank, WORLD=self.size, RANKS=triton.next_power_of_2(self.size), SPLITS=splits, SENT=False,
                HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, NORM=NORMS[norm.kind if norm else None],
                HAS_NORM_WEIGHT=norm is not None and norm.weight is not None,
                HAS_NORM_BIAS=norm is not None and norm.bias is not None,
            )  # fmt: skip
            programs = count // row if norm is not None else -(-count // block)
            self._launch(one_shot_kernel, programs, args, constexprs, out.dtype, block, warps)

    def two_shot(self, x: Tensor, out: Tensor, *, config: Config | None = None) -> None:
        """out <- sum of x over the ranks: tensors of one shape and dtype. out may be x."""
        source, target = _words(x), _words(out)
        words = source.numel()
        most = self._half // (2 * (self.size - 1)) // ALIGNMENT * ALIGNMENT * self.size
        config = config or two_shot_config(min(words, most) * WORD)
        block = config.nbytes // WORD
        for start in range(0, words, most):
            count = min(most, words - start)
            part = slice(start, start + count)
            chunk = -(-count // (self.size * ALIGNMENT)) * ALIGNMENT
            args = source[part], target[part], self._state, *self._inboxes, count, self._half, chunk, self.patience
            constexprs = dict(RANK=self.rank, WORLD=self.size, RANKS=triton.next_power_of_2(self.size))
            self._launch(two_shot_kernel, -(-chunk // block), args, constexprs, x.dtype, block, config.warps)

    def _launch(
        self,
        kernel: Any,
        programs: int,
        args: Sequence[Any],
        constexprs: dict[str, Any],
        dtype: torch.dtype,
        block: int,
        warps: int,
    ) -> None:
        pdl = configs.architecture(self.device) == 90
        trap = self.trap and not configs.interpreted()
        constexprs |= dict(PDL=pdl, TRAP=trap, DTYPE=DTYPES[dtype], BLOCK=block)
        options = {"launch_pdl": True} if pdl else {}
        launch(kernel, (programs,), self.device, args, constexprs, num_warps=warps, **options)


def in_words(x: Tensor) -> bool:
    """Whether the kernels can read x as it lies: contiguous, of whole words, at a multiple of their size."""
    return x.is_contiguous() and x.data_ptr() % WORD == 0 and x.numel() * x.element_size() % WORD == 0


def _words(x: Any) -> Any:  # Tensor | None
    return x if x is None else x.view(-1).view(torch.int32)


def one_shot_config(nbytes: int) -> Config:
    return Config(2048, 4)


def two_shot_config(nbytes: int) -> Config:
    return Config(2048, 4)
