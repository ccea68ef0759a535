"""The four operations with DeepSpeed's arguments, and its softmax, score_4d_matmul and context_4d_matmul.

    qkv, normed = QKVGemmOp(config)(x, weight, bias, gamma, beta)
    context, key, value = SoftmaxContextOp(config)(qkv, mask, heads, num_kv, norm_factor, …)
    output = VectorMatMulOp(config)(context, weight)

Made through ops.py's names from a DeepSpeed config. Weights are [in, out], or [out, in] in transposed_mode; int8 ones
carry their scales, fp32 [out, in / group], as an attribute `scale`, or come with weight_scale. There is no workspace:
results are new tensors, or views of a call's own, and later calls leave them alone. What is meant for DeepSpeed's own
scheduling is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tp_attention import functional, ops
from tp_attention.deepspeed_cache import OwnKeys, Past
from tp_attention.deepspeed_config import Settings, read
from tp_attention.deepspeed_masks import attention_mask, local_heads, split_qkv, with_bias
from tp_attention.rope import RotaryEmbedding, apply_rope
from tp_attention.sharding import ShardPlan

PATHS = ("flash", "softmax_context", "torch")


class QKVGemmOp(ops.QKVGemmOp):
    """Norm and the QKV projection."""

    def __init__(self, config: Any) -> None:
        self.settings = read(config)

    def __call__(  # type: ignore[override]
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        normed: bool = False,
        weight_scale: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """input [B, T, E] -> qkv [B, T, columns of weight], norm(input) [B, T, E].

        gamma, beta [E]: the norm's weight and bias. normed: input is already. rope: cos, sin [B or 1, T, n], which turn
        q and k of so many heads and kv_heads.
        """
        settings = self.settings
        weight, transposed, scale = weight_of(weight, settings, weight_scale)
        result = functional.norm_qkv(
            input,
            weight,
            bias,
            norm=None if normed else settings.norm,
            norm_weight=None if normed else gamma,
            norm_bias=None if normed else beta,
            eps=settings.attention.norm_eps,
            return_normed=True,
            transposed=transposed,
            weight_scale=scale,
            heads=heads,
            kv_heads=kv_heads,
            rope=rope,
            interleaved=_interleaved(settings),
            backend=backend,
        )
        return result[0], result[1]


class LinearOp(ops.LinearOp):
    """A projection with bias."""

    def __init__(self, config: Any) -> None:
        self.settings = read(config)

    def __call__(  # type: ignore[override]
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        add_bias: bool = True,
        do_flash_attn: bool = False,
        num_heads: int | None = None,
        external_cache: bool | None = None,
        num_layers: int | None = None,
        *,
        weight_scale: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """input [..., in] -> [..., out]; bias [out] only if add_bias. num_heads and num_layers change nothing here."""
        if do_flash_attn or external_cache:
            raise ValueError("do_flash_attn and external_cache are not for a projection here; leave them out")
        weight, transposed, scale = weight_of(weight, self.settings, weight_scale)
        return functional.linear(
            input, weight, bias if add_bias else None, transposed=transposed, weight_scale=scale, backend=backend
        )


class VectorMatMulOp(ops.VectorMatMulOp):
    """The output projection without bias: a partial sum where weight holds one rank's rows."""

    def __init__(self, config: Any) -> None:
        self.settings = read(config)

    def __call__(  # type: ignore[override]
        self,
        input: Tensor,
        weight: Tensor,
        async_op: bool = False,
        *,
        bias: Tensor | None = None,
        weight_scale: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """input [..., in] -> [..., out]. bias: [out], where it is to be added here."""
        if async_op:
            raise ValueError("async_op=True is not supported; the product is on the current stream")
        weight, transposed, scale = weight_of(weight, self.settings, weight_scale)
        return functional.linear(input, weight, bias, transposed=transposed, weight_scale=scale, backend=backend)


class SoftmaxContextOp(ops.SoftmaxContextOp):
    """Attention, with RoPE and the keys and values so far of each layer_id.

    plan, rank: whose heads these are, where a layer is cut over ranks; None for all of them.
    """

    def __init__(self, config: Any, plan: ShardPlan | None = None, rank: int = 0) -> None:
        self.settings = read(config)
        plan = plan or ShardPlan.for_layer(self.settings.attention, 1)
        self.heads, self.span = plan.heads, plan.q_heads(rank)
        self.local_heads, self.local_kv_heads = plan.local_heads(rank), plan.local_kv_heads(rank)
        self.groups = {
            "q_start": self.span[0],
            "group_size": plan.group_size,
            "kv_start": plan.kv_head_range(rank)[0],
        }
        rope = self.settings.attention.rope
        self.rotary = None if rope is None else RotaryEmbedding(rope, self.settings.attention.head_dim)
        self.keys = OwnKeys(self.settings)

    def __call__(  # type: ignore[override]
        self,
        query_key_value: Tensor,
        attn_mask: Tensor | bool | None,
        heads: int | None = None,
        num_kv: int | None = None,
        norm_factor: float | None = None,
        no_masking: bool = False,
        layer_id: int = 0,
        num_layers: int | None = None,
        alibi: Tensor | None = None,
        is_prompt: bool | None = None,
        token_idx: Tensor | int | None = None,
        position_ids: Tensor | None = None,
        *,
        layer_past: Past | None = None,
        memory: Tensor | None = None,
        rotated: bool = False,
        alibi_slopes: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        path: str = "flash",
    ) -> tuple[Tensor, ...]:
        """qkv [B, T, columns] -> context [B, T, heads·D], key and value [B, kv heads, S, D], probabilities if wanted.

        heads, num_kv: this rank's, None (or num_kv < 1: as many as heads) for the config's. norm_factor: its square
        multiplies scores, None for the config's. attn_mask: integers keep, floats are added. alibi: [B·heads, 1, S].
        layer_past: keys and values before these; None for those this op has of layer_id, none where is_prompt (None:
        T > 1, and always where the layer is not causal, which keeps none). token_idx: tokens with this call's, where
        some of a prompt are padding, or a token is to be replaced. position_ids: [B or 1, T] for RoPE. memory: keys and
        values [B, S, 2·kv heads·D] to attend to instead, all of them. rotated: RoPE is done.
        head_mask: broadcast to [B, heads, T, S], multiplies probabilities. path: one of PATHS.
        """
        settings, attention = self.settings, self.settings.attention
        local = self.local_heads if heads is None else heads
        local_kv = self.local_kv_heads if heads is None and num_kv is None else num_kv
        local_kv = local if local_kv is None or local_kv < 1 else local_kv
        ours = (local, local_kv) == (self.local_heads, self.local_kv_heads)  # else some that the caller knows of
        _one_of("path", path, PATHS)
        mask = None if no_masking else attention_mask(attn_mask, settings.keep)
        causal = attention.causal and memory is None
        window = None if memory is not None else attention.window
        if memory is not None:
            q = query_key_value.unflatten(2, (-1, attention.head_dim))
            k, v = memory.unflatten(2, (2, local_kv, attention.head_dim)).unbind(2)
        else:
            q, k, v = split_qkv(query_key_value, local, local_kv, attention.head_dim, settings.per_head_qkv)
            start = self.keys.begin(layer_id, q.shape[1], layer_past, is_prompt, token_idx)
            if self.rotary is not None and not rotated:
                cos, sin = angles(self.rotary, start, q.shape[1], position_ids, q.device)
                q, k = (apply_rope(x, cos, sin, _interleaved(settings)) for x in (q, k))
            k, v, kept = self.keys.join(layer_id, start, k, v, layer_past, token_idx)
        mask = with_bias(mask, alibi, q.shape[0], *((self.heads, self.span) if ours else (local, (0, local))))
        features: dict[str, Any] = {
            "scale": settings.scale(layer_id) if norm_factor is None else norm_factor**2,
            "causal": causal,
            "window": window,
            "mask": mask,
            "softcap": attention.softcap,
            "alibi_slopes": alibi_slopes,
            **(self.groups if ours else {}),
        }
        context, *probabilities = attend(q, k, v, path, head_mask, output_attentions, **features)
        if memory is None:
            self.keys.keep(layer_id, kept)  # only now: a call that fails leaves what there was
        return (context.flatten(2), k.transpose(1, 2), v.transpose(1, 2), *probabilities)


def angles(
    rotary: RotaryEmbedding, start: int, tokens: int, position_ids: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, T, n] of the tokens from `start` on, or at position_ids [B or 1, T] or [T]."""
    if position_ids is None:
        position_ids = torch.arange(start, start + tokens, device=device)
    if position_ids.dim() not in (1, 2) or position_ids.shape[-1] != tokens:
        raise ValueError(f"position_ids {list(position_ids.shape)} do not fit {tokens} tokens; expected [B or 1, T]")
    return rotary(position_ids if position_ids.dim() == 2 else position_ids[None])


def attend(
    q: Tensor, k: Tensor, v: Tensor, path: str, head_mask: Tensor | None, probabilities: bool, **features: Any
) -> tuple[Tensor, ...]:
    """Attention on one of three paths: context [B, T, heads, D], and the probabilities [B, heads, T, S] if wanted."""
    backend = "torch" if path == "torch" else "auto"
    if path != "softmax_context" and head_mask is None and not probabilities:
        return (functional.attention(q, k, v, backend=backend, **features),)
    context, weights = functional.softmax_context(q, k, v, backend=backend, **features)
    if head_mask is not None:
        mask = local_heads("head_mask", head_mask, q.shape[2], (0, q.shape[2]))
        weights = (weights * (mask[:, None, None] if mask.dim() == 1 else mask)).to(q.dtype)
        groups = {name: features[name] for name in ("q_start", "group_size", "kv_start") if name in features}
        context = functional.context_4d_matmul(weights, v, backend=backend, **groups)
    return (context, weights) if probabilities else (context,)


def score_4d_matmul(qkv: Tensor, head_size: int, triangular: bool = False, scale: float = -1.0) -> Tensor:
    """Scores [B, heads, T, T] in fp32 of a packed qkv [B, T, 3·heads·D]; triangular: −inf for later keys.

    scale: as DeepSpeed's, where it is not positive scores are not scaled.
    """
    if not isinstance(triangular, bool):
        raise ValueError(f"triangular is a {type(triangular).__name__}; pass a bool, and a mask to softmax")
    q, k, _ = packed_qkv(qkv, head_size)
    return functional.score_4d_matmul(q, k, scale=scale if scale > 0 else 1.0, causal=triangular)


def softmax(input: Tensor, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Softmax over the last dimension of scores [B, heads, T, S], in their dtype. mask: integers keep, floats add."""
    if dim not in (-1, input.dim() - 1):
        raise ValueError(f"dim={dim} is not supported; softmax is over the last dimension, the keys")
    return functional.softmax(input, mask=attention_mask(mask))


def context_4d_matmul(prob: Tensor, qkv: Tensor, head_size: int) -> Tensor:
    """prob [B, heads, T, T] @ values of a packed qkv [B, T, 3·heads·D] -> [B, T, heads·D]."""
    return functional.context_4d_matmul(prob, packed_qkv(qkv, head_size)[2]).flatten(2)


def packed_qkv(qkv: Tensor, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, heads, D] of a packed qkv [B, T, 3·heads·D]."""
    if head_size < 1 or qkv.dim() != 3 or qkv.shape[2] % (3 * head_size):
        raise ValueError(f"qkv {list(qkv.shape)} does not hold q, k and v of whole heads of {head_size}")
    heads = qkv.shape[2] // (3 * head_size)
    return split_qkv(qkv, heads, heads, head_size)


def weight_of(
    weight: Tensor, settings: Settings, weight_scale: Tensor | None = None
) -> tuple[Tensor, bool, Tensor | None]:
    """The weight as functional.linear takes it: itself, whether it is [in, out], and its scales if it is int8."""
    if weight.dtype != torch.int8:
        return weight, not settings.transposed, None
    scale = getattr(weight, "scale", None) if weight_scale is None else weight_scale
    if scale is None or scale.dim() != 2 or (weight_scale is None and scale.shape[1] == 3):
        found = "none" if scale is None else f"a scale {list(scale.shape)}"
        raise ValueError(
            f"an int8 weight needs an attribute `scale`, fp32 [out, in / group], and has {found}; of DeepSpeed's, "
            "[out, 3] is not read, and q_scales by TritonSelfAttention; [out, 3] of ours is weight_scale, or a layer's "
            "attn_qkvw_scale or attn_ow_scale"
        )
    return weight if settings.transposed else weight.T, False, scale


def _interleaved(settings: Settings) -> bool:
    rope = settings.attention.rope
    return rope is not None and rope.interleaved


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; use one of {', '.join(known)}")
