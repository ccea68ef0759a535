"""Rank 0 reads the cache or measures; every rank installs what it found, or raises what it failed with.

One message, broadcast whatever happens on rank 0, so no rank waits for one that raised. Limit: a GPU that a kernel
broke can send no message; then the group's time limit and heartbeat end the others.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tp_attention.autotune import cache as files
from tp_attention.autotune.layer import LayerShape, launches
from tp_attention.autotune.search import Report, search
from tp_attention.autotune.spaces import ANY_DTYPE, SPACES, Entry
from tp_attention.comm import TPGroup, broadcast
from tp_attention.kernels import configs
from tp_attention.user_cache import cache_directory

log = logging.getLogger("tp_attention")

BUDGET_S = 60.0  # in all: people wait for it, once per GPU model and shape; what is compiled later is not tried

Tune = Callable[[LayerShape, torch.device, float, Report], list[Entry]]


def tune_layer(layer: LayerShape, device: torch.device, seconds: float, report: Report) -> list[Entry]:
    """The entries that beat the tables' for this layer on this GPU."""
    families = ANY_DTYPE if layer.dtype == torch.float32 else tuple(SPACES)
    return search(launches(layer, device), device, seconds, families=families, report=report)


def tune_together(
    layer: LayerShape, group: TPGroup, folder: Path | None, *, quiet: bool, tune: Tune = tune_layer
) -> dict[str, int]:
    """autotune, on any device; `tune`, on rank 0 alone, is asked where there is no cache."""
    entries: list[Entry] = []
    failure: Exception | None = None
    message = ""
    if group.rank == 0:
        try:
            entries = _found(layer, group, folder or cache_directory(), quiet, tune)
            message = json.dumps({"entries": files.encoded(entries)})
        except Exception as error:  # raised below, after the others heard of it
            failure = error
            message = json.dumps({"error": f"{type(error).__name__}: {error}"})
    said = json.loads(_broadcast(message, group))
    if failure is not None:
        raise failure
    if group.rank != 0:
        if "error" in said:
            raise RuntimeError(
                f"autotune failed on rank 0 of group {group.name}, here is rank {group.rank} of {group.size}: "
                f"{said['error']}"
            )
        entries = files.decoded(said["entries"])
    for entry in entries:
        configs.remember(*entry)
    return dict(Counter(entry.kernel for entry in entries))


def _found(layer: LayerShape, group: TPGroup, folder: Path, quiet: bool, tune: Tune) -> list[Entry]:
    about = files.circumstances(layer, group.device)
    path = files.file_of(folder, about)
    entries = files.read(path, about)
    if entries is not None:
        log.info("autotune: %d entries from %s", len(entries), path)
        return entries
    start = time.monotonic()
    # the others wait in a broadcast meanwhile, and that has a limit too
    seconds = BUDGET_S if group.size == 1 else min(BUDGET_S, group.timeout / 2)
    with _bar(seconds, quiet) as report:
        entries = tune(layer, group.device, seconds, report)
    log.info("autotune: %d entries beat the tables', found in %.0f s", len(entries), time.monotonic() - start)
    files.write(path, about, entries)
    return entries


def _broadcast(text: str, group: TPGroup) -> str:
    """Rank 0's text."""
    content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=group.device)
    length = broadcast(torch.tensor([len(content)], device=group.device), group)
    if group.rank != 0:
        content = torch.empty(int(length), dtype=torch.uint8, device=group.device)
    return bytes(broadcast(content, group).tolist()).decode()


@contextmanager
def _bar(seconds: float, quiet: bool) -> Iterator[Report]:
    """A bar of the time there is, on standard error where that is a terminal; the log has a line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    if hidden:
        log.info("autotune: measuring for at most %.0f s", seconds)
    columns = TextColumn("autotune"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task, start = bar.add_task("", total=seconds), time.monotonic()
        yield lambda text: bar.update(task, description=text, completed=time.monotonic() - start)
