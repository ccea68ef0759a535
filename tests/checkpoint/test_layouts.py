"""Layouts name every tensor of their family in both directions, refuse what they do not know, and travel as JSON."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.in_memory import InMemory
from tests.checkpoint.oracles import GATED, bits, head_counts, poison, random_bits
from tp_attention.checkpoint.families import LAYOUTS, find
from tp_attention.checkpoint.layouts import EXTRA, Layout, Rule, from_json, native_packing, to_json
from tp_attention.checkpoint.logical import LogicalTensors, StateDict
from tp_attention.checkpoint.packing import WHOLE, Packing, length
from tp_attention.sharding import ShardPlan

NATIVE = re.compile(  # the names that layouts.py promises
    r"(embedding|position_embedding|token_type_embedding)\.weight|(embedding_norm|norm|head)\.(weight|bias)"
    r"|layers\.\d+\.((attention_norm|mlp_norm|attention_post_norm|mlp_post_norm)\.(weight|bias)"
    r"|attention\.(qkv_weight|qkv_bias|out_weight|out_bias|q_norm_weight|k_norm_weight|sinks)"
    r"|mlp\.(in_weight|in_bias|out_weight|out_bias))"
)


def file_names(layout: Layout, prefixed: bool = True) -> list[str]:
    """Every name that the layout's rules can write, of two layers; aliases left out."""
    names = []
    for rule in layout.rules:
        prefix, rest = re.fullmatch(r"(?:\[([^\]]*)\])?(.*)", rule.name).groups()  # type: ignore[union-attr]
        if not rule.alias:
            for layer, kind in product("03", ("weight", "bias")):
                names.append(((prefix or "") if prefixed else "") + rest.format(layer=layer, kind=kind))
    return list(dict.fromkeys(names))


def one_spelling(layout: Layout) -> Layout:
    """Without the second names for what an earlier rule has named."""
    rules: dict[tuple[str, Packing], Rule] = {}
    for rule in layout.rules:
        if not rule.alias:
            rules.setdefault((rule.native, rule.packing), rule)
    return replace(layout, rules=tuple(rules.values()))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
