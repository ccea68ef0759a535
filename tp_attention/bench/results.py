"""A benchmark's rows: medians with their spread, each appended to a CSV file as soon as it is measured."""

from __future__ import annotations

import csv
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
import typer

OURS = "tp_attention"
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of the CSV files and plots. Default: benchmarks, tiny ones to benchmarks-tiny."),
]


@dataclass(frozen=True)
class Row:
    """One measurement: the median of `repeats` samples in `unit`, with the least and the greatest.

    ratio: this median over ours in the same run, larger being better for the peer.
    """

    row: str
    who: str
    unit: str
    median: float
    least: float
    greatest: float
    repeats: int
    ratio: float
    device: str
    torch: str

    def __str__(self) -> str:
        return (
            f"{self.row:28} {self.who:14} {self.median:10.2f} {self.unit} "
            f"({self.least:.2f} to {self.greatest:.2f}, {self.repeats} runs)  {self.ratio:.2f}x ours"
        )


@dataclass(frozen=True)
class KernelRow:
    """One function at one shape, by us or by a peer; what was not measured is None.

    ms: the median of `samples` replays, between its quartiles lower and upper. rate: the row's work in `unit`, over
    ms; the work is the row's, also for a peer that moves or computes more. ceiling: what this device reached in
    the same run, in `unit`. best: ms of the fastest peer with a right result over this ms, so above 1 is a win.
    error: largest difference from the fp64 reference over its largest value; allowed: what ours may have. note: why
    there is no time, or what is wrong with the result.
    """

    benchmark: str
    row: str
    dtype: str
    who: str
    ms: float | None
    lower: float | None
    upper: float | None
    samples: int | None
    rate: float | None
    unit: str
    ceiling: float | None
    best: float | None
    error: float | None
    allowed: float | None
    note: str
    device: str
    torch: str
    triton: str
    date: str

    def __str__(self) -> str:
        head = f"{self.row:44} {self.who:13}"
        error = "" if self.error is None else f"  error {self.error:.1e}"
        note = f"  {self.note}" if self.note else ""
        if self.ms is None or self.rate is None:
            return head + error + note
        of = f" ({self.rate / self.ceiling:4.0%})" if self.ceiling else ""
        best = "" if self.best is None else f"  {self.best:5.2f}x best peer"
        return f"{head} {self.ms * 1e3:10.1f} µs {self.rate:7.2f} {self.unit}{of}{best}{error}{note}"


def device_name(device: torch.device) -> str:
    cpu = platform.processor() or platform.machine()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def summarise(row: str, unit: str, samples: Mapping[str, Sequence[float]], device: torch.device) -> list[Row]:
    """Rows of one shape: samples of us and of each peer, in units where more is better."""
    ours = statistics.median(samples[OURS])
    name = device_name(device)
    return [
        Row(row, who, unit, median, min(values), max(values), len(values), median / ours, name, torch.__version__)
        for who, values in samples.items()
        for median in [statistics.median(values)]
    ]


def append(path: Path, rows: Sequence[Row] | Sequence[KernelRow]) -> None:
    """Append rows of one kind to a CSV file, with a header where it is new. ValueError if it holds other columns."""
    append_records(path, [field.name for field in fields(rows[0])], [asdict(row) for row in rows])


def read(path: Path) -> list[KernelRow]:
    """The kernel rows of a CSV file; none if it holds rows of another kind."""
    floats = {"ms", "lower", "upper", "rate", "ceiling", "best", "error", "allowed"}
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != [field.name for field in fields(KernelRow)]:
            return []
        return [
            KernelRow(
                **{
                    name: text if name not in floats | {"samples"} else None if not text else float(text)
                    for name, text in record.items()
                }  # type: ignore[arg-type]
            )
            for record in reader
        ]


def folder(out: Path | None, tiny: bool) -> Path:
    """Where rows go that nobody named a place for: those of a dry run are not to get among the others."""
    return out or Path("benchmarks-tiny" if tiny else "benchmarks")


def append_records(path: Path, columns: Sequence[str], records: Sequence[Mapping[str, object]]) -> None:
    """`append` for rows that are mappings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="") as stream:
            if (found := next(csv.reader(stream), [])) != list(columns):
                raise ValueError(f"{path} has columns {found}, not {list(columns)}; move it away or take another --out")
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        if new:
            writer.writeheader()
        writer.writerows(records)
