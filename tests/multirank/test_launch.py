"""spawn and init: that they work, and how they fail."""

import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tp_attention import launch
from tp_attention.comm import all_reduce, barrier, process_groups
from tp_attention.launch import RankError, spawn
from tp_attention.launch import world as world_module
from tp_attention.launch.environment import TORCHRUN

pytestmark = pytest.mark.skipif(launch.launched(), reason="starts ranks itself; nothing here is for a launcher's")


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """After every test: no child of ours, neither running nor a zombie, but for the helper that "spawn" starts."""
    yield
    children = psutil.Process().children()
    assert not [child for child in children if not any("resource_tracker" in part for part in child.cmdline())]


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "still not after 10 s"
        time.sleep(0.02)


# spawn


def test_spawn_returns_in_rank_order():
    seen = [5]

    def place(a, b):  # a closure: a fork needs no pickle
        return int(os.environ["RANK"]), a + b, seen, torch.get_num_threads()

    assert spawn(place, 3, 1, 2, timeout=30, start_method="fork") == [(rank, 3, [5], 1) for rank in range(3)]


def ones(n):
    with launch.init() as world:
        return all_reduce(torch.ones(n, device=world.device), world.tp).cpu()


def test_large_return_values_and_tensors():
    first, second = spawn(ones, 2, 3_000_000, timeout=60)
    assert first.shape == (3_000_000,) and torch.equal(first, second)


def test_start_method_spawn_with_several_threads():
    assert [total.tolist() for total in spawn(ones, 2, 1, timeout=120, threads=2)] == [[2.0], [2.0]]


def test_twelve_ranks_fork_from_a_process_with_a_thread_pool():
    (torch.randn(600, 600) @ torch.randn(600, 600)).sum()  # starts the pool that the ranks must not wait for
    assert {total.item() for total in spawn(ones, 12, 1, timeout=60)} == {12.0}


@pytest.mark.parametrize("arguments, match", [({"ranks": 0}, "ranks=0"), ({"threads": 0}, "threads=0")])
def test_spawn_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        spawn(ones, **{"ranks": 2} | arguments)
    with pytest.raises(ValueError, match="forkserver"):
        spawn(ones, 2, start_method="forkserver")


def fail(how, bad_rank=1):
    """One rank fails in its own way while the others wait for it in a collective."""
    with launch.init() as world:
        barrier(world.tp)
        if world.rank == bad_rank:
            if how == "raise":
                raise KeyError("no such head")
            if how == "sys.exit":
                sys.exit(3)
            if how == "os._exit":
                os._exit(0)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        barrier(world.tp)
        time.sleep(100)


@pytest.mark.parametrize(
    "how, cause, message, exit_code",
    [
        ("raise", "KeyError", "'no such head'", 1),
        ("sys.exit", "SystemExit", "3", 3),
        ("os._exit", "exit", "exited with code 0 before it returned", 0),
        ("kill", "SIGKILL", "killed by SIGKILL (out of memory?)", -signal.SIGKILL),
    ],
)
def test_failing_rank_is_found_and_ends_the_others(how, cause, message, exit_code):
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 3: ") as caught:
        spawn(fail, 3, how, timeout=60)
    assert time.monotonic() - start < 10
    error = caught.value
    assert (error.rank, error.exit_code, error.cause_type, error.cause_message) == (1, exit_code, cause, message)
    if how == "raise":
        assert 'raise KeyError("no such head")' in error.traceback and error.traceback in str(error)


def unpicklable():
    return lambda: None


def test_return_value_that_cannot_be_pickled():
    with pytest.raises(RankError, match=r"rank 0 of 1: .*pickle"):
        spawn(unpicklable, 1, timeout=30)


class Loop:
    """Garbage that must be collected where it was made."""

    def __init__(self):
        self.me, self.home = self, os.getpid()

    def __del__(self):
        if os.getpid() != self.home:
            os.abort()


def test_ranks_do_not_collect_the_parents_garbage():
    Loop()
    assert len(spawn(gc.collect, 2, timeout=30)) == 2


