"""The four operations an attention layer is assembled from; they hold no weights and know nothing of other ranks.

q, k, v = QKVGemmOp(config, plan, rank)(x, weight)          norm + projection + RoPE, this rank's heads
context = SoftmaxContextOp(config, plan, rank)(q, k, v)     attention
partial = LinearOp()(context, weight)                       output projection, to be summed over the ranks

Made from a DeepSpeed config and nothing else, each takes DeepSpeed's arguments: those are in deepspeed_ops.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tp_attention import functional
from tp_attention.config import AttentionConfig
from tp_attention.sharding import ShardPlan


class _Op:
    """Makes DeepSpeed's variant of an operation where it is given a config that is not ours."""

    def __new__(cls, config: Any = None, *args: Any, **keywords: Any) -> Any:
        if config is None or isinstance(config, AttentionConfig):
            return super().__new__(cls)
        from tp_attention import deepspeed_ops  # it imports this module

        variant = getattr(deepspeed_ops, cls.__name__, None)
        if variant is None:
            raise TypeError(f"{cls.__name__} takes an AttentionConfig; for DeepSpeed's, subclass deepspeed_ops' class")
        return super().__new__(variant)


class QKVGemmOp(_Op):
    """Norm, the column-parallel QKV projection, q/k norm and RoPE."""

    def __init__(self, config: AttentionConfig, plan: ShardPlan, rank: int) -> None:
        self.config = config
        self.heads, self.kv_heads = plan.local_heads(rank), plan.local_kv_heads(rank)
        self.interleaved = config.rope is not None and config.rope.interleaved

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        q_norm_weight: Tensor | None = None,
        k_norm_weight: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, E], weight [(local_heads + 2·local_kv_heads)·D, E] = [q; k; v], norm weights [E], q/k norms [D].

        rope: cos and sin [B or 1, T, rotary_dim / 2].
        Returns q [B, T, local_heads, D] and k, v [B, T, local_kv_heads, D].
        """
        config = self.config
        qkv = functional.norm_qkv(
            x,
            weight,
            bias,
            norm=config.norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=config.norm_eps,
            heads=self.heads,
            kv_heads=self.kv_heads,
            qk_norm=config.qk_norm,
            q_norm_weight=q_norm_weight,
            k_norm_weight=k_norm_weight,
            rope=rope,
            interleaved=self.interleaved,
        ).unflatten(-1, (-1, config.head_dim))
        q, k, v = qkv.split_with_sizes([self.heads, self.kv_heads, self.kv_heads], dim=2)
        return q, k, v


class SoftmaxContextOp(_Op):
    """Attention of this rank's query heads over this rank's kv heads."""

    def __init__(self, config: AttentionConfig, plan: ShardPlan, rank: int) -> None:
        self.config, self.group_size = config, plan.group_size
        self.q_start, self.kv_start = plan.q_heads(rank)[0], plan.kv_head_range(rank)[0]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        mask_is_final: bool = False,
    ) -> Tensor:
        """q [B, T, local_heads, D], k, v [B, S, local_kv_heads, D]; mask, slopes and sinks have q's heads.

        mask_is_final: the mask alone says what is seen, the config's causal and window do not apply.

        Returns [B, T, local_heads·D].
        """
        context = functional.attention(
            q,
            k,
            v,
            scale=self.config.scale,
            causal=self.config.causal and not mask_is_final,
            mask=mask,
            alibi_slopes=alibi_slopes,
            window=None if mask_is_final else self.config.window,
            softcap=self.config.softcap,
            sinks=sinks,
            q_start=self.q_start,
            group_size=self.group_size,
            kv_start=self.kv_start,
        )
        return context.flatten(2)


class LinearOp(_Op):
    """y = x @ weightᵀ (+ bias); a partial sum where x and weight hold this rank's columns (row parallel)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in], weight [out, in], bias [out] -> [..., out]."""
        return functional.linear(x, weight, bias)


class VectorMatMulOp(LinearOp):
    """The output projection without bias, which the layer adds once after the sum over ranks."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]  # a projection has no bias
        """x [..., in], weight [out, in] -> [..., out]."""
        return functional.linear(x, weight)
