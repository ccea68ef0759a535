"""The kernel benchmarks at tiny sizes: every row and peer once, what is written down, and what is refused.

On a GPU the same tests go through CUDA graphs.
"""

import contextlib
import csv
import dataclasses
import functools
import sys
import types

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from tp_attention import cli, functional
from tp_attention.bench import attention, candidates, ceilings, command, peers, plots, projections, timing, tune
from tp_attention.bench.cases import Unavailable, relative_error, run, sampled
from tp_attention.bench.results import OURS, KernelRow, append

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET_MS", 0.1)
    monkeypatch.setattr(timing, "MIN_SAMPLES", 2)
    monkeypatch.setattr(peers, "_compiled_flex", lambda compiled: flex_attention)  # on a GPU it compiles for minutes


def records(path):
    with path.open() as stream:
        return list(csv.DictReader(stream))


def case_of(**changes):
    case = next(case for case in projections.linear(tiny=True, device=DEVICE))
    return dataclasses.replace(case, **changes)


@pytest.mark.parametrize("name", command.KERNELS)
def test_every_row_is_measured_and_saved(name, tmp_path):
    command.bench([name], None, None, tmp_path, plot=False, tiny=True)  # raises if a row of ours fails
    rows = records(tmp_path / f"{name}.csv")
    ours = [row for row in rows if row["who"] == OURS]
    assert len(ours) == sum(len(list(make(True, DEVICE))) for make in command.KERNELS[name])
    for row in ours:
        assert float(row["ms"]) > 0 and float(row["rate"]) > 0 and float(row["ceiling"]) > 0 and not row["note"]
        assert float(row["error"]) <= float(row["allowed"])
    assert {row["unit"] for row in records(tmp_path / "ceilings.csv")} == {"TB/s", "TFLOP/s"}


def test_rows_and_peers_select(tmp_path, monkeypatch, capsys):
    argv = "tp-attention bench attention --tiny --rows D256 --peers formula --peers flash --out"
    monkeypatch.setattr(sys, "argv", [*argv.split(), str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0
    rows = records(tmp_path / "attention.csv")
    assert {row["who"] for row in rows} == {OURS, "flash", "formula"}
    assert all("D256" in row["row"] for row in rows)
    assert "best peer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["moon"], "unknown benchmarks"),
        (["decode", "--tiny", "--rows", "moon"], "no row matches"),
        (["decode", "--tiny", "--peers", "moon"], "unknown peers"),
        pytest.param(["decode"], "need a GPU", marks=pytest.mark.skipif(DEVICE.type == "cuda", reason="would measure")),
    ],
)
def test_unknown_names_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tp-attention", "bench", *options])
    with pytest.raises(SystemExit, match=message):
        cli.main()


def test_a_failing_peer_costs_its_own_row_and_a_missing_one_none():
    def fails(*inputs):
        raise RuntimeError("no such shape")

    def misses(*inputs):
        raise Unavailable("not installed")

    def grows(x, norm_weight, weight):
        taken.append(x)
        if len(taken) > 1:  # right, and then no room for the other copies beside those of the others
            raise torch.OutOfMemoryError("tried to allocate")
        return lambda: functional.linear(x, weight)

    def lies(x, norm_weight, weight):
        return lambda: torch.zeros(*x.shape[:2], len(weight), device=x.device)

    taken = []
    case = case_of()
    odd = {"fails": fails, "misses": misses, "grows": grows, "lies": lies}
    case = dataclasses.replace(case, peers={**odd, **case.peers})
    rows = {row.who: row for row in run(case, list(case.peers), 1.0, DEVICE)}
    assert list(rows) == [OURS, "fails", "grows", "lies", "cublas"]
    assert rows["fails"].ms is None and rows["fails"].note == "RuntimeError: no such shape"
    assert rows["grows"].ms is None and rows["grows"].note == "OutOfMemoryError: tried to allocate"
    assert rows["lies"].note == "wrong result" and rows["lies"].error == pytest.approx(1.0)
    assert rows["cublas"].best == pytest.approx(1.0)  # however fast a wrong result is
    assert "no such shape" in str(rows["fails"])
    assert rows[OURS].ms and rows[OURS].samples == rows["lies"].samples == rows["cublas"].samples


def test_a_row_that_nobody_finishes_has_no_times():
    def fails(*inputs):
        raise RuntimeError("no such shape")

    rows = run(case_of(ours=fails, peers={"cublas": fails}), ["cublas"], 1.0, DEVICE)
    assert [(row.ms, row.note) for row in rows] == [(None, "RuntimeError: no such shape")] * 2


def test_our_faults_are_saved_and_raised_after_the_other_rows(tmp_path, monkeypatch):
    linear = functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, weight: linear(x, weight) * (1.1 if x.shape[1] == 1 else 1.0))
    with pytest.raises(RuntimeError, match=r"1 rows of ours failed: linear K256 N384 M1: inexact"):
        command.bench(["projections"], ["linear"], None, tmp_path, plot=False, tiny=True)
    notes = {row["row"]: row["note"] for row in records(tmp_path / "projections.csv") if row["who"] == OURS}
    assert len(notes) == 2 and sum(map(bool, notes.values())) == 1


def test_plots_have_a_file_per_benchmark_and_unit(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        dataclasses.replace(row, benchmark="b", row=f"b {row.row}", who=who, ceiling=2.0)
        for row in ceilings.measure([torch.bfloat16], True, DEVICE)
        for who in (OURS, "peer")
    ]
    failed = dataclasses.replace(rows[0], who="fails", ms=None, rate=None)
    paths = plots.plot([*rows, failed], tmp_path / "new")
    assert [path.name for path in paths] == ["b-bytes.png", "b-flops.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_other_columns_are_not_mixed(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n")
    row = ceilings.measure([], True, DEVICE)[0]
    with pytest.raises(ValueError, match="has columns"):
        append(tmp_path / "rows.csv", [row])
    append(tmp_path / "new.csv", [row])
    assert list(records(tmp_path / "new.csv")[0]) == [field.name for field in dataclasses.fields(KernelRow)]


