"""What to compile ahead of time: one module per kernel family, each with LAUNCHES by name.

Every module of this folder is found by compile_all.py. Tensors on "meta" cost nothing, so use real sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """call: launches kernels. wgmma, tma: whether some kernel of it must use these on sm_90 (None: either way).

    kernels: at most so many may be compiled for it. setmaxnreg: on sm_90 its warpgroups must share out registers.
    moving: no loop within a loop may run to a bound from outside of both, which Triton makes of a carried one. polls:
    what waits for another GPU's values must look at 16 bytes at a time. cluster: whether on sm_90 its programs must add
    up in clusters (None: either way).
    """

    call: Callable[[], object]
    wgmma: bool | None = None
    tma: bool | None = None
    kernels: int = 2
    setmaxnreg: bool = False
    moving: bool = False
    polls: bool = False
    cluster: bool | None = None
