"""Greedy generation of one prompt by a whole model on one rank: tokens per second beside Hugging Face's generate."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp_attention import models
from tp_attention.bench.results import OURS, Row, summarise
from tp_attention.comm import TPGroup

PEERS = ("huggingface",)
NEW_TOKENS, REPEATS = 64, 5
PROMPTS = {"generate smollm2 short": "The capital of France is", "generate smollm2 long": "one two three four " * 100}


def measure(rows: Collection[str], peers: Collection[str], device: torch.device) -> Iterator[list[Row]]:
    """The chosen rows of PROMPTS, one after another; both models run in turn so that drift hits both."""
    folder = models.resolve("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = models.load(folder, TPGroup.alone(device))
    theirs = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    theirs.generation_config.eos_token_id = None  # both write NEW_TOKENS tokens, whatever they are
    for row in rows:
        ids = torch.tensor([tokenizer(PROMPTS[row])["input_ids"]], device=device)

        def ours(ids: torch.Tensor = ids) -> list[int]:
            return [token for token, _ in models.stream(model, ids, max_new_tokens=NEW_TOKENS)]

        def hugging_face(ids: torch.Tensor = ids) -> list[int]:
            output = theirs.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            return output[0, ids.shape[1] :].tolist()

        runs = {OURS: ours} | ({"huggingface": hugging_face} if "huggingface" in peers else {})
        texts = {who: run() for who, run in runs.items()}  # the warm-up, and the proof
        if any(text != texts[OURS] for text in texts.values()):
            raise RuntimeError(f"{row}: the models write different tokens, so their speeds do not compare: {texts}")
        samples: dict[str, list[float]] = {who: [] for who in runs}
        for _ in range(REPEATS):
            for who, run in runs.items():
                start = time.perf_counter()
                count = len(run())  # reads every token back, so the device is done
                samples[who].append(count / (time.perf_counter() - start))
        yield summarise(row, "tokens/s", samples, device)
