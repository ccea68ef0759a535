"""The benchmark runs, asserts equality before it times, and saves its rows."""

import csv
import sys
import time

import pytest
import torch

from tp_attention import cli
from tp_attention.bench import first_call, generation, links, timing
from tp_attention.bench.results import OURS, append, folder, summarise
from tp_attention.comm import all_reduce


def test_rows_hold_median_spread_and_ratio(tmp_path):
    samples = {OURS: [4.0, 1.0, 3.0], "peer": [6.0, 6.0, 6.0]}
    rows = summarise("shape", "tokens/s", samples, torch.device("cpu"))
    assert [(row.median, row.least, row.greatest, row.repeats, row.ratio) for row in rows] == [
        (3.0, 1.0, 4.0, 3, 1.0),
        (6.0, 6.0, 6.0, 3, 2.0),
    ]
    append(tmp_path / "new" / "rows.csv", rows)
    append(tmp_path / "new" / "rows.csv", rows[:1])
    with (tmp_path / "new" / "rows.csv").open() as stream:
        assert [row["who"] for row in csv.DictReader(stream)] == [OURS, "peer", OURS]


def test_command_measures_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generation, "NEW_TOKENS", 2)
    monkeypatch.setattr(generation, "REPEATS", 1)
    monkeypatch.setattr(sys, "argv", ["tp-attention", "bench", "--rows", "short", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0
    assert "huggingface" in capsys.readouterr().out
    with (tmp_path / "generation.csv").open() as stream:
        assert [row["who"] for row in csv.DictReader(stream)] == [OURS, "huggingface"]


@pytest.mark.parametrize(
    ("options", "message"), [(["--rows", "moon"], "no row matches"), (["--peers", "moon"], "unknown peers")]
)
def test_unknown_names_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tp-attention", "bench", *options])
    with pytest.raises(SystemExit, match=message):
        cli.main()


def test_different_tokens_are_not_timed(monkeypatch):
    monkeypatch.setattr(generation, "NEW_TOKENS", 2)
    monkeypatch.setattr(generation.models, "stream", lambda *_, **__: iter([(0, None), (0, None)]))
    with pytest.raises(RuntimeError, match="write different tokens"):
        next(generation.measure(["generate smollm2 short"], ["huggingface"], torch.device("cpu")))


def test_first_call_is_measured_in_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    first_call.main(hidden=256)
    first, second = capsys.readouterr().out.splitlines()
    for line, start in ((first, "compiling: prefill "), (second, "from Triton's cache: prefill ")):
        assert line.startswith(start) and "14 other lengths: 0 more" in line


def test_deepspeeds_layers_beside_ours(tmp_path, capsys):
    """Without a GPU DeepSpeed's say why they cannot; ours is held against fp64 and timed all the same."""
    from tp_attention.bench import deepspeed_layer

    deepspeed_layer.main(tmp_path, True, "float16")
    rows = list(csv.DictReader((tmp_path / "deepspeed_layer.csv").open()))
    assert [row["who"] for row in rows] == ["tp_attention", "deepspeed triton", "deepspeed cuda"] * 2
    ours = rows[::3]
    assert all(float(row["eager_us"]) > 0 and row["eager_over_ours"] == "1.0" for row in ours)
    assert all(float(row["note"].split()[1].rstrip(",")) < 2e-3 for row in ours)
    if not torch.cuda.is_available():
        assert all(row["eager_us"] == "" and row["note"] for row in rows if row not in ours)


def _sums(world, out):
    from tp_attention.bench import comm

    comm._tables(world.tp, out, tiny=True, plot=True)


def test_sums_beside_the_backends(world, tmp_path):
    pytest.importorskip("matplotlib")
    world(2)(_sums, tmp_path)
    rows = list(csv.DictReader((tmp_path / "all_reduce.csv").open()))
    peer = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    for name in ("8 KiB", "64 KiB"):
        assert {OURS, peer} <= {row["who"] for row in rows if row["row"] == name}
    projections = list(csv.DictReader((tmp_path / "projection_all_reduce.csv").open()))
    for name in ("M1 E256", "M96 E256"):
        assert {OURS, "gemm alone", peer} <= {row["who"] for row in projections if row["row"] == name}
    for row in rows + projections:
        assert 0 < float(row["lower"]) <= float(row["us"]) <= float(row["upper"]) and row["ranks"] == "2"
        assert ("error" in row["note"]) == (row["who"] != "gemm alone")
        assert (row["best_peer_over_ours"] != "") == (row["who"] == OURS)
    assert {path.name for path in tmp_path.glob("*.png")} == {"all_reduce.png", "projection_all_reduce.png"}


def _wrong_on_one_rank(world):
    """[(who, whether there is a time, its note)], and what ends the run."""
    from tp_attention.bench import comm
    from tp_attention.bench.comm_peers import Contender

    group, failures = world.tp, []
    x = torch.ones(64, device=group.device)
    truth = torch.full_like(x, group.size, dtype=torch.float64)

    def call():
        return all_reduce(x, group)

    contenders = [
        Contender(OURS, [call], call, truth, peer=False),
        Contender("peer", [call], lambda: call() + group.rank, truth),
        Contender(f"{OURS} inexact", [call], call, truth, call() + group.rank, peer=False),
        Contender("slow peer", [call, call, call], call, truth),
    ]
    rows = comm._measured(contenders, "row", 256, group, 1e9, failures)
    return [(row["who"], row["us"] != "", row["note"]) for row in rows], failures


def test_who_fails_on_one_rank_is_timed_on_none(world):
    first, second = world(2)(_wrong_on_one_rank)
    for rows, _ in (first, second):
        assert [timed for _, timed, _ in rows] == [True, False, False, True]
    assert [note for _, _, note in first[0]][1:3] == ["RuntimeError: failed on 1 of the other ranks"] * 2
    assert "wrong result" in second[0][1][2] and "not the fp32 sum in rank order" in second[0][2][2]
    for _, failures in (first, second):
        assert len(failures) == 1 and failures[0].startswith("row, tp_attention inexact: ")


def _calls_made(world):
    """By ranks of which each measures another time."""
    calls = 0

    def call():
        nonlocal calls
        calls += 1
        time.sleep(1e-4 if world.rank == 0 else 5e-3)

    device = torch.device("cpu")
    return timing.measure([call], device, 20.0, world.tp).samples, calls


def test_ranks_that_measure_different_times_make_equal_counts_of_calls(world):
    first, second = world(2)(_calls_made)
    assert first == second and first[0] > timing.MIN_SAMPLES


SIZES = [2**n for n in range(13, 29)]


def test_fit_finds_alpha_and_beta():
    line = links.fit({size: 5.0 + size / 380e3 for size in SIZES})
    assert line.alpha == pytest.approx(5.0) and 1 / line.beta == pytest.approx(380e3)
    with pytest.raises(ValueError, match="two sizes"):
        links.fit({8: 1.0})


def _model():
    line = {size: 5.0 + size / 380e3 for size in SIZES}
    two = {size: 6.5 + size / 380e3 for size in SIZES}
    return links.model(2, line, two, {size: 12.0 + size / 350e3 for size in SIZES}, hop=0.6, latency=15, bandwidth=50e3)


def test_model_goes_through_what_it_was_fitted_to_and_grows():
    made = _model()
    for way, alpha, rate in ((made.one_shot, 5.0, 380e3), (made.two_shot, 6.5, 380e3), (made.nccl, 12.0, 350e3)):
        ranks = [2, 3, 4, 5, 6, 7, 8, *([16, 32, 64] if way == made.nccl else [])]
        assert way(2, 1e6) == pytest.approx(alpha + 1e6 / rate)
        for size in SIZES:
            times = [way(n, size) for n in ranks]
            assert times == sorted(times) and way(ranks[-1], size) < way(ranks[-1], 2 * size)
    for n in range(3, 9):
        size = made.crossover(n)
        assert made.one_shot(n, size) == pytest.approx(made.two_shot(n, size))
        assert made.one_shot(n, size / 2) < made.two_shot(n, size / 2)


def test_model_is_drawn_from_the_last_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    columns = ["row", "bytes", "ranks", "who", "us", "note", "device", "date"]
    with (tmp_path / "all_reduce.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        for date, alpha in (("old", 50.0), ("new", 5.0)):
            for who, more in ((OURS, 0.0), (f"{OURS} two_shot", 1.5), ("nccl", 7.0)):
                writer.writerows(["", n, 2, who, alpha + more + n / 380e3, "one_shot", "a GPU", date] for n in SIZES)
    links.main(tmp_path, 50.0, 15.0, 0.6)
    said = capsys.readouterr().out
    assert "one shot alpha 5.00 µs, B 380 GB/s" in said and "delay 1.50 µs, fitted" in said
    assert "model, 8 GPUs: two shots are the faster from 106 KiB" in said
    assert (tmp_path / "all_reduce-model.png").exists()


def test_dry_runs_have_a_folder_of_their_own(tmp_path):
    assert folder(None, tiny=False).name == "benchmarks"
    assert folder(None, tiny=True).name == "benchmarks-tiny"
    assert folder(tmp_path, tiny=True) == tmp_path
