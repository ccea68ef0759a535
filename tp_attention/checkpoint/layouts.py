"""How each family of checkpoints names and packs its weights.

A Layout is a list of rules. A rule ties a name in the file to a name of ours, and says which parts the tensor packs.
Our names are the same for every family, so a layout reads in both directions. A tensor that no rule names is an
error: shapes never decide. The layouts that ship are in families/; users add theirs as JSON.

Our names:
    embedding.weight  position_embedding.weight  token_type_embedding.weight  embedding_norm.weight|bias
    layers.N.attention_norm.weight|bias
    layers.N.attention.qkv_weight|qkv_bias|out_weight|out_bias|q_norm_weight|k_norm_weight|sinks
    layers.N.mlp_norm.weight|bias  layers.N.mlp.in_weight|in_bias|out_weight|out_bias
    layers.N.attention_post_norm.weight  layers.N.mlp_post_norm.weight  (Gemma's second norms)
    norm.weight|bias  head.weight|bias
    extra.NAME        whatever a layout keeps whole under the file's own NAME
    NAME_scale        the group scales of a quantised weight NAME
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tp_attention.checkpoint.packing import HEAD_PARTS, WHOLE, Packing

EXTRA = "extra."
SCALE = "_scale"  # a quantised weight's scales stand beside it under its name and this
_FIELDS = {"layer": r"\d+", "kind": "weight|bias"}
_NATIVE = re.compile(
    r"(embedding|position_embedding|token_type_embedding)\.weight|(embedding_norm|norm|head)\.(weight|bias|{kind})"
    r"|layers\.{layer}\.((attention|mlp)(_post)?_norm\.(weight|bias|{kind})|attention\.((q|k)_norm_weight|sinks)"
    r"|(attention\.(qkv|out)|mlp\.(in|out))_(weight|bias|{kind}))"
)
_FORM = re.compile(r"(?:\[(?P<prefix>[^\]]*)\])?(?P<rest>.*)")


@dataclass(frozen=True)
class Rule:
    """File tensors named `name` are, or are part of, our `native`, packed like `packing`.

    In both names `{layer}` stands for a number and `{kind}` for weight or bias. `name` may start with a prefix in
    brackets, which files have or have not: "[transformer.]h.{layer}.ln_1.{kind}". alias: read, never written.
    """

    name: str
    native: str
    packing: Packing = WHOLE
    alias: bool = False


@dataclass(frozen=True)
class Match:
    """What a file's tensor is: the parts of `packing` of our tensor `native`.

    prefixed: whether the name had its rule's optional prefix; None where the rule has none.
    """

    native: str
    packing: Packing
    prefixed: bool | None = None


@dataclass(frozen=True)
class Layout:
    """One family's rules; the first that matches a name wins.

    extra: patterns of whole names that belong to nothing we run (buffers, other tasks' heads): kept, as extra.NAME.
    """

    name: str
    rules: tuple[Rule, ...]
    extra: tuple[str, ...] = ()

    def match(self, name: str) -> Match:
        """What the file's tensor `name` is. Raises ValueError when no rule knows it."""
        for rule, file_pattern, _ in self._patterns:
            if found := file_pattern.fullmatch(name):
                groups = found.groupdict()
                optional = "prefix" in groups
                prefixed = groups.pop("prefix", None) is not None if optional else None
                return Match(rule.native.format(**groups), rule.packing, prefixed)
        if any(re.fullmatch(pattern, name) for pattern in self.extra):
            return Match(EXTRA + name, WHOLE)
        raise ValueError(f"layout {self.name!r} does not know the tensor {name!r}; it would be lost, so it is refused")

    def tensors_for(self, native: str, parts: set[str], prefixed: bool = True) -> list[tuple[str, Packing]]:
        """Names and packings of the file tensors that together hold `parts` of our tensor `native`.

        prefixed: write the optional prefixes. Raises ValueError when this layout has no place for some parts.
        """
        if native.startswith(EXTRA):
            return [(native.removeprefix(EXTRA), WHOLE)]
        found, left = [], set(parts)
        for rule, _, native_pattern in self._patterns:
            match = native_pattern.fullmatch(native)
            if match and not rule.alias and set(rule.packing.parts) <= left:
                prefix, rest = _FORM.fullmatch(rule.name).groups()  # type: ignore[union-attr]  # matches anything
                found.append(((prefix or "" if prefixed else "") + rest.format(**match.groupdict()), rule.packing))
                left -= set(rule.packing.parts)
        if left:
            raise ValueError(f"layout {self.name!r} has no place for {', '.join(sorted(left))} of {native}")
        return found

    def spelled_like(self, names: Iterable[str]) -> Layout:
        """This layout, writing what it knows several names for under those that `names`, of a checkpoint, has."""
        seen = list(names)
        used = [any(map(pattern.fullmatch, seen)) for _, pattern, _ in self._patterns]
        first = tuple(replace(rule, alias=False) for rule, here in zip(self.rules, used, strict=True) if here)
        return replace(self, rules=first + tuple(rule for rule, here in zip(self.rules, used, strict=True) if not here))

    @cached_property
    def _patterns(self) -> list[tuple[Rule, re.Pattern[str], re.Pattern[str]]]:
        return [(rule, _pattern(rule.name), _pattern(rule.native)) for rule in self.rules]


def native_packing(parts: set[str]) -> Packing:
    """How our own form packs the `parts` of one tensor: [q; query_gate; k; v], [gate; up], or one part alone."""
    order = [part for part in (*HEAD_PARTS, "gate", "up") if part in parts] or sorted(parts)
    return Packing(tuple(order), dim=1 if parts & {"out", "down"} else 0)


def from_json(path: Path) -> Layout:
    """A layout of the user's: {"name": …, "extra": […], "rules": [{"name", "native", "parts", "order", …}]}.

    A rule's keys past name and native are Packing's fields; without "parts" the tensor is whole.
    Raises ValueError naming the file and what is wrong with it.
    """
    try:
        return from_data(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is no layout: {error}") from None


def from_data(data: dict[str, Any]) -> Layout:
    """The layout in a parsed JSON file. Raises ValueError when it is none."""
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    if not isinstance(data.get("name"), str):
        raise ValueError("it lacks 'name', a text")
    extra = data.get("extra", [])
    if not isinstance(extra, list) or not all(isinstance(pattern, str) for pattern in extra):
        raise ValueError(f"extra {extra!r} is no list of patterns")
    try:
        list(map(re.compile, extra))
    except re.error as error:
        raise ValueError(f"extra {error.pattern!r} is no pattern: {error}") from None
    rules = data.get("rules")
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ValueError("it lacks 'rules', a list of objects")
    return Layout(data["name"], tuple(map(_rule, rules)), tuple(extra))


def to_json(layout: Layout) -> dict[str, Any]:
    """What `from_json` reads, and `from_data`."""
    rules = [
        {"name": rule.name, "native": rule.native, **packing_to_json(rule.packing), "alias": rule.alias}
        for rule in layout.rules
    ]
    return {"name": layout.name, "extra": list(layout.extra), "rules": rules}


def packing_to_json(packing: Packing) -> dict[str, Any]:
    """Packing's fields, parts as a list."""
    values = {field.name: getattr(packing, field.name) for field in fields(Packing)}
    return {**values, "parts": list(packing.parts)}


def _rule(data: dict[str, Any]) -> Rule:
    kinds: dict[str, type] = {"name": str, "native": str, "parts": list, "alias": bool}
    kinds |= {field.name: type(field.default) for field in fields(Packing) if field.name not in kinds}
    for key, value in data.items():
        if key not in kinds:
            raise ValueError(f"unknown key {key!r} in a rule; known: {', '.join(sorted(kinds))}")
        if type(value) is not kinds[key]:  # bool is no int here
            raise ValueError(f"{key} {value!r} of a rule is no {kinds[key].__name__}")
    if lacking := {"name", "native"} - data.keys():
        raise ValueError(f"a rule lacks {min(lacking)!r}")
    if not all(isinstance(part, str) for part in data.get("parts", [])):
        raise ValueError(f"parts {data['parts']!r} of a rule is no list of names")
    for template in (data["name"], data["native"]):
        _pattern(template)
    if not _NATIVE.fullmatch(data["native"].removesuffix(SCALE)):
        raise ValueError(f"{data['native']!r} is no name of ours; they are listed in {__name__}")
    if sorted(re.findall(r"{\w*}", data["name"])) != sorted(re.findall(r"{\w*}", data["native"])):
        raise ValueError(f"{data['name']!r} and {data['native']!r} must have the same fields in braces, each once")
    packing = {key: value for key, value in data.items() if key not in ("name", "native", "alias")}
    return Rule(data["name"], data["native"], Packing(**{"parts": ("whole",), **packing}), bool(data.get("alias")))


@cache
def _pattern(template: str) -> re.Pattern[str]:
    prefix, rest = _FORM.fullmatch(template).groups()  # type: ignore[union-attr]  # matches anything
    pattern = f"(?P<prefix>{re.escape(prefix)})?" if prefix is not None else ""
    for literal, name in re.findall(r"([^{]*)(?:\{(\w*)\})?", rest):
        pattern += re.escape(literal)
        if name:
            if name not in _FIELDS:
                raise ValueError(f"unknown field {{{name}}} in {template!r}; known: {', '.join(_FIELDS)}")
            if f"(?P<{name}>" in pattern:
                raise ValueError(f"field {{{name}}} is twice in {template!r}")
            pattern += f"(?P<{name}>{_FIELDS[name]})"
    return re.compile(pattern)
