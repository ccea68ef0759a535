"""TritonSelfAttention: the attention layer of DeepSpeed's inference, at any mp_size.

DeepSpeed's constructor, weights, forward and results, on this package's kernels; its own class asserts mp_size == 1 and
fp16, ignores layer_past and has no causal mask without flash. README.md lists all differences. Inference only; the
norm's weights are the block's and come with each call.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from tp_attention import functional
from tp_attention.autotune import autotune
from tp_attention.comm import TPGroup, all_reduce, as_group
from tp_attention.config import AttentionConfig
from tp_attention.deepspeed_cache import Past
from tp_attention.deepspeed_config import Settings, read
from tp_attention.deepspeed_masks import attention_mask, local_heads, with_bias
from tp_attention.deepspeed_ops import (
    LinearOp,
    QKVGemmOp,
    SoftmaxContextOp,
    VectorMatMulOp,
    angles,
    attend,
    context_4d_matmul,
    packed_qkv,
    score_4d_matmul,
    softmax,
    weight_of,
)
from tp_attention.deepspeed_weights import AttentionWeights
from tp_attention.masks import alibi_slopes
from tp_attention.sharding import ShardPlan

__all__ = ["TritonSelfAttention", "context_4d_matmul", "score_4d_matmul", "softmax"]


class TritonSelfAttention(AttentionWeights):
    """One rank's share of an attention layer; heads are cut over mp_group, also where they do not divide.

    config: DeepSpeed's DeepSpeedInferenceConfig, an object with its attributes, or an AttentionConfig; never modified.
    mp_group: a process group (torch's, deepspeed.comm's), a TPGroup, an MPIGroup, or None for one rank alone.
    q_scales, q_groups, merge_count: of int8 weights in DeepSpeed's form, [2 or 4, scales] with the rows of qkv and of
    the output projection first; merge_count checkpoints were merged into this rank (a power of two, kept as its log2).
    qkv_merging: attn_qw, attn_kw, attn_vw [out, in] and their biases become attn_qkvw and attn_qkvb when they are
    loaded, or at the first forward, and are freed; without it they stay and are joined for every call.

    attn_qkvw [E, (local heads + 2·local kv heads)·D], attn_qkvb, attn_ow [local heads·D, E]; transposed_mode has them
    [out, in]. attn_ob [E] is whole on every rank. Raises ValueError on a config or a combination that does not work.
    """

    alibi_slopes: Tensor | None
    num_layers = 0  # made so far in this process
    _latest: tuple[Any, int] = (None, 0)  # which model the last layer was of, and how many of its layers there are

    def __init__(
        self,
        config: Any,
        mp_group: Any = None,
        q_scales: Tensor | None = None,
        q_groups: int = 1,
        merge_count: int = 1,
        qkv_merging: bool = False,
    ) -> None:
        settings = read(config)
        group: TPGroup = as_group(mp_group, _device())
        if settings.mp_size not in (None, group.size):
            raise ValueError(f"config.mp_size={settings.mp_size} but mp_group has {group.size} ranks; make them equal")
        plan, rank = ShardPlan.for_layer(settings.attention, group.size), group.rank
        super().__init__(settings, plan, rank, group.device, q_scales, q_groups, merge_count, qkv_merging)
        self.mp_group, self.group = mp_group, group

        self.layer_id = TritonSelfAttention._number(settings)
        self.config = config
        if not isinstance(config, AttentionConfig):
            self.config = copy.copy(config)
            with suppress(AttributeError):  # a frozen one keeps what it has
                self.config.layer_id = self.layer_id
        self.hidden_size, self.head_size = settings.attention.hidden_size, settings.attention.head_dim
        self.hidden_size_per_attention_head = self.head_size
        self.num_attention_heads_per_partition = plan.local_heads(rank)
        self.num_kv_partition = plan.local_kv_heads(rank)
        self.hidden_size_per_partition = plan.local_heads(rank) * self.head_size
        self.norm_factor, self.scale = settings.norm_factor(self.layer_id), settings.scale(self.layer_id)
        self.triangular_masking = settings.attention.causal
        self.use_flash = True

        slopes = alibi_slopes(plan.heads, group.device)[slice(*plan.q_heads(rank))]
        self.register_buffer("alibi_slopes", slopes if settings.attention.alibi else None, persistent=False)

        self.qkv_func, self.linear_func = QKVGemmOp(settings), LinearOp(settings)
        self.score_context_func = SoftmaxContextOp(settings, plan, rank)
        self.vector_matmul_func = VectorMatMulOp(settings)
        if settings.autotune and self.layer_id == 0:
            self.tune(settings.max_out_tokens or 1024)

    @staticmethod
    def _number(settings: Settings) -> int:
        """A layer's number: the config's, else one more than the last; another model begins at 0 again."""
        TritonSelfAttention.num_layers += 1
        if settings.layer >= 0:
            return settings.layer
        attention = settings.attention
        model = attention.hidden_size, attention.heads, attention.kv_heads, settings.layers
        latest, count = TritonSelfAttention._latest
        number = 0 if model != latest or count == settings.layers else count
        TritonSelfAttention._latest = model, number + 1
        return number

    def tune(self, tokens: int) -> None:
        """_triton_autotune for this layer and prompts of up to so many tokens; every rank of its group must call it."""
        self._triton_autotune(
            2, tokens, self.head_size, self.hidden_size, self.triangular_masking, self.scale, self.data_type_fp,
            group=self.group, heads=self.num_attention_heads_per_partition, kv_heads=self.num_kv_partition,
            transposed=not self.transposed_mode and not self.settings.int8, use_flash=self.use_flash,
        )  # fmt: skip

    @staticmethod
    def _triton_autotune(
        min_seqlen: int,
        max_seqlen: int,
        head_size: int,
        hidden_size: int,
        triangular_masking: bool,
        scale: float,
        dtype: torch.dtype = torch.float16,
        *,
        group: TPGroup | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        transposed: bool = True,
        use_flash: bool = True,
    ) -> None:
        """Find the fastest kernel configurations for such a layer and use them in this process, on all ranks alike.

        group: rank 0 tunes, or reads what it found before, and the others get it; None is one rank. heads, kv_heads:
        this rank's, None for hidden_size / head_size. transposed: weights are [in, out]. autotune/ has the rest.
        """
        heads = hidden_size // head_size if heads is None else heads
        kv_heads = heads if kv_heads is None else kv_heads
        autotune(
            min_seqlen, max_seqlen, head_size=head_size, hidden_size=hidden_size, heads=heads, kv_heads=kv_heads,
            qkv_rows=(heads + 2 * kv_heads) * head_size, causal=triangular_masking, scale=scale, dtype=dtype,
            group=group or TPGroup.alone(_device()), transposed=transposed, use_flash=use_flash,
        )  # fmt: skip

    def forward(
        self,
        input: Tensor,
        input_mask: Tensor | bool | None = None,
        head_mask: Tensor | None = None,
        layer_past: Past | None = None,
        get_present: bool = False,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | bool | None = None,
        output_attentions: bool = False,
        norm_w: Tensor | None = None,
        norm_b: Tensor | None = None,
        alibi: Tensor | None = None,
        use_triton_attention: bool = True,
        *,
        first_token: bool | None = None,
        token_idx: Tensor | int | None = None,
        position_ids: Tensor | None = None,
        add_attn_ob: bool = False,
    ) -> tuple[Tensor, ...]:
        """input [B, T, E] -> (output, key, value, context, inp_norm), and the probabilities if output_attentions.

        output [B, T, E]: without attn_ob unless add_attn_ob; summed over the ranks, unless mlp_after_attn is False:
        then a partial sum, with attn_ob on rank 0. key, value [B, local kv heads, S, D]: all so far; no later call
        writes to them, and neither should the caller: the layer may remember the same memory. context [B, T, local
        heads·D]. inp_norm [B, T, E]: the normed input, or input where not pre_layer_norm. probabilities [B, local
        heads, T, S]. get_present changes nothing: key and value always come.

        input_mask: [B, S] or 4-D over [B, heads, T, S], S with the tokens so far; integers and bools keep (or mask,
        where invert_mask is False), floats are added. alibi: [B·heads, 1, S], added. head_mask: [heads], or 4-D,
        multiplies probabilities. All three have all heads on every rank.
        layer_past: key and value of the tokens before. None: those that the layer remembers, or none where first_token
        (None: T > 1). token_idx: how many tokens there are with these, where the end of a prompt is padding or a token
        is replaced. position_ids: [B or 1, T], for RoPE.
        encoder_hidden_states [B, S, E]: what keys and values are made of, all visible but for encoder_attention_mask;
        input_mask is not read then.
        norm_w, norm_b: [E]. use_triton_attention False: attention by torch; use_flash False: by the kernel that
        materialises the probabilities.

        Raises ValueError on what does not fit together.
        """
        settings = self.settings
        if input.dim() != 3 or input.shape[2] != self.hidden_size:
            raise ValueError(f"input has shape {list(input.shape)}; expected [B, T, {self.hidden_size}]")
        weight, bias = self.qkv()
        path = "torch" if not use_triton_attention else "flash" if self.use_flash else "softmax_context"
        heads, kv_heads = self.num_attention_heads_per_partition, self.num_kv_partition
        extra: dict[str, Any] = {"path": path, "output_attentions": output_attentions}
        if head_mask is not None:
            extra["head_mask"] = local_heads("head_mask", head_mask, self.plan.heads, self.plan.q_heads(self.rank))
        if encoder_hidden_states is None and encoder_attention_mask is not None:
            raise ValueError("encoder_attention_mask goes with encoder_hidden_states; pass both, or input_mask")
        if layer_past is not None and (token_idx is not None or first_token):
            raise ValueError("layer_past says how many tokens there are; leave token_idx and first_token out")
        normed, rope = input, None
        if encoder_hidden_states is not None:
            if layer_past is not None:
                raise ValueError(
                    "layer_past does not go with encoder_hidden_states, which all keys are made of; pass one"
                )
            if self.score_context_func.rotary is not None:
                raise ValueError(
                    "rotary_dim does not go with encoder_hidden_states, whose tokens have no positions here"
                )
            if settings.norm_first:
                normed = functional.norm(input, norm_w, norm_b, settings.norm, settings.attention.norm_eps)
            qkv, extra["memory"] = self._cross(normed, encoder_hidden_states, weight, bias)
            input_mask = encoder_attention_mask
        else:
            rotary = self.score_context_func.rotary
            if rotary is not None and not settings.per_head_qkv:
                start = self.score_context_func.keys.begin(
                    self.layer_id, input.shape[1], _checked(layer_past), first_token, token_idx
                )
                rope = angles(rotary, start, input.shape[1], position_ids, input.device)
                extra["rotated"] = True
            if settings.norm_first or rope is not None:
                qkv, normed = self.qkv_func(
                    input,
                    weight,
                    bias,
                    norm_w,
                    norm_b,
                    heads=heads,
                    kv_heads=kv_heads,
                    rope=rope,
                    normed=not settings.norm_first,
                    weight_scale=self.attn_qkvw_scale,
                )
            else:
                qkv = self.linear_func(
                    input=input, weight=weight, bias=bias, add_bias=bias is not None, do_flash_attn=False,
                    num_heads=heads, num_layers=TritonSelfAttention.num_layers, weight_scale=self.attn_qkvw_scale,
                )  # fmt: skip
        context, key, value, *probabilities = self.ds_compute_attention(
            qkv, input_mask, layer_past, alibi, first_token, token_idx, position_ids, **extra
        )
        bias = self.attn_ob if add_attn_ob else None
        one_sum = self.group.size == 1 or not settings.mlp_after_attn
        output = self.vector_matmul_func(
            input=context,
            weight=self.stored(self.attn_ow, "attn_ow"),
            bias=bias if one_sum and self.rank == 0 else None,
            weight_scale=self.attn_ow_scale,
        )
        if not one_sum:
            output = all_reduce(output, self.group, out=output)
            output = output if bias is None else output + bias
        return (output, key, value, context, normed, *probabilities)

    def ds_compute_attention(
        self,
        qkv_out: Tensor | tuple[Tensor, ...] | list[Tensor],
        input_mask: Tensor | bool | None,
        layer_past: Past | None,
        alibi: Tensor | None,
        is_prompt: bool | None = None,
        token_idx: Tensor | int | None = None,
        position_ids: Tensor | None = None,
        **extra: Any,
    ) -> tuple[Tensor, ...]:
        """qkv [B, T, columns], or a tuple that begins with it -> context, key, value as `forward` returns them.

        More keywords are those of SoftmaxContextOp. Neither projects nor reduces.
        """
        return self.score_context_func(
            query_key_value=qkv_out if isinstance(qkv_out, Tensor) else qkv_out[0],
            attn_mask=input_mask,
            heads=self.num_attention_heads_per_partition,
            num_kv=self.num_kv_partition,
            layer_id=self.layer_id,
            num_layers=TritonSelfAttention.num_layers,
            alibi=alibi,
            is_prompt=is_prompt,
            token_idx=token_idx,
            position_ids=position_ids,
            layer_past=_checked(layer_past),
            alibi_slopes=self.alibi_slopes,
            **extra,
        )

    def reset_cache(self) -> None:
        """Forget the keys and values of the tokens so far."""
        self.score_context_func.keys.reset()

    def _cross(self, x: Tensor, memory: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries of x, keys and values of memory."""
        if self.settings.per_head_qkv:
            raise ValueError(
                "encoder_hidden_states do not go with bigscience_bloom, whose q, k and v are in one another"
            )
        q = self.num_attention_heads_per_partition * self.head_size
        weight, transposed, scale = weight_of(weight, self.settings, self.attn_qkvw_scale)
        out_first = weight.T if transposed else weight

        def project(x: Tensor, rows: slice) -> Tensor:
            return functional.linear(
                x,
                out_first[rows],
                None if bias is None else bias[rows],
                weight_scale=None if scale is None else scale[rows],
            )

        return project(x, slice(0, q)), project(memory, slice(q, None))