@pytest.mark.parametrize("prefixed", [True, False])
def test_what_a_name_reads_as_is_written_under_that_name(layout: Layout, prefixed: bool) -> None:
    written: dict[str, set[str]] = {}
    names = file_names(one_spelling(layout), prefixed)
    matches = {name: layout.match(name) for name in names}
    for match in matches.values():
        assert NATIVE.fullmatch(match.native)
        written.setdefault(match.native, set()).update(match.packing.parts)
    back = {
        name: (native, packing)
        for native, parts in written.items()
        for name, packing in layout.tensors_for(native, parts, prefixed)
    }
    assert back == {name: (match.native, match.packing) for name, match in matches.items()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_every_spelling_is_kept(layout: Layout) -> None:
    for rule in layout.rules:
        alone = replace(layout, rules=(replace(rule, alias=False),))
        for name in file_names(alone):
            match = layout.match(name)
            spelled = layout.spelled_like([name])
            assert spelled.tensors_for(match.native, {*match.packing.parts}) == [(name, match.packing)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_a_layer_is_complete(layout: Layout) -> None:
    """Attention's four, the MLP's four and both norms; gate and up where the family has them."""
    found: dict[str, set[str]] = {}
    for name in file_names(layout):
        match = layout.match(name)
        found.setdefault(match.native, set()).update(match.packing.parts)
    layer = "layers.3."
    gate = {"query_gate"} if layout.name.endswith("output-gate") else set()
    for kind in ("weight", "bias"):
        assert found[f"{layer}attention.qkv_{kind}"] == {"q", "k", "v"} | gate
        assert f"{layer}attention_norm.{kind}" in found
    assert found[f"{layer}attention.out_weight"] == {"out"} and found[f"{layer}attention.out_bias"] == {"whole"}
    assert found["embedding.weight"] == {"vocab"}
    assert found.get("head.weight", {"head"}) == {"head"}
    if layout.name != "dbrx":  # experts
        mlp = {"gate", "up"} if layout.name in GATED else {"up"}
        assert found[f"{layer}mlp.in_weight"] == found[f"{layer}mlp.in_bias"] == mlp
        assert found[f"{layer}mlp.out_weight"] == {"down"} and found[f"{layer}mlp.out_bias"] == {"whole"}
    assert (f"{layer}mlp_norm.weight" in found) == (layout.name != "codegen")  # one norm for both halves
    assert ("head.weight" in found) == (layout.name != "bert")


@pytest.mark.parametrize(
    ("layout", "name", "parts"),
    [
        ("qwen-1", "transformer.h.1.mlp.w1.weight", ("up",)),  # w1(x) · silu(w2(x))
        ("qwen-1", "transformer.h.1.mlp.w2.weight", ("gate",)),
        ("internlm2", "model.layers.1.feed_forward.w1.weight", ("gate",)),
        ("llama-meta", "layers.1.feed_forward.w1.weight", ("gate",)),
        ("llama-meta", "layers.1.feed_forward.w3.weight", ("up",)),
        ("llama-gguf", "blk.1.ffn_gate.weight", ("gate",)),
        ("baichuan", "model.layers.1.mlp.gate_proj.weight", ("gate",)),
        ("chatglm2", "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight", ("gate", "up")),
        ("megatron-3.0-gated", "language_model.encoder.layers.1.mlp.dense_h_to_4h.weight", ("gate", "up")),
        ("megatron-core-gated", "decoder.layers.1.mlp.linear_fc1.weight", ("gate", "up")),
        ("deepspeed-merged-gated", "model.layers.1.mlp.inter_w", ("up", "gate")),
    ],
)
def test_which_half_of_a_gated_mlp_is_the_gate(layout: str, name: str, parts: tuple[str, ...]) -> None:
    assert LAYOUTS[layout].match(name).packing.parts == parts


@pytest.mark.parametrize(
    ("layout", "turned"),
    [
        ("gpt2", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        ("gpt-bigcode-mqa", ()),
        ("deepspeed-merged", ("attention.attn_qkvw", "attention.attn_ow", "mlp.inter_w", "mlp.output_w")),
        ("deepspeed-split", ("attention.attn_ow", "mlp.inter_w", "mlp.output_w")),
        ("deepspeed-transposed", ()),
    ],
)
def test_which_weights_lie_turned_around(layout: str, turned: tuple[str, ...]) -> None:
    for name in file_names(LAYOUTS[layout]):
        match = LAYOUTS[layout].match(name)
        if match.native.endswith("weight") and match.packing != WHOLE:
            assert match.packing.transposed == name.removesuffix(".weight").endswith(turned), name


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("llama", "model.layers.7.self_attn.rotary_emb.inv_freq"),
        ("bert", "cls.predictions.decoder.weight"),
        ("bert", "bert.pooler.dense.bias"),
        ("bert", "embeddings.position_ids"),
        ("gpt2", "h.11.attn.bias"),
        ("gpt-neox", "gpt_neox.layers.3.attention.masked_bias"),
        ("gpt-neox", "gpt_neox.layers.3.attention.rotary_emb.inv_freq"),
        ("codegen", "transformer.h.3.attn.causal_mask"),
        ("chatglm2", "transformer.rotary_pos_emb.inv_freq"),
        ("llama-meta", "rope.freqs"),
        ("llama-gguf", "rope_freqs.weight"),
        ("dbrx", "transformer.blocks.3.ffn.experts.mlp.w1"),
        ("megatron-core", "decoder.layers.3.self_attention.linear_qkv._extra_state"),
        ("deepspeed-merged", "bert.pooler.dense.weight"),
    ],
)
def test_what_no_layer_of_ours_runs_is_kept_whole(layout: str, name: str) -> None:
    match = LAYOUTS[layout].match(name)
    assert match.native == EXTRA + name and match.packing == WHOLE
    assert LAYOUTS[layout].tensors_for(match.native, {"whole"}) == [(name, WHOLE)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", ["layers.0.unheard_of.weight", "xmodel.norm.weight", "lm_head.weight.more", ""])
def test_an_unknown_tensor_is_refused(layout: Layout, name: str) -> None:
    with pytest.raises(ValueError, match=f"layout '{layout.name}' does not know the tensor '{name}'; it would be lost"):
        layout.match(name)


def test_parts_without_a_place_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layout 'gpt2' has no place for gate of layers\.0\.mlp\.in_weight"):
        LAYOUTS["gpt2"].tensors_for("layers.0.mlp.in_weight", {"gate", "up"})
    with pytest.raises(ValueError, match=r"layout 'phi3' has no place for up of layers\.0\.mlp\.in_weight"):
        LAYOUTS["phi3"].tensors_for("layers.0.mlp.in_weight", {"up"})


def whole_checkpoint(layout: Layout, plan: ShardPlan, seed: int) -> StateDict:
    """Random bits under every name of the layout; what parallel layers share is as large as `plan` says."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in file_names(one_spelling(layout)):
        packing = layout.match(name).packing
        size = 3 if packing == WHOLE else length(packing, plan, 0)
        shape = (size,) if name.endswith(("bias", "b", "offset")) or packing == WHOLE else (size, 5)
        turned = len(shape) == 2 and (packing.dim == 1) != packing.transposed
        tensors[name] = random_bits(*(reversed(shape) if turned else shape), dtype=torch.float16, generator=generator)
    return StateDict(tensors, layout, plan)


@pytest.mark.parametrize(
    ("layout", "heads", "kv_heads"), [(name, *counts) for name in LAYOUTS for counts in head_counts(name)[-2:]]
)
def test_a_model_in_any_layout_survives_any_cut(layout: str, heads: int, kv_heads: int) -> None:
    plans = {
        tp: ShardPlan(tp, heads, kv_heads, head_dim=2, hidden_size=5, intermediate_size=41, vocab_size=23)
        for tp in (1, 3, 8)
    }
    whole = whole_checkpoint(LAYOUTS[layout], plans[1], seed=heads + kv_heads)
    logical = LogicalTensors(whole)
    for tp in (3, 8):
        ranks = [{name: logical.share(name, plans[tp], rank) for name in logical.names()} for rank in range(tp)]
        parts = {name: logical.parts(name) for name in logical.names()}
        rules = tuple(Rule(name, name, native_packing(held)) for name, held in parts.items())
        again = LogicalTensors(InMemory(ranks, Layout("ours", rules), plans[tp]))
        for native, held in parts.items():
            for name, packing in LAYOUTS[layout].tensors_for(native, held):
                expected = whole.tensors[name]
                out = again.fill(poison(tuple(expected.shape), expected.dtype), native, packing, plans[1], 0)
                assert torch.equal(bits(out), bits(expected)), name


def test_unknown_layouts_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown layout 'lama'; known: llama, gemma2.*megatron-2\.0.*\.json file"):
        find("lama")
    with pytest.raises(ValueError, match="unknown layout"):
        find(tmp_path / "absent.json")
    assert find("megatron-1.0") is LAYOUTS["megatron-1.0"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_layouts_round_trip_as_json(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(to_json(layout)))
    assert find(path) == from_json(path) == layout


def test_a_layout_of_the_users_may_be_short(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    rule = {
        "name": "[m.]b{layer}.qkv.{kind}",
        "native": "layers.{layer}.attention.qkv_{kind}",
        "parts": ["v", "q", "k"],
    }
    norm = {"name": "[m.]n.weight", "native": "norm.weight"}
    path.write_text(json.dumps({"name": "mine", "rules": [rule, norm]}))
    layout = find(str(path))
    assert layout.match("b12.qkv.bias").native == "layers.12.attention.qkv_bias"
    assert layout.match("m.b12.qkv.bias").packing == Packing(("v", "q", "k"))
    assert layout.tensors_for("norm.weight", {"whole"}, prefixed=False) == [("n.weight", WHOLE)]


RULE = {"name": "a", "native": "norm.weight"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rules": [RULE]}, "lacks 'name'"),
        ({"name": "mine"}, "lacks 'rules'"),
        ({"name": "mine", "rules": [{"name": "a"}]}, "lacks 'native'"),
        ({"name": "mine", "rules": [RULE | {"part": "q"}]}, "unknown key 'part' in a rule; known: alias, blocks"),
        ({"name": "mine", "rules": [RULE | {"parts": ["x"]}]}, "unknown part 'x'"),
        (
            {"name": "mine", "rules": [RULE | {"name": "a{rank}"}]},
            r"unknown field \{rank\} in 'a\{rank\}'; known: layer",
        ),
        ({"name": "mine", "rules": [RULE | {"transposed": "false"}]}, "transposed 'false' of a rule is no bool"),
        ({"name": "mine", "rules": [RULE | {"alias": 1}]}, "alias 1 of a rule is no bool"),
        ({"name": "mine", "rules": [RULE | {"dim": True}]}, "dim True of a rule is no int"),
        ({"name": "mine", "rules": [RULE | {"parts": ["q"], "dim": 1}]}, r"dim=1 for \('q',\): out and down are cut"),
        ({"name": "mine", "rules": [RULE | {"parts": ["out"]}]}, r"dim=0 for \('out',\): out and down are cut"),
        ({"name": "mine", "rules": [RULE | {"native": "norm.wait"}]}, "'norm.wait' is no name of ours"),
        ({"name": "mine", "rules": [RULE | {"native": "norm.{kind}"}]}, "must have the same fields in braces"),
        ({"name": "mine", "rules": [RULE | {"name": "{layer}.{layer}"}]}, r"field \{layer\} is twice in '\{layer\}"),
        ({"name": "mine", "rules": [RULE], "extra": "abc"}, "extra 'abc' is no list of patterns"),
        ({"name": "mine", "rules": [RULE], "extra": ["("]}, r"extra '\(' is no pattern"),
        ({"name": "mine", "rules": [RULE | {"parts": [["q"]]}]}, r"parts \[\['q'\]\] of a rule is no list of names"),
        ({"name": "mine", "rules": [{"name": "a"}]}, "a rule lacks 'native'"),
        ({"name": 3, "rules": [RULE]}, "it lacks 'name', a text"),
        ({"name": "mine", "rules": 3}, "is no layout"),
        ([], "is no layout"),
    ],
)
def test_a_wrong_layout_file_says_what_is_wrong(data: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        find(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_layout_file_that_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is no layout: Expecting"):
        find(path)
