"""linear_all_reduce: a row-parallel projection and the sum over the ranks, with what follows it."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from tp_attention import functional
from tp_attention.comm.collectives import all_reduce
from tp_attention.comm.group import TPGroup, check_group
from tp_attention.comm.norm import Norm
from tp_attention.functional.backends import refuse_grad
from tp_attention.functional.checks import check_like, check_norm, check_weight


@overload
def linear_all_reduce(
    x: Tensor,
    weight: Tensor,
    group: TPGroup,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: None = None,
    *,
    weight_scale: Tensor | None = None,
    transposed: bool = False,
) -> Tensor: ...


@overload
def linear_all_reduce(
    x: Tensor,
    weight: Tensor,
    group: TPGroup,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm: Norm,
    weight_scale: Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]: ...


def linear_all_reduce(
    x: Tensor,
    weight: Tensor,
    group: TPGroup,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    *,
    weight_scale: Tensor | None = None,
    transposed: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = sum over the ranks of x @ weightᵀ, once + bias + residual; with a norm (norm(y), y).

    x [..., K]: this rank's columns of the whole x; K may differ by rank and be 0. weight [E, K]: the same columns of
    the whole weight. bias [E] and residual [..., E]: the same on every rank. weight_scale, transposed: as in
    functional.linear. The sum is rounded to x's dtype, then bias and residual are added in fp32.

    Where the group sums through symmetric memory, one launch after the projection does all the rest, but for the norm
    after a sum in two shots; from 32 MiB on, results are transferred in chunks by copy engines meanwhile.

    Raises ValueError for what does not fit, and as functional.linear and all_reduce do.
    """
    check_group(group)
    columns = check_weight(x, weight, bias, transposed, weight_scale)
    shape = (*x.shape[:-1], columns)
    if residual is not None:
        check_like("residual", residual, "x", x)
        if residual.shape != shape:
            raise ValueError(f"residual has shape {list(residual.shape)}; expected {list(shape)}, as the projection")
    if norm is not None:
        if not isinstance(norm, Norm):
            raise ValueError(f"norm is a {type(norm).__name__}; use comm.Norm(kind, weight, bias, eps)")
        check_norm(x.new_empty((0, columns)), norm.weight, norm.bias, norm.kind)
    keywords: dict[str, Any] = {"weight_scale": weight_scale, "transposed": transposed}
    if group.size == 1 and residual is None and norm is None:
        return functional.linear(x, weight, bias, **keywords)

    result, sums = None, group.symmetric
    if sums is not None and sums.takes(x) and not (weight_scale is not None and x.dtype == torch.float32):
        refuse_grad(x=x, weight=weight, bias=bias, residual=residual)
        flat = None if residual is None else residual.reshape(-1, columns)
        then = None if norm is None else norm.kind  # it decides what is sent how
        with group.transfer("linear_all_reduce", x, free=x.dim() - 1, columns=columns, norm=then):
            rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # not -1: a rank may hold no columns
            result = sums.project(rows, weight, **keywords, bias=bias, residual=flat, norm=norm)
    normed = None
    if result is not None:
        y = result[0].view(shape)
        normed = None if result[1] is None else result[1].view(shape)
    else:
        partial = functional.linear(x, weight, **keywords)
        y = all_reduce(partial, group, out=partial)
        if bias is not None or residual is not None:
            wide = y.to(torch.promote_types(x.dtype, torch.float32))
            for each in (bias, residual):
                wide = wide if each is None else wide + each
            y = wide.to(x.dtype)
    if norm is None:
        return y
    return functional.norm(y, norm.weight, norm.bias, norm.kind, norm.eps) if normed is None else normed, y
