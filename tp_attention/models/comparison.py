"""The proof behind `--check`: the sharded model's numbers beside Hugging Face's own, unsharded, model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from tp_attention.models.embedding import embed

# Largest difference, in units of the largest value. fp32: a sum cut over ranks rounds in another order, through all
# layers. Halves: both models round every activation to 8 (bf16) or 11 (fp16) bits, so they differ by a few of those.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Comparison:
    """max_difference: greatest absolute difference; largest: greatest absolute value of the reference."""

    what: str
    max_difference: float
    largest: float
    tolerance: float
    agreeing: int | None = None
    compared: int | None = None

    @property
    def passed(self) -> bool:
        return self.max_difference <= self.tolerance * self.largest

    def __str__(self) -> str:
        verdict = "equal" if self.passed else "DIFFERENT"
        text = (
            f"{verdict}: greatest {self.what} difference {self.max_difference:.2e} against the unsharded Hugging Face "
            f"model, {self.max_difference / self.largest:.1e} of the largest, {self.largest:.2f} "
            f"(limit {self.tolerance:.0e})"
        )
        if self.compared is not None:
            text += f"; same best token at {self.agreeing} of {self.compared} positions"
        return text


@torch.inference_mode()
def compare_logits(folder: Path, ids: Tensor, logits: Tensor, dtype: torch.dtype) -> Comparison:
    """ids [1, T + n]: prompt and new tokens; logits [n, vocabulary]: what each new token was chosen from."""
    with _no_bars():
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(logits.device).eval()
    expected = reference(input_ids=ids[:, :-1].to(logits.device), logits_to_keep=len(logits)).logits[0]
    agreeing = int((expected.argmax(-1) == logits.argmax(-1)).sum())
    return _compare("logit", logits, expected, dtype, agreeing, len(logits))


@torch.inference_mode()
def compare_embeddings(folder: Path, batch: Any, embeddings: Tensor, dtype: torch.dtype) -> Comparison:
    """embeddings [n, E] of a tokenized batch against the unsharded encoder's."""
    with _no_bars():
        reference = AutoModel.from_pretrained(folder, dtype=dtype).to(embeddings.device).eval()
    return _compare("embedding", embeddings, embed(reference, folder, batch), dtype)


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a bar of its own for every load, terminal or not."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _compare(
    what: str,
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    agreeing: int | None = None,
    compared: int | None = None,
) -> Comparison:
    difference = (actual.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    return Comparison(what, difference, largest, TOLERANCE[dtype], agreeing, compared)
