"""TritonSelfAttention beside DeepSpeed's TritonSelfAttention and DeepSpeedSelfAttention, fp16, on one GPU.

    TORCH_CUDA_ARCH_LIST=9.0 python -m tp_attention.bench.deepspeed_layer      # DeepSpeed compiles its kernels first
    torchrun --nproc-per-node=2 -m tp_attention.bench.deepspeed_layer          # ours alone, beside mp_size 1

First each result is held against DeepSpeed's. Then all take turns: eager calls, which is how such layers are used, and
replays of CUDA graphs, which leave the host out. Rows are appended to deepspeed_layer.csv one by one.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from tp_attention import TritonSelfAttention, launch, reference
from tp_attention.bench import timing
from tp_attention.bench.cases import reason, stamp
from tp_attention.bench.results import OURS, Out, append_records, folder
from tp_attention.comm import TPGroup

CALLS, ROUNDS = 40, 11  # eager: so many calls between two events, in so many turns
LIMIT = 2e-3  # ‖ours − theirs‖ / ‖theirs‖: both round to fp16 five times
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """A layer and its input [batch, tokens, hidden]."""

    hidden: int
    heads: int
    batch: int
    tokens: int
    causal: bool

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"hidden {self.hidden} H{self.heads} B{self.batch} S{self.tokens} {kind}"


SHAPES = (
    Shape(1024, 16, 8, 512, False),
    Shape(768, 12, 16, 128, False),
    Shape(4096, 32, 1, 2048, True),
    Shape(4096, 32, 4, 2048, True),
)
TINY = (Shape(64, 4, 2, 16, False), Shape(64, 4, 1, 16, True))


def main(
    out: Out = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small shapes: a dry run, also without a GPU.")] = False,
    dtype: Annotated[
        str, typer.Option(help="float16 or, where several ranks compare ours alone, bfloat16.")
    ] = "float16",
) -> None:
    """Compare and time every shape."""
    with launch.init() as world, torch.inference_mode():
        if world.device.type == "cpu" and not tiny:
            raise ValueError("these shapes need a GPU; --tiny tries small ones here")
        for shape in TINY if tiny else SHAPES:
            _measure(shape, world, getattr(torch, dtype), folder(out, tiny))


def _measure(shape: Shape, world: launch.World, dtype: torch.dtype, out: Path) -> None:
    device = world.device
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale).to(device, dtype)

    hidden = shape.hidden
    weights = {
        "attn_qkvw": draw(hidden, 3 * hidden, scale=hidden**-0.5), "attn_qkvb": draw(3 * hidden, scale=0.1),
        "attn_ow": draw(hidden, hidden, scale=hidden**-0.5), "attn_ob": draw(hidden, scale=0.1),
    }  # fmt: skip
    x, gamma, beta = draw(shape.batch, shape.tokens, hidden), 1 + draw(hidden, scale=0.1), draw(hidden, scale=0.1)
    truth = _truth(shape, weights, x, gamma, beta)
    contenders: dict[str, Callable[[], Any]] = {OURS: lambda: _ours(shape, world.tp, weights, dtype)}
    if world.tp.size > 1:
        contenders = {f"{OURS} mp_size {world.tp.size}": contenders[OURS]}
        contenders[f"{OURS} mp_size 1"] = lambda: _ours(shape, TPGroup.alone(device), weights, dtype)
    elif dtype == torch.float16:
        for name in THEIRS:
            contenders[name] = functools.partial(_theirs, shape, name, weights)

    calls: dict[str, Call] = {}
    results: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for who, make in contenders.items():
        try:
            layer = make()
            calls[who] = lambda layer=layer: layer(x, None, norm_w=gamma, norm_b=beta)  # type: ignore[misc]
            results[who] = calls[who]()[0].clone()
        except Exception as failure:  # DeepSpeed is not there, or cannot
            notes[who] = reason(failure, device)
            calls.pop(who, None)
    ours = results[next(iter(contenders))]
    for who, result in results.items():
        difference = ((ours.double() - result.double()).norm() / result.double().norm()).item()
        error = ((result.double() - truth).norm() / truth.norm()).item()
        notes[who] = f"error {error:.1e}, ours differs by {difference:.1e}"
        if not difference <= LIMIT * (1 if dtype == torch.float16 else 8):
            raise RuntimeError(f"{shape}: ours differs from {who} by {difference:.2e}, more than {LIMIT}")
    eager = _eager(calls, world.tp)
    graphs = _graphs(calls, world.tp, notes)
    base = eager[next(iter(contenders))]
    launches = _launches(calls[next(iter(contenders))], device)
    for who in contenders:
        row: dict[str, object] = {
            "row": str(shape), "who": who, "dtype": str(dtype).removeprefix("torch."),
            "eager_us": _us(eager.get(who)), "graph_us": _us(graphs.get(who)),
            "eager_over_ours": round(eager[who] / base, 3) if who in eager else "", "note": notes.get(who, ""),
        }  # fmt: skip
        if world.rank == 0:
            origin: dict[str, object] = {**stamp(device)}
            append_records(out / "deepspeed_layer.csv", [*row, *origin], [row | origin])
            said = f"eager {row['eager_us']:>7} µs  graph {row['graph_us']:>7} µs  {row['eager_over_ours']}x ours"
            print(f"{row['row']:40} {who:28} {said}  {row['note']}", flush=True)
    if world.rank == 0 and launches:
        print(f"{shape!s:40} {launches} launches: ours, one forward", flush=True)


def _config(shape: Shape, mp_size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden, "heads": shape.heads, "num_hidden_layers": 1, "dtype": dtype, "mp_size": mp_size,
        "pre_layer_norm": True, "triangular_masking": shape.causal, "max_out_tokens": shape.tokens,
        "layer_norm_eps": 1e-12,
    }  # fmt: skip


def _ours(shape: Shape, group: TPGroup, weights: dict[str, Tensor], dtype: torch.dtype) -> TritonSelfAttention:
    config = SimpleNamespace(**_config(shape, group.size, dtype))
    return TritonSelfAttention(config, mp_group=group).load_unsharded(weights)


THEIRS = ("deepspeed triton", "deepspeed cuda")


def _theirs(shape: Shape, which: str, weights: dict[str, Tensor]) -> Any:
    from deepspeed.ops.transformer.inference.config import DeepSpeedInferenceConfig
    from deepspeed.ops.transformer.inference.ds_attention import DeepSpeedSelfAttention
    from deepspeed.ops.transformer.inference.op_binding.workspace import WorkspaceOp
    from deepspeed.ops.transformer.inference.triton import attention

    triton_ops = which == "deepspeed triton"
    config = DeepSpeedInferenceConfig(**_config(shape, 1, torch.float16), use_triton=triton_ops)
    if triton_ops:
        layer = attention.TritonSelfAttention(config)
    else:
        DeepSpeedSelfAttention.num_layers = 0  # its cache is indexed by this
        layer = DeepSpeedSelfAttention(config)
        sizes = shape.hidden, shape.heads, shape.tokens, shape.batch
        WorkspaceOp(config).allocate_workspace(*sizes, 1, 1, False, 0, shape.tokens, 1)
    for name, weight in weights.items():
        getattr(layer, name).data.copy_(weight)
    return layer


def _truth(shape: Shape, weights: dict[str, Tensor], x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The layer in fp64, on the device by torch: the reference's loop over heads is for small shapes."""
    qkv = reference.norm(x, gamma, beta, "layernorm", 1e-12) @ weights["attn_qkvw"].double()
    q, k, v = (qkv + weights["attn_qkvb"].double()).unflatten(2, (3, shape.heads, -1)).unbind(2)
    contexts = []
    for b in range(shape.batch):
        scores = torch.einsum("thd,shd->hts", q[b], k[b]) / q.shape[3] ** 0.5
        if shape.causal:
            scores.masked_fill_(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        contexts.append(torch.einsum("hts,shd->thd", torch.softmax(scores, -1), v[b]).flatten(1))
    return torch.stack(contexts) @ weights["attn_ow"].double()


def _eager(calls: dict[str, Call], group: TPGroup) -> dict[str, float]:
    """Median µs of a call, of CALLS one after the other, the contenders in turns; the ranks meet before each burst."""
    samples: dict[str, list[float]] = {who: [] for who in calls}
    for turn in range(ROUNDS + 2):
        for who, call in calls.items() if turn % 2 else reversed(calls.items()):
            timing.meet(group)
            spent = _burst(call, group.device)
            if turn >= 2:  # two turns to warm up
                samples[who].append(spent)
    return {who: statistics.median(spent) for who, spent in samples.items()}


def _burst(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS * 1e6


def _graphs(calls: dict[str, Call], group: TPGroup, notes: dict[str, str]) -> dict[str, float]:
    device = group.device
    if device.type != "cuda":
        return {}
    ready = {}
    for who, call in calls.items():
        try:
            ready[who] = timing.ready([call], device, group)
        except Exception as failure:
            notes[who] += f"; no graph: {reason(failure, device)}"
    measured = timing.in_turns(list(ready.values()), device, group=group)
    return {who: each.ms * 1e3 for who, each in zip(ready, measured, strict=True)}


def _launches(call: Call, device: torch.device) -> int:
    """Kernels that one call starts."""
    if device.type != "cuda":
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    typer.run(main)
