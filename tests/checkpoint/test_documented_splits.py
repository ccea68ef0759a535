"""Layouts without a class in transformers: our layer computes what their code, as documented, makes of their files.

That is: a fused projection, their split of what it gives, and fp64 attention; each rank of the file by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint.simulated_ranks import ATTENTION, ours
from tests.checkpoint.test_family_forward import FAMILIES
from tests.tolerances import assert_close
from tp_attention.checkpoint.families import LAYOUTS
from tp_attention.config import AttentionConfig, RopeConfig
from tp_attention.reference import attention as reference_attention
from tp_attention.sharding import ShardPlan

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 7


D = 4  # head dim of what follows
Heads3 = tuple[Tensor, Tensor, Tensor]


def thirds(fused: Tensor, q: int, kv: int) -> Heads3:
    """fused [B, T, rows] -> q [B, T, q, D], k and v [B, T, kv, D]: one after another."""
    q_rows, k_rows, v_rows = fused.split([q * D, kv * D, kv * D], dim=-1)
    return q_rows.unflatten(-1, (q, D)), k_rows.unflatten(-1, (kv, D)), v_rows.unflatten(-1, (kv, D))


def per_head(fused: Tensor, q: int, kv: int) -> Heads3:
    """Megatron 2.0, ChatGLM: every head's q, k, v."""
    q_heads, k_heads, v_heads = fused.unflatten(-1, (q, 3 * D)).chunk(3, dim=-1)
    return q_heads, k_heads, v_heads


def per_element(fused: Tensor, q: int, kv: int) -> Heads3:
    """Megatron 1.0: q, k, v of every element of every head."""
    q_heads, k_heads, v_heads = fused.unflatten(-1, (q, D, 3)).unbind(-1)
    return q_heads, k_heads, v_heads


