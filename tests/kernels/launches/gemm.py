"""Many rows: every tile of the product's table, norms of every size, q/k norm and RoPE."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from tests.kernels.launches import Launch
from tp_attention.kernels import configs
from tp_attention.kernels.gemm import CONFIGS, Others, gemm
from tp_attention.kernels.norm import norm
from tp_attention.kernels.rope import qk_norm_rope_


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gemm(
    rows: int, columns: int, depth: int, dtype: torch.dtype = torch.bfloat16, group: int = 0, transposed: bool = False,
    **keywords: Any,
) -> Callable[[], object]:  # fmt: skip
    weight = _empty(*((depth, columns) if transposed else (columns, depth)), dtype=torch.int8 if group else dtype)
    scale = _empty(columns, depth // group, dtype=torch.float32) if group else None
    bias = _empty(columns, dtype=dtype)
    return lambda: gemm(
        _empty(rows, depth, dtype=dtype), weight, bias, weight_scale=scale, transposed=transposed, **keywords
    )


def _safe(kind: str) -> dict[str, Any]:
    """The table's entry for a GPU it does not know."""
    return {"config": next(config for key, config in CONFIGS.items() if key[:2] == (0, kind))}


def _norm(columns: int, kind: str, dtype: torch.dtype = torch.bfloat16, rows: int = 4096) -> Callable[[], object]:
    weight = _empty(columns, dtype=dtype)
    return lambda: norm(_empty(rows, columns, dtype=dtype), weight, weight if kind == "layernorm" else None, kind, 1e-5)


def _rope(head_dim: int, pairs: int, **keywords: Any) -> Callable[[], object]:
    angles = {"cos": _empty(1, 512, pairs, dtype=torch.float32), "sin": _empty(1, 512, pairs, dtype=torch.float32)}
    return lambda: qk_norm_rope_(_empty(4096, 48 * head_dim), 32, 8, head_dim, **(angles if pairs else {}), **keywords)


def _summed(ranks: int, rows: int = 4096, columns: int = 8192, **keywords: Any) -> Callable[[], object]:
    others = Others(ranks // 2, _empty(ranks - 1, 2 * rows, columns)[:, :rows])
    return _gemm(rows, columns, 4096, others=others, residual=_empty(rows, columns), **keywords)


def _stored(rows: int, columns: int, width: int, store: int) -> Callable[[], object]:
    """A sum of 8 with the table's entry as autotune may have it: so many columns are stored at a time."""

    def call() -> None:
        config = CONFIGS.get((configs.architecture(torch.device("meta")), "half", width))
        _summed(8, rows, columns, config=config and dataclasses.replace(config, store=store))()

    return call


def _summed_in_place() -> None:
    parts = _empty(1, 4096, 8192)
    gemm(_empty(4096, 4096), _empty(8192, 4096), out=parts[0], others=Others(1, parts, _empty(4096, 8192)))


_q_norm = {"q_norm_weight": _empty(128), "k_norm_weight": _empty(128)}

LAUNCHES = {
    "256 columns": Launch(_gemm(4096, 6144, 4096), wgmma=True, tma=True),
    "256 columns transposed": Launch(_gemm(4096, 6144, 4096, transposed=True), wgmma=True, tma=True),
    "192 columns": Launch(_gemm(512, 6144, 4096, torch.float16), wgmma=True, tma=True),
    "160 columns": Launch(_gemm(512, 5120, 8192), wgmma=True, tma=True),
    "128 columns": Launch(_gemm(264, 4224, 4096), wgmma=True, tma=True),
    "64 columns": Launch(_gemm(128, 6144, 4096), wgmma=True, tma=True),
    "odd columns": Launch(_gemm(4096, 6143, 4096), wgmma=True, tma=True),
    "odd depth": Launch(_gemm(4096, 6143, 4095, transposed=True), wgmma=True, tma=True),
    "int8": Launch(_gemm(4096, 6144, 4096, group=128), wgmma=True, tma=True),
    "int8 64 columns": Launch(_gemm(128, 6144, 4096, group=64), wgmma=True, tma=True),
    "int8 odd group": Launch(_gemm(4096, 5120, 5120, torch.float16, group=80), wgmma=True),
    "fp32": Launch(_gemm(4096, 6144, 4096, torch.float32)),
    "fp32 transposed": Launch(_gemm(4096, 6144, 4096, torch.float32, transposed=True)),
    **{f"sum of {ranks}": Launch(_summed(ranks), wgmma=True, tma=True) for ranks in (2, 5, 8)},
    "sum of 2, 192 columns": Launch(_summed(2, 512, 6144), wgmma=True, tma=True),
    "sum of 8, 192 columns": Launch(_summed(8, 512, 6144), wgmma=True, tma=True),
    "sum of 8, 128 columns": Launch(_stored(264, 4224, 128, 256), wgmma=True, tma=True),
    "sum of 8, 192 columns, 64 at a time": Launch(_stored(512, 6144, 192, 64), wgmma=True, tma=True),
    "sum of 2 in place": Launch(_summed_in_place, wgmma=True, tma=True),
    "sum of 2, int8": Launch(_summed(2, group=128), wgmma=True, tma=True),
    "safe": Launch(_gemm(4096, 6144, 4096, **_safe("half"))),
    "safe int8": Launch(_gemm(4096, 6144, 4096, group=128, **_safe("int8"))),
    "safe fp32": Launch(_gemm(4096, 6144, 4096, torch.float32, **_safe("float32"))),
    "rmsnorm 4096": Launch(_norm(4096, "rmsnorm")),
    "rmsnorm 8192 fp32": Launch(_norm(8192, "rmsnorm", torch.float32)),
    "rmsnorm 16384": Launch(_norm(16384, "rmsnorm")),
    "layernorm 768": Launch(_norm(768, "layernorm")),
    "layernorm 200": Launch(_norm(200, "layernorm")),
    "layernorm 20000": Launch(_norm(20000, "layernorm")),
    "rope": Launch(_rope(128, 64)),
    "rope interleaved": Launch(_rope(80, 16, interleaved=True)),
    "rope q/k norm": Launch(_rope(128, 64, qk_norm="rmsnorm", **_q_norm)),
    "q/k layernorm, part turned": Launch(_rope(128, 32, qk_norm="layernorm", **_q_norm)),
    "q/k norm alone": Launch(_rope(256, 0, qk_norm="rmsnorm")),
}
