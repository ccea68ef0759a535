"""What DeepSpeed's attention layer means, unsharded and in fp64; and configs, weights and inputs to try it with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tp_attention import reference


def config(**fields: Any) -> SimpleNamespace:
    """A DeepSpeed config without DeepSpeed: what is not named has DeepSpeed's default."""
    return SimpleNamespace(**{"hidden_size": 40, "heads": 5, "dtype": torch.float32, "epsilon": 1e-5, **fields})


def kv_heads(cfg: Any) -> int:
    number = getattr(cfg, "num_kv", -1)
    return cfg.heads if number < 0 else number


def make_weights(cfg: Any, seed: int = 0) -> dict[str, Tensor]:
    """Whole weights by the module's names, in fp32; biases too."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head = cfg.hidden_size, cfg.hidden_size // cfg.heads
    rows = (cfg.heads + 2 * kv_heads(cfg)) * head
    shapes = {"attn_qkvw": (hidden, rows), "attn_qkvb": (rows,), "attn_ow": (hidden, hidden), "attn_ob": (hidden,)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("attn_qkvw", "attn_ow"):
        found[name] = found[name] / hidden**0.5  # activations of size 1: scores that half precision can tell apart
        if getattr(cfg, "transposed_mode", False):
            found[name] = found[name].T.contiguous()
    return found


def make_norm(cfg: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    found = {"norm_w": 1 + 0.3 * torch.randn(cfg.hidden_size, generator=generator)}
    if "RMS" not in str(getattr(cfg, "norm_type", "LayerNorm")):
        found["norm_b"] = 0.3 * torch.randn(cfg.hidden_size, generator=generator)
    return found


def make_input(cfg: Any, batch: int = 2, tokens: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, cfg.hidden_size, generator=torch.Generator().manual_seed(seed))


def expected(
    cfg: Any,
    weights: dict[str, Tensor],
    x: Tensor,
    mask: Tensor | None = None,
    *,
    alibi: Tensor | None = None,
    norm_w: Tensor | None = None,
    norm_b: Tensor | None = None,
    memory: Tensor | None = None,
    head_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    layer: int = 0,
) -> dict[str, Tensor]:
    """All six results for all heads, fp64; output with no attn_ob."""
    field = lambda name, default: getattr(cfg, name, default)  # noqa: E731
    transposed, heads, kv = field("transposed_mode", False), cfg.heads, kv_heads(cfg)
    head = cfg.hidden_size // heads
    weights = {name: w.double() for name, w in weights.items()}
    packed = weights["attn_qkvw"] if transposed else weights["attn_qkvw"].T
    rows = [heads * head, kv * head, kv * head]
    if field("bigscience_bloom", False):
        order = torch.arange(3 * heads * head).view(heads, 3, head).transpose(0, 1).flatten()
        packed, bias = packed[order], weights["attn_qkvb"][order]
    else:
        bias = weights["attn_qkvb"]
    normed = x.double()
    if field("pre_layer_norm", True):
        kind = "rmsnorm" if "RMS" in str(field("norm_type", "LayerNorm")) else "layernorm"
        normed = reference.norm(x, norm_w, norm_b, kind, cfg.epsilon)
    q, k, v = (
        reference.linear(normed if i == 0 or memory is None else memory, w, b).unflatten(-1, (-1, head))
        for i, (w, b) in enumerate(zip(packed.split(rows), bias.split(rows), strict=True))
    )
    if field("rotary_dim", -1) > 0 and memory is None:
        at = torch.arange(x.shape[1])[None] if position_ids is None else position_ids
        angles = reference.rope_angles(at, cfg.rotary_dim, field("rope_theta", 10000))
        q, k = (reference.rope(each, *angles, not field("rotate_half", False)) for each in (q, k))
    scale = 1.0
    if field("scale_attention", True):
        scale = 1 / head if field("use_mup", False) else head**-0.5
        scale /= layer + 1 if field("scale_attn_by_inverse_layer_idx", False) else 1
    causal = field("triangular_masking", True) and memory is None
    total = torch.zeros(1, 1, 1, k.shape[1], dtype=torch.float64)
    if mask is not None:
        whole = mask[:, None, None] if mask.dim() == 2 else mask
        if whole.is_floating_point():
            total = total + whole
        else:
            total = total.masked_fill((whole != 0) != field("invert_mask", True), -torch.inf)
    if alibi is not None:
        total = total + alibi.double().unflatten(0, (-1, heads))
    window = (cfg.window_size - 1, 0) if field("local_attention", False) and memory is None else None
    asked = {"scale": scale, "causal": causal, "mask": total, "window": window}
    # masks are read as fp32, which these values are exactly
    probabilities = reference.probabilities(q, k, **asked)
    if head_mask is not None:
        probabilities = probabilities * (head_mask[None, :, None, None] if head_mask.dim() == 1 else head_mask)
    per_key = v.repeat_interleave(heads // kv, dim=2)
    context = torch.einsum("bhts,bshd->bthd", probabilities, per_key).flatten(2)
    out = weights["attn_ow"] if transposed else weights["attn_ow"].T
    return {
        "output": reference.linear(context, out),
        "key": k.transpose(1, 2),
        "value": v.transpose(1, 2),
        "context": context,
        "inp_norm": normed,
        "probabilities": probabilities,
    }
