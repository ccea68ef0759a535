"""The few shapes that rules of any family have, so that a family's file reads as a table of its names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tp_attention.checkpoint.layouts import Rule
from tp_attention.checkpoint.packing import Packing

EMBEDDING = "embedding.weight"
Rules = tuple[Rule, ...]


def per_layer(root: str, *groups: Rules) -> Rules:
    """The rules of one layer, whose names in the file follow `root` and the layer's number."""
    return tuple(
        replace(rule, name=f"{root}{{layer}}.{rule.name}", native=f"layers.{{layer}}.{rule.native}")
        for group in groups
        for rule in group
    )


def column(name: str, native: str, *parts: str, **packing: Any) -> Rules:
    """A column-parallel projection: its bias is packed like its weight's rows."""
    return (Rule(f"{name}.{{kind}}", f"{native}_{{kind}}", Packing(parts, **packing)),)


def row(name: str, native: str, part: str, **packing: Any) -> Rules:
    """A row-parallel projection ("out" or "down"): every rank adds the whole bias, once."""
    weight = Rule(f"{name}.weight", f"{native}_weight", Packing((part,), dim=1, **packing))
    return weight, Rule(f"{name}.bias", f"{native}_bias")


def whole(name: str, native: str, alias: bool = False) -> Rules:
    """Weight and bias of what is not cut: a norm, as a rule."""
    return (Rule(f"{name}.{{kind}}", f"{native}.{{kind}}", alias=alias),)


def embedding(name: str) -> Rules:
    """The token embedding, cut by rows."""
    return (Rule(f"{name}.weight", EMBEDDING, Packing(("vocab",))),)


def head(name: str = "lm_head") -> Rules:
    """The language-modelling head, cut by rows like the embedding, whether tied to it or not."""
    return (Rule(f"{name}.{{kind}}", "head.{kind}", Packing(("head",))),)


def split_qkv(q: str, k: str, v: str, **packing: Any) -> Rules:
    """Three projections in tensors of their own."""
    return tuple(
        rule
        for name, part in ((q, "q"), (k, "k"), (v, "v"))
        for rule in column(name, "attention.qkv", part, **(packing if part != "v" else {}))
    )
