"""autotune without a GPU: launches that only ask, times that are made up, ranks on gloo; last, what takes a GPU."""

import dataclasses
import json
import logging
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is built for Linux alone")

from tp_attention import user_cache
from tp_attention.autotune import autotune, cache, ranks
from tp_attention.autotune.layer import LayerShape, launches
from tp_attention.autotune.search import asked, search, watched
from tp_attention.autotune.spaces import ARCHITECTURES, SPACES, Entry, entry, keys, table
from tp_attention.comm import TPGroup
from tp_attention.kernels import configs

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
SIZES = {"head_size": 32, "hidden_size": 64, "heads": 3, "kv_heads": 2, "qkv_rows": 224, "causal": True, "scale": 0.2}
LAYER = LayerShape(2, 300, **SIZES, dtype=torch.float16)
KEY = (0, 64, 2, "full")
FASTER = dataclasses.replace(entry("flash_prefill", KEY), num_stages=3)
GEMM = (0, "half", 64)
FOUND = [
    Entry("flash_prefill", KEY, FASTER),
    Entry("gemm", GEMM, dataclasses.replace(entry("gemm", GEMM), stages=4)),
]


@pytest.fixture(autouse=True)
def forgetful(monkeypatch, tmp_path):
    """What a test makes this process remember, it forgets; nobody's own cache is touched."""
    monkeypatch.setattr(configs, "_autotuned", {})
    monkeypatch.setenv("TP_ATTENTION_CACHE", str(tmp_path / "unasked"))


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="tp_attention")
    return lambda: [record.getMessage() for record in caplog.records]


# What a layer launches


def families_at(layer, architecture, monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: architecture)
    backend = "auto" if DEVICE.type == "cuda" else "triton"
    with watched():
        found = {name: asked(launch) for name, launch in launches(layer, DEVICE, backend)}
    assert {key[0] for _, key in found.values()} <= {architecture, 0}
    return {name: kernel for name, (kernel, _) in found.items()}


def test_a_layer_asks_for_the_kernels_of_its_shapes(monkeypatch):
    sizes = {**SIZES, "head_size": 64}
    asking = families_at(LayerShape(2, 300, **sizes, dtype=torch.float16), 90, monkeypatch)
    assert asking["qkv 1"] == asking["output 64"] == "skinny_gemm" and asking["qkv 128"] == "gemm"
    assert asking["attention 1 x 300"] == asking["attention 16 x 16"] == "flash_decode"
    assert asking["attention 64 x 64"] == "flash_prefill"
    assert asking["attention 300 x 300"] == "flash_prefill_hopper"
    assert not any(name.startswith("attention 1 x") for name in families_at(
        LayerShape(2, 300, **{**sizes, "causal": False}, dtype=torch.float16), 90, monkeypatch
    ))  # fmt: skip
    materialised = LayerShape(2, 300, **sizes, dtype=torch.float16, use_flash=False)
    assert set(families_at(materialised, 90, monkeypatch).values()) == {"skinny_gemm", "gemm", "softmax_context"}


@pytest.mark.parametrize(
    "change", [{"dtype": torch.int8}, {"dtype": torch.bfloat16, "transposed": True}, {"dtype": torch.float32}]
)
def test_every_kind_of_weight_is_launched(change, monkeypatch):
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float16)  # as while a checkpoint is loaded
    try:
        assert "skinny_gemm" in families_at(LayerShape(1, 70, **SIZES, **change), 0, monkeypatch).values()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(state, torch.get_rng_state())  # or ranks would draw different tokens afterwards


def test_wide_heads_have_no_kernel(monkeypatch, said):
    layer = LayerShape(1, 8, **{**SIZES, "head_size": 512}, dtype=torch.float16)
    assert set(families_at(layer, 0, monkeypatch).values()) == {"skinny_gemm"}
    assert any("attention is not tuned: head_dim 512 > 256" in line for line in said())


def test_lengths_are_both_ends_and_the_powers_of_two_between():
    assert LAYER.lengths() == [2, 4, 8, 16, 32, 64, 128, 256, 300]
    assert dataclasses.replace(LAYER, min_seqlen=5, max_seqlen=5).lengths() == [5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_seqlen": 0}, "min_seqlen=0, max_seqlen=300"),
        ({"max_seqlen": 1}, "min_seqlen=2, max_seqlen=1; use"),
        ({"heads": 0}, "heads=0 must be at least 1"),
        ({"kv_heads": 4}, "kv_heads=4 > heads=3"),
        ({"dtype": torch.int32}, "dtype=torch.int32 is not supported; use one of torch.float16"),
        ({"dtype": torch.int8, "transposed": True}, "pass transposed=False"),
    ],
)
def test_sizes_that_are_no_layers(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LAYER, **change)


