"""The command line: results on standard output, the rest on standard error, mistakes in one line with exit code 1."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tp_attention import cli
from tp_attention.models import jobs, resolve

PROMPT = "The capital of France is"


@pytest.fixture
def run(monkeypatch, capfd):
    """run(*args, stdin=...) -> exit code, standard output, standard error. In this process: ranks fork from here."""

    def run(*args, stdin=""):
        monkeypatch.setattr(sys, "argv", ["tp-attention", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capfd.readouterr()
        if isinstance(exit.value.code, str):  # what the interpreter prints for sys.exit("text")
            return 1, out, err + exit.value.code + "\n"
        return exit.value.code, out, err

    return run


def test_generate_on_two_ranks_streams_reports_and_checks(run):
    code, out, err = run("generate", "--tp", 2, "--prompt", PROMPT, "--max-new-tokens", 8, "--check")
    assert code == 0, err
    assert out.startswith(PROMPT + " Paris")
    assert "0–4 (5)" in err and "5–8 (4)" in err and "277,947,648" in err and "tokens/s" in err
    assert "equal: greatest logit difference" in err and "8 of 8 positions" in err


def test_quiet_prints_the_text_alone_and_reads_standard_input(run):
    code, out, err = run("generate", "--quiet", "--max-new-tokens", 6, stdin=PROMPT + "\n")
    assert code == 0 and err == ""
    assert out.strip().startswith("Paris")


def test_sampling_repeats_with_its_seed(run):
    options = ("generate", "--quiet", "--prompt", PROMPT, "--max-new-tokens", 6, "--temperature", 1.5, "--top-p", 0.9)
    texts = [run(*options, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_embed_on_three_ranks(run):
    code, out, err = run("embed", "--tp", 3, "--check", "a cat", "a kitten", "the stock market")
    assert code == 0, err
    rows = [line.replace("│", " ").split() for line in out.splitlines() if line.startswith("│")]
    assert len(rows) == 3 and float(rows[0][1]) == 1.0
    assert float(rows[0][2]) > float(rows[0][3])
    assert "the stock market" in out
    assert "equal: greatest embedding difference" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", "--tp", 10, "--prompt", "x"), "error: tp=10 exceeds heads=9; use tp <= 9"),
        (("generate", "--tp", 100_000, "--prompt", "x"), "error: tp=100000 exceeds heads=9"),
        (("generate", "--tp", 0, "--prompt", "x"), "error: --tp 0 must be at least 1"),
        (("generate", "--prompt", ""), "error: the prompt is empty"),
        (
            ("generate", "--model", "nowhere", "--prompt", "x"),
            "error: model 'nowhere' is neither a folder nor a bundled",
        ),
        (("generate", "--prompt", "x", "--dtype", "int4"), "error: --dtype int4 is not known; use one of float32"),
        (("generate", "--prompt", "x", "--temperature", -1), "error: temperature=-1.0"),
        (
            ("generate", "--tp", 2, "--prompt", "x", "--max-new-tokens", 9000),
            "9000 new tokens exceed the context of 8192",
        ),
        (("generate", "--tp", 2, "--prompt", "word " * 9000), "64 new tokens exceed the context of 8192; shorten"),
        (("embed", "--tp", 13, "x"), "error: tp=13 exceeds heads=12"),
        (("embed", "word " * 600), "has 602 tokens, the model takes 512"),
        (("generate", "--model", "minilm", "--prompt", "x"), "BertModel"),
    ],
)
def test_mistakes_end_in_one_line(args, message, run):
    code, out, err = run(*args)
    assert code == 1 and out == ""
    assert message in err
    assert len(err.splitlines()) == 1, err


def test_a_truncated_checkpoint_ends_in_one_line(run, tmp_path):
    folder = shutil.copytree(resolve("minilm"), tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(1_000_000)
    code, out, err = run("embed", "--tp", 2, "--model", folder, "x")
    assert code == 1 and out == ""
    assert "has 1,000,000 bytes, its header promises" in err and len(err.splitlines()) == 1


def test_a_killed_rank_ends_in_one_line(run, monkeypatch):
    def die(*_, **__):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    monkeypatch.setattr(jobs, "stream", die)
    start = time.monotonic()
    code, _, err = run("generate", "--tp", 2, "--prompt", PROMPT, "--quiet")
    assert code == 1 and time.monotonic() - start < 30
    assert "rank 1: killed by SIGKILL" in err and len(err.splitlines()) == 1


def test_a_folder_without_tokenizer_is_refused(run, tmp_path):
    folder = shutil.copytree(resolve("minilm"), tmp_path / "model")
    for file in [*folder.glob("tokenizer*"), folder / "vocab.txt"]:
        file.unlink()
    code, out, err = run("embed", "--model", folder, "x")
    assert code == 1 and out == "" and "has no tokenizer" in err


def test_an_unexpected_error_is_one_line_and_names_its_kind(run, tmp_path):
    folder = shutil.copytree(resolve("minilm"), tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    code, _, err = run("embed", "--tp", 2, "--model", folder, "x")
    assert code == 1 and len(err.splitlines()) == 1 and "--verbose shows where" in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_told_that_the_prompt_is_read_from_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tp-attention", "generate"])
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    with pytest.raises(SystemExit, match="prompt is empty"):
        cli.main()
    assert capsys.readouterr().err.splitlines()[0] == "the prompt is read from here; Ctrl-D ends it"


def test_other_ranks_do_not_say_it_again(run, monkeypatch):
    place = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    for command in (("doctor",), ("inspect", resolve("minilm"))):
        assert run(*command) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert "BERT" in run("inspect", resolve("minilm"))[1].upper()


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "tp_attention", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "generate" in done.stdout, done.stderr


@pytest.mark.slow
def test_joins_torchruns_ranks():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "-m",
        "tp_attention.cli",
        "generate",
    ]
    options = ["--prompt", PROMPT, "--max-new-tokens", "4", "--check"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT + " Paris") and "0–4 (5)" in done.stderr
    refused = subprocess.run([*command, *options, "--tp", "3"], capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert "--tp 3 but torchrun started 2 ranks" in refused.stderr
