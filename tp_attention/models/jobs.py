"""What each rank does for `tp-attention generate` and `embed`: load, run, compare, and report on rank 0.

Results go to standard output; bars, tables and the comparison to standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, TextStreamer

from tp_attention import launch
from tp_attention.checkpoint.formats.native import MANIFEST
from tp_attention.comm import TPGroup, all_gather, barrier, broadcast
from tp_attention.models.comparison import Comparison, compare_embeddings, compare_logits
from tp_attention.models.embedding import embed, tokenize
from tp_attention.models.folders import resolve
from tp_attention.models.generation import Sampling, check_length, stop_ids, stream
from tp_attention.models.loading import checkpoint_dtype, held_bytes, load, policy_for
from tp_attention.sharding import format_range

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")


@dataclass(frozen=True)
class Job:
    """What both commands share. name: as the user gave it. folder: where it is. tp: None takes all ranks there are.

    Raises ValueError for a check of our own files, which Hugging Face's model cannot read.
    """

    name: str
    folder: Path
    tp: int | None
    dtype: torch.dtype | None
    check: bool
    quiet: bool

    def __post_init__(self) -> None:
        if self.check and (self.folder / MANIFEST).is_file():
            raise ValueError(
                f"--check compares with Hugging Face's own model, which does not read the files in {self.folder}; "
                "check the model they were cut from, or what `tp-attention reshard --format hf --tp 1` makes of them"
            )


def prepare(model: str, tp: int | None, command: str) -> Path:
    """The folder of a model, converted where needed. Raises ValueError where it does not fit `command` or tp."""
    folder = resolve(model)
    config = _config(folder, command)
    policy_for(config).plan(config, tp or 1, torch.float32)
    if not any((folder / name).is_file() for name in TOKENIZERS):  # transformers would make up an empty one
        raise ValueError(f"{folder} has no tokenizer; copy one of {', '.join(TOKENIZERS)} beside config.json")
    return folder


def generate(job: Job, prompt: str, max_new_tokens: int, sampling: Sampling) -> None:
    """Stream the continuation of rank 0's `prompt`. ValueError for bad input, RuntimeError when the check fails."""
    with _tensor_parallel(job.tp) as group:
        config = _config(job.folder, "generate")
        tokenizer = AutoTokenizer.from_pretrained(job.folder)
        ids = _from_rank_0(torch.tensor([tokenizer(prompt, verbose=False)["input_ids"]], dtype=torch.long), group)
        check_length(config, ids.shape[1], max_new_tokens)
        model = _load(job, config, group)
        decoding = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}  # as the model wrote it
        streamer = TextStreamer(tokenizer, skip_prompt=job.quiet, **decoding)
        printing = group.rank == 0
        if printing:
            streamer.put(ids)
        tokens, logits, times = [], [], []
        steps = stream(model, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids(model))
        for token, scores in steps:
            times.append(time.perf_counter())
            tokens.append(token)
            if job.check:
                logits.append(scores)
            if printing:
                streamer.put(torch.tensor([token]))
        if printing:
            streamer.end()
        decoded = len(times) - 1  # the first token comes out of the prefill
        _report(job, model, "tokens/s", decoded / (times[-1] - times[0]) if decoded else float("nan"))
    if job.check and group.rank == 0:  # the other ranks need not wait
        whole = torch.cat([ids, torch.tensor([tokens])], dim=1)
        _verdict(compare_logits(job.folder, whole, torch.stack(logits), model.dtype))


def embed_texts(job: Job, texts: list[str]) -> None:
    """Print the cosine similarities of `texts`. Raises ValueError for bad input, RuntimeError when the check fails."""
    with _tensor_parallel(job.tp) as group:
        config = _config(job.folder, "embed")
        batch = tokenize(AutoTokenizer.from_pretrained(job.folder), texts, config.max_position_embeddings)
        model = _load(job, config, group)
        start = time.perf_counter()
        embeddings = embed(model, job.folder, batch)
        seconds = time.perf_counter() - start
        if group.rank == 0:
            _print_similarities(torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu(), texts)
        _report(job, model, "texts/s", len(texts) / seconds)
    if job.check and group.rank == 0:
        _verdict(compare_embeddings(job.folder, batch, embeddings, model.dtype))


