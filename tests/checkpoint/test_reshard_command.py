"""`tp-attention reshard` and `inspect`: what they print, and mistakes in one line."""

import os
import pty
import re
import sys

import pytest
import tiny_llama

from tp_attention import cli
from tp_attention.checkpoint import command, open_checkpoint


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*args) -> exit code, standard output, standard error."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["tp-attention", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        if isinstance(exit.value.code, str):  # what the interpreter prints for sys.exit("text")
            return 1, out, f"{err}{exit.value.code}\n"
        return exit.value.code, out, err

    return run


@pytest.fixture
def source(tmp_path):
    tiny_llama.write(tmp_path / "source", finite=True)
    return tmp_path / "source"


def test_an_empty_path_is_not_the_current_folder(run, source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = run("reshard", source, "", "--tp", 2)
    assert code == 1 and "and destination '' must both be paths, not empty" in err
    monkeypatch.chdir(source)
    for args in (("reshard", "", tmp_path / "out", "--tp", 2), ("inspect", "")):
        code, _, err = run(*args)
        assert code == 1 and "empty" in err and len(err.splitlines()) == 1
    assert not any((tmp_path / "empty").iterdir()) and not (tmp_path / "out").exists()


def test_reshard_says_what_it_wrote(run, source, tmp_path):
    code, out, err = run("reshard", source, tmp_path / "cut", "--tp", 3, "--verify", "--verify-forward")
    assert (code, err) == (0, "")
    sizes = [f"{path.stat().st_size:,} bytes" for path in sorted((tmp_path / "cut").glob("rank-*"))]
    assert out.startswith(f"wrote {tmp_path / 'cut'}: native, tp=3")
    assert [re.search(size, out) is not None for size in sizes] == [True] * 3
    assert "/s)" in out and "verified:" in out and "forward" in out


def test_dry_run_writes_nothing(run, source, tmp_path):
    code, out, _ = run("reshard", source, tmp_path / "cut", "--tp", 4, "--format", "megatron", "--dry-run")
    assert code == 0 and list(tmp_path.iterdir()) == [source]
    assert "would write" in out and "legal tp as megatron: 1, 2, 4" in out and "memory for" in out


def test_every_option_arrives(run, source, tmp_path):
    options = ["--quantize", "--group-size", 16, "--workers", 1, "--max-memory", "1MB", "--quiet"]
    assert run("reshard", source, tmp_path / "int8", "--tp", 2, *options) == (0, "", "")
    assert open_checkpoint(tmp_path / "int8").plan.mlp_unit == 16
    back = ["--format", "hf", "--target-layout", "baichuan"]
    code, _, err = run("reshard", source, tmp_path / "packed", "--tp", 1, *back)
    assert code == 0, err
    assert "model.layers.0.self_attn.W_pack.weight" in open_checkpoint(tmp_path / "packed", layout="baichuan").names(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", 13], "error: tp=13 exceeds heads=12; use tp <= 12"),
        (["--tp", 3, "--format", "megatron"], "use tp 1, 2, 4, or --format native"),
        (["--tp", 2, "--max-memory", "lots"], "error: 'lots' is no size; write it like 2GB, 512MiB or 1000000"),
        (["--tp", 2, "--max-memory", "1kB"], "max_memory=1,000 bytes is less than the largest tensor"),
        (["--tp", 2, "--layout", "lama"], "source: unknown layout 'lama'; known: "),
    ],
)
def test_mistakes_end_in_one_line(run, source, tmp_path, options, message):
    code, out, err = run("reshard", source, tmp_path / "cut", *options)
    assert code == 1 and out == "" and message in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [source]


def test_inspect_says_what_it_is(run, source, tmp_path):
    assert run("reshard", source, tmp_path / "cut", "--tp", 5, "--quiet")[0] == 0
    code, out, _ = run("inspect", source)
    assert code == 0
    assert "hf, layout llama, cut for tp=1" in out and "legal tp as native: 1–12" in out
    assert "12 query heads, 4 kv heads of 4 on 1 ranks" in out and "bfloat16" in out and "W_pack" not in out
    code, out, _ = run("inspect", tmp_path / "cut", "--tensors")
    assert "native" in out and "cut for tp=5" in out and "0–2 (3)" in out
    assert re.search(r"4  layers.1.attention.qkv_weight  bfloat16  \[16, 16\]", out)
    assert "kv heads held by more than one rank: none" in run("inspect", source, "--tp", 2)[1]
    code, out, err = run("inspect", tmp_path)
    assert code == 1 and "is no checkpoint" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_a_bar_on_a_terminal_alone(run, source, tmp_path, monkeypatch, options):
    main, other = pty.openpty()
    with open(other, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run("reshard", source, tmp_path / "cut", "--tp", 2, *options)[0] == 0
        terminal.write("end")
        terminal.flush()
        shown = b""
        while not shown.endswith(b"end"):
            shown += os.read(main, 1 << 16)
    os.close(main)
    assert (b"/s" in shown) == (shown != b"end") == (not options)


@pytest.mark.parametrize(
    ("text", "count"), [("2GB", 2 * 10**9), ("512MiB", 2**29), ("1.5 g", 1_500_000_000), ("1000", 1000), ("8kb", 8000)]
)
def test_sizes(text, count):
    assert command.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1 000", "1IB"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="is no size; write it like"):
        command.parse_bytes(text)
