"""What goes wrong ends in one clear line, with the source untouched and nothing left at the destination."""

import errno
import fcntl
import json
import os
import re
import shutil

import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file

from tp_attention.checkpoint import journal, reshard, writing


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    tiny_llama.write(folder)
    before = tiny_llama.files_of(folder)
    yield folder
    assert tiny_llama.files_of(folder) == before


@pytest.fixture
def cut(tmp_path):
    """The same on three ranks, with kv head 1 held by two of them; to be damaged."""
    tiny_llama.write(tmp_path / "whole", heads=6, kv_heads=2, intermediate=128, vocab=52)
    reshard(tmp_path / "whole", tmp_path / "cut", 4)
    return tmp_path / "cut"


def refused(tmp_path, message, *args, **options):
    before = tiny_llama.files_of(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        reshard(*args, **options)
    assert "\n" not in str(caught.value)
    assert tiny_llama.files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("to", "tp", "options", "message"),
    [
        ("out", 13, {}, "tp=13 exceeds heads=12; use tp <= 12"),
        ("out", 0, {}, "tp=0 must be at least 1"),
        ("out", 3, {"format": "megatron"}, r"tp=3 does not fit .* use tp 1, 2, 4, or --format native"),
        ("out", 2, {"format": "hf"}, "use tp 1, or --format native"),
        ("out", 2, {"format": "gguf"}, "gguf.*native, hf, megatron"),
        ("out", 2, {"layout": "lama"}, "unknown layout 'lama'; known: .*llama"),
        ("out", 2, {"target_layout": "lama", "format": "megatron"}, "unknown layout 'lama'; known: .*llama"),
        ("out", 2, {"quantize": True, "group_size": 16, "format": "megatron"}, "has no place for int8 weights"),
        ("out", 2, {"quantize": True, "group_size": 5}, "groups of 5 do not divide"),
        ("out", 2, {"workers": 0}, "workers=0 must be at least 1"),
        ("source", 2, {}, "lie in one another"),
        ("source/below/out", 2, {}, "lie in one another"),
        (".", 2, {}, "lie in one another"),
        ("full", 2, {}, "full exists and is not an empty folder"),
        ("file", 2, {}, "file exists and is not an empty folder"),
    ],
)
def test_bad_arguments(source, tmp_path, to, tp, options, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "file").touch()
    refused(tmp_path, message, source, tmp_path / to, tp, **options)


def test_no_checkpoint(tmp_path):
    refused(tmp_path, "nowhere", tmp_path / "nowhere", tmp_path / "out", 2)


def test_truncated_file(cut, tmp_path):
    file = cut / "rank-00001-of-00004.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    refused(tmp_path, f"{file.name} has {size - 1:,} bytes, the manifest says {size:,}", cut, tmp_path / "out", 2)


def test_missing_shard(cut, tmp_path):
    (cut / "rank-00002-of-00004.safetensors").unlink()
    refused(tmp_path, "rank-00002-of-00004.safetensors is missing", cut, tmp_path / "out", 2)


def test_wrong_version(cut, tmp_path):
    edit(cut, lambda manifest: manifest.update(version=2))
    refused(tmp_path, "version 2; this program reads 'tp_attention' version 1", cut, tmp_path / "out", 2)


def test_missing_tensor(cut, tmp_path):
    rewrite(cut, 1, lambda tensors: tensors.pop("norm.weight"))
    refused(tmp_path, "'norm.weight' is in the manifest alone", cut, tmp_path / "out", 2)


def test_additional_tensor(cut, tmp_path):
    rewrite(cut, 1, lambda tensors: tensors.update(more=torch.ones(1)))
    refused(tmp_path, "'more' is in the file alone", cut, tmp_path / "out", 2)


def test_shard_of_another_rank(cut, tmp_path):
    first, second = (cut / f"rank-{rank:05d}-of-00004.safetensors" for rank in (2, 3))
    os.replace(first, cut / "aside"), os.replace(second, first), os.replace(cut / "aside", second)
    refused(tmp_path, "its rank is '3', not '2'", cut, tmp_path / "out", 2)


@pytest.mark.parametrize("name", ["layers.1.attention.qkv_weight", "layers.0.mlp_norm.weight"])
def test_replicas_that_differ_in_one_bit(cut, tmp_path, name):
    # Heads 0-1, 2-3, 4, 5 are the ranks'; kv heads 0, 0-1, 1, 1. The last row is of a v head that rank 2 has too.
    rewrite(cut, 3, lambda tensors: flip(tensors[name].view(torch.uint8).view(-1)))
    refused(tmp_path, f"{re.escape(name)} of .*ranks disagree about", cut, tmp_path / "out", 2)