@contextmanager
def _tensor_parallel(tp: int | None) -> Iterator[TPGroup]:
    """The group of all ranks. Raises ValueError where a launcher started another number of them than `tp`."""
    with launch.init() as world:
        if tp is not None and tp != world.size:
            raise ValueError(
                f"--tp {tp} but {world.launcher} started {world.size} ranks; every rank takes part, so leave --tp out "
                f"or start {tp} ranks"
            )
        yield world.tp


def _from_rank_0(ids: Tensor, group: TPGroup) -> Tensor:
    """Rank 0's ids [1, T] on every rank: under a launcher only rank 0 has read standard input."""
    count = int(broadcast(torch.tensor([ids.shape[1]], device=group.device), group))
    shared = ids if group.rank == 0 else ids.new_empty(1, count)
    return broadcast(shared.to(group.device), group).cpu()


def _config(folder: Path, command: str) -> PreTrainedConfig:
    """The model's config. Raises ValueError for a model that is not made for `command`."""
    config = AutoConfig.from_pretrained(folder)
    policy = policy_for(config)
    if policy.command != command:
        raise ValueError(f"{config.architectures[0]} is a model for `tp-attention {policy.command}`, not for {command}")
    return config


def _load(job: Job, config: PreTrainedConfig, group: TPGroup) -> PreTrainedModel:
    expected = policy_for(config).plan(config, group.size, job.dtype or checkpoint_dtype(config))
    columns = (TextColumn("loading rank 0"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    hidden = job.quiet or group.rank != 0 or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("loading", total=expected.weight_bytes(group.rank))
        model = load(job.folder, group, dtype=job.dtype, progress=lambda count: bar.advance(task, count))
    barrier(group)  # a rank that could not load has failed by now: nobody prints half an answer
    return model


def _report(job: Job, model: PreTrainedModel, unit: str, speed: float) -> None:
    """A table of what each rank holds and how fast it was, printed by rank 0."""
    group, plan = model.tp_group, model.shard_plan
    mine = torch.tensor([[held_bytes(model), speed]], dtype=torch.float64, device=group.device)
    measured = all_gather(mine, group, dim=0, sizes=[1] * group.size).tolist()
    if job.quiet or group.rank != 0:
        return
    table = Table(
        title=f"{job.name}, {group.size} rank{'s' if group.size > 1 else ''}, {group.device.type}, {model.dtype}"
    )
    for column in ("rank", "query heads", "kv heads", "weight bytes", "as planned", unit):
        table.add_column(column, justify="right")
    for rank, (held, rate) in enumerate(measured):
        planned = plan.weight_bytes(rank)
        table.add_row(
            str(rank),
            format_range(plan.q_heads(rank)),
            format_range(plan.kv_head_range(rank)),
            f"{int(held):,}",
            "yes" if held == planned else f"no: {planned:,}",
            f"{rate:.1f}" if rate == rate else "–",  # a single token has no rate
        )
    Console(stderr=True).print(table)


def _verdict(comparison: Comparison) -> None:
    """Print it; a difference past the tolerance is a RuntimeError."""
    print(comparison, file=sys.stderr)
    if not comparison.passed:
        raise RuntimeError("the sharded model differs from the unsharded one; please report this")


def _print_similarities(embeddings: Tensor, texts: list[str]) -> None:
    table = Table(title="cosine similarity")
    table.add_column("", justify="right")
    for number in range(1, len(texts) + 1):
        table.add_column(str(number), justify="right", no_wrap=True, min_width=7)
    table.add_column("text", no_wrap=True)
    for number, row in enumerate((embeddings @ embeddings.T).tolist(), 1):
        table.add_row(str(number), *(f"{value:.4f}" for value in row), texts[number - 1].replace("\n", " "))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fit into
        console = Console(width=20 + 10 * len(texts) + max(map(len, texts)))
    console.print(table)
