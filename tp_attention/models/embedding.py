"""Sentence embeddings from a sharded encoder, pooled as the model's sentence-transformers files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int) -> Any:
    """A padded batch of ids and mask [n, T]. Raises ValueError for no text, or one longer than `limit` tokens."""
    if not texts:
        raise ValueError("0 texts given; pass at least 1")
    batch = tokenizer(texts, padding=True, return_tensors="pt", verbose=False)  # its length warning: ours is an error
    for number, length in enumerate(batch["attention_mask"].sum(1).tolist(), 1):
        if length > limit:
            raise ValueError(f"text {number} has {length} tokens, the model takes {limit}; shorten it")
    return batch


@torch.inference_mode()
def embed(model: PreTrainedModel, folder: Path, batch: Any) -> Tensor:
    """Embeddings [n, E] of a tokenized batch; `folder` holds the pooling files. Works on unsharded models too."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    return pool(model(**inputs).last_hidden_state, inputs["attention_mask"], folder)


def pool(states: Tensor, mask: Tensor, folder: Path) -> Tensor:
    """states [n, T, E], mask [n, T] -> [n, E]: mean over the tokens or the first token, normalised where so asked.

    Reads 1_Pooling/config.json and modules.json; without them the plain mean. Raises ValueError for another mode.
    """
    pooling = folder / "1_Pooling" / "config.json"
    asked = json.loads(pooling.read_text()) if pooling.is_file() else {"pooling_mode_mean_tokens": True}
    modes = {name for name, wanted in asked.items() if name.startswith("pooling_mode") and wanted is True}
    if modes == {"pooling_mode_mean_tokens"}:
        weights = mask[..., None].to(states.dtype)
        pooled = (states * weights).sum(1) / weights.sum(1)
    elif modes == {"pooling_mode_cls_token"}:
        pooled = states[:, 0]
    else:
        raise ValueError(f"pooling {sorted(modes)} is not supported; mean tokens or cls token, one of them, is")
    modules = folder / "modules.json"
    if modules.is_file() and any(entry["type"].endswith("Normalize") for entry in json.loads(modules.read_text())):
        pooled = torch.nn.functional.normalize(pooled, dim=-1)
    return pooled