def per_group(fused: Tensor, q: int, kv: int) -> Heads3:
    """Megatron-core, InternLM2: a kv head behind the query heads that read it."""
    grouped = fused.unflatten(-1, (kv, q // kv + 2, D))
    return grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]


Split = Callable[[Tensor, int, int], Heads3]
SPLITS: dict[str, tuple[Split, int]] = {  # with the kv heads of 6 query heads
    "megatron-0": (thirds, 6),
    "megatron-1.0": (per_element, 6),
    "megatron-2.0": (per_head, 6),
    "megatron-3.0": (per_group, 6),
    "megatron-3.0-gated": (per_group, 2),
    "megatron-core": (per_group, 2),
    "megatron-core-gated": (per_group, 6),
    "megatron-core-output-gate": (per_group, 2),
    "chatglm": (per_head, 6),
    "chatglm2": (thirds, 2),
    "internlm2": (per_group, 2),
    "baichuan": (thirds, 6),
    "qwen-1": (thirds, 6),
    "deepspeed-merged": (thirds, 6),
    "deepspeed-merged-gated": (thirds, 2),
    "deepspeed-transposed": (thirds, 6),
    "deepspeed-split": (thirds, 6),
    "deepspeed-split-gated": (thirds, 2),
    "llama-meta": (thirds, 2),
    "llama-gguf": (thirds, 2),
}


class Cut:
    """One layer's attention, cut over ranks, in a layout: random file tensors."""

    path, metadata = Path("(cut)"), {}  # type: ignore[var-annotated]

    def __init__(self, layout: str, plan: ShardPlan) -> None:
        self.layout, self.plan = LAYOUTS[layout], plan
        parts = {"q", "k", "v"} | ({"query_gate"} if layout.endswith("output-gate") else set())
        self.ranks: list[dict[str, Tensor]] = [{} for _ in range(plan.tp)]
        out_bias = torch.randn(24)
        for rank, tensors in enumerate(self.ranks):
            counts = {"q": plan.local_heads(rank), "k": plan.local_kv_heads(rank)}
            counts |= {"query_gate": counts["q"], "v": counts["k"], "out": counts["q"]}
            for kind, shape in (("weight", (24,)), ("bias", ())):
                for name, packing in self.layout.tensors_for(f"{ATTENTION}qkv_{kind}", parts):
                    tensors[name] = torch.randn(sum(counts[part] for part in packing.parts) * D, *shape)
                    if packing.transposed and kind == "weight":
                        tensors[name] = tensors[name].t().contiguous()
            (self.out, packing), *_ = self.layout.tensors_for(f"{ATTENTION}out_weight", {"out"})
            out = torch.randn(24, counts["q"] * D)
            tensors[self.out] = out.t().contiguous() if packing.transposed else out
            tensors[self.layout.tensors_for(f"{ATTENTION}out_bias", {"whole"})[0][0]] = out_bias
        self.parts, self.out_transposed, self.out_bias = parts, packing.transposed, out_bias

    def names(self, rank: int) -> list[str]:
        return list(self.ranks[rank])

    def tensor(self, rank: int, name: str) -> Tensor:
        return self.ranks[rank][name]

    def fused(self, rank: int, x: Tensor) -> Tensor:
        """x through the rank's file tensors, one after another where q, k and v have one each."""
        rows = []
        files = [self.layout.tensors_for(f"{ATTENTION}qkv_{kind}", self.parts) for kind in ("weight", "bias")]
        for (weight_name, packing), (bias_name, _) in zip(*files, strict=True):
            weight = self.ranks[rank][weight_name].double()
            rows.append(x @ (weight if packing.transposed else weight.t()) + self.ranks[rank][bias_name].double())
        return torch.cat(rows, dim=-1)

    def projected(self, rank: int, context: Tensor) -> Tensor:
        out = self.ranks[rank][self.out].double()
        return context @ (out if self.out_transposed else out.t())


def turned(heads: Tensor, pairs: bool) -> Tensor:
    """RoPE of [B, T, heads, D] as complex numbers: neighbours are one (pairs), or element i and i + D/2."""
    numbers = heads.unflatten(-1, (D // 2, 2) if pairs else (2, D // 2))
    numbers = torch.view_as_complex((numbers if pairs else numbers.transpose(-1, -2)).contiguous())
    angles = torch.arange(TOKENS)[:, None] * 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    result = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)[:, None])
    return (result if pairs else result.transpose(-1, -2)).flatten(-2)


@pytest.mark.parametrize("source_tp", [1, 2])
@pytest.mark.parametrize("layout", SPLITS)
def test_our_layer_agrees_with_the_documented_split(layout: str, source_tp: int) -> None:
    split, kv_heads = SPLITS[layout]
    plan = ShardPlan(tp=source_tp, heads=6, kv_heads=kv_heads, head_dim=D, hidden_size=24, mlp_unit=1)
    checkpoint, x = Cut(layout, plan), torch.randn(2, TOKENS, 24)
    expected = checkpoint.out_bias.double().expand(2, TOKENS, 24)
    for rank in range(source_tp):  # each rank as the framework that wrote its file would run it
        q_heads, kv = plan.local_heads(rank), plan.local_kv_heads(rank)
        fused, gate = checkpoint.fused(rank, x.double()), None
        if layout.endswith("output-gate"):
            grouped = fused.unflatten(-1, (kv, 2 * q_heads // kv + 2, D))
            q, gate, kv_rows = grouped.split([q_heads // kv, q_heads // kv, 2], dim=3)
            gate, fused = gate.flatten(2).sigmoid(), torch.cat([q, kv_rows], dim=3).flatten(2)
        q, k, v = split(fused, q_heads, kv)
        q, k = (turned(heads, pairs=layout in ("llama-meta", "llama-gguf")) for heads in (q, k))
        context = reference_attention(q, k, v, causal=True)[0].flatten(2)
        expected = expected + checkpoint.projected(rank, context if gate is None else context * gate)
    config = AttentionConfig(24, 6, kv_heads, D, rope=RopeConfig(), qkv_bias=True, out_bias=True)
    for tp in (1, 2, 3):
        assert_close(ours(checkpoint, config, x, tp), expected)


def test_every_layout_is_run() -> None:
    assert SPLITS.keys() | FAMILIES.keys() >= LAYOUTS.keys()
