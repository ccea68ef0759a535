"""TPSelfAttention: self-attention with its heads sharded over a group and one all-reduce after the output projection.

    x [B, T, E]  the same on every rank
      │ norm + QKV projection   column parallel: this rank's query heads and the kv heads they read
      │ RoPE on q and k; k and v appended to the cache
      │ attention               this rank's heads
      │ output projection       row parallel
      │ all-reduce              the only communication
    y [B, T, E]  the same on every rank, then + bias once

Inference only. The residual connection is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tp_attention.cache import LayerCache
from tp_attention.comm import TPGroup, linear_all_reduce
from tp_attention.config import AttentionConfig
from tp_attention.masks import alibi_slopes
from tp_attention.ops import QKVGemmOp, SoftmaxContextOp
from tp_attention.rope import RotaryEmbedding
from tp_attention.sharding import ShardPlan


class TPSelfAttention(nn.Module):
    """One rank's share of the attention layer that `config` describes.

    config: the whole layer, in global head counts. group: the ranks it is cut over; None is one process alone.
    device: where the weights live, the group's device if None. Weights start uninitialised; fill them with
    `load_unsharded` or, for whole models, tp_attention.models.
    Raises ValueError when the group has more ranks than the layer has heads.
    """

    alibi_slopes: Tensor | None

    def __init__(
        self, config: AttentionConfig, group: TPGroup | None = None, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.group = TPGroup.alone(device or "cpu") if group is None else group
        self.plan = ShardPlan.for_layer(config, self.group.size)
        rank = self.group.rank
        device = self.group.device if device is None else device

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=config.dtype, device=device), requires_grad=False)

        rows, local_heads, hidden = self.plan.qkv_rows(rank), self.plan.local_heads(rank), config.hidden_size
        self.norm_weight = weight(hidden) if config.norm else None
        self.norm_bias = weight(hidden) if config.norm == "layernorm" else None
        self.qkv_weight = weight(rows, hidden)
        self.qkv_bias = weight(rows) if config.qkv_bias else None
        self.q_norm_weight = weight(config.head_dim) if config.qk_norm else None
        self.k_norm_weight = weight(config.head_dim) if config.qk_norm else None
        self.sinks = weight(local_heads) if config.sinks else None
        self.out_weight = weight(hidden, local_heads * config.head_dim)
        self.out_bias = weight(hidden) if config.out_bias else None
        slopes = alibi_slopes(config.heads, self.group.device)[slice(*self.plan.q_heads(rank))]
        self.register_buffer("alibi_slopes", slopes if config.alibi else None, persistent=False)

        self.rotary = None if config.rope is None else RotaryEmbedding(config.rope, config.head_dim)
        self.qkv = QKVGemmOp(config, self.plan, rank)
        self.softmax_context = SoftmaxContextOp(config, self.plan, rank)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        mask_is_final: bool = False,
        positions: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [B, T, E] -> [B, T, E], both the same on every rank.

        mask: [B, S] or 4-D over [B, heads, T, S], as in functional.attention; S counts the cached tokens too. A mask
        with a heads dimension has the global heads. mask_is_final: the mask alone says what is seen; causal and window
        of the config do not apply. positions: [B or 1, T] of x's tokens for RoPE; None counts on from
        the cache. rope: cos and sin where the caller has them already. cache: keys and values so far; x's are appended.
        """
        if x.dim() != 3 or x.shape[-1] != self.config.hidden_size:
            raise ValueError(f"x has shape {list(x.shape)}; expected [B, T, hidden_size={self.config.hidden_size}]")
        q, k, v = self.qkv(
            x,
            self.qkv_weight,
            self.qkv_bias,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            q_norm_weight=self.q_norm_weight,
            k_norm_weight=self.k_norm_weight,
            rope=rope or self._rope(x, positions, cache),
        )
        if cache is not None:
            k, v = cache.append(k, v)
        context = self.softmax_context(
            q,
            k,
            v,
            mask=self._local_mask(mask),
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            mask_is_final=mask_is_final,
        )
        return linear_all_reduce(context, self.out_weight, self.group, self.out_bias)

    def _rope(self, x: Tensor, positions: Tensor | None, cache: LayerCache | None) -> tuple[Tensor, Tensor] | None:
        if self.rotary is None:
            return None
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        return self.rotary(positions)

    def _local_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None or mask.dim() != 4 or mask.shape[1] == 1:
            return mask
        if mask.shape[1] != self.config.heads:
            raise ValueError(f"mask has {mask.shape[1]} heads, the layer {self.config.heads}; pass 1 or all heads")
        return mask[:, slice(*self.plan.q_heads(self.group.rank))]

    @torch.no_grad()
    def load_unsharded(self, weights: Mapping[str, Tensor]) -> TPSelfAttention:
        """Copy this rank's slices from the whole layer's weights.

        Names and shapes: q_weight [heads·D, E], k_weight and v_weight [kv_heads·D, E], out_weight [E, heads·D], and
        where the config has them q_bias, k_bias, v_bias, out_bias, norm_weight, norm_bias [E], q_norm_weight and
        k_norm_weight [D], sinks [heads]. Raises ValueError on a missing, unknown or misshapen one, before copying any.
        """
        slots = self._slots()
        if slots.keys() != weights.keys():
            missing, unknown = slots.keys() - weights.keys(), weights.keys() - slots.keys()
            raise ValueError(f"weights missing: {sorted(missing) or 'none'}; unknown: {sorted(unknown) or 'none'}")
        for name, (shape, _, _) in slots.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"{name} has shape {list(weights[name].shape)}; expected {list(shape)}")
        for name, (_, local, target) in slots.items():
            target.copy_(weights[name][local])
        return self

    def _slots(self) -> dict[str, tuple[tuple[int, ...], tuple[slice, ...], Tensor]]:
        """Name of each whole weight -> its shape, this rank's slice of it, and where that slice is kept."""
        config, plan, rank = self.config, self.plan, self.group.rank
        q, kv = slice(*plan.q_rows(rank)), slice(*plan.kv_rows(rank))
        q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
        slots: dict[str, tuple[tuple[int, ...], tuple[slice, ...], Tensor]] = {
            "out_weight": ((config.hidden_size, q_rows), (slice(None), q), self.out_weight)
        }
        for kind, packed in (("weight", self.qkv_weight), ("bias", self.qkv_bias)):
            if packed is not None:
                parts = packed.split([q.stop - q.start, kv.stop - kv.start, kv.stop - kv.start])
                for name, rows, local, part in zip("qkv", (q_rows, kv_rows, kv_rows), (q, kv, kv), parts, strict=True):
                    slots[f"{name}_{kind}"] = (rows, *packed.shape[1:]), (local,), part
        if self.sinks is not None:
            slots["sinks"] = (config.heads,), (slice(*plan.q_heads(rank)),), self.sinks
        for name in ("norm_weight", "norm_bias", "q_norm_weight", "k_norm_weight", "out_bias"):
            if (whole := getattr(self, name)) is not None:
                slots[name] = tuple(whole.shape), (), whole
        return slots
