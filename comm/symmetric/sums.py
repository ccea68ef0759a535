"""Sums over the GPUs of one host through symmetric memory: which way for which size, and every tensor made to fit."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from tp_attention.comm.norm import Norm
from tp_attention.comm.symmetric import AUTO, ONE_SHOT, TWO_SHOT
from tp_attention.comm.symmetric.inbox import DTYPES, WORD, Inboxes, in_words
from tp_attention.comm.symmetric.overlap import Overlap
from tp_attention.kernels import replay
from tp_attention.kernels.gemm import gemm
from tp_attention.kernels.skinny_gemm import MAX_ROWS, partial_sums, skinny_gemm

# Up to how many bytes everyone sends all of x to everyone, by the number of ranks; two shots move fewer beyond. Of two
# ranks measured on H200s (benchmarks/all_reduce.csv): one shot is the faster or within 1% at every size. Of more it is
# where the model of bench/links.py, fitted to these measurements, has the two cross; nobody has measured it there.
ONE_SHOT_BYTES = {2: None, 3: 480 << 10, 4: 208 << 10, 5: 128 << 10, 6: 96 << 10, 7: 72 << 10, 8: 60 << 10}


class SymmetricSums:
    """all_reduce and the projection before it, for fp32, fp16 and bf16 on `size` GPUs of one host.

    stages: memory of every rank that the others bring parts of projections to and read sums from, uint8 (overlap.py).
    way: "one_shot", "two_shot" or "auto", which chooses by size. keep: what must live as long as the memory.

    Streams: a call waits for the latest one, on whatever stream that was. Calls that are captured in a graph are
    ordered by the graph, and whoever replays it on one stream and calls on another must order those. A graph holds the
    memory's addresses and must not be replayed after `close`.
    """

    def __init__(self, inboxes: Inboxes, stages: list[Tensor], way: str = AUTO, keep: Any = None) -> None:
        self.inboxes, self.rank, self.size, self.way = inboxes, inboxes.rank, inboxes.size, way
        self.device = inboxes.device
        self.overlap = Overlap(inboxes, stages)
        self._keep = keep
        self._latest: torch.cuda.Stream | None = None  # the stream of the latest call
        self._handle = -1  # its own

    def close(self, *, wait: bool) -> None:
        """Nothing is kept any more that uses the memory. wait: until kernels that do have ended.

        Otherwise the memory stays until the process ends: giving it back would wait for a kernel that may be waiting
        for a dead rank, and ends the process where the GPU is lost, before anybody has read why.
        """
        if self.device.type == "cuda":
            replay.forget()
            if wait:
                torch.cuda.synchronize(self.device)
            else:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def takes(self, x: Tensor) -> bool:
        """Whether x is of a dtype that is summed here."""
        return x.dtype in DTYPES

    def way_of(self, nbytes: int) -> str:
        """How a tensor of so many bytes is summed."""
        if self.way != AUTO:
            return self.way
        most = ONE_SHOT_BYTES[self.size]
        return ONE_SHOT if most is None or nbytes <= most else TWO_SHOT

    def all_reduce(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The sum of x over the ranks, in fp32 and rank order, rounded once. out: None, x, or like x."""
        self._follow()
        way = self.way_of(x.nbytes)
        if in_words(x) and (out is None or in_words(out)):
            if out is x:  # which replay knows as one tensor
                return self._again(self._sum_in_place, x, way)
            return self._again(self._sum, x, out, way)
        # an odd number of halves, a view that begins at an odd one, or one that is not contiguous
        numel = x.numel()
        padded = x.new_zeros(numel + -numel % (WORD // x.element_size()))
        padded[:numel].view(x.shape).copy_(x)
        total = self._sum_in_place(padded, way)[:numel].view(x.shape)
        return total if out is None else out.copy_(total)

    def project(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        weight_scale: Tensor | None = None,
        transposed: bool = False,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        norm: Norm | None = None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """x [M, K] @ weightᵀ summed over the ranks, + bias [N] + residual [M, N]; and the norm of that, or None.

        The norm is made where it costs no launch. None altogether for rows that are no whole words or do not fit.
        """
        rows, columns = x.shape[0], weight.shape[1 if transposed else 0]
        row = columns * x.element_size()
        if not rows or not columns or row % WORD:
            return None
        bias, residual = _in_words(bias), _in_words(residual)
        few, way = rows <= MAX_ROWS, self.way_of(rows * row)
        if not few and self.way != ONE_SHOT and self.overlap.pays(rows, columns, x.element_size()):
            out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
            if not x.shape[1]:  # a rank that holds no columns: zeros to multiply
                x, weight, weight_scale, transposed = x.new_zeros(rows, 8), x.new_zeros(columns, 8), None, False
            multiply = functools.partial(gemm, weight=weight, weight_scale=weight_scale, transposed=transposed)
            self._follow()
            self.overlap.project(multiply, x, out, bias, residual)
            return out, None
        if way == ONE_SHOT and (rows * row if few else row) > self.inboxes.room:
            return None
        then: tuple[Any, ...] = (None,)
        if norm is not None and way == ONE_SHOT and self.inboxes.holds(columns, x.element_size()):
            then = norm.kind, _in_words(norm.weight), _in_words(norm.bias), norm.eps
        self._follow()
        return self._again(self._project, x, weight, weight_scale, transposed, way, bias, residual, *then)

    def _sum(self, x: Tensor, out: Tensor | None, way: str) -> Tensor:
        out = torch.empty_like(x) if out is None else out
        (self.inboxes.one_shot if way == ONE_SHOT else self.inboxes.two_shot)(x, out)
        return out

    def _sum_in_place(self, x: Tensor, way: str) -> Tensor:
        return self._sum(x, x, way)

    def _project(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor | None,
        transposed: bool,
        way: str,
        bias: Tensor | None,
        residual: Tensor | None,
        kind: str | None,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        eps: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """The product, then all the rest in one launch, or in one for each inbox that it fills."""
        few = x.shape[0] <= MAX_ROWS
        keywords: dict[str, Any] = {"weight_scale": weight_scale, "transposed": transposed}
        if not x.shape[1]:
            parts = out = x.new_zeros((x.shape[0], weight.shape[1 if transposed else 0]))
        elif few and way == ONE_SHOT:
            parts, out = partial_sums(x, weight, **keywords)
        else:
            parts = out = (skinny_gemm if few else gemm)(x, weight, **keywords)
        if way == TWO_SHOT:
            self.inboxes.two_shot(parts, out, bias=bias, residual=residual)
            return out, None
        norm = None if kind is None else Norm(kind, norm_weight, norm_bias, eps)
        normed = None if norm is None else torch.empty_like(out)
        self.inboxes.one_shot(parts, out, bias=bias, residual=residual, norm=norm, normed=normed)
        return out, normed

    def _again(self, function: Any, *args: Any) -> Any:
        """function(*args); on a GPU what it launches is kept for the next call."""
        if self.device.type != "cuda":
            return function(*args)
        return replay.again(function, args, {}, self.inboxes.memory)

    def _follow(self) -> None:
        """Order this call after the latest one."""
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        handle = torch._C._cuda_getCurrentRawStream(self.device.index)
        if handle != self._handle:
            stream = torch.cuda.current_stream(self.device)
            if self._latest is not None:
                stream.wait_stream(self._latest)
            self._handle, self._latest = handle, stream


def _in_words(x: Tensor | None) -> Tensor | None:
    """x, or a copy that the kernels can read."""
    return x if x is None or in_words(x) else x.clone(memory_format=torch.contiguous_format)
