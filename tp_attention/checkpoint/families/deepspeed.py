"""DeepSpeed's inference layers, as `save_mp_checkpoint_path` writes them: its own names inside the model's.

A layer lies wherever the model had it, so these layouts know where the models that DeepSpeed injects into have theirs,
and what these have around them.
"""

from __future__ import annotations

from tp_attention.checkpoint.families.bert import BERT
from tp_attention.checkpoint.families.build import Rules, per_layer
from tp_attention.checkpoint.families.gpt import BLOOM, GPT2, GPT_NEOX
from tp_attention.checkpoint.families.llama import LLAMA
from tp_attention.checkpoint.layouts import Layout, Rule
from tp_attention.checkpoint.packing import Packing

_MODELS = (GPT2, BLOOM, GPT_NEOX, LLAMA, BERT)
_ROOTS = ("[transformer.]h.", "[gpt_neox.]layers.", "[model.]layers.", "[bert.]encoder.layer.", "[transformer.]layers.")


def _around() -> Rules:
    """What the models have outside their layers."""
    return tuple(dict.fromkeys(rule for model in _MODELS for rule in model.rules if "{layer}" not in rule.name))


def _column(weight: str, bias: str, native: str, *parts: str, transposed: bool = False) -> Rules:
    packing = Packing(parts, transposed=transposed)
    return Rule(weight, f"{native}_weight", packing), Rule(bias, f"{native}_bias", packing)


def _row(weight: str, bias: str, native: str, part: str, transposed: bool) -> Rules:
    packing = Packing((part,), dim=1, transposed=transposed)
    return Rule(weight, f"{native}_weight", packing), Rule(bias, f"{native}_bias")


def _deepspeed(name: str, *, transposed: bool, split: bool = False, gated: bool = False) -> Layout:
    if split:  # these are [out, in] whatever the others are
        letters = ((f"attention.attn_{part}", part) for part in "qkv")
        qkv = tuple(rule for name, part in letters for rule in _column(f"{name}w", f"{name}b", "attention.qkv", part))
    else:
        merged = ("attention.attn_qkvw", "attention.attn_qkvb", "attention.qkv")
        qkv = _column(*merged, "q", "k", "v", transposed=transposed)
    if split and gated:
        gates = ((f"mlp.inter_{part}", part) for part in ("up", "gate"))
        mlp = tuple(rule for name, part in gates for rule in _column(f"{name}_w", f"{name}_b", "mlp.in", part))
    else:
        parts = ("up", "gate") if gated else ("up",)
        mlp = _column("mlp.inter_w", "mlp.inter_b", "mlp.in", *parts, transposed=transposed)
    layer = (
        Rule("norm_w", "attention_norm.weight"),
        Rule("norm_b", "attention_norm.bias"),
        *qkv,
        *_row("attention.attn_ow", "attention.attn_ob", "attention.out", "out", transposed),
        Rule("mlp.attn_nw", "mlp_norm.weight"),
        Rule("mlp.attn_nb", "mlp_norm.bias"),
        *mlp,
        *_row("mlp.output_w", "mlp.output_b", "mlp.out", "down", transposed),
    )
    layers = (rule for root in _ROOTS for rule in per_layer(root, layer))
    extra = dict.fromkeys(pattern for model in _MODELS for pattern in model.extra)
    return Layout(name, (*_around(), *layers), tuple(extra))


DEEPSPEED_MERGED = _deepspeed("deepspeed-merged", transposed=True)
DEEPSPEED_MERGED_GATED = _deepspeed("deepspeed-merged-gated", transposed=True, gated=True)
DEEPSPEED_TRANSPOSED = _deepspeed("deepspeed-transposed", transposed=False)  # DeepSpeed's transposed_mode
DEEPSPEED_SPLIT = _deepspeed("deepspeed-split", transposed=True, split=True)
DEEPSPEED_SPLIT_GATED = _deepspeed("deepspeed-split-gated", transposed=True, split=True, gated=True)
