"""The plots of bench/comm.py and bench/links.py: times over sizes as lines, times of shapes as bars.

python -m tp_attention.bench.comm_plots benchmarks      # draws a folder's CSV files of bench/comm.py
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tp_attention.bench.comm_peers import GEMM
from tp_attention.bench.plots import OUR_COLOUR, PEER_COLOURS, grouped
from tp_attention.bench.results import OURS

Row = Mapping[str, Any]


def main(folder: Path) -> None:
    """Draw the CSV files of bench/comm.py in folder."""
    for name, draw in (("all_reduce", lines), ("projection_all_reduce", bars)):
        with (folder / f"{name}.csv").open(newline="") as stream:
            rows = [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(stream)]
        print(draw(name, rows, folder / f"{name}.png"))


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def canvas(title: str, width: float = 9.0, panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure with this title, and the axes of its panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: it keeps state, and may look for a screen

    figure = Figure(figsize=(width, 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    each = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in each:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    each[0].set_ylabel("µs")
    return figure, each


def lines(name: str, rows: Sequence[Row], path: Path) -> Path:
    """Time over size, a line for each contender, the link's floor dashed."""
    figure, (axes,) = canvas(_title(name, rows))
    for who, colour in _colours(rows).items():
        points = [(row["bytes"], row["us"]) for row in rows if row["who"] == who and row["us"] != ""]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=who, color=colour)
    floors = {row["bytes"]: row["link_floor_us"] for row in rows if row["link_floor_us"] != ""}
    if floors:
        axes.plot(list(floors), list(floors.values()), "k--", linewidth=1, label="link floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5 * min(row["us"] for row in rows if row["us"] != ""))  # the floor goes on down
    labels = {row["bytes"]: row["row"] for row in rows}
    axes.set_xticks(list(labels), list(labels.values()), rotation=30)
    return save(figure, path)


def bars(name: str, rows: Sequence[Row], path: Path) -> Path:
    """Time of each shape in groups of bars, what cannot be beaten dashed."""
    shapes, colours = list(dict.fromkeys(row["row"] for row in rows)), _colours(rows)
    figure, (axes,) = canvas(_title(name, rows), max(9.0, 1.1 * len(shapes) + 3))
    times = {(row["row"], row["who"]): row["us"] for row in rows if row["us"] != ""}
    grouped(axes, shapes, colours, times)
    limits = {row["row"]: row["limit_us"] for row in rows if row["limit_us"] != ""}
    for j, shape in enumerate(shapes):
        if shape in limits:
            label = None if j else f"limit: {GEMM} or link"
            axes.plot((j - 0.46, j + 0.46), (limits[shape],) * 2, "k--", linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), shapes, rotation=30)
    return save(figure, path)


def save(figure: Any, path: Path) -> Path:
    """Write the figure, with its legend beside it."""
    figure.legend(fontsize=8, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Of those with a time: ours stands out."""
    who = list(dict.fromkeys(row["who"] for row in rows if row["us"] != ""))
    peers = [name for name in who if name != OURS]
    return {
        name: OUR_COLOUR if name == OURS else PEER_COLOURS[peers.index(name) % len(PEER_COLOURS)]
        for name in who
    }  # fmt: skip


def _title(name: str, rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"{name}, bf16, {int(first['ranks'])} x {first['device']}, torch {first['torch']}, triton {first['triton']}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