def test_times_are_medians_between_quartiles_and_copies_keep_the_cache_cold():
    time = timing.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (time.ms, time.lower, time.upper, time.samples) == (3.0, 2.0, 4.0, 5)
    cuda = torch.device("cuda")
    assert timing.copies_needed(50_000_000, cuda) == 4 and timing.copies_needed(1_000_000_000, cuda) == 4
    assert timing.copies_needed(9_400_000, cuda) * 9_400_000 >= timing.COLD_BYTES


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda's graphs and events by a clock that a replay moves by what its calls return; -> calls of a capture."""
    clock, recorded = [0.0], []

    class Graph:
        def replay(self):
            clock[0] += sum(call() for call in self.calls)

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):
        recorded.clear()
        yield
        graph.calls = list(recorded)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "CUDAGraph": Graph,
        "graph": capture,
        "Event": Event,
        "synchronize": lambda: None,
        "current_stream": lambda: stream,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(timing, "_side_stream", lambda: stream)
    return recorded


def test_graphs_go_round_the_copies_and_samples_are_of_one_call(fake_cuda, monkeypatch):
    monkeypatch.setattr(timing, "REPLAY_MS", 12.0)
    names = []

    def call(name):
        names.append(name)
        fake_cuda.append(lambda: 1.0)

    calls = [functools.partial(call, i) for i in range(4)]
    time = timing.measure(calls, torch.device("cuda"), budget_ms=50)
    assert (time.ms, time.lower, time.upper, time.samples) == (1.0, 1.0, 1.0, 4)
    assert names[-12:] == [0, 1, 2, 3] * 3 and len(fake_cuda) == 12  # 4 ms a round, 12 wanted
    assert timing.ready(calls, torch.device("cuda")).calls is calls  # else what a graph reads would be freed


def test_contenders_of_one_speed_are_found_so_on_a_gpu_that_slows_down(fake_cuda, monkeypatch):
    monkeypatch.setattr(timing, "REPLAY_MS", 1.0)
    monkeypatch.setattr(timing, "WARMUP", 0)  # one round
    order = []

    def runs(name):
        order.append(name)
        return 1 + len(order) / 1000

    device = torch.device("cuda")
    contenders = [timing.ready([lambda n=n: fake_cuda.append(lambda: runs(n))], device) for n in "ABC"]
    order.clear()
    times = timing.in_turns(contenders, device, budget_ms=9)
    assert "".join(order) == "A" + "ABCCBA" * 4 + "ABC"  # of A the first replay is untimed, then a round to warm up
    assert all(time.samples == 8 for time in times)
    assert max(time.ms for time in times) - min(time.ms for time in times) < 1e-9  # one after another: 0.016


@pytest.mark.parametrize("count", [1, 2, 64, 65, 1000])
def test_sampled_rows_are_sorted_and_hold_both_ends(count):
    rows = sampled(count, DEVICE).tolist()
    assert rows == sorted(set(rows)) and len(rows) == min(count, 64)
    assert rows[0] == 0 and rows[-1] == count - 1


def test_relative_error_sees_nan_and_refuses_other_shapes():
    expected = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, -1.5]), expected) == 0.25
    assert relative_error(torch.tensor([1.0, torch.nan]), expected) == float("inf")
    with pytest.raises(ValueError, match=r"shape \[1\], expected \[2\]"):
        relative_error(expected[:1], expected)


def test_work_is_that_of_the_shape():
    shape = attention.Shape(2, 8, 2, 100, 64, causal=True)
    assert shape.score_flops == 4 * 2 * 8 * 100 * 100 * 64 / 2
    decode = next(case for case in attention.decode(False, DEVICE) if case.name == "decode B1 H8/1 S32768 D128")
    assert decode.work == 2 * 32768 * 128 * 2


@pytest.mark.parametrize("name", candidates.FAMILIES)
def test_every_entry_of_every_table_has_candidates(name):
    family = candidates.FAMILIES[name]
    for config in candidates.table(name).values():
        found = list(family.candidates(config))
        assert found[0] == config and len(found) == len(set(found)) > 1
        assert set(map(type, found)) == {type(config)}


def test_tuning_times_candidates_and_returns_an_entry_for_each_key(tmp_path, monkeypatch):
    family = dataclasses.replace(candidates.FAMILIES["softmax_context"], space={"block_m": (32, 3)}, keep=bool)
    monkeypatch.setitem(candidates.FAMILIES, "softmax_context", family)
    with torch.no_grad():
        best = tune.tune("softmax_context", "", 60, tmp_path, True, DEVICE)
    tried = records(tmp_path / "tune.csv")
    assert {row["key"] for row in tried} == set(map(str, best))
    assert all(row["note"] for row in tried if "block_m=3," in row["config"])  # no power of two: recorded, not fatal
    for config, speedup in best.values():
        assert config.block_m != 3 and speedup >= 1


def test_tables_are_printed_as_source(capsys):
    assert set(candidates.FAMILIES) <= set(candidates.tables())
    tune.main(table_only=True)
    printed = capsys.readouterr().out
    for name in candidates.tables():
        key, config = next(iter(candidates.table(name).items()))
        assert f"# kernels/{name}.py" in printed and f"{key!r}: {config!r}," in printed
