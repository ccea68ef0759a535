"""One PNG per benchmark and unit: grouped bars of everyone's rate at each shape, and the ceiling of the same run.

`tp-attention bench --plot` draws what it measured, `python -m tp_attention.bench.plots FOLDER` a folder's CSV files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tp_attention.bench.results import OURS, KernelRow, read

# Ours stands out, peers keep their colour from plot to plot (as far as there are colours).
OUR_COLOUR, PEER_COLOURS = "#d1495b", ("#30638e", "#8fb8de", "#a7a8aa", "#edae49", "#6a994e", "#003d5b", "#bc9ec1")


def main(folder: Path) -> None:
    """Draw every CSV file of kernel rows in folder; of a row measured twice, the last."""
    for path in sorted(folder.glob("*.csv")):
        for png in plot([row for row in read(path) if row.benchmark != "ceilings"], folder):
            print(png)


def plot(rows: Sequence[KernelRow], folder: Path) -> list[Path]:
    """Write BENCHMARK-UNIT.png files into folder, and return their paths."""
    groups: dict[tuple[str, str], list[KernelRow]] = {}
    for row in rows:
        if row.rate is not None:
            groups.setdefault((row.benchmark, row.unit), []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (benchmark, unit), members in groups.items():
        path = folder / f"{benchmark}-{'flops' if unit == 'TFLOP/s' else 'bytes'}.png"
        _bars(benchmark, unit, members, path)
        paths.append(path)
    return paths


def check() -> None:
    """Raise RuntimeError before anything is measured if plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RuntimeError("plots need matplotlib: pip install 'tp_attention[bench]', or pass --no-plot") from None


def _bars(benchmark: str, unit: str, rows: Sequence[KernelRow], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: it keeps state, and may look for a screen

    shapes = list(dict.fromkeys(row.row for row in rows))
    who = sorted({row.who for row in rows}, key=lambda name: (name != OURS, name))
    rate = {(row.row, row.who): row.rate or 0.0 for row in rows}
    figure = Figure(figsize=(max(7.0, 1.3 * len(shapes) + 2), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = [OUR_COLOUR if name == OURS else PEER_COLOURS[(i - 1) % len(PEER_COLOURS)] for i, name in enumerate(who)]
    grouped(axes, shapes, dict(zip(who, colours, strict=True)), rate)
    if ceiling := next((row.ceiling for row in rows if row.ceiling), None):
        what = "matmul" if unit == "TFLOP/s" else "device copy"
        axes.axhline(ceiling, color="black", linestyle="--", linewidth=1, label=f"{what}: {ceiling:.4g} {unit}")
    axes.set_xticks(range(len(shapes)), [shape.removeprefix(benchmark).strip() for shape in shapes])
    axes.tick_params(axis="x", labelsize=8, labelrotation=30)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
    axes.set_ylabel(unit)
    axes.set_title(f"{benchmark}, {rows[0].dtype}, {rows[0].device}, torch {rows[0].torch}, triton {rows[0].triton}")
    figure.legend(fontsize=8, loc="outside right upper")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)


def grouped(
    axes: Any, shapes: Sequence[str], colours: Mapping[str, str], heights: Mapping[tuple[str, str], float]
) -> None:
    """Bars of heights[shape, name], a group for each shape, in it a bar for each name of colours that has one."""
    width = 0.84 / max(1, len(colours))
    for i, (name, colour) in enumerate(colours.items()):
        at = [j for j, shape in enumerate(shapes) if (shape, name) in heights]
        left = [j + (i - (len(colours) - 1) / 2) * width for j in at]
        axes.bar(left, [heights[shapes[j], name] for j in at], width, label=name, color=colour)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
