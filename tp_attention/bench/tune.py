"""Find the configurations of the kernels' frozen tables: python -m tp_attention.bench.tune --family flash_prefill.

Processes that share Triton's disk cache compile all candidates first, a processor each, because the GPU is the dear
part. Each candidate's result is then held against that of today's entry, and timed as the benchmarks time. Every
measurement is appended to tune.csv at once; the entries that won are printed as Python source, ready to paste.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from tp_attention.autotune import comparison, search
from tp_attention.autotune.spaces import entry
from tp_attention.bench import timing
from tp_attention.bench.candidates import FAMILIES, Problem, table, tables
from tp_attention.bench.cases import reason, stamp
from tp_attention.bench.results import Out, append_records, folder
from tp_attention.kernels import configs

Best = dict[configs.Key, tuple[Any, float]]  # per key the winner and its speed over the entry of today

COLUMNS = ("family", "key", "problem", "config", "ms", "lower", "upper", "speedup", "note")
BUDGET_MS = 40.0


def tune(family: str, keys: str, limit: float, out: Path, tiny: bool, device: torch.device) -> Best:
    """Time every candidate on every problem whose key contains `keys`; per key the best one and its speed-up.

    A candidate's score is the geometric mean over the key's problems; one that fails on any of them is out.
    """
    deadline = time.monotonic() + limit
    speedups: dict[configs.Key, list[dict[Any, float]]] = {}
    with search.watched():
        problems = list(_asked(family, keys, tiny, device))
        for done, (problem, key, default) in enumerate(problems):
            share = (deadline - time.monotonic()) / (len(problems) - done)
            print(f"{family} {key} {problem.name}", flush=True)
            speedups.setdefault(key, []).append(_measure(family, problem, key, default, share, out, device))
    return {key: comparison.winner(next(iter(measured[0])), measured) for key, measured in speedups.items()}


def _asked(family: str, keys: str, tiny: bool, device: torch.device) -> Iterator[tuple[Problem, configs.Key, Any]]:
    """The family's problems with the key that each asks the table for and the entry it gets: one launch, watched."""
    none = True
    for problem in FAMILIES[family].problems(tiny, device):
        question = search.asked(problem.make())
        if question is None or question[0] != family:
            continue
        none = False
        _, key = question
        if keys in str(key):
            yield problem, key, entry(family, key)
    if none:
        print(f"{family}: no problem launches it on {device}", flush=True)


def _measure(
    family: str, problem: Problem, key: configs.Key, default: Any, seconds: float, out: Path, device: torch.device
) -> dict[Any, float]:
    """The speed of each candidate over that of `default`, which comes first, until the seconds are over."""
    deadline = time.monotonic() + seconds
    copies = timing.copies_needed(problem.reads, device)
    launches = [functools.partial(search.forced, problem.make(), family, key) for _ in range(copies)]
    expected = comparison.first(launches[0](default)).double()
    base = 0.0
    speedups: dict[Any, float] = {}
    for config in FAMILIES[family].candidates(default):
        if speedups and time.monotonic() > deadline:
            print(f"    out of time after {len(speedups)} candidates", flush=True)
            break
        measured, note = _try(launches, config, expected, device)
        record: dict[str, object] = {
            "family": family,
            "key": str(key),
            "problem": problem.name,
            "config": str(config),
            "note": note,
        }
        if measured is not None:
            base = base or measured.ms
            speedups[config] = base / measured.ms
            record |= {"ms": measured.ms, "lower": measured.lower, "upper": measured.upper}
            record |= {"speedup": speedups[config]}
            print(f"{measured.ms * 1e3:13.2f} µs {speedups[config]:6.3f}x  {config}", flush=True)
        elif config == default:
            raise RuntimeError(f"{family} {key}: today's entry {default} fails on {problem.name}: {note}")
        origin = stamp(device)
        append_records(out / "tune.csv", [*COLUMNS, *origin], [record | origin])
    return speedups


def _try(
    launches: Sequence[Callable[[Any], Any]], config: Any, expected: Tensor, device: torch.device
) -> tuple[timing.Timing | None, str]:
    """A candidate's time, or why it has none."""
    try:
        error = comparison.relative_error(comparison.first(launches[0](config)), expected)
        if not error <= comparison.TOLERANCE:
            return None, f"inexact: error {error:.2e}"
        return timing.measure([functools.partial(launch, config) for launch in launches], device, BUDGET_MS), ""
    except Exception as failure:  # too much shared memory, say: a search space is allowed to hold such
        return None, reason(failure, device)


def compile_shard(family: str, keys: str, shard: int, shards: int, tiny: bool, device: torch.device) -> None:
    """Run every shards-th candidate of every key once, for what that leaves in Triton's cache."""
    with search.watched():
        for problem, key, default in {key: (p, key, d) for p, key, d in _asked(family, keys, tiny, device)}.values():
            launch = problem.make()
            for config in itertools.islice(FAMILIES[family].candidates(default), shard, None, shards):
                with contextlib.suppress(Exception):  # the one who times it will say why
                    search.forced(launch, family, key, config)
                    torch.cuda.synchronize()


def _compile(family: str, keys: str, limit: float) -> None:
    """Compile all candidates, in one process per processor."""
    count = min(16, os.cpu_count() or 1)
    command = [sys.executable, "-m", "tp_attention.bench.tune", "--family", family, "--keys", keys, "--shard"]
    workers = [subprocess.Popen([*command, f"{i}/{count}"], stderr=subprocess.DEVNULL) for i in range(count)]
    deadline = time.monotonic() + limit
    try:
        for worker in workers:
            worker.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        print(f"{family}: compiling took {limit:.0f} s; the rest is compiled as it is timed", flush=True)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def show(family: str, entries: dict[configs.Key, Any], notes: dict[configs.Key, str] | None = None) -> None:
    """Print entries as Python source."""
    print(f"\n# kernels/{family}.py")
    for key, config in entries.items():
        print(f"    {key!r}: {config!r},{(notes or {}).get(key, '')}")


def main(
    family: Annotated[list[str] | None, typer.Option(help="Families to tune; repeatable. Default: all.")] = None,
    keys: Annotated[str, typer.Option(help="Only table keys whose text contains this, such as '128, 2'.")] = "",
    limit: Annotated[float, typer.Option(help="Seconds per family, half of them at most for compiling.")] = 120.0,
    out: Out = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small problems: a dry run, also without a GPU.")] = False,
    table_only: Annotated[bool, typer.Option("--table", help="Print today's tables and tune nothing.")] = False,
    shard: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Tune kernel families on this GPU and print the table entries that won."""
    known = tables() if table_only else list(FAMILIES)
    families = family or known
    if unknown := set(families) - set(known):
        raise ValueError(f"unknown families {sorted(unknown)}; known: {', '.join(known)}")
    if table_only:
        for name in families:
            show(name, table(name))
        return
    cuda = torch.cuda.device_count() > 0
    if not cuda and not tiny:
        raise ValueError("tuning needs a GPU; --tiny tries small problems here")
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    with torch.no_grad():
        if shard is not None:
            index, _, count = shard.partition("/")
            for name in families:
                compile_shard(name, keys, int(index), int(count), tiny, device)
            return
        for name in families:
            start = time.monotonic()
            if cuda:
                _compile(name, keys, limit / 2)
            best = tune(name, keys, limit - (time.monotonic() - start), folder(out, tiny), tiny, device)
            gains = {key: f"  # {speedup:.2f}x" for key, (_, speedup) in best.items()}
            show(name, {key: config for key, (config, _) in best.items()}, gains)


if __name__ == "__main__":
    typer.run(main)
