"""`tp-attention bench`: which rows, which peers, in which order, and where the results go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch

from tp_attention.bench import attention, ceilings, plots, projections
from tp_attention.bench.cases import Case, run
from tp_attention.bench.results import OURS, KernelRow, append

Cases = Callable[[bool, torch.device], Iterator[Case]]

KERNELS: dict[str, tuple[Cases, ...]] = {
    "attention": (attention.prefill,),
    "decode": (attention.decode,),
    "projections": (projections.norm_qkv, projections.linear, projections.int8),
    "materialised": (attention.materialised,),
}
GENERATION = "generation"
BENCHMARKS = (*KERNELS, GENERATION)


def bench(
    names: Sequence[str], rows: Sequence[str] | None, peers: Sequence[str] | None, out: Path, plot: bool, tiny: bool
) -> None:
    """Measure; rows: names containing any of these; peers: these alone; None: all. Prints and appends row by row.

    Raises ValueError on unknown names, and at the end RuntimeError naming our rows that failed or were inexact.
    """
    if unknown := set(names) - set(BENCHMARKS):
        raise ValueError(f"unknown benchmarks {sorted(unknown)}; known: {', '.join(BENCHMARKS)}")
    device = torch.device("cuda", 0) if torch.cuda.device_count() else torch.device("cpu")
    if not names:
        names = BENCHMARKS if device.type == "cuda" else (*KERNELS,) if tiny else (GENERATION,)
    kernels = [name for name in names if name != GENERATION]
    if kernels and device.type == "cpu" and not tiny:
        raise ValueError(f"{', '.join(kernels)}: these shapes need a GPU; --tiny tries small ones here")

    cases = {name: [case for make in KERNELS[name] for case in make(tiny, device)] for name in kernels}
    prompts, writers = _generation(names)
    known = [case.name for members in cases.values() for case in members] + prompts
    chosen = {name for name in known if rows is None or any(part in name for part in rows)}
    if not chosen:
        raise ValueError(f"no row matches {rows}; known: {', '.join(known)}")
    known_peers = list(dict.fromkeys([*(p for m in cases.values() for case in m for p in case.peers), *writers]))
    if unknown := set(peers or ()) - set(known_peers):
        raise ValueError(f"unknown peers {sorted(unknown)}; known: {', '.join(known_peers)}")
    wanted = known_peers if peers is None else peers
    if plot and kernels:
        plots.check()

    cases = {name: [case for case in members if case.name in chosen] for name, members in cases.items()}
    cases = {name: members for name, members in cases.items() if members}
    faults: list[str] = []
    if cases:
        faults = _kernels(cases, wanted, out, plot, tiny, device)
    if todo := [prompt for prompt in prompts if prompt in chosen]:
        from tp_attention.bench import generation

        for measured in generation.measure(todo, [peer for peer in wanted if peer in writers], device):
            append(out / "generation.csv", measured)
            for row in measured:
                print(row, flush=True)
    if faults:
        raise RuntimeError(f"{len(faults)} rows of ours failed: {'; '.join(faults)}")


def _generation(names: Collection[str]) -> tuple[list[str], list[str]]:
    """Rows and peers of whole-model generation, where it is wanted: it imports transformers."""
    if GENERATION not in names:
        return [], []
    from tp_attention.bench import generation

    return list(generation.PROMPTS), list(generation.PEERS)


@torch.no_grad()
def _kernels(
    cases: dict[str, list[Case]], peers: Sequence[str], out: Path, plot: bool, tiny: bool, device: torch.device
) -> list[str]:
    """Run them; return what is wrong with our rows."""
    faults = []
    dtypes = list(dict.fromkeys(case.dtype for members in cases.values() for case in members))
    limits = ceilings.measure(dtypes, tiny, device)
    _save(out / "ceilings.csv", limits)
    for name, members in cases.items():
        done: list[KernelRow] = []
        for case in members:
            measured = run(case, peers, ceilings.of(limits, case.unit, case.dtype), device)
            _save(out / f"{name}.csv", measured)
            done += measured
            faults += [f"{row.row}: {row.note}" for row in measured if row.who == OURS and row.note]
        if plot:
            for path in plots.plot(done, out):
                print(path, flush=True)
    return faults


def _save(path: Path, rows: list[KernelRow]) -> None:
    append(path, rows)
    for row in rows:
        print(row, flush=True)
