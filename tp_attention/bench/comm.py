"""Sums over ranks, bare and after a projection, beside NCCL's and torch's over symmetric memory.

    torchrun --nproc-per-node=2 -m tp_attention.bench.comm --out benchmarks
    torchrun --nproc-per-node=2 -m tp_attention.bench.comm --tiny --out rows    # a dry run, also on CPUs with gloo

First each result is held against the fp64 sum, ours also against the fp32 sum in rank order, bit for bit. Then all
take turns, as replays of CUDA graphs (by the wall clock on CPUs); times are the slowest rank's. Rows are appended to
all_reduce.csv and projection_all_reduce.csv one by one. Ours failing is an error at the end; a peer that fails has
its reason as its note. `over_ours`: this time over ours, so above 1 ours is the faster. The link's floor is what one
rank must send, 2 (n - 1) / n times the bytes, over the rate of a copy from GPU 0 to GPU 1 in the same run.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from tp_attention import launch
from tp_attention.bench import comm_peers, comm_plots, plots, timing
from tp_attention.bench.cases import reason, stamp
from tp_attention.bench.comm_peers import GEMM, Contender, Symmetric
from tp_attention.bench.results import OURS, Out, append_records, folder
from tp_attention.bench.timing import Timing
from tp_attention.comm import TPGroup

KIB, MIB = 1 << 10, 1 << 20
BYTES = (*(n * KIB for n in (8, 16, 32, 64, 128, 256, 512)), *(n * MIB for n in (1, 2, 4, 16, 64, 256)))
SHAPES = tuple((rows, width) for width in (4096, 8192) for rows in (1, 16, 64, 128, 512, 2048, 8192))
TINY_BYTES, TINY_SHAPES = (8 * KIB, 64 * KIB), ((1, 256), (96, 256))
BUDGET_MS = 60.0  # of samples for each contender
LIMIT = 2**-8  # of the largest value, for each rank: bf16 is rounded at most twice for each, by 2^-9


def main(
    out: Out = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small sizes: a dry run, also without a GPU.")] = False,
    plot: Annotated[bool, typer.Option(help="Draw both tables.")] = True,
) -> None:
    """Compare and time every size and shape."""
    with launch.init() as world, torch.inference_mode():
        group = world.tp
        if group.size == 1:
            raise ValueError("one rank has nothing to sum; start this with torchrun --nproc-per-node=2")
        if group.device.type == "cpu" and not tiny:
            raise ValueError("these sizes need GPUs; --tiny tries small ones here")
        if plot:
            plots.check()
        _tables(group, folder(out, tiny), tiny, plot)


def _tables(group: TPGroup, out: Path, tiny: bool, plot: bool) -> None:
    symmetric, rate = _symmetric(group)
    tables: dict[str, list[dict[str, object]]] = {"all_reduce": [], "projection_all_reduce": []}
    wrong: list[str] = []
    for nbytes in TINY_BYTES if tiny else BYTES:
        rows = _measured(comm_peers.all_reduce(nbytes, group, symmetric), _size(nbytes), nbytes, group, rate, wrong)
        tables["all_reduce"] += [{k: row[k] for k in row if k not in PROJECTION_ONLY} for row in rows]
        _save(tables["all_reduce"][-len(rows) :], out / "all_reduce.csv", group)
    for tokens, width in TINY_SHAPES if tiny else SHAPES:
        contenders = comm_peers.projection(tokens, width, group, symmetric)
        nbytes = tokens * width * comm_peers.DTYPE.itemsize
        rows = _measured(contenders, f"M{tokens} E{width}", nbytes, group, rate, wrong)
        tables["projection_all_reduce"] += rows
        _save(rows, out / "projection_all_reduce.csv", group)
    if plot and group.rank == 0:
        for name, draw in (("all_reduce", comm_plots.lines), ("projection_all_reduce", comm_plots.bars)):
            print(draw(name, tables[name], out / f"{name}.png"), flush=True)
    if wrong:
        raise RuntimeError("; ".join(wrong))


def _symmetric(group: TPGroup) -> tuple[Symmetric | None, float | None]:
    """torch's symmetric memory and the link's bytes a second, where there are such."""
    if group.device.type != "cuda":
        return None, None
    try:
        symmetric = timing.together(group, lambda: Symmetric(group, max(BYTES)))
        rate = symmetric.bandwidth()
    except Exception as failure:
        print(f"rank {group.rank}: no symmetric memory of torch: {reason(failure, group.device)}", flush=True)
        return None, None
    if group.rank == 0:
        how = "as the table says" if group.symmetric is not None else "by NCCL"
        print(f"{group.size} x {stamp(group.device)['device']}, link {rate / 1e9:.0f} GB/s, ours {how}", flush=True)
    return symmetric, rate


PROJECTION_ONLY = ("gemm_us", "limit_us", "over_limit")


def _measured(
    contenders: Sequence[Contender], name: str, nbytes: int, group: TPGroup, rate: float | None, wrong: list[str]
) -> list[dict[str, object]]:
    """The rows of one size. All ranks go through the same steps, and give a contender up together."""
    notes: dict[str, str] = {}
    ready: dict[str, timing.Contender] = {}
    for each in contenders:
        try:
            notes[each.who] = timing.together(group, lambda each=each: _checked(each, group))  # type: ignore[misc]
            ready[each.who] = timing.ready(each.calls, group.device, group)
        except Exception as failure:
            if group.process_group is None:  # a collective of ours failed, and with it the group
                raise
            notes[each.who] = reason(failure, group.device)
            if each.who.startswith(OURS):
                wrong.append(f"{name}, {each.who}: {notes[each.who]}")
    measured = timing.in_turns(list(ready.values()), group.device, BUDGET_MS, group)
    times: dict[str, Timing] = dict(zip(ready, measured, strict=True))
    ours, gemm = _us(times.get(OURS))[0], _us(times.get(GEMM))[0]
    best = min((times[each.who].ms * 1e3 for each in contenders if each.peer and each.who in times), default=None)
    floor = 2 * (group.size - 1) / group.size * nbytes / rate * 1e6 if rate else None
    limit = max(gemm, floor) if gemm is not None and floor is not None else None
    rows: list[dict[str, object]] = []
    for each in contenders:
        us, lower, upper = _us(times.get(each.who))
        rows.append({
            "row": name, "bytes": nbytes, "ranks": group.size, "who": each.who,
            "us": _rounded(us), "lower": _rounded(lower), "upper": _rounded(upper),
            "over_ours": _rounded(us / ours if us and ours else None),
            "best_peer_over_ours": _rounded(best / ours if each.who == OURS and best and ours else None),
            "gemm_us": _rounded(gemm), "link_floor_us": _rounded(floor), "limit_us": _rounded(limit),
            "over_limit": _rounded(us / limit if us and limit else None),
            "note": notes[each.who], **stamp(group.device),
        })  # fmt: skip
    ready.clear()
    gc.collect()  # graphs of NCCL's kernels must be gone before the process group is, and not only some time later
    if group.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _checked(contender: Contender, group: TPGroup) -> str:
    """A note on a right result. Raises RuntimeError for a wrong one."""
    if contender.result is None or contender.expected is None:
        return contender.note
    result = contender.result()
    error = ((result.double() - contender.expected).abs().max() / contender.expected.abs().max()).item()
    if not error <= group.size * LIMIT:  # a NaN neither
        raise RuntimeError(f"wrong result, error {error:.1e}")
    if contender.exact is not None and not torch.equal(result, contender.exact):
        raise RuntimeError(f"not the fp32 sum in rank order, error {error:.1e}")
    return ", ".join(filter(None, (contender.note, f"error {error:.1e}")))


def _save(rows: Sequence[dict[str, object]], path: Path, group: TPGroup) -> None:
    if group.rank:
        return
    append_records(path, list(rows[0]), rows)
    for row in rows:
        best = f"  best peer {row['best_peer_over_ours']}x" if row["best_peer_over_ours"] != "" else ""
        over = f"  {row['over_limit']}x limit" if row.get("over_limit", "") != "" else ""
        said = f"{row['us']:>10} µs  {row['over_ours']:>6}x ours{best}{over}"
        print(f"{path.stem:22} {row['row']:14} {row['who']:34} {said}  {row['note']}", flush=True)


def _size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def _us(time: Timing | None) -> tuple[float, float, float] | tuple[None, None, None]:
    """Median, lower and upper quartile in µs."""
    return (time.ms * 1e3, time.lower * 1e3, time.upper * 1e3) if time else (None, None, None)


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 3)


if __name__ == "__main__":
    typer.run(main)
