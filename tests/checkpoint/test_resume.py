"""A reshard that was killed leaves nothing, or what the next run goes on with; never a torn destination."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny_llama
import torch

from tp_attention.checkpoint import journal, reshard, writing


def slow_reshard(source, destination, format):
    """With small syncs and a pause a tensor, so that a kill at a random time falls anywhere in a small reshard."""
    torch.set_num_threads(1)  # a forked process must not touch its parent's thread pool
    transfer = writing.Writer._transfer

    def slow(self, place):
        time.sleep(0.005)
        return transfer(self, place)

    writing.SYNC_BYTES, writing.Writer._transfer = 512, slow
    reshard(source, destination, 4, format=format, workers=2)  # 204 tensors: half a second at least


def killed_run(*args, seconds):
    """Start a reshard and kill it after `seconds`; whether that was before its end."""
    child = multiprocessing.get_context("fork").Process(target=slow_reshard, args=args)
    child.start()
    time.sleep(seconds)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def kill_and_check(tmp_path, kills, formats, longest):
    tiny_llama.write(tmp_path / "source", layers=8)
    before = tiny_llama.files_of(tmp_path / "source")
    whole = {}
    for format in formats:
        reshard(tmp_path / "source", tmp_path / f"whole-{format}", 4, format=format)
        whole[format] = hashes(tmp_path / f"whole-{format}")
    killed = resumed = 0
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    for index in range(kills):
        format = formats[index % len(formats)]
        killed += killed_run(tmp_path / "source", out, format, seconds=random.uniform(0, longest))
        if not out.exists():
            if index % 3 == 0:  # a killed run that went on is killed as well
                killed += killed_run(tmp_path / "source", out, format, seconds=random.uniform(0, longest))
            if not out.exists():
                resumed += reshard(tmp_path / "source", out, 4, format=format, verify=True).resumed > 0
        assert hashes(out) == whole[format]
        assert not partial.exists()
        shutil.rmtree(out)
    assert tiny_llama.files_of(tmp_path / "source") == before
    return killed, resumed


def hashes(folder):
    """SHA-256 by file and tensor, of what is there: torch.save's archives differ in nothing else."""
    (file,) = folder.glob("tp_attention*.json")
    manifest = json.loads(file.read_text())
    assert all((folder / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
    native = {name: value for name, value in tiny_llama.files_of(folder).items() if name.endswith(".safetensors")}
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}, native


def test_three_kills(tmp_path):
    killed, _ = kill_and_check(tmp_path, 3, ["native"], 0.45)
    assert killed >= 3  # a run that goes on may end before its kill


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    killed, resumed = kill_and_check(tmp_path, 20, ["native", "megatron"], 0.8)
    assert killed >= 10 and resumed >= 5


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A destination whose name alone is missing."""
    tiny_llama.write(tmp_path / "source")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.Journal, "finish", interrupt)
        reshard(tmp_path / "source", tmp_path / "out", 3)
    reshard(tmp_path / "source", tmp_path / "whole", 3)
    return tmp_path


def interrupt(*_, **__):
    raise KeyboardInterrupt


def lines_of(folder):
    return (folder / "out.partial" / journal.NAME).read_bytes().splitlines(keepends=True)


def go_on(folder):
    report = reshard(folder / "source", folder / "out", 3)
    assert tiny_llama.files_of(folder / "out") == tiny_llama.files_of(folder / "whole")
    return report.resumed


def test_finished_tensors_are_not_written_again(interrupted, monkeypatch):
    monkeypatch.setattr(writing.Writer, "_transfer", interrupt)
    total = sum(path.stat().st_size for path in (interrupted / "whole").glob("rank-*"))
    assert 0.5 * total < go_on(interrupted) < total


@pytest.mark.parametrize("keep", [0, 1, 7])
def test_a_torn_last_line_is_ignored(interrupted, keep):
    lines = lines_of(interrupted)
    torn = lines[keep][: len(lines[keep]) // 2]
    (interrupted / "out.partial" / journal.NAME).write_bytes(b"".join(lines[:keep]) + torn)
    for file in (interrupted / "out.partial").glob("rank-*"):  # what no line speaks of may be anything
        if keep <= 1:
            file.write_bytes(b"\xff" * file.stat().st_size)
    resumed = go_on(interrupted)
    assert (resumed > 0) == (keep > 1)


def test_a_file_that_is_begun_again_stays_so(interrupted, monkeypatch):
    """A run that is killed as well, just after it has made the file anew, full of zeros."""
    next(iter(sorted((interrupted / "out.partial").glob("rank-*")))).unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writing.Writer, "_copy", interrupt)
        reshard(interrupted / "source", interrupted / "out", 3)
    go_on(interrupted)


@pytest.mark.parametrize("line", [b"[1]\n", b"{\n", b'["a", "b"]\n', b"3\n"])
def test_a_broken_journal(interrupted, line):
    path, lines = interrupted / "out.partial" / journal.NAME, lines_of(interrupted)
    path.write_bytes(b"".join([line, *lines[1:]] if line == b"{\n" else [lines[0], line, *lines[1:]]))
    with pytest.raises(ValueError, match=r"journal\.jsonl is broken; delete .*out\.partial to start anew"):
        go_on(interrupted)


def test_what_a_kill_left_beside_a_finished_file_is_removed(tmp_path, monkeypatch):
    tiny_llama.write(tmp_path / "source")
    unlink = Path.unlink

    def stop(path, **options):  # just before what a finished file's tensors were gathered in is removed
        if path.name.endswith(".gathering"):
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", stop)
        reshard(tmp_path / "source", tmp_path / "out", 2, format="deepspeed")
    reshard(tmp_path / "source", tmp_path / "out", 2, format="deepspeed", verify=True)
    assert not list((tmp_path / "out").glob("*.pt.*"))


def test_a_kill_between_the_renaming_and_the_journals_end(tmp_path, monkeypatch):
    tiny_llama.write(tmp_path / "source")
    reshard(tmp_path / "source", tmp_path / "whole", 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal, "tidy", interrupt)
        reshard(tmp_path / "source", tmp_path / "out", 3)
    assert (tmp_path / "out" / journal.NAME).exists()
    for dry_run in (True, False):  # there is nothing to go on with but the journal, which a dry run leaves too
        with pytest.raises(ValueError, match="out exists and is not an empty folder"):
            reshard(tmp_path / "source", tmp_path / "out", 3, dry_run=dry_run)
        assert (tmp_path / "out" / journal.NAME).exists() == dry_run
    assert tiny_llama.files_of(tmp_path / "out") == tiny_llama.files_of(tmp_path / "whole")


def test_a_file_that_is_gone_or_short_is_written_again(interrupted):
    files = sorted((interrupted / "out.partial").glob("rank-*"))
    left = files[2].stat().st_size
    files[0].unlink()
    os.truncate(files[1], 100)
    assert 0 < go_on(interrupted) < left
