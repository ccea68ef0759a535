"""The weights of TritonSelfAttention on one rank: their shapes, how they are loaded, joined and, in int8, scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tp_attention.checkpoint.deepspeed_int8 import group_scales
from tp_attention.checkpoint.deepspeed_merge import merge_qkv
from tp_attention.deepspeed_config import Settings
from tp_attention.sharding import ShardPlan

WHOLE = ("attn_qkvw", "attn_qkvb", "attn_ow", "attn_ob")
PARTS = ("attn_qw", "attn_kw", "attn_vw", "attn_qb", "attn_kb", "attn_vb")
WEIGHTS = (*WHOLE, *PARTS)
SCALES = {"attn_qkvw": ("attn_qkvw_scale", "column"), "attn_ow": ("attn_ow_scale", "row")}  # of int8, and how it is cut

Self = TypeVar("Self", bound="AttentionWeights")


class AttentionWeights(nn.Module):
    """A module with the weights of `rank`'s share under `plan`, uninitialised, or None each if settings.empty.

    The other arguments are those of TritonSelfAttention. int8 weights have their scales, fp32 [out, in / group], in
    attn_qkvw_scale and attn_ow_scale.
    """

    attn_qkvw: nn.Parameter | None
    attn_qkvb: nn.Parameter | None
    attn_ow: nn.Parameter | None
    attn_ob: nn.Parameter | None
    attn_qkvw_scale: Tensor | None
    attn_ow_scale: Tensor | None

    def __init__(
        self,
        settings: Settings,
        plan: ShardPlan,
        rank: int,
        device: torch.device,
        q_scales: Tensor | None,
        q_groups: int,
        merge_count: int,
        qkv_merging: bool,
    ) -> None:
        super().__init__()
        if merge_count < 1 or merge_count & (merge_count - 1):
            raise ValueError(
                f"merge_count={merge_count} is no power of two, which DeepSpeed's form needs; "
                "checkpoint.merge_for_deepspeed gives scales of our own form for it"
            )
        if q_groups != 1 and q_scales is None:
            raise ValueError(f"q_groups={q_groups} says how q_scales are cut; pass q_scales too")
        if q_scales is not None and not settings.int8:
            raise ValueError(f"q_scales belong to dtype=torch.int8, the config has {settings.attention.dtype}")
        self.settings, self.plan, self.rank, self.device = settings, plan, rank, device
        self.q_scales, self.q_groups, self.merge_count = q_scales, q_groups, merge_count.bit_length() - 1
        self.qkv_merging, self.transposed_mode = qkv_merging, settings.transposed
        self.data_type_fp = settings.attention.dtype
        self.data_type = torch.int8 if settings.int8 else self.data_type_fp
        for name in WEIGHTS:
            self.register_parameter(name, None)
        for row, (name, (scale, parallel)) in enumerate(SCALES.items()):
            self.register_buffer(scale, None)
            if q_scales is not None:
                shape = self._shape(name, plan, rank)
                shape = shape if settings.transposed else shape[::-1]
                found = group_scales(q_scales[row].to(device), q_groups, merge_count, shape, parallel)
                setattr(self, scale, found)
        if not settings.empty:
            biases = {"attn_qkvb": settings.attention.qkv_bias, "attn_ob": settings.attention.out_bias}
            for name in WHOLE:
                if biases.get(name, True):
                    self._make(name)

    @torch.no_grad()
    def load_unsharded(self: Self, weights: Mapping[str, Tensor]) -> Self:
        """Copy this rank's heads from the whole layer's weights, named and laid out like this module's own.

        attn_qkvw [E, (heads + 2·kv_heads)·D] ([out, in] in transposed_mode), attn_qkvb, attn_ow [heads·D, E], attn_ob;
        or, for the first two, attn_qw [heads·D, E], attn_kw, attn_vw and their biases, which are merged.
        Raises ValueError on a missing, unknown or misshapen one, before anything is copied, and for int8.
        """
        if self.settings.int8:
            raise ValueError("int8 weights have no unsharded form here; reshard the checkpoint and load each rank's")
        weights = dict(weights)
        if "attn_qkvw" not in weights and (parts := {name: weights.pop(name) for name in PARTS if name in weights}):
            weights["attn_qkvw"], merged = merge_qkv(parts, self.transposed_mode)
            if merged is not None:
                weights["attn_qkvb"] = merged
        whole = ShardPlan.for_layer(self.settings.attention, 1)
        wanted = {name for name in WHOLE if self.settings.empty or getattr(self, name) is not None}
        missing = wanted - weights.keys() - ({"attn_qkvb", "attn_ob"} if self.settings.empty else set())
        if missing or weights.keys() - wanted:
            unknown = sorted(weights.keys() - wanted)
            raise ValueError(f"weights missing: {sorted(missing) or 'none'}; unknown: {unknown or 'none'}")
        for name, tensor in weights.items():
            if tuple(tensor.shape) != (expected := self._shape(name, whole, 0)):
                raise ValueError(f"{name} has shape {list(tensor.shape)}; expected the whole layer's {list(expected)}")
        for name, tensor in weights.items():
            parameter = getattr(self, name)
            (self._make(name) if parameter is None else parameter).copy_(self._share(name, tensor))
        return self

    def _share(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a whole weight."""
        if name == "attn_ob":
            return tensor
        plan, rank, (q, k_and_v) = self.plan, self.rank, (self.plan.q_rows, self.plan.kv_rows)
        out_first = tensor if tensor.dim() == 1 or self.transposed_mode else tensor.T
        start, stop = q(rank)
        if name == "attn_ow":
            out_first = out_first[:, start:stop]
        elif self.settings.per_head_qkv:
            out_first = out_first[3 * start : 3 * stop]
        else:
            rows = plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim, plan.kv_heads * plan.head_dim
            spans = q(rank), k_and_v(rank), k_and_v(rank)
            out_first = torch.cat([x[slice(*span)] for x, span in zip(out_first.split(rows), spans, strict=True)])
        return out_first if tensor.dim() == 1 or self.transposed_mode else out_first.T

    def _shape(self, name: str, plan: ShardPlan, rank: int) -> tuple[int, ...]:
        """Of a weight on `rank` of `plan`."""
        q, kv, hidden = (
            plan.local_heads(rank) * plan.head_dim,
            plan.local_kv_heads(rank) * plan.head_dim,
            self.plan.hidden_size,
        )
        out, columns = {
            "attn_qkvw": (q + 2 * kv, hidden),
            "attn_ow": (hidden, q),
            "attn_qw": (q, hidden),
            "attn_ob": (hidden, 0),
            "attn_qb": (q, 0),
            "attn_qkvb": (q + 2 * kv, 0),
        }.get(name, (kv, hidden if name.endswith("w") else 0))
        if not name.endswith("w"):
            return (out,)
        return (columns, out) if name in ("attn_qkvw", "attn_ow") and not self.transposed_mode else (out, columns)

    def _make(self, name: str) -> nn.Parameter:
        """Register an uninitialised weight or bias."""
        shape, int8 = self._shape(name, self.plan, self.rank), self.settings.int8 and name.endswith("w")
        swap = int8 and not self.transposed_mode  # int8 kernels read [out, in]
        dtype = torch.int8 if int8 else self.data_type_fp
        empty = torch.empty(shape[::-1] if swap else shape, dtype=dtype, device=self.device)
        self.register_parameter(name, nn.Parameter(empty.T if swap else empty, requires_grad=False))
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in WEIGHTS and isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            parameter = nn.Parameter(value, requires_grad=False)  # as DeepSpeed's class, take plain tensors too
            if hasattr(value, "scale"):
                parameter.scale = value.scale  # type: ignore[attr-defined]
            value = parameter
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.qkv_merging and all(prefix + name in state_dict for name in PARTS[:3]):
            state_dict = dict(state_dict)
            parts = {name: state_dict.pop(prefix + name) for name in PARTS if prefix + name in state_dict}
            weight, bias = merge_qkv(parts, self.transposed_mode)
            state_dict |= {prefix + "attn_qkvw": weight} | ({} if bias is None else {prefix + "attn_qkvb": bias})
        for name, (scale, _) in SCALES.items():
            loaded = state_dict.get(prefix + name)
            if loaded is not None and (loaded.dtype == torch.int8) != self.settings.int8:
                raise ValueError(
                    f"{prefix}{name} is {loaded.dtype}, the layer's weights are {self.data_type}; nothing is converted"
                )
            if prefix + scale in state_dict and getattr(self, scale) is None:
                setattr(self, scale, torch.empty_like(state_dict[prefix + scale], device=self.device))
        for name in WEIGHTS:
            if prefix + name in state_dict and getattr(self, name) is None:
                if not (self.settings.empty or (self.qkv_merging and name in PARTS)):
                    continue
                self._make(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def qkv(self) -> tuple[Tensor, Tensor | None]:
        """The packed projection and its bias, joined of its parts where those are what there is."""
        whole = self.attn_qkvw
        if whole is not None and not self.qkv_merging:  # mostly so, and looking for parts takes 10 µs
            return self.stored(whole, "attn_qkvw"), self.attn_qkvb
        parts = {name: part for name in PARTS if (part := getattr(self, name)) is not None}
        if whole is not None and not parts:
            return self.stored(whole, "attn_qkvw"), self.attn_qkvb
        if not parts:
            raise ValueError("the layer has no weights yet: set attn_qkvw, or attn_qw, attn_kw and attn_vw")
        with torch.inference_mode(False), torch.no_grad():  # a parameter outlives the inference_mode it is made in
            weight, bias = merge_qkv(parts, self.transposed_mode)
        scales = [getattr(parts[name], "scale", None) for name in PARTS[:3]]
        if weight.dtype == torch.int8 and all(scale is not None for scale in scales):
            self.attn_qkvw_scale = torch.cat(scales)  # type: ignore[arg-type]
        if self.qkv_merging:
            self.attn_qkvw, self.attn_qkvb = weight, bias  # type: ignore[assignment]  # see __setattr__
            for name in PARTS:
                setattr(self, name, None)
            return self.stored(self.attn_qkvw, "attn_qkvw"), self.attn_qkvb
        return self.stored(weight, "attn_qkvw"), bias

    def stored(self, weight: Tensor | None, name: str) -> Tensor:
        """The weight; one in int8 in the order of memory that kernels read."""
        if weight is None:
            raise ValueError(f"the layer has no {name} yet; load its weights first")
        if weight.dtype == torch.int8 and not self.transposed_mode and not weight.T.is_contiguous():
            weight.data = weight.data.T.contiguous().T
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Buffers (scales, slopes) keep their dtype: half() is for weights."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
