"""What of Hugging Face models is swapped, kept and refused; and which options of init_inference are. One rank."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, MistralConfig, MistralForCausalLM

from tests.hugging_face_families import MODELS, SIZES, build, expected_logits, generated, logits, prompt
from tests.tolerances import assert_close
from tp_attention import TritonSelfAttention, deepspeed_policy
from tp_attention.deepspeed_policy import init_inference, options, replace_attention

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


def kinds(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt-neox", {"attention_bias": False, "use_parallel_residual": False}),
        ("gpt-neox", {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("opt", {"enable_bias": False, "do_layer_norm_before": False}),
        ("llama", {"attention_bias": True, "rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
        ("llama", {"rope_parameters": LINEAR}),
        ("llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}, "max_position_embeddings": 10}),
    ],
)
def test_variants_of_a_family(name, changes):
    whole = build(name, **changes)
    model = replace_attention(copy.deepcopy(whole))
    assert kinds(model).count(TritonSelfAttention) == 2
    for padding in ("none", "left"):
        assert_close(logits(model, padding), expected_logits(whole, padding), torch.float32)
    assert torch.equal(generated(model), generated(whole))


def test_a_part_of_a_model_and_one_that_has_recorded_already():
    whole = BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()
    with torch.no_grad():
        assert len(whole(**prompt(), output_attentions=True).attentions) == 0  # sdpa has none, but its hooks are there
        model = replace_attention(copy.deepcopy(whole))
        out = model(**prompt("left"), output_attentions=True)
        whole.set_attn_implementation("eager")
        expected = whole.double()(**prompt("left"), output_attentions=True)
    for actual, probabilities in zip(out.attentions, expected.attentions, strict=True):
        assert_close(actual, probabilities.double(), torch.float32)
    assert_close(out.last_hidden_state[1], expected.last_hidden_state[1], torch.float32)


def test_beams_sampling_and_assistants_cache():
    """What moves, repeats and cuts the cache: beams reorder it, an assistant's rejected tokens are cropped."""
    whole = build("llama")
    model = replace_attention(copy.deepcopy(whole))
    assert torch.equal(generated(model, num_beams=3), generated(whole, num_beams=3))
    ids = {"input_ids": prompt()["input_ids"][:1]}
    tokens = [m.generate(**ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3) for m in (model, whole)]
    assert torch.equal(*tokens)


@torch.no_grad()
def test_masks_of_four_dimensions():
    whole = build("gpt-neox")
    whole.set_attn_implementation("eager")
    model = replace_attention(copy.deepcopy(whole))
    ids = prompt()["input_ids"]
    causal = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    causal[:, :, 5:, :2] = False  # a packed sequence, say
    additive = torch.zeros(2, 1, 7, 7).masked_fill(~causal, torch.finfo(torch.float32).min)
    expected = whole.double()(ids, attention_mask=additive.double()).logits
    for mask in (causal, additive):
        assert_close(model(ids, attention_mask=mask).logits, expected, torch.float32)
    with pytest.raises(ValueError, match="lets queries see later keys"):
        model(ids, attention_mask=torch.ones_like(causal))


def test_dtype_may_change_afterwards():
    model = replace_attention(build("opt")).bfloat16()
    error = (logits(model) - expected_logits(build("opt"))).abs().max()
    assert error < 0.1 * expected_logits(build("opt")).abs().max()  # 2 layers of roundings at 2^-8
    assert not any(parameter.requires_grad for parameter in model.parameters())


def refused(model, message):
    """The model is refused and stays as it was."""
    before, implementation = kinds(model), model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        replace_attention(model)
    assert kinds(model) == before and model.config._attn_implementation == implementation
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_architectures_are_refused():
    fields = {"num_key_value_heads": 1, "intermediate_size": 8}
    model = MistralForCausalLM(MistralConfig(**SIZES | fields))
    refused(model, "MistralForCausalLM has none of the attentions that can be replaced: BertAttention, Bloom")
    model = replace_attention(build("gpt2"))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has none"):
        replace_attention(model)  # twice


