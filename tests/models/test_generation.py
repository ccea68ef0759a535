"""Choosing tokens, and the limits of a generation."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tp_attention import models
from tp_attention.models.generation import Sampling, choose

IDS = torch.tensor([[5, 17, 99, 3]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_greedy_takes_the_likeliest():
    assert choose(torch.tensor([0.1, 3.0, 2.0]), Sampling(), generator()).tolist() == [1]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    drawn = {int(choose(logits, Sampling(1.0, 0.7), generator(seed))) for seed in range(200)}
    assert drawn == {0, 1}
    assert {int(choose(logits, Sampling(1.0, 1e-9), generator(seed))) for seed in range(20)} == {0}


def test_temperature_flattens():
    logits = torch.tensor([4.0, 0.0])

    def share(temperature):
        picks = [int(choose(logits, Sampling(temperature), generator(seed))) for seed in range(400)]
        return sum(picks) / 400

    assert share(0.5) < share(1.0) < share(8.0)


def test_a_seed_repeats_and_another_differs(tiny):
    model = models.load(tiny["qwen3"])

    def draw(seed):
        return [token for token, _ in models.stream(model, IDS, max_new_tokens=12, sampling=Sampling(2.0, 0.9, seed))]

    assert draw(1) == draw(1) != draw(2)


def test_stream_stops_at_a_stop_id(tiny):
    model = models.load(tiny["qwen3"])
    tokens = [token for token, _ in models.stream(model, IDS, max_new_tokens=12)]
    stop = tokens[4]
    stopped = [token for token, _ in models.stream(model, IDS, max_new_tokens=12, stop_ids={stop})]
    assert stopped == tokens[: tokens.index(stop) + 1]


def test_stream_is_greedy_hugging_face(tiny):
    with torch.inference_mode():
        reference = AutoModelForCausalLM.from_pretrained(tiny["mistral"])
        reference.generation_config.eos_token_id = None  # stream was told of no stop ids either
        expected = reference.generate(IDS, max_new_tokens=20, do_sample=False)[0, 4:]
        rows = reference(torch.cat([IDS[0], expected])[None]).logits[0, 3:-1]
    model = models.load(tiny["mistral"])
    tokens, logits = zip(*models.stream(model, IDS, max_new_tokens=20), strict=True)
    torch.testing.assert_close(torch.stack(logits), rows, atol=1e-5 * rows.abs().max().item(), rtol=0)
    assert list(tokens) == expected.tolist()


@pytest.mark.parametrize(
    ("ids", "new", "message"),
    [
        (IDS, 61, "4 prompt tokens \\+ 61 new tokens exceed the context of 64"),
        (IDS, 0, "4 prompt tokens and 0 new tokens"),
        (IDS[:, :0], 1, "0 prompt tokens"),
        (IDS.repeat(2, 1), 1, r"shape \[2, 4\]; expected one prompt"),
    ],
)
def test_impossible_requests_are_refused(ids, new, message, tiny):
    with pytest.raises(ValueError, match=message):
        next(iter(models.stream(models.load(tiny["mistral"]), ids, max_new_tokens=new)))


@pytest.mark.parametrize(("values", "message"), [((-1.0, 1.0), "temperature=-1.0"), ((1.0, 0.0), "top_p=0.0")])
def test_impossible_sampling_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(*values)