def _triton_attention(
    qkv: Tensor | tuple[Tensor, ...] | list[Tensor],
    input_mask: Tensor | bool | None,
    layer_past: Past | None,
    alibi: Tensor | None,
    scale: float,
    head_size: int,
    triangular: bool = False,
    use_cuda_flash: bool = False,
    use_triton_flash: bool = False,
    use_ds_attention: bool = False,
) -> Tensor:
    """Attention of a packed qkv [B, T, 3·heads·D], or a tuple that begins with it -> [B, T, heads·D].

    input_mask, layer_past, alibi: as in TritonSelfAttention.forward, for these heads. Any of the three switches takes
    the flash kernel, none the one with materialised scores; the numbers are the same.
    """
    q, k, v = packed_qkv(qkv if isinstance(qkv, Tensor) else qkv[0], head_size)
    heads = q.shape[2]
    if (past := _checked(layer_past)) is not None:
        k, v = (torch.cat((before.transpose(1, 2), new), dim=1) for before, new in zip(past, (k, v), strict=True))
    mask = with_bias(attention_mask(input_mask), alibi, q.shape[0], heads, (0, heads))
    path = "flash" if use_cuda_flash or use_triton_flash or use_ds_attention else "softmax_context"
    return attend(q, k, v, path, None, False, scale=scale, causal=triangular, mask=mask)[0].flatten(2)


def _checked(past: Past | None) -> Past | None:
    if past is None:
        return None
    fits = len(past) == 2 and all(isinstance(x, Tensor) and x.dim() == 4 for x in past)
    if not fits or past[0].shape != past[1].shape or past[0].dtype != past[1].dtype:
        shapes = [(x.dtype, list(x.shape)) if isinstance(x, Tensor) else x for x in past]
        raise ValueError(f"layer_past has shapes {shapes}; expected key and value [B, local kv heads, S, D]")
    return past[0], past[1]


def _device() -> torch.device:
    """Where a layer without a group lives: this process's GPU, where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
