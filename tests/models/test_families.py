"""Every family, cut for 1 to 4 ranks, computes what Hugging Face's own unsharded model does."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from tp_attention import KVCache, models
from tp_attention.comm import TPGroup
from tp_attention.models.loading import held_bytes

CAUSAL = ["llama", "mistral", "qwen2", "qwen3"]
LIMIT = 1e-5  # of the largest logit: fp32 sums in another order, through two or three layers


def batch():
    """Ids [2, 11] and a mask that pads the first row on the left by 4."""
    ids = torch.randint(3, 131, (2, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


def assert_equal(actual, expected):
    difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= LIMIT * largest, f"{difference:.2e} of {largest:.2f}"


def run_causal(world, folder):
    model = models.load(folder, world.tp)
    ids, mask = (tensor.to(world.device) for tensor in batch())
    padded = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
    cache = KVCache(model.shard_plan, world.tp.rank, batch=2, max_length=11, device=world.device)
    steps = [model(input_ids=ids[:, :7], past_key_values=cache, use_cache=True).logits]
    for column in range(7, 11):
        steps.append(model(input_ids=ids[:, column : column + 1], past_key_values=cache, use_cache=True).logits)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    results = padded.cpu(), torch.cat(steps, 1).cpu(), text.cpu()
    return *results, held_bytes(model), model.shard_plan.weight_bytes(world.tp.rank)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_families(family, tiny, world):
    ids, mask = batch()
    with torch.inference_mode():
        reference = AutoModelForCausalLM.from_pretrained(tiny[family])
        padded = reference(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
        plain = reference(input_ids=ids).logits
        text = reference.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for ranks in (1, 2, 3, 4):
        results = world(ranks)(run_causal, tiny[family])
        for rank_padded, rank_steps, rank_text, held, planned in results:
            assert_equal(rank_padded[mask.bool()], padded[mask.bool()])
            assert_equal(rank_steps, plain)
            assert torch.equal(rank_text, text)
            assert held == planned
        assert all(torch.equal(result[0], results[0][0]) for result in results), "ranks differ"


def run_bert(world, folder):
    model = models.load(folder, world.tp)
    ids, mask = (tensor.to(world.device) for tensor in batch())
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return states.cpu(), held_bytes(model), model.shard_plan.weight_bytes(world.tp.rank)


def test_bert(tiny, world):
    ids, mask = batch()
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(tiny["bert"])(input_ids=ids, attention_mask=mask).last_hidden_state
    for ranks in (1, 2, 3, 4):
        for states, held, planned in world(ranks)(run_bert, tiny["bert"]):
            assert_equal(states[mask.bool()], expected[mask.bool()])
            assert held == planned


def run_shard_in_place(world, folder):
    ids, _ = batch()
    model = models.shard(AutoModelForCausalLM.from_pretrained(folder), world.tp)
    return (
        model(input_ids=ids.to(world.device)).logits.cpu(),
        held_bytes(model),
        model.shard_plan.weight_bytes(world.tp.rank),
    )


def test_shard_in_place_on_a_mesh(tiny, world):
    """Two data-parallel copies on two ranks each: the group is not the world."""
    ids, _ = batch()
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tiny["qwen3"])(input_ids=ids).logits
    for logits, held, planned in world(4, tp=2)(run_shard_in_place, tiny["qwen3"]):
        assert_equal(logits, expected)
        assert held == planned


def run_two_models(world, first, second):
    ids = batch()[0].to(world.device)
    a, b = models.load(first, world.tp), models.load(second, TPGroup.alone(world.device))
    return tuple(model(input_ids=ids).logits.cpu() for model in (a, b, a))


def test_two_models_in_one_process(tiny, world):
    """One sharded, one not, called in turn: neither knows of the other's group."""
    ids, _ = batch()
    with torch.inference_mode():
        a, b = (AutoModelForCausalLM.from_pretrained(tiny[name])(input_ids=ids).logits for name in ("llama", "mistral"))
    for first, second, again in world(2)(run_two_models, tiny["llama"], tiny["mistral"]):
        assert_equal(first, a)
        assert_equal(second, b)
        assert torch.equal(first, again)


def test_packed_sequences_keep_apart(tiny):
    """Position ids that start over mean packed sequences: transformers masks them, and so must we."""
    ids, _ = batch()
    where = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]] * 2)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tiny["llama"])(input_ids=ids, position_ids=where).logits
        assert_equal(models.load(tiny["llama"])(input_ids=ids, position_ids=where).logits, expected)


def test_half_precision_loads_in_that_dtype(tiny):
    model = models.load(tiny["llama"], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert held_bytes(model) == model.shard_plan.weight_bytes(0)


def test_a_static_cache_is_refused(tiny):
    ids, _ = batch()
    with pytest.raises(ValueError, match="static transformers caches are not supported"):
        models.load(tiny["llama"]).generate(ids, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("family", CAUSAL)
def test_a_4d_mask_is_complete(family, tiny):
    """transformers' rule: it replaces causality and windows. Here the last 3 keys are hidden, later ones are not."""
    ids, _ = batch()
    mask = torch.zeros(2, 1, 11, 11)
    mask[..., 8:] = torch.finfo(torch.float32).min
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tiny[family])(input_ids=ids, attention_mask=mask).logits
        assert_equal(models.load(tiny[family])(input_ids=ids, attention_mask=mask).logits, expected)