# Searching


def asking(kernel, key, result=lambda config: torch.ones(2)):
    """A launch that asks for a configuration and runs nothing. What it was given is in `launch.given`."""

    def launch():
        launch.given = configs.choose(kernel, table(kernel), key)
        return result(launch.given)

    return launch


def timed(launch, ms):
    """A measure for launches that share `launch.given`: ms(config)."""

    def measure(call):
        call()
        return ms(launch.given)

    return measure


def tried(ms, result=lambda config: torch.ones(2), seconds=30.0):
    launch = asking("flash_prefill", KEY, result)
    return search([("a", launch), ("b", launch)], CPU, seconds, measure=timed(launch, ms))


def test_the_fastest_wins_and_is_used_from_then_on():
    assert tried(lambda config: 1.0 if config == FASTER else 2.0) == [Entry("flash_prefill", KEY, FASTER)]
    configs.remember("flash_prefill", KEY, FASTER)
    assert configs.choose("flash_prefill", table("flash_prefill"), KEY) == FASTER
    assert tried(lambda config: 1.0) == []  # compared with the table, whatever is remembered


def test_one_percent_is_noise():
    default = entry("flash_prefill", KEY)
    assert tried(lambda config: 1.0 if config == default else 0.995) == []
    assert tried(lambda config: 1.0 if config == default else 0.98) != []


def test_luck_does_not_win_twice():
    lucky = iter([1.0, 1.0, 0.5])  # both launches of the entry, then the first candidate's
    assert tried(lambda config: next(lucky, 1.0)) == []


def test_what_is_wrong_or_fails_is_out(said):
    def result(config):
        if config.num_stages == 4:
            raise RuntimeError("out of shared memory")
        return torch.full((2,), 1.1 if config == FASTER else torch.nan if config.block_m == 128 else 1.0)

    (found,) = tried(lambda config: 1 / (config.block_m * config.num_stages), result)
    assert found.config.block_m == 64 and found.config.num_stages == 3 and found.config != FASTER
    assert any("returns something else" in line for line in said())


def test_a_failing_entry_is_an_error():
    with pytest.raises(RuntimeError, match="no such kernel"):
        tried(lambda config: 1.0, lambda config: (_ for _ in ()).throw(RuntimeError("no such kernel")))


def test_a_launch_without_room_is_left_out(said):
    def full(config=None):
        raise torch.OutOfMemoryError("P")

    launch = asking("flash_prefill", KEY)
    named = [("a", launch), ("long", asking("flash_prefill", KEY, full)), ("longer", full)]
    found = search(named, CPU, 30.0, measure=timed(launch, lambda config: 1.0 if config == FASTER else 2.0))
    assert found == [Entry("flash_prefill", KEY, FASTER)]
    assert {
        "autotune: long has no room to be timed: left out",
        "autotune: longer has no room for its results: left out",
    } <= {*said()}


def test_time_is_kept():
    def slow(config):
        time.sleep(0.05)
        return torch.ones(2)

    start = time.monotonic()
    tried(lambda config: 1.0, slow, seconds=0.3)
    assert time.monotonic() - start < 3


def test_watching_ends_with_an_error_too():
    choose = configs.choose
    with pytest.raises(KeyError), watched():
        assert configs.choose is not choose
        raise KeyError
    assert configs.choose is choose


def test_no_hopper_configuration_that_hangs():
    for config in table("flash_prefill_hopper").values():
        for candidate in SPACES["flash_prefill_hopper"].candidates(config):
            assert candidate.stages >= candidate.consumers


# The file


@pytest.mark.parametrize("family", SPACES)
def test_every_key_and_configuration_survives_the_file(family):
    assert set(table(family)) <= set(keys(family))
    entries = [Entry(family, key, entry(family, key)) for key in keys(family)]
    for config in [*SPACES[family].candidates(entries[0].config)][:5]:
        entries.append(Entry(family, entries[0].key, config))
    back = cache.decoded(json.loads(json.dumps(cache.encoded(entries))))
    assert back == entries
    assert [repr(a) for a in back] == [repr(b) for b in entries]  # True is not 1
    assert {key[0] for key in keys(family)} <= set(ARCHITECTURES)