def test_a_model_is_left_whole_when_a_later_layer_is_refused():
    model = build("llama")
    model.model.layers[1].self_attn.o_proj = torch.nn.Sequential(model.model.layers[1].self_attn.o_proj)
    refused(model, "LlamaAttention.o_proj is a Sequential, not a plain Linear; merge or dequantise")
    model = build("gpt2")
    model.transformer.h[1].attn.c_proj.weight = torch.nn.Parameter(torch.ones(40, 39))
    refused(model, r"attn_ow has shape \[39, 40\]")
    model = build("opt")
    model.model.decoder.layers[1].self_attn.to("meta")
    refused(model, "OPTAttention.q_proj is on the meta device; load the weights first")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"is_decoder": True}, "BERT as a decoder"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact"),
    ],
)
def test_configs_that_are_refused(name, changes, message):
    refused(build(name, **changes), message)


def test_static_caches_are_refused():
    model = replace_attention(build("llama"))
    with pytest.raises(ValueError, match=r"past_key_values is a StaticCache .*; pass a plain DynamicCache"):
        generated(model, cache_implementation="static")


def test_needs_no_deepspeed():
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"  # importing it fails
        "from tests.hugging_face_families import build\n"
        "from tp_attention.deepspeed_policy import replace_attention\n"
        "replace_attention(build('bert')); print('fine')"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.stdout.endswith("fine\n"), done.stderr


# init_inference

OFF = {
    "replace_with_kernel_inject": True,
    "use_triton": True,
    "enable_cuda_graph": True,
    "quant": {"enabled": True},
    "set_empty_params": True,
    "checkpoint": "a.json",
    "base_dir": "a",
    "checkpoint_config": {"base_dir": "a"},
    "save_mp_checkpoint_path": "a",
    "injection_policy": {torch.nn.Linear: "a"},
    "injection_policy_tuple": ("a",),
    "config": {"a": 1},
    "moe": True,
    "ep_size": 2,
    "ep_group": object(),
    "ep_mp_group": object(),
    "moe_experts": [2],
    "moe_type": "residual",
}


@pytest.fixture
def deepspeed():
    return pytest.importorskip("deepspeed")


def test_every_option_of_deepspeed_is_decided_on_and_documented(deepspeed):
    from deepspeed.inference.config import DeepSpeedInferenceConfig

    decided = [*options.WORKS, *options.REFUSED, *options.NO_EFFECT]
    assert sorted(decided) == sorted(DeepSpeedInferenceConfig.model_fields)
    table = deepspeed_policy.__doc__
    works, refused_ones = table.index("  works  "), table.index("  refused  ")
    spans = [(works, refused_ones), (refused_ones, table.index("  no effect  ")), (table.index("  no effect  "), None)]
    for (start, stop), names in zip(spans, (options.WORKS, options.REFUSED, options.NO_EFFECT), strict=True):
        assert not [name for name in names if name not in table[start:stop]]


@pytest.mark.parametrize("name", options.REFUSED)
def test_options_that_are_refused(name, deepspeed):
    model = build("gpt2")
    with pytest.raises(ValueError, match=f"^{name}=.* {options.REFUSED[name][:20]}"):
        init_inference(model, {"dtype": torch.float32, name: OFF[name]})
    assert TritonSelfAttention not in kinds(model)


def test_aliases_and_files_are_read_and_contradictions_refused(deepspeed, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"kernel_inject": True, "moe": False}))
    model = build("gpt2")
    for config, keywords, message in [
        (str(tmp_path / "a.json"), {}, "replace_with_kernel_inject=True puts DeepSpeed's whole layers"),
        ({"tp": {"tp_size": 2}}, {"tensor_parallel": {"tp_size": 3}}, "tensor_parallel is given as .*2.* and as .*3"),
        ({"dtype": "int8"}, {}, "dtype=torch.int8 does not work"),
        ({"mp": 2}, {}, "mp"),
    ]:
        given = dict(config) if isinstance(config, dict) else config
        with pytest.raises(ValueError, match=message):
            init_inference(model, config, **keywords)
        assert config == given  # DeepSpeed's own adds the keywords to it
    assert TritonSelfAttention not in kinds(model)


def test_families_are_the_documented_ones():
    from tp_attention.deepspeed_policy.families import FAMILIES

    assert len(FAMILIES) == len(MODELS) == 6
