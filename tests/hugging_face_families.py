"""The families of deepspeed_policy, tiny and random, and what transformers itself makes of them."""

import copy

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

# Odd on purpose: 5 heads, or 9 query and 3 kv heads, are uneven on 2 ranks; widths of the MLP divide by nothing.
SIZES = {"vocab_size": 131, "num_hidden_layers": 2, "hidden_size": 40, "num_attention_heads": 5}
MLP = {"intermediate_size": 77}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "bert": (BertForMaskedLM, BertConfig, SIZES | MLP | {"pad_token_id": 0}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, SIZES | TOKENS | {"n_inner": 77}),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig, SIZES | MLP | TOKENS | {"rotary_pct": 0.5}),
    "bloom": (BloomForCausalLM, BloomConfig, SIZES | TOKENS),
    "opt": (OPTForCausalLM, OPTConfig, SIZES | TOKENS | {"ffn_dim": 77, "word_embed_proj_dim": 40}),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        SIZES | MLP | TOKENS | {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8},
    ),
}


def build(name, **changes):
    """A model with the same random weights at every call. Neither are biases zero nor norms one: mistakes show."""
    model, config, fields = MODELS[name]
    built = model(config(**fields | changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in built.named_parameters():
            norm = ("norm" in path.lower() or "ln_" in path) and path.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.3, generator=generator)
    return built


def prompt(padding="none"):
    """input_ids and attention_mask of two sequences. padding: none, left or right, of the first; full: no zero."""
    ids = torch.randint(3, 131, (2, 7), generator=torch.Generator().manual_seed(1))
    if padding == "none":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    if padding != "full":
        mask[0, slice(0, 3) if padding == "left" else slice(5, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _inputs(model, padding):  # a model, or an engine around one
    return {name: value.to(next(model.parameters()).device) for name, value in prompt(padding).items()}


@torch.no_grad()
def logits(model, padding="none"):
    """Logits of the tokens that are no padding [N, vocabulary]."""
    inputs = _inputs(model, padding)
    out = model(**inputs).logits
    return out[inputs["attention_mask"].bool()] if "attention_mask" in inputs else out.flatten(0, 1)


@torch.no_grad()
def expected_logits(model, padding="none"):
    """Of an unswapped model, in fp64."""
    whole = copy.deepcopy(model).double()
    if model.config.model_type != "bloom":
        return logits(whole, padding)
    # Its own mask is NaN in fp64 where a row keeps nothing; nor does padding change what it says of a sequence.
    inputs = prompt(padding)
    keep = inputs.get("attention_mask", torch.ones(inputs["input_ids"].shape)).bool()
    rows = [ids[kept] for ids, kept in zip(inputs["input_ids"], keep, strict=True)]
    return torch.cat([whole(row[None]).logits[0] for row in rows])


def generated(model, padding="left", **options):
    """Greedy tokens, 8 a sequence."""
    return model.generate(**_inputs(model, padding), max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)