def written(folder):
    about = cache.circumstances(LAYER, CPU)
    path = cache.file_of(folder, about)
    cache.write(path, about, FOUND)
    return path, about


def changed(document, *path, to):
    *way, last = path
    inner = document
    for step in way:
        inner = inner[step]
    inner[last] = to
    return document


def edits():
    yield "not JSON", lambda text: "\x00", "Expecting value"
    yield "not text", lambda text: b"\xff\xfe\xff", "decode"
    yield "empty", lambda text: "", "Expecting value"
    yield "cut", lambda text: text[: len(text) // 2], "line"
    yield "deep", lambda text: "[" * 100_000, "recursion"
    yield "a list", lambda text: "[]", "no object of 'about' and 'entries'"
    changes = [
        (("more",), 1, "no object of 'about' and 'entries'"),
        (("about",), 1, "'about' is no object of device, capability"),
        (("about", "device"), "another GPU", "it is for device 'another GPU', here is 'cpu'"),
        (("about", "capability"), [9, 0], r"for capability \[9, 0\]"),
        (("about", "torch"), "1.0", "for torch '1.0'"),
        (("about", "triton"), "1.0", "for triton '1.0'"),
        (("about", "tp_attention"), "0.0.0", "for tp_attention '0.0.0', here is"),
        (("about", "kernels"), "0" * 64, "for kernels '000"),
        (("about", "layer", "heads"), 4, "for layer {"),
        (("entries",), {}, "entries are no list"),
        (("entries", 0), [], "an entry is no object of config, kernel, key"),
        (("entries", 0, "speed"), 2.0, "an entry is no object of"),
        (("entries", 0, "kernel"), "os.system", "'os.system' is no kernel that is tuned"),
        (("entries", 0, "kernel"), [], "is no kernel that is tuned"),
        (("entries", 0, "key"), "(0, 65, 2, 'full')", "flash_prefill has no key"),
        (("entries", 0, "key"), [0, 64, 2, "full"], "flash_prefill has no key"),
        (("entries", 0, "config"), None, "is never tried with null"),
        (("entries", 0, "config", "block_m"), 4096, "is never tried with .*4096"),
        (("entries", 0, "config", "block_m"), "64", "is never tried with"),
        (("entries", 0, "config", "block_m"), 64.0, "is never tried with"),
        (("entries", 0, "config", "block_x"), 64, "is never tried with .*block_x"),
        (("entries", 1, "config", "tma"), 0, "is never tried with"),
    ]
    for path, to, message in changes:
        name = ".".join(map(str, path))
        yield f"{name}={to}", lambda text, p=path, t=to: json.dumps(changed(json.loads(text), *p, to=t)), message


@pytest.mark.parametrize(("edit", "message"), [pytest.param(e, m, id=name) for name, e, m in edits()])
def test_what_may_not_be_believed_is_ignored_with_a_line(edit, message, tmp_path, said):
    path, about = written(tmp_path)
    assert cache.read(path, about) == FOUND and not said()
    text = edit(path.read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cache.read(path, about) is None
    (line,) = said()
    assert f"autotune: {path} is ignored" in line
    assert re.search(message, line), line
    assert written(tmp_path)[0] == path and cache.read(path, about) == FOUND  # written anew


def test_a_file_is_of_one_device_and_layer(tmp_path):
    about = cache.circumstances(LAYER, CPU)
    others = [{**about, "device": "NVIDIA H200"}, cache.circumstances(dataclasses.replace(LAYER, heads=4), CPU)]
    assert len({cache.file_of(tmp_path, some) for some in (about, *others)}) == 3
    assert "nvidia-h200" in cache.file_of(tmp_path, others[0]).name
    assert cache.file_of(tmp_path, {**about, "torch": "1.0"}) == cache.file_of(tmp_path, about)  # stale, so overwritten


def test_where_files_are(monkeypatch):
    assert user_cache.cache_directory().name == "unasked"
    monkeypatch.delenv("TP_ATTENTION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert user_cache.cache_directory() == Path("/xdg/tp_attention")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert user_cache.cache_directory() == Path("/home/me/.cache/tp_attention")


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_killed_before_the_rename_the_old_file_stands(tmp_path, monkeypatch):
    path, about = written(tmp_path)
    if (child := os.fork()) == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            cache.write(path, about, [])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert cache.read(path, about) == FOUND
    assert len(list(tmp_path.iterdir())) == 2  # what it had written so far


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path, said):
    blocked = tmp_path / "file"
    blocked.write_text("")
    path, about = written(blocked / "folder")
    assert not path.exists() and cache.read(path, about) is None
    assert any("cannot keep the results" in line and "TP_ATTENTION_CACHE" in line for line in said())


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, said):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    written(tmp_path)
    assert not list(tmp_path.iterdir()) and "No space left" in said()[0]


# Ranks


def tune_on_rank(world, folder, failing):
    """What this rank measured, was told and has installed."""
    asked_for = []

    def tune(layer, device, seconds, report):
        report("half way")
        asked_for.append((layer.heads, seconds))
        if failing:
            raise LookupError("no such kernel")
        return FOUND

    configs._autotuned.clear()
    mine = dataclasses.replace(LAYER, heads=4 - (world.rank > 0))  # uneven: those of rank 0 count
    start = time.monotonic()
    try:
        counts = ranks.tune_together(mine, world.tp, folder, quiet=False, tune=tune)
    except Exception as error:
        assert time.monotonic() - start < 10
        return asked_for, f"{type(error).__name__}: {error}", dict(configs._autotuned)
    return asked_for, counts, dict(configs._autotuned)


INSTALLED = {(found.kernel, found.key): found.config for found in FOUND}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rank_0_measures_and_all_ranks_use_it(world, n, tmp_path):
    run = world(n)
    for measured in ([(4, 60.0 if n == 1 else 30.0)], []):  # a world's collectives wait 60 s; then the cache
        results = run(tune_on_rank, tmp_path, False)
        assert [asked_for for asked_for, _, _ in results] == [measured] + [[]] * (n - 1)
        assert all(counts == {"flash_prefill": 1, "gemm": 1} for _, counts, _ in results)
        assert all(installed == INSTALLED for _, _, installed in results)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rank_0s_failure_is_everybodys(world, n, tmp_path):
    (_, first, _), *others = results = world(n)(tune_on_rank, tmp_path, True)
    assert first == "LookupError: no such kernel"
    for rank, (asked_for, error, _) in enumerate(others, 1):
        assert not asked_for and error.startswith("RuntimeError: autotune failed on rank 0")
        assert f"rank {rank} of {n}: LookupError: no such kernel" in error
    assert all(not installed for _, _, installed in results) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_the_bar_is_on_standard_error_of_a_terminal(terminal, quiet, tmp_path, monkeypatch, capsys, said):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal

    def tune(layer, device, seconds, report):
        report("half way")
        return FOUND

    ranks.tune_together(LAYER, TPGroup.alone(), tmp_path, quiet=quiet, tune=tune)
    printed = capsys.readouterr()
    shown = terminal and not quiet
    assert not printed.out and ("half way" in printed.err) == shown
    assert any("measuring for at most 60 s" in line for line in said()) != shown


def test_without_a_gpu_there_is_a_line(said):
    assert autotune(2, 64, **SIZES, dtype=torch.float16, group=TPGroup.alone()) == {}
    assert said() == ["autotune: no GPU, the group's tensors are on cpu: nothing to tune"]
    with pytest.raises(ValueError, match="min_seqlen=8, max_seqlen=4"):
        autotune(8, 4, **SIZES, dtype=torch.float16, group=TPGroup.alone())


# With a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("change", [{}, {"use_flash": False}, {"dtype": torch.int8}, {"dtype": torch.float32}])
def test_a_gpu_is_tuned_in_time_and_from_its_cache(change, tmp_path, monkeypatch, said):
    monkeypatch.setattr(ranks, "BUDGET_S", 12.0)
    sizes = {**SIZES, "head_size": 64, "hidden_size": 512, "heads": 8, "kv_heads": 8, "qkv_rows": 1536}
    arguments = {**sizes, "dtype": torch.float16, "group": TPGroup.alone("cuda"), "cache": tmp_path, **change}
    start = time.monotonic()
    counts = autotune(2, 512, **arguments)
    assert time.monotonic() - start < 40
    installed = dict(configs._autotuned)
    assert sum(counts.values()) == len(installed)
    configs._autotuned.clear()
    start = time.monotonic()
    assert autotune(2, 512, **arguments) == counts and configs._autotuned == installed
    assert time.monotonic() - start < 2 and any("entries from" in line for line in said())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp64_has_no_kernels(said):
    assert autotune(2, 64, **SIZES, dtype=torch.float64, group=TPGroup.alone("cuda")) == {}
    assert any("there are no kernels for torch.float64" in line for line in said())
