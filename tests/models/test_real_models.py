"""SmolLM2 and MiniLM, real weights: sharded numbers against Hugging Face's in fp32, and both against fp64."""

import ctypes
import os
import threading
import time

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tp_attention import models
from tp_attention.models.comparison import compare_logits
from tp_attention.models.embedding import embed, tokenize
from tp_attention.models.loading import held_bytes

PROMPT = "The capital of France is"
TEXTS = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell sharply today."]


@pytest.fixture(scope="module")
def french(smollm2):
    """Ids of a longer text, Hugging Face's fp32 logits, and the fp64 ones."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = torch.tensor([tokenizer(PROMPT + " Paris, and the capital of Italy is Rome. " * 3)["input_ids"]])
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(smollm2)
        single = model(ids).logits
        return ids, single, model.double()(ids).logits


def run_logits(world, folder, ids):
    model = models.load(folder, world.tp)
    logits = model(ids.to(world.device)).logits.cpu()  # on every rank: they compute together
    return logits if world.rank == 0 else None, held_bytes(model), model.shard_plan.weight_bytes(world.tp.rank)


def check_logits(world, ranks, folder, french):
    ids, single, double = french
    results = world(ranks, timeout=170)(run_logits, folder, ids)
    logits = results[0][0]
    largest = single.abs().max()
    difference = (logits - single).abs().max()
    assert difference <= min(3e-4, 1e-5 * largest), f"tp={ranks}: {difference:.2e} of {largest:.1f}"
    ours, theirs = ((x.double() - double).abs().max() for x in (logits, single))
    assert ours <= 2 * theirs, f"tp={ranks}: {ours:.2e} against fp64, Hugging Face {theirs:.2e}"
    assert all(held == planned for _, held, planned in results)


def test_smollm2_on_two_ranks(smollm2, french, world):
    check_logits(world, 2, smollm2, french)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [1, 3, 4, 5, 6, 7, 8, 9])
def test_smollm2_on_any_number_of_ranks(ranks, smollm2, french, world):
    check_logits(world, ranks, smollm2, french)


def run_text(world, folder, ids):
    model = models.load(folder, world.tp)
    return [token for token, _ in models.stream(model, ids, max_new_tokens=64)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_writes_the_same_64_tokens_at_every_tp(smollm2, world):
    ids = torch.tensor([AutoTokenizer.from_pretrained(smollm2)(PROMPT)["input_ids"]])
    with torch.inference_mode():
        reference = AutoModelForCausalLM.from_pretrained(smollm2)
        reference.generation_config.eos_token_id = None  # stream was told of no stop ids either
        expected = reference.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :]
    for ranks in range(1, 10):
        for tokens in world(ranks, timeout=170)(run_text, smollm2, ids):
            assert tokens == expected.tolist(), f"tp={ranks}"


def run_embeddings(world, folder):
    model = models.load(folder, world.tp)
    batch = tokenize(AutoTokenizer.from_pretrained(folder), TEXTS, 512)
    return embed(model, folder, batch).cpu(), held_bytes(model), model.shard_plan.weight_bytes(world.tp.rank)


def check_embeddings(world, ranks, folder):
    with torch.inference_mode():
        batch = tokenize(AutoTokenizer.from_pretrained(folder), TEXTS, 512)
        expected = embed(AutoModel.from_pretrained(folder).eval(), folder, batch)
    for embeddings, held, planned in world(ranks, timeout=170)(run_embeddings, folder):
        assert (embeddings - expected).abs().max() <= 1e-5
        assert held == planned


@pytest.mark.parametrize("ranks", [1, 3])
def test_minilm(ranks, minilm, world):
    check_embeddings(world, ranks, minilm)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 5, 6, 7, 8, 9, 10, 11, 12])
def test_minilm_on_any_number_of_ranks(ranks, minilm, world):
    check_embeddings(world, ranks, minilm)


def anonymous_bytes() -> int:
    """Anonymous memory of this process: what mapped files do not count towards."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def run_load_under_watch(world, folder):
    ctypes.CDLL(None).malloc_trim(0)  # what the forking process had freed would serve the weights unseen
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    model = models.load(folder, world.tp)
    done.set()
    thread.join()
    return peak - before, anonymous_bytes() - before, model.shard_plan.weight_bytes(world.tp.rank)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_peak_memory_while_loading(smollm2, world):
    """At most 1.3 times the rank's share and one whole tensor, the largest."""
    largest = 49152 * 576 * 4
    for peak, after, share in world(2)(run_load_under_watch, smollm2):
        assert share * 0.9 < after, "the watch does not see the weights"
        assert peak <= 1.3 * share + largest, f"peak {peak:,} for a share of {share:,}"


def test_check_notices_a_difference(smollm2, french):
    ids, single, _ = french
    logits = single[0, 3:-1].clone()
    assert compare_logits(smollm2, ids, logits, torch.float32).passed
    logits[2, 77] += 1e-2
    assert not compare_logits(smollm2, ids, logits, torch.float32).passed
    logits[2, 77] = float("nan")
    assert not compare_logits(smollm2, ids, logits, torch.float32).passed
