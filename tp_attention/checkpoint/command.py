"""The bodies of `tp-attention reshard` and `inspect`: numbers for people around the functions of this package."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tp_attention.checkpoint.inspection import Inspection, inspect
from tp_attention.checkpoint.reshard import Report, reshard

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def run_reshard(
    source: str | Path, destination: str | Path, tp: int, quiet: bool, max_memory: str | None, **options: Any
) -> None:
    """Reshard with a progress bar on a terminal, then say what was written."""
    memory = None if max_memory is None else parse_bytes(max_memory)
    with _bar(quiet or options["dry_run"]) as progress:
        report = reshard(source, destination, tp, max_memory=memory, progress=progress, **options)
    if not quiet:
        print(describe_report(report))


def run_inspect(path: str | Path, tp: int | None, tensors: bool, **options: Any) -> None:
    """Print what a checkpoint is."""
    print(describe_inspection(inspect(path, tp, **options), tensors))


def parse_bytes(text: str) -> int:
    """Bytes of "2GB", "512MiB", "1.5 G" or "1000". Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not found or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no size; write it like 2GB, 512MiB or 1000000")
    return int(float(found[1]) * UNITS[found[2]])


def format_bytes(count: float) -> str:
    """`1.47 GB`: three digits and a unit of a power of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def describe_report(report: Report) -> str:
    """Some lines: what was or would be written, memory, and the legal tp."""
    verb = "wrote" if report.written else "would write"
    lines = [f"{verb} {report.destination}: {report.format}, tp={report.tp}, {report.tensors} tensors"]
    lines += [f"  {path}  {size:,} bytes" for path, size in report.files.items()]
    total = f"{format_bytes(report.total_bytes)} in {len(report.files)} files"
    if report.written:
        rate = (report.total_bytes - report.resumed) / max(report.seconds, 1e-9)
        kept = f", {format_bytes(report.resumed)} of it kept from an earlier run" if report.resumed else ""
        lines.append(f"{total} in {report.seconds:.1f} s ({format_bytes(rate)}/s){kept}")
    else:
        lines.append(total)
    lines.append(f"memory for {report.workers} workers: {format_bytes(report.peak_memory)}")
    if not report.written:
        lines.append(f"legal tp as {report.format}: {_numbers(report.legal_tp)}")
    return "\n".join(lines + report.notes)


def describe_inspection(found: Inspection, tensors: bool) -> str:
    """Some lines and the table of who owns what, for the checkpoint's own cut or for `tp` ranks."""
    plan = found.plan
    size = sum(found.bytes_by_dtype.values())
    dtypes = ", ".join(f"{format_bytes(count)} of {dtype}" for dtype, count in found.bytes_by_dtype.items())
    lines = [
        f"{found.path}: {found.format}, layout {found.layout}, cut for tp={plan.tp}",
        f"{len(found.tensors)} tensors, {format_bytes(size)}: {dtypes}",
        f"{plan.layers} layers, hidden {plan.hidden_size}, MLP {plan.intermediate_size}, vocabulary {plan.vocab_size}",
        *(f"legal tp as {format}: {_numbers(legal)}" for format, legal in found.legal_tp.items()),
        "",
        found.owners.describe(),
    ]
    if found.metadata:
        lines += ["", "metadata:"]
        lines += [f"  {key}: {_short(value)}" for key, value in found.metadata.items()]
    if tensors:
        lines += ["", "rank  tensor  dtype  shape  ours"]
        for info in found.tensors:
            dtype = str(info.dtype).removeprefix("torch.")
            parts = "" if info.parts == ("whole",) else f" ({', '.join(info.parts)})"
            lines.append(f"{info.rank:4}  {info.name}  {dtype}  {list(info.shape)}  {info.native}{parts}")
    return "\n".join(lines)


def _numbers(numbers: list[int]) -> str:
    """1, 2, 4; runs of three and more as 1–9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(texts) or "none"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."


@contextmanager
def _bar(hidden: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar with bytes and rate on standard error, where that is a terminal."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("reshard", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
