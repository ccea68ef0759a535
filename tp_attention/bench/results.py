"""A benchmark's rows: medians with their spread, each appended to a CSV file as soon as it is measured."""

from __future__ import annotations

import csv
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

OURS = "tp_attention"


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


def summarise(row: str, unit: str, samples: Mapping[str, Sequence[float]], device: torch.device) -> list[Row]:
    """Rows of one shape: samples of us and of each peer, in units where more is better."""
    ours = statistics.median(samples[OURS])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return [
        Row(row, who, unit, median, min(values), max(values), len(values), median / ours, name, torch.__version__)
        for who, values in samples.items()
        for median in [statistics.median(values)]
    ]


def append(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a CSV file, with a header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
