"""The benchmark runs, asserts equality before it times, and saves its rows."""

import csv
import sys

import pytest
import torch

from tp_attention import cli
from tp_attention.bench import first_call, generation
from tp_attention.bench.results import OURS, append, summarise


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
