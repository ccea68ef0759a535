"""What a DeepSpeedInferenceConfig, or an AttentionConfig, says of one attention layer: read once, checked, not written.

DeepSpeed need not be installed: any object with its attributes will do, and one that is missing has DeepSpeed's
default. Fields of the block around attention say nothing here: intermediate_size, mlp_act_func_type, return_tuple,
return_single_tuple, training_mp_size. Nor do stochastic_mode (allows results to vary; ours never do), use_triton (who
makes the class has decided) and local_rank (a layer lives where its group does).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tp_attention.config import AttentionConfig, RopeConfig

# DeepSpeed's defaults of the fields that are read.
DEFAULTS = {
    "hidden_size": -1, "heads": -1, "num_hidden_layers": -1, "layer_id": -1, "mp_size": 1, "dtype": torch.float16,
    "pre_layer_norm": True, "norm_type": "LayerNorm", "epsilon": 1e-12, "scale_attention": True, "use_mup": False,
    "scale_attn_by_inverse_layer_idx": False, "triangular_masking": True, "local_attention": False, "window_size": 256,
    "rotary_dim": -1, "rotate_half": False, "rotate_every_two": True, "rope_theta": 10000, "num_kv": -1,
    "mlp_after_attn": True, "bigscience_bloom": False, "max_out_tokens": 1024, "min_out_tokens": 1,
    "enable_qkv_quantization": False, "set_empty_params": False, "transposed_mode": False, "triton_autotune": False,
    "invert_mask": True,
}  # fmt: skip
NORM_TYPES = {1: "layernorm", 3: "rmsnorm", "LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}  # of deepspeed's NormType


@dataclass(frozen=True)
class Settings:
    """attention: the whole layer, its dtype that of activations; norm is None where x arrives normed (not
    pre_layer_norm). norm: the kind that QKVGemmOp applies all the same. mp_size: None for as many as the group has.

    per_head_qkv: columns of q, k, v alternate head by head (BLOOM). keep: what an integer mask says of keys to keep.
    max_out_tokens: of the layer's own cache, None for any number. layer: its number, -1 if not given. layers: how many
    the model has, if known.
    """

    attention: AttentionConfig
    norm: str = "layernorm"
    mp_size: int | None = None
    int8: bool = False
    mlp_after_attn: bool = True
    transposed: bool = True
    per_head_qkv: bool = False
    empty: bool = False
    keep: bool = True
    max_out_tokens: int | None = None
    autotune: bool = False
    layer: int = -1
    layers: int = -1
    norm_root: float = 0.0  # the square root of what scores are divided by, before the layer's number
    by_layer: bool = False

    @property
    def norm_first(self) -> bool:
        """pre_layer_norm: the layer norms its input."""
        return self.attention.norm is not None

    def norm_factor(self, layer: int) -> float:
        """DeepSpeed's: both q and k are divided by it."""
        return self.norm_root * (math.sqrt(layer + 1) if self.by_layer else 1.0)

    def scale(self, layer: int) -> float:
        """What scores are multiplied by: 1 unless scale_attention."""
        if self.attention.scale is not None:
            return self.attention.scale
        return self.norm_factor(layer) ** -2


def read(config: Any) -> Settings:
    """Settings of a config. Raises ValueError on what is out of range, contradicts itself or is not supported."""
    if isinstance(config, Settings):
        return config
    if isinstance(config, AttentionConfig):
        return _ours(config)
    fields: dict[str, Any] = {name: getattr(config, name, default) for name, default in DEFAULTS.items()}
    if fields["enable_qkv_quantization"]:
        raise ValueError("enable_qkv_quantization=True is not supported; quantise the checkpoint: dtype=torch.int8")
    norm = NORM_TYPES.get(getattr(fields["norm_type"], "value", fields["norm_type"]))
    if norm is None:
        raise ValueError(f"norm_type={fields['norm_type']} is not supported; use LayerNorm or RMSNorm")
    if not 1 <= fields["min_out_tokens"] <= fields["max_out_tokens"]:
        raise ValueError(
            f"min_out_tokens={fields['min_out_tokens']} and max_out_tokens={fields['max_out_tokens']} leave no room "
            "for keys; use 1 <= min_out_tokens <= max_out_tokens"
        )
    if fields["local_attention"] and fields["window_size"] < 1:
        raise ValueError(f"window_size={fields['window_size']} must be at least 1, the token itself")
    if fields["bigscience_bloom"] and fields["num_kv"] > 0:
        raise ValueError(f"bigscience_bloom packs q, k and v of each head; num_kv={fields['num_kv']} does not fit")
    int8 = fields["dtype"] == torch.int8
    attention = AttentionConfig(
        hidden_size=fields["hidden_size"],
        heads=fields["heads"],
        kv_heads=fields["heads"] if fields["num_kv"] == -1 else fields["num_kv"],
        causal=bool(fields["triangular_masking"]),
        norm=norm if fields["pre_layer_norm"] else None,
        norm_eps=fields["epsilon"],
        qkv_bias=True,
        out_bias=True,
        rope=_rope(fields),
        window=(fields["window_size"] - 1, 0) if fields["local_attention"] else None,
        scale=None if fields["scale_attention"] else 1.0,
        dtype=torch.float16 if int8 else fields["dtype"],
    )
    return Settings(
        attention=attention,
        norm=norm,
        mp_size=fields["mp_size"],
        int8=int8,
        mlp_after_attn=bool(fields["mlp_after_attn"]),
        transposed=bool(fields["transposed_mode"]),
        per_head_qkv=bool(fields["bigscience_bloom"]),
        empty=bool(fields["set_empty_params"]),
        keep=bool(fields["invert_mask"]),
        max_out_tokens=fields["max_out_tokens"],
        autotune=bool(fields["triton_autotune"]),
        layer=fields["layer_id"],
        layers=fields["num_hidden_layers"],
        norm_root=math.sqrt(attention.head_dim) if fields["use_mup"] else attention.head_dim**0.25,
        by_layer=bool(fields["scale_attn_by_inverse_layer_idx"]),
    )


def _ours(config: AttentionConfig) -> Settings:
    if config.qk_norm is not None or config.sinks:
        what = "sinks" if config.qk_norm is None else f"qk_norm={config.qk_norm!r}"
        raise ValueError(f"TritonSelfAttention has no weights for {what}; use TPSelfAttention")
    return Settings(attention=config, norm=config.norm or "layernorm", norm_root=config.head_dim**0.25)


def _rope(fields: dict[str, Any]) -> RopeConfig | None:
    if (fields["rotary_dim"] or -1) <= 0:  # None: what some models' configs have
        return None
    if not (fields["rotate_half"] or fields["rotate_every_two"]):
        raise ValueError(
            f"rotary_dim={fields['rotary_dim']} with neither rotate_half nor rotate_every_two; set the one that the "
            "model was trained with"
        )
    # as DeepSpeed's kernel: rotate_half wins, and rotate_every_two is what its config has by default
    return RopeConfig(fields["rope_theta"], fields["rotary_dim"], interleaved=not fields["rotate_half"])
