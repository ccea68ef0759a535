"""TritonSelfAttention behind the forward of a Hugging Face attention class, and what a family has to say for it.

The norm, the residual (but BLOOM's, which its attention adds) and everything outside attention stay Hugging Face's. An
adapter is a subclass of the class it stands in for, by which transformers finds the attentions that it records. Limit:
inference, without dropout and cross-attention; of transformers' caches only the dynamic one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import _active_collector

from tp_attention.comm import TPGroup, all_gather
from tp_attention.config import AttentionConfig
from tp_attention.triton_self_attention import TritonSelfAttention


class Adapter(nn.Module):
    """Stands in for one attention module, with this rank's heads of its weights. A subclass is a family.

    source: the module, whole on every rank; it is left as it is. config: its model's. group: the ranks to cut it over.
    Raises ValueError for what the family allows and we do not, and where the group has more ranks than there are heads.
    """

    replaces: ClassVar[type[nn.Module]]
    projections: ClassVar[dict[str, str]]  # our name without its last letter, w or b -> the Linear in `replaces`
    per_head: ClassVar[bool] = False  # the rows of attn_qkv are [heads, 3, D], not [3, heads, D]
    mlp: ClassVar[type[nn.Module]]  # DeepSpeed cuts the Linears in modules of this class: by columns,
    mlp_out: ClassVar[str]  # and this one by rows, with a sum over the ranks behind it

    def __init__(self, source: nn.Module, config: PreTrainedConfig, group: TPGroup) -> None:
        nn.Module.__init__(self)  # not the Hugging Face class's, which would make whole weights
        self.check(config)
        weights = self.weights(source, config.num_attention_heads)
        fields: dict[str, Any] = {
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "qkv_bias": not weights.keys().isdisjoint(("attn_qkvb", "attn_qb")),
            "out_bias": "attn_ob" in weights,
            "dtype": weights["attn_ow"].dtype,
        }
        self.description = AttentionConfig(**fields | self.special(source, config))
        recorded = self.recorded(source)
        self.layer_idx = recorded.layer_idx
        for hook in recorded._forward_hooks.values():  # transformers' recorders are such
            self.register_forward_hook(hook)
        self.attention = TritonSelfAttention(self.description, group).load_unsharded(weights)
        self.train(source.training)

    def check(self, config: PreTrainedConfig) -> None:
        if getattr(config, "add_cross_attention", False):
            raise ValueError("add_cross_attention=True is not supported; models without cross-attention are")

    def special(self, source: Any, config: PreTrainedConfig) -> dict[str, Any]:
        """Fields of AttentionConfig in which the families differ."""
        return {}

    def weights(self, source: nn.Module, heads: int) -> dict[str, Tensor]:
        """The whole layer's, [out, in], under the names of load_unsharded."""
        weights: dict[str, Tensor] = {}
        for name, path in self.projections.items():
            linear: Any = source.get_submodule(path)
            place = f"{type(source).__name__}.{path}"
            if type(linear) not in (nn.Linear, Conv1D):
                raise ValueError(
                    f"{place} is a {type(linear).__name__}, not a plain Linear; merge or dequantise what was added to "
                    "it, and let nothing else cut the model before"
                )
            if linear.weight.is_meta:
                raise ValueError(f"{place} is on the meta device; load the weights first")
            weights[f"{name}w"] = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
            if linear.bias is not None:
                weights[f"{name}b"] = linear.bias
        for name in ("attn_qkvw", "attn_qkvb"):
            if self.per_head and name in weights:
                weights[name] = weights[name].unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return weights

    @staticmethod
    def recorded(source: nn.Module) -> Any:
        """Of `source`, the module that has the layer's number and whose outputs transformers records."""
        return source

    def install(self, parent: nn.Module, name: str) -> None:
        """Take the place of parent.name."""
        setattr(parent, name, self)

    @staticmethod
    def prepare_mlp(mlp: Any) -> None:
        """Give an MLP the form that DeepSpeed can cut."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        *,
        layer_past: DynamicCache | None = None,
        position_ids: Tensor | None = None,
        alibi: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, E] -> the same shape, and if wanted the probabilities [B, heads, T, S] of all heads.

        attention_mask: [B, S], which the hook of tp_attention.models hands over, or 4-D. past_key_values: what some
        families call layer_past; it holds this rank's heads, and those of hidden_states are appended.
        """
        cache = past_key_values if layer_past is None else layer_past
        if output_attentions is None:  # GPT-2 does not hand it on, and no family hands on its config's
            output_attentions = "attentions" in (_active_collector.get() or ())
        output, key, value, _, _, *probabilities = self.attention(
            hidden_states,
            self._causal_at_most(attention_mask, hidden_states.shape[1]),
            head_mask,
            self._past(hidden_states, cache),
            output_attentions=output_attentions,
            alibi=alibi,
            position_ids=None if self.description.rope is None else position_ids,
            add_attn_ob=True,
        )
        if cache is not None:
            self._keep(key, value, cache)
        return output, self._all_heads(probabilities[0]) if probabilities else None

    def _past(self, x: Tensor, cache: DynamicCache | None) -> tuple[Tensor, Tensor] | None:
        """Keys and values so far [B, local kv heads, S, D]: none without a cache, as the layer keeps none here."""
        if not self.description.causal:
            return None
        if cache is not None:
            layers = getattr(cache, "layers", [])[self.layer_idx : self.layer_idx + 1]  # none before its first tokens
            plain = isinstance(cache, DynamicCache) and not cache.offloading
            if not plain or any(type(layer) is not DynamicLayer for layer in layers):
                raise ValueError(
                    f"past_key_values is a {type(cache).__name__} that is static, slides, quantises or offloads; pass "
                    "a plain DynamicCache, or leave it out"
                )
            if cache.get_seq_length(self.layer_idx):
                return layers[0].keys, layers[0].values
        empty = x.new_empty(x.shape[0], self.attention.num_kv_partition, 0, self.description.head_dim)
        return empty, empty

    def _keep(self, key: Tensor, value: Tensor, cache: DynamicCache) -> None:
        if cache.get_seq_length(self.layer_idx):  # they are behind the cache's already: once more would copy them all
            cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values = key, value
        else:
            cache.update(key, value, self.layer_idx)

    def _causal_at_most(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        """The mask, unless it is a caller's own that shows later keys, which the layer's causality would hide again."""
        if mask is None or not self.description.causal or mask.dim() != 4 or tokens == 1:
            return mask
        kept = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if kept.triu(mask.shape[-1] - tokens + 1).any():
            raise ValueError("the 4-D attention mask lets queries see later keys; a causal model's may only take away")
        return mask

    def _all_heads(self, probabilities: Tensor) -> Tensor:
        group, plan = self.attention.group, self.attention.plan
        if group.size == 1:
            return probabilities
        return all_gather(probabilities, group, dim=1, sizes=[plan.local_heads(rank) for rank in range(plan.tp)])
