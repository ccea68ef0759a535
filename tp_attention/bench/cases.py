"""One row of a kernel benchmark and how it is measured: right first, then fast, then written down.

A case names its work, our function, its peers and the truth. A peer that fails, or is not installed, costs its own line
and nothing else. Ours failing, or being less exact than allowed, is written down too; the caller raises at the end, so
that the other rows of an expensive run are there. All contenders of a row hold their layouts and scratch until the last
is timed, up to some 15 GB; where that is too much, the one who finds no room has the error as its note.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tp_attention.autotune.comparison import relative_error as relative_error  # asked for here by every benchmark
from tp_attention.bench import timing
from tp_attention.bench.results import OURS, KernelRow, device_name

log = logging.getLogger("tp_attention")

ALLOWED = 1.5  # times the error of the case's baseline: another order of the sums, another rounding of probabilities
ALLOWED_DRY = 5.0  # of a dry run's few values the greatest error is chance
WRONG = 10  # times the baseline's error and more is no rounding: a peer whose time does not count
SAMPLED_ROWS = 64  # of each head or matrix are compared with fp64, which takes too long for all of them

Inputs = tuple[Tensor, ...]
Prepare = Callable[..., Callable[[], Any]]  # inputs -> a call without arguments; its layouts are made here, untimed


@dataclass(frozen=True)
class Case:
    """make: one more copy of the inputs. ours and peers: Prepare of those. baseline: the peer whose error bounds ours.

    work: FLOPs for "TFLOP/s", bytes for "TB/s". truth(*inputs): from a result, its error against fp64.
    """

    benchmark: str
    name: str
    dtype: torch.dtype
    work: float
    unit: str
    make: Callable[[], Inputs]
    ours: Prepare
    peers: Mapping[str, Prepare]
    baseline: str
    truth: Callable[..., Callable[[Any], float]]
    reads: int | None = None  # bytes of a copy that ours reads, where that is not all of it


class Unavailable(Exception):
    """A peer that is not here: said once in the log, no row."""


def run(case: Case, peers: Collection[str], ceiling: float | None, device: torch.device) -> list[KernelRow]:
    """Measure ours and the wanted peers: made ready in that order, timed in turns. ceiling: in the case's unit."""
    inputs = case.make()
    error_of = case.truth(*inputs)
    checked: dict[str, tuple[timing.Contender | None, float | None, str]] = {}
    baseline = _error(case.peers[case.baseline], inputs, error_of)
    factor = ALLOWED if device.type == "cuda" else ALLOWED_DRY
    allowed = None if isinstance(baseline, str) else factor * baseline

    nbytes = case.reads or sum(x.nbytes for x in inputs)
    copies = [inputs, *(case.make() for _ in range(timing.copies_needed(nbytes, device) - 1))]
    for who, prepare in {OURS: case.ours, **{who: case.peers[who] for who in case.peers if who in peers}}.items():
        error = _error(prepare, inputs, error_of)
        if isinstance(error, str):
            if error:
                checked[who] = None, None, error
            continue
        note = ""
        if allowed is not None and not error <= allowed * (1 if who == OURS else WRONG / factor):
            note = f"inexact: error {error:.2e}, allowed {allowed:.2e}" if who == OURS else "wrong result"
        try:
            checked[who] = timing.ready([prepare(*copy) for copy in copies], device), error, note
        except Exception as failure:  # recorded: it is one line of many
            checked[who] = None, error, reason(failure, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what one needed to get ready is of sizes that the next has no use for

    ready = {who: contender for who, (contender, _, _) in checked.items() if contender is not None}
    times = dict(zip(ready, timing.in_turns([*ready.values()], device), strict=True))
    rivals = [time.ms for who, time in times.items() if who != OURS and not checked[who][2]]
    best = min(rivals, default=None)
    return [
        KernelRow(
            benchmark=case.benchmark,
            row=case.name,
            dtype=str(case.dtype).removeprefix("torch."),
            who=who,
            ms=time.ms if time else None,
            lower=time.lower if time else None,
            upper=time.upper if time else None,
            samples=time.samples if time else None,
            rate=case.work / time.ms / 1e9 if time else None,
            unit=case.unit,
            ceiling=ceiling,
            best=best / time.ms if best and time else None,
            error=error,
            allowed=allowed if who == OURS else None,
            note=note,
            **stamp(device),
        )
        for who, (_, error, note) in checked.items()
        for time in [times.get(who)]
    ]


def _error(prepare: Prepare, inputs: Inputs, error_of: Callable[[Any], float]) -> float | str:
    """The error of one run, or why there is none; "" where the peer is not installed."""
    try:
        return error_of(prepare(*inputs)())
    except Unavailable as why:
        _say_once(str(why))
        return ""
    except Exception as failure:
        return reason(failure, inputs[0].device)


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning("%s", text)


def reason(failure: Exception, device: torch.device) -> str:
    """A failure as one line. Raises where it broke the device's context, and with it all that would follow."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"


@functools.cache
def stamp(device: torch.device) -> dict[str, str]:
    """Where a row was measured, and when the run began: rows of one date and device compare."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    return {"device": device_name(device), "torch": torch.__version__, "triton": triton, "date": date}


def sampled(count: int, device: torch.device) -> Tensor:
    """Indices of the rows to compare: all where they are few, else the ends and random ones, sorted."""
    if count <= SAMPLED_ROWS:
        return torch.arange(count, device=device)
    middle = 1 + torch.randperm(count - 2, device=device)[: SAMPLED_ROWS - 2].sort().values
    return torch.cat((middle.new_tensor([0]), middle, middle.new_tensor([count - 1])))