def stubborn(folder):
    """Rank 1 hangs, will not hear SIGTERM, and has a child of its own."""
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "100"])
        (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(100)


def test_time_limit_names_the_running_ranks_and_ends_them(tmp_path):
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 3 still running after 1.5 s"):
        spawn(stubborn, 3, tmp_path, timeout=1.5)
    for pid in (tmp_path / "pids").read_text().split():
        wait_until(lambda pid=pid: gone(int(pid)))


PARENT = """
import os, pathlib, signal, sys, time
from tp_attention import launch

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it

def hang(folder):
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(100)

launch.spawn(hang, 2, pathlib.Path(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_parent(tmp_path, number):
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent ended")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, tmp_path], stderr=subprocess.PIPE, text=True)
    files = [tmp_path / "0", tmp_path / "1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files), 30)
    parent.send_signal(number)
    errors = parent.communicate(timeout=20)[1]
    for file in files:
        wait_until(lambda file=file: gone(int(file.read_text())))
    assert errors.count("KeyboardInterrupt") == (number == signal.SIGINT)  # the parent's, none of a rank


# init


def describe(tp):
    with launch.init(tp=tp) as world:
        return world.rank, world.size, world.tp.rank, world.tp.size, world.dp.rank, world.dp.size


def test_mesh_places():
    assert spawn(describe, 4, 2, timeout=60) == [(r, 4, r % 2, 2, r // 2, 2) for r in range(4)]
    assert spawn(describe, 2, None, timeout=60) == [(r, 2, r, 2, 0, 1) for r in range(2)]


@pytest.mark.parametrize("tp", [0, 4, 5, 12])
def test_tp_that_does_not_divide_the_world(tp):
    with pytest.raises(ValueError, match=f"tp={tp} .* 6 ranks; use tp = 1, 2, 3, 6"):
        process_groups.check_tp(tp, 6)
    with pytest.raises(RankError) as caught:
        spawn(describe, 3, 2, timeout=60)
    assert caught.value.cause_type == "ValueError"
    assert caught.value.cause_message == "tp=2 does not divide the world of 3 ranks; use tp = 1, 3"


def want_tp_by_rank():
    launch.init(tp=2 - int(os.environ["RANK"]), device="cpu")


def test_ranks_that_want_different_worlds():
    with pytest.raises(RankError, match="rank 1 wants cpu and tp=1, but rank 0 wants cpu and tp=2"):
        spawn(want_tp_by_rank, 2, timeout=60)


def alone_without_environment():
    for name in TORCHRUN.place:
        del os.environ[name]
    with launch.init() as world:
        assert not dist.is_initialized()
        return world.size, world.launcher, world.tp.size, world.tp.process_group


def test_world_of_one_needs_nothing():
    assert spawn(alone_without_environment, 1, timeout=30) == [(1, "none", 1, None)]


def meet_nobody(store_answers):
    if os.environ["RANK"] == "1":
        if not store_answers:
            os.environ["MASTER_PORT"] = "9"
        launch.init(timeout=1)
    time.sleep(100)


@pytest.mark.parametrize("store_answers", [True, False])
def test_time_limit_of_init(store_answers):
    with pytest.raises(RankError, match="rank 1 of 2 did not meet the others in 1 s"):
        spawn(meet_nobody, 2, store_answers, timeout=60)


def start_over(port):
    """Three worlds, one after the other, on one store. port: rank 0 runs it, as under launchers that have none."""
    if port:
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
    totals = []
    for _ in range(3):
        with launch.init() as world:
            totals.append(all_reduce(torch.ones(1, device=world.device), world.tp).item())
        assert not dist.is_initialized()
    if port:
        time.sleep(0.5 * (world.rank == 0))  # its store must outlive the others' goodbye
    return totals


@pytest.mark.parametrize("hosted", [True, False])
def test_init_again_after_close(hosted):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert spawn(start_over, 2, 0 if hosted else port, timeout=60) == [[2.0] * 3] * 2


def join_the_callers_group(close_first):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    world = launch.init(tp=1)
    assert (world.rank, world.size, world.device.type, world.dp.size) == (rank, size, "cpu", size)
    assert all_reduce(torch.ones(1), world.dp).item() == size
    if close_first:
        world.close()
        dist.barrier()  # still there: not ours
    dist.destroy_process_group()
    world.close()


@pytest.mark.parametrize("close_first", [True, False])
def test_the_callers_process_group_is_joined_and_left_alone(close_first):
    spawn(join_the_callers_group, 2, close_first, timeout=60)


def close_the_owner_first():
    first, second = launch.init(), launch.init()
    assert all_reduce(torch.ones(1, device=second.device), second.tp).item() == 2
    barrier(first.tp)
    first.close()
    second.close()
    assert not dist.is_initialized()
    third = launch.init()
    second.close()  # its group is long gone, and this default group is another
    assert all_reduce(torch.ones(1, device=third.device), third.tp).item() == 2
    third.close()


def test_worlds_close_in_any_order():
    spawn(close_the_owner_first, 2, timeout=60)


def test_too_few_gpus(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with caplog.at_level(logging.WARNING, "tp_attention"):
        assert world_module._pick_device(None, 0, 2) == torch.device("cpu")
    assert "1 GPUs are too few for the 2 ranks" in caplog.text
    with pytest.raises(ValueError, match=r"2 ranks .* it has 1; use device='cpu'"):
        world_module._pick_device("cuda", 0, 2)
