"""Hugging Face models with our attention on 1 to 3 ranks equal the models without; and under DeepSpeed's engine."""

import pytest
import torch

from tests.hugging_face_families import MODELS, build, expected_logits, generated, logits
from tests.multirank.launchers import command, run
from tests.tolerances import assert_close
from tp_attention import launch
from tp_attention.deepspeed_policy import replace_attention

PADDINGS = ("none", "full", "left", "right")


def run_family(world, name):
    model = replace_attention(build(name).to(world.device), world.tp.process_group)  # None where there is one rank
    outputs = [logits(model, padding) for padding in PADDINGS]
    with torch.no_grad():
        inputs = torch.arange(3, 10, device=world.device)[None]
        attentions = model(inputs, output_attentions=True).attentions
    tokens = [] if name == "bert" else [generated(model, padding) for padding in ("none", "left")]
    return outputs, attentions, tokens


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_equals_hugging_face(name, ranks, world):
    whole = build(name)
    whole.set_attn_implementation("eager")  # it alone returns attentions
    with torch.no_grad():
        probabilities = whole.double()(torch.arange(3, 10)[None], output_attentions=True).attentions
    whole = build(name)
    results = world(ranks)(run_family, name)
    for outputs, attentions, tokens in results:
        for padding, output in zip(PADDINGS, outputs, strict=True):
            assert_close(output, expected_logits(whole, padding), torch.float32)
        for actual, expected in zip(attentions, probabilities, strict=True):
            assert_close(actual, expected.double(), torch.float32)
        for padding, actual in zip(("none", "left"), tokens, strict=False):
            assert torch.equal(actual, generated(whole, padding))
        assert all(torch.equal(a, b) for a, b in zip(outputs, results[0][0], strict=True)), "ranks differ"


def run_too_many(world):
    model = build("bloom", num_attention_heads=2)
    with pytest.raises(ValueError, match="tp=3 exceeds heads=2; use tp <= 2"):
        replace_attention(model, world.tp)
    return type(model.transformer.h[0].self_attention).__name__


def test_more_ranks_than_heads_leave_the_model_whole(world):
    assert set(world(3)(run_too_many)) == {"BloomAttention"}


@pytest.mark.skipif(launch.launched(), reason="starts a launcher itself")
@pytest.mark.timeout(420)  # a minute or two of them the compiler's, where this machine has not run it yet
def test_under_deepspeed():
    """All families in DeepSpeed's engine on two of its launcher's ranks. The first ever compiles a helper."""
    codes, output, _ = run([*command("deepspeed"), "tests.multirank.deepspeed_ranks"], limit=400)
    assert codes == [0], output
    for name in MODELS:
        assert output.count(f"{name} equals") == 2, output
    assert output.count("one rank equals") == 2, output