def test_verify_finds_a_flipped_byte(cut, tmp_path):
    file = cut / "rank-00002-of-00004.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of the tensor that lies last
    file.write_bytes(content)
    message = f"1 tensors of .*{file.name} are not what was written, by their SHA-256: "
    refused(tmp_path, message, cut, tmp_path / "out", 2, verify=True)


def test_verify_finds_what_the_disk_did_not_keep(source, tmp_path, monkeypatch):
    def lossy(descriptor, content, offset=None):
        return journal.write_all(descriptor, bytes(content[:-1]) + b"\0" if offset else content, offset)

    monkeypatch.setattr(writing, "write_all", lossy)
    refused(tmp_path, "are not what was written, by their SHA-256", source, tmp_path / "out", 2, verify=True)


@pytest.mark.parametrize("format", ["native", "megatron"])
def test_disk_full_before_anything_is_copied(source, tmp_path, monkeypatch, format):
    sizes = []

    def fallocate(descriptor, offset, length):
        sizes.append(length)
        if len(sizes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(OSError, match=r"disk full: .* takes ([0-9,]+) bytes, ([0-9,]+) are left") as caught:
        reshard(source, tmp_path / "out", 2, format=format)
    assert f"{sizes[1]:,}" in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


def test_disk_full_in_the_middle_can_go_on(source, tmp_path, monkeypatch):
    written = []

    def write(descriptor, content, offset=None):
        written.append(offset)
        if len(written) == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        journal.write_all(descriptor, content, offset)

    monkeypatch.setattr(writing, "SYNC_BYTES", 1)
    monkeypatch.setattr(writing, "write_all", write)
    with pytest.raises(OSError, match="No space left"):
        reshard(source, tmp_path / "out", 2, workers=1)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out.partial"}
    report = reshard(source, tmp_path / "out", 2, verify=True)
    assert report.resumed > 0
    reshard(source, tmp_path / "fresh", 2, verify=True)
    assert tiny_llama.files_of(tmp_path / "out") == tiny_llama.files_of(tmp_path / "fresh")


def test_disk_full_where_torch_would_save(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(OSError, match=r"disk full: .* takes [0-9,]+ bytes, 100 are left"):
        reshard(source, tmp_path / "out", 2, format="deepspeed")
    monkeypatch.undo()
    assert reshard(source, tmp_path / "out", 2, format="deepspeed", verify=True).resumed > 0
    assert not list((tmp_path / "out").glob("*.pt.*"))


def test_a_parent_that_is_a_file(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        reshard(source, tmp_path / "file" / "out", 2)


def test_another_process_is_at_it(source, tmp_path, monkeypatch):
    interrupt(monkeypatch, source, tmp_path / "out", 2)
    with open(tmp_path / "out.partial" / journal.NAME) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        refused(tmp_path, "another process is writing .*out.partial", source, tmp_path / "out", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 3}, "was begun with tp=2, this run has tp=3"),
        ({"format": "megatron"}, 'was begun with format="native", this run has format="megatron"'),
        ({"quantize": True, "group_size": 16}, "was begun with quantize=false, this run has quantize=true"),
    ],
)
def test_something_else_was_begun_there(source, tmp_path, monkeypatch, options, message):
    interrupt(monkeypatch, source, tmp_path / "out", 2)
    refused(tmp_path, f"{message}; .* or delete .*out.partial", source, tmp_path / "out", **{"tp": 2, **options})


def test_the_source_has_changed_since(source, tmp_path, monkeypatch):
    interrupt(monkeypatch, source, tmp_path / "out", 2)
    os.utime(source / "model.safetensors")
    file = re.escape(str(source / "model.safetensors"))
    refused(
        tmp_path, rf"was begun with source {file}=\[(.*)\], this run has source {file}=\[", source, tmp_path / "out", 2
    )


def test_a_folder_that_no_reshard_began(source, tmp_path):
    (tmp_path / "out.partial").touch()
    refused(tmp_path, "out.partial is in the way and no reshard began it", source, tmp_path / "out", 2)
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").touch()
    refused(tmp_path, "out.partial is in the way and no reshard began it", source, tmp_path / "out", 2)


def interrupt(monkeypatch, source, destination, tp):
    """Leave a destination whose name alone is missing."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.Journal, "finish", stop)
        reshard(source, destination, tp)


def edit(folder, change):
    file = folder / "tp_attention.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def rewrite(folder, rank, change):
    """Change a rank's tensors, the manifest's sizes with them."""
    (file,) = folder.glob(f"rank-{rank:05d}-of-*.safetensors")
    tensors = load_file(file)
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    change(tensors)
    save_file(tensors, file, metadata=header["__metadata__"])
    edit(folder, lambda manifest: manifest["files"][file.name].update(bytes=file.stat().st_size))


def flip(content):
    content[-1] ^= 1
