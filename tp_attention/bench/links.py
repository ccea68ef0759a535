"""A MODEL, not a measurement: how long an all-reduce would take on 2 to 64 GPUs, in hosts of 8.

    python -m tp_attention.bench.links benchmarks      # reads all_reduce.csv, draws all_reduce-model.png

t(S) = alpha + beta S, in µs for S bytes (Hockney 1994), is fitted to the measured times of ours and of NCCL. With n
ranks, and B = (n0 − 1) / beta from our one shot at the n0 ranks that were measured:

    one shot   alpha + (n − 1) S / B                        n ≤ 8, one host: everyone sends all to everyone
    two shot   alpha + delay + 2 (n − 1) / n S / B          n ≤ 8, one host: sum a chunk, send the sum round
    NCCL       fixed + 2 (n − 1) hop + 2 (n − 1) / n S / B'     a ring (Patarasuk and Yuan 2009)

delay, of the second shot, is the difference between the alphas of our two ways, or alpha where two shots were not
measured. fixed is what NCCL's alpha leaves beside the 2 (n0 − 1) hops that are in it. hop is the mean round the ring:
once there are several hosts one hop a host takes `latency`. B' = 2 (n0 − 1) / n0 / beta of NCCL; between hosts it is at
most `bandwidth` times the GPUs of a host, for NCCL lays a ring through each GPU's adapter.

Not in it: NCCL's trees and its choice among protocols, switches that are shared, and what a GPU does beside.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tp_attention.bench import comm_plots, plots
from tp_attention.bench.plots import OUR_COLOUR, PEER_COLOURS
from tp_attention.bench.results import OURS

HOST, MOST = 8, 64  # GPUs of a host, and of what is drawn
SIZES = {"64 KiB": 64 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
ONE_SHOT, TWO_SHOT, NCCL = "one shot", "two shot", "NCCL ring"
Times = Mapping[int, float]  # by bytes: µs


@dataclass(frozen=True)
class Line:
    """t(S) = alpha + beta * S: µs for S bytes."""

    alpha: float
    beta: float

    def __call__(self, nbytes: float) -> float:
        return self.alpha + self.beta * nbytes


@dataclass(frozen=True)
class Model:
    """Times in µs on any number of ranks. delay: of the second shot; rate, nccl_rate: bytes a µs; fixed: of NCCL.

    hop, latency: µs of a ring's hop within a host and between two. bandwidth: bytes a µs between hosts, of each GPU.
    """

    alpha: float
    delay: float
    rate: float
    fixed: float
    nccl_rate: float
    hop: float
    latency: float
    bandwidth: float

    def one_shot(self, ranks: int, nbytes: float) -> float:
        """ranks: of one host."""
        return self.alpha + (ranks - 1) * nbytes / self.rate

    def two_shot(self, ranks: int, nbytes: float) -> float:
        """ranks: of one host."""
        return self.alpha + self.delay + 2 * (ranks - 1) / ranks * nbytes / self.rate

    def nccl(self, ranks: int, nbytes: float) -> float:
        """ranks: of one host, or of whole hosts."""
        between = 1 / HOST if ranks > HOST else 0.0  # of the ring's hops
        hop = between * self.latency + (1 - between) * self.hop
        rate = min(self.nccl_rate, self.bandwidth * HOST) if ranks > HOST else self.nccl_rate
        return self.fixed + 2 * (ranks - 1) * hop + 2 * (ranks - 1) / ranks * nbytes / rate

    def crossover(self, ranks: int) -> float:
        """Bytes from which on two shots are the faster, of 3 ranks or more: of two both send the same."""
        return self.delay * self.rate / ((ranks - 1) * (1 - 2 / ranks))


def fit(times: Times) -> Line:
    """The line of least squared relative error. ValueError for fewer than two sizes."""
    if len(times) < 2:
        raise ValueError(f"a line needs two sizes or more, not {len(times)}")
    beta, alpha = np.polyfit([*times], [*times.values()], 1, w=[1 / t for t in times.values()])
    return Line(float(alpha), float(beta))


def model(
    ranks: int, one_shot: Times, two_shot: Times, nccl: Times, *, hop: float, latency: float, bandwidth: float
) -> Model:
    """From times on so many ranks of one host; two_shot may be empty. ValueError for times that no link explains."""
    ours, theirs = fit(one_shot), fit(nccl)
    delay = fit(two_shot).alpha - ours.alpha if len(two_shot) > 1 else ours.alpha
    if min(ours.alpha, ours.beta, theirs.alpha, theirs.beta) <= 0:
        raise ValueError(f"these times do not grow like alpha + beta S: ours {ours}, NCCL {theirs}")
    steps = 2 * (ranks - 1)
    return Model(
        alpha=ours.alpha, delay=max(delay, 0.0), rate=(ranks - 1) / ours.beta,
        fixed=max(theirs.alpha - steps * hop, 0.0), nccl_rate=steps / ranks / theirs.beta,
        hop=hop, latency=latency, bandwidth=bandwidth,
    )  # fmt: skip


def main(
    folder: Annotated[Path, typer.Argument(help="Where all_reduce.csv is, and the plot goes.")],
    bandwidth: Annotated[float, typer.Option(help="GB/s between hosts, of each GPU: a 400 Gbit/s adapter.")] = 50.0,
    latency: Annotated[float, typer.Option(help="µs of a hop between hosts, through both adapters.")] = 15.0,
    hop: Annotated[float, typer.Option(help="µs of a ring's hop over NVLink: NCCL's own estimate for LL.")] = 0.6,
) -> None:
    """Fit the last run in all_reduce.csv, print the fit and the crossovers, draw the model."""
    plots.check()
    rows = read(folder / "all_reduce.csv")
    ranks = int(rows[0]["ranks"])
    one_shot, two_shot = _ways(rows)
    nccl = _times(rows, ("nccl", "gloo"))
    made = model(ranks, one_shot, two_shot, nccl, hop=hop, latency=latency, bandwidth=bandwidth * 1e3)
    print(f"fitted at {ranks} GPUs: one shot alpha {made.alpha:.2f} µs, B {made.rate / 1e3:.0f} GB/s")
    how = "fitted" if len(two_shot) > 1 else "taken as alpha, for two shots were not measured"
    print(f"second delay {made.delay:.2f} µs, {how}")
    fixed, rate = made.fixed, made.nccl_rate / 1e3
    print(f"NCCL alpha {fit(nccl).alpha:.2f} µs, of which {fixed:.2f} whatever the ranks, B {rate:.0f} GB/s")
    for way, times in ((ONE_SHOT, one_shot), (NCCL, nccl)):
        line = fit(times)
        worst = max(times, key=lambda nbytes: abs(line(nbytes) / times[nbytes] - 1))
        print(f"{way}: the fit is off by up to {line(worst) / times[worst] - 1:+.0%}, at {worst >> 10} KiB")
    for n in range(3, HOST + 1):
        print(f"model, {n} GPUs: two shots are the faster from {made.crossover(n) / 1024:.0f} KiB on")
    print(draw(made, ranks, {ONE_SHOT: one_shot, TWO_SHOT: two_shot, NCCL: nccl}, rows[0], folder))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of the last run. ValueError where there are none."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return [row for row in rows if all(row[key] == rows[-1][key] for key in ("date", "device", "ranks"))]


def draw(made: Model, measured: int, times: Mapping[str, Times], stamp: Mapping[str, str], folder: Path) -> Path:
    """all_reduce-model.png: time over GPUs, a line for each way, a panel for each size; what was measured as points."""
    title = f"MODEL, not measured, but for the points: all_reduce over GPUs, hosts of {HOST}; {stamp['device']}"
    figure, panels = comm_plots.canvas(title, 12.0, panels=len(SIZES))
    colours = {ONE_SHOT: OUR_COLOUR, TWO_SHOT: PEER_COLOURS[3], NCCL: PEER_COLOURS[0]}
    ways = {
        ONE_SHOT: (made.one_shot, range(2, HOST + 1)), TWO_SHOT: (made.two_shot, range(2, HOST + 1)),
        NCCL: (made.nccl, (*range(2, HOST + 1), *range(2 * HOST, MOST + 1, HOST))),
    }  # fmt: skip
    for axes, (size, nbytes) in zip(panels, SIZES.items(), strict=True):
        for way, (time, ranks) in ways.items():
            label = f"{way}, model" if axes is panels[0] else None
            axes.plot(ranks, [time(n, nbytes) for n in ranks], color=colours[way], label=label)
            if nbytes in times[way]:
                label = f"{way}, measured" if axes is panels[0] else None
                axes.plot([measured], [times[way][nbytes]], "o", color=colours[way], label=label)
        axes.axvline(HOST + 0.5, color="grey", linestyle=":", linewidth=1)
        axes.set_title(size, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
        axes.set_xlabel("GPUs")
    return comm_plots.save(figure, folder / "all_reduce-model.png")


def _ways(rows: Sequence[Mapping[str, str]]) -> tuple[dict[int, float], dict[int, float]]:
    """Our times by one shot and by two: at each size our own choice has no row that names its way."""
    if any(row["who"] == OURS and "shot" not in row["note"] for row in rows):
        raise ValueError("our sums in these rows went by NCCL or gloo; measure where symmetric memory is used")
    ours, one, two = (_times(rows, (who,)) for who in (OURS, f"{OURS} one_shot", f"{OURS} two_shot"))
    return (
        {nbytes: one.get(nbytes, ours[nbytes]) for nbytes in ours},
        {nbytes: two.get(nbytes, ours[nbytes]) for nbytes in ours if nbytes in two or nbytes in one},
    )


def _times(rows: Iterable[Mapping[str, str]], who: Sequence[str]) -> dict[int, float]:
    return {int(row["bytes"]): float(row["us"]) for row in rows if row["who"] in who and row["us"]}


if __name__ == "__main__":
    typer.run(main)
