"""Which keys a query sees, and what is added to its scores: the mask rules of every attention path, in one place.

Pure torch. The Triton kernels work causal, window and ALiBi out from positions and need only `check_mask` and
`effective_window`; the torch path builds all of it as one tensor, for a block of query rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOT_KEPT = -1e30  # an additive mask at or below this removes the key: -inf does, and finfo.min of fp32 and bf16

Window = tuple[int | None, int | None]


def check_mask(mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> None:
    """Raise ValueError unless mask is [B, S], or 4-D and broadcastable to [B, Hq, T, S], and bool or floating."""
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(
            f"mask has dtype {mask.dtype}, which could mean keep or add; pass mask.bool() (True = keep) or a float mask"
        )
    full = (batch, heads, queries, keys)
    if mask.dim() == 2:
        fits = mask.shape == (batch, keys)
    else:
        fits = mask.dim() == 4 and all(size in (1, whole) for size, whole in zip(mask.shape, full, strict=True))
    if not fits:
        raise ValueError(
            f"mask has shape {list(mask.shape)}; expected [B, S] = [{batch}, {keys}], or 4-D and broadcastable to "
            f"[B, Hq, T, S] = {list(full)}"
        )


def effective_window(queries: int, keys: int, causal: bool, window: Window | None) -> Window:
    """The (left, right) reach of each query, None where it excludes nothing; causal is a right reach of 0.

    Query i sits at key position S - T + i. One query under a causal mask, the decode case, gets (None, None).
    """
    left, right = window or (None, None)
    if causal:
        right = 0
    if left is not None and (left < 0 or left >= keys - 1):
        left = None
    if right is not None and (right < 0 or right >= queries - 1):
        right = None
    return left, right


def reachable(rows: range, offset: int, keys: int, reach: Window) -> range:
    """The keys that these query rows see between them; one key at least, which score_bias removes if it is not seen."""
    left, right = reach
    low = 0 if left is None else max(0, rows.start + offset - left)
    high = keys if right is None else min(keys, rows.stop + offset + right)
    return range(low, max(high, low + 1))


def score_bias(
    rows: range,
    keys: range,
    offset: int,
    reach: Window,
    mask: Tensor | None,
    slopes: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """All that masks and ALiBi do to the scores of these query rows and keys, as one tensor; None if nothing.

    offset: S - T, row i sits at key position i + offset. mask: the whole 4-D mask. slopes: [Hq].
    Returns [B or 1, Hq or 1, t or 1, s or 1]: bool (True = keep) while there is nothing to add, else fp32 (fp64 if the
    slopes are) with -inf where not kept.
    """
    bias = keep = None
    if mask is not None:
        keep = _narrow(_narrow(mask, 2, rows), 3, keys)
        if keep.dtype != torch.bool:
            bias = keep.float()
            keep = bias > NOT_KEPT
    if slopes is not None or reach != (None, None):
        at = torch.arange(rows.start + offset, rows.stop + offset, device=device)
        distance = torch.arange(keys.start, keys.stop, device=device) - at[:, None]  # [t, s], positive for later keys
        left, right = reach
        if right is not None:
            keep = _both(keep, distance <= right)
        if left is not None:
            keep = _both(keep, distance >= -left)
        if slopes is not None:
            alibi = -slopes[:, None, None] * distance.abs()  # [Hq, t, s]
            bias = alibi[None] if bias is None else bias + alibi
    if bias is None:
        return keep
    return bias if keep is None else bias.masked_fill(~keep, -torch.inf)


def empty_rows(bias: Tensor) -> Tensor:
    """The rows of a score_bias that keep no key: bool [B or 1, Hq or 1, t or 1, 1]."""
    return ~bias.any(-1, keepdim=True) if bias.dtype == torch.bool else bias.amax(-1, keepdim=True) == -torch.inf


def alibi_slopes(heads: int, device: torch.device | str = "cpu") -> Tensor:
    """The standard ALiBi slopes of `heads` heads, fp32 [heads] (arXiv 2108.12409).

    A geometric series for a power of two; otherwise that of the power below, then every other term of the one above.
    """
    below = 1 << (heads.bit_length() - 1)
    exponents = [8 * (i + 1) / below for i in range(below)] + [4 * (2 * i + 1) / below for i in range(heads - below)]
    return torch.tensor([2.0**-exponent for exponent in exponents], device=device)


def _narrow(mask: Tensor, dim: int, span: range) -> Tensor:
    return mask if mask.shape[dim] == 1 else mask.narrow(dim, span.start, len(span))


def _both(keep: Tensor | None, also: Tensor) -> Tensor:
    """keep [B, Hq, t, s] or None, also [t, s]."""
    return also[None, None] if keep is None else keep & also
