"""Heartbeat, which CUDA groups have, on gloo; and that groups of all kinds are destroyed in any order."""

import os
import random
import re
import signal
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tp_attention import launch
from tp_attention.comm import CollectiveError, TPGroup, all_reduce, barrier, broadcast
from tp_attention.comm.heartbeat import EXIT_CODE, MISSED, Beat, Peer

pytestmark = [
    pytest.mark.skipif(launch.launched(), reason="ranks die here, and a launcher's must not"),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="its groups would be NCCL's"),
]

FAST = 0.2  # seconds from beat to beat: a death shows after MISSED of them


def ones(n):
    return torch.ones(n)


def watched(world, timeout=60.0):
    return TPGroup.from_process_group(world.tp.process_group, timeout=timeout, heartbeat=FAST, name="watched")


def stay_outside(world, how):
    """All ranks compute, none is in a collective; the last one goes in its own way."""
    group = watched(world, timeout=2 * FAST * MISSED if how == "late" else 60)
    all_reduce(ones(7), group)
    if world.rank < world.size - 1:
        if how == "late":
            broadcast(ones(9), group)  # gloo's source does not wait
        time.sleep(20)
    time.sleep(2 * FAST)  # so that the others hear of its last collective
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "failed":
        group.destroy(abort=True)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(20)


REASONS = {
    "kill": "died or cannot be reached",
    "stopped": "died or cannot be reached",
    "failed": "left after an error",
    "late": "did not come to call 2",
}


@pytest.mark.parametrize("n, how", [(2, "kill"), (3, "stopped"), (2, "failed"), (2, "late")])
def test_heartbeat_ends_the_others(failures, capfd, n, how):
    start = time.monotonic()
    ends = failures(n, stay_outside, how, grace=15 if how == "kill" else 1)
    assert time.monotonic() - start < 10
    assert ends[0].exit_code == EXIT_CODE != 0
    errors = capfd.readouterr().err
    said = (
        rf"rank 0 of {n} of group watched: rank {n - 1} {REASONS[how]}.*; its last collective: call 1, all_reduce of "
    )
    here = r"torch\.float32 \[7\]; here: call \d, (all_reduce|broadcast) of torch\.float32 \[\d\]"
    assert re.search(said + here, errors), errors


def lose_the_store(world, port):
    world.close()
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
    with launch.init(heartbeat=FAST) as own:
        barrier(own.tp)
        if world.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(20)


def test_heartbeat_notices_that_the_store_is_gone(failures, capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert failures(2, lose_the_store, port)[1].exit_code == EXIT_CODE
    assert re.search(
        r"rank 1 of 2 of group tp \[0, 1\]: the store's process .* cannot be reached", capfd.readouterr().err
    )


def raise_no_alarm(world):
    busy, leaving = watched(world), watched(world)
    assert world.tp._heartbeat is None
    if world.rank == 0:
        leaving.destroy()  # in good order; the others keep theirs
    end = time.monotonic() + 2 * FAST * MISSED
    while time.monotonic() < end:  # holds Python's lock as far as Python does
        if world.rank == 1:
            time.sleep(0.1)
    assert all_reduce(ones(1), busy).item() == world.size
    for group in (busy, leaving):
        group.destroy()
        group.destroy()
    return [thread.name for thread in threading.enumerate() if "heartbeat" in thread.name]


def test_no_alarm_for_a_busy_rank_or_one_that_left(world, capfd):
    assert world(3)(raise_no_alarm) == [[], [], []]
    assert "tp_attention: rank" not in capfd.readouterr().err


def test_what_a_peer_is_judged_by():
    steady = Peer()
    assert not any(steady.judge(Beat(turn), 5, 3) for turn in range(1, 4))  # 0 of 5 calls, and the limit is 3 beats
    assert steady.judge(Beat(4), 5, 3).startswith("did not come to call 1")
    assert Peer().judge(Beat(1, 5), 5, 0) is None and Peer().judge(Beat(1, 6), 5, 0) is None
    moving = Peer()
    assert not any(moving.judge(Beat(turn, turn), 10**6, 1) for turn in range(1, 50))  # behind, but it comes
    absent = Peer()
    assert not any(absent.judge(Beat(), 0, 3) for _ in range(50))  # has yet to make its group
    left = Peer()
    assert not any(left.judge(Beat(9, 4, "left"), 4, 3) for _ in range(50))
    assert [bool(left.judge(Beat(9, 4, "left"), 5, 3)) for _ in range(4)] == [False, False, False, True]
    for state in ("running", "failed"):
        gone = Peer()
        assert [bool(gone.judge(Beat(9, 4, state), 4, 3)) for _ in range(MISSED + 2)] == [False] * (MISSED + 1) + [True]


# Destruction


def destroy_in_any_order(world, seed):
    order = random.Random(seed)  # one seed, one order on all ranks: making groups is a collective
    for _ in range(3):
        own = launch.init(tp=order.choice([1, 2]), heartbeat=order.choice([0, FAST]))
        groups = [own.tp, own.dp, *(watched(world) for _ in range(2))]
        for _ in range(8):
            members = order.sample(range(world.size), order.choice([2, world.size]))
            process_group = dist.new_group(members)
            if world.rank in members:
                groups.append(TPGroup.from_process_group(process_group, owned=True))
        for group in groups:
            assert all_reduce(ones(1), group).item() == group.size
        late = random.Random(seed + world.rank)  # destroying is not
        late.shuffle(groups)
        for group in groups[: len(groups) // 2] * 2:
            group.destroy(abort=late.choice([True, False]) and group._heartbeat is None)
        own.close()
        for group in groups:
            group.destroy()
        assert all_reduce(ones(1), world.tp).item() == world.size
    kept = watched(world)
    world.close()  # the default group, and with it those that are left
    assert not dist.is_initialized()
    kept.destroy()
    world.tp.destroy()
    assert not [thread for thread in threading.enumerate() if "heartbeat" in thread.name]


@pytest.mark.parametrize("n", [2, 4])
def test_groups_are_destroyed_in_any_order(world, n):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    world(n)(destroy_in_any_order, seed)


def go_on_after_an_error(world):
    for n in range(2):
        with pytest.raises(KeyError), launch.init(timeout=5) as broken:
            barrier(broken.tp)
            raise KeyError
        with launch.init(timeout=0.3) as impatient:
            if world.rank == n:
                with pytest.raises(CollectiveError):
                    barrier(impatient.tp)
        barrier(world.tp)
        assert all_reduce(ones(1), world.tp).item() == world.size


def test_groups_after_errors(world):
    world(3)(go_on_after_an_error)
