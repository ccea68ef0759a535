"""Configurations measured for one layer's shapes, where the kernels' tables were made for other shapes or another GPU.

A layer calls `autotune` once, before its first forward. Rank 0 reads them from a cache or measures them, and all ranks
use what it found. What it replaces, DeepSpeed's table, is a pickle that every rank writes when it exits, the same file
for every GPU.

ranks.py: who measures, and how all come to agree. layer.py: what a layer launches. spaces.py: what may be tried.
search.py: trying it. comparison.py: what wins. cache.py: the file.

Limit: a table's key is coarser than a shape, so of two layers tuned in one process the later one wins where they share
a key. Masks, windows, ALiBi and paged caches ask for keys of their own, which keep their table's entries.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch

from tp_attention.autotune.layer import LayerShape
from tp_attention.comm import TPGroup

log = logging.getLogger("tp_attention")


def autotune(
    min_seqlen: int,
    max_seqlen: int,
    *,
    head_size: int,
    hidden_size: int,
    heads: int,
    kv_heads: int,
    qkv_rows: int,
    causal: bool,
    scale: float,
    dtype: torch.dtype,
    group: TPGroup,
    transposed: bool = False,
    use_flash: bool = True,
    cache: Path | None = None,
    quiet: bool = False,
) -> dict[str, int]:
    """Tune the kernels for one sequence of min_seqlen to max_seqlen tokens; every rank of the group must call this.

    heads, kv_heads, qkv_rows: this rank's query and kv heads, and rows of its QKV projection; those of rank 0 count.
    scale: of q·k. dtype: of the weights; torch.int8 goes with fp16 activations. transposed: weights are [in, out].
    use_flash: False tunes softmax_context. cache: a folder; None is $TP_ATTENTION_CACHE, else
    $XDG_CACHE_HOME/tp_attention, else ~/.cache/tp_attention. quiet: no progress bar.

    Returns for each kernel family how many entries of its table gave way to a faster one, in this process from now on.
    Where there is nothing to tune (no GPU, fp64) the log says so and it is {}: a group's ranks all have the same kind
    of device and dtype, so all of them return without a transfer.

    Raises ValueError for sizes that are no layer's, before anything is measured; on every rank what rank 0 failed with.
    """
    layer = LayerShape(
        min_seqlen,
        max_seqlen,
        head_size=head_size,
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        qkv_rows=qkv_rows,
        causal=causal,
        scale=scale,
        dtype=dtype,
        transposed=transposed,
        use_flash=use_flash,
    )
    why = None
    if group.device.type != "cuda":
        why = f"no GPU, the group's tensors are on {group.device}"
    elif dtype == torch.float64:
        why = "there are no kernels for torch.float64"
    elif importlib.util.find_spec("triton") is None:
        why = "triton is not installed"
    if why:
        log.info("autotune: %s: nothing to tune", why)
        return {}
    from tp_attention.autotune.ranks import tune_together  # here: kernels import triton, which may be missing

    return tune_together(layer, group, cache, quiet=quiet)
