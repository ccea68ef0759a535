"""Ranks that die, are late, leave or call something else: every other rank ends with the named error, and soon."""

import os
import re
import signal
import threading
import time
from collections import Counter
from datetime import timedelta

import pytest
import torch

from tp_attention import launch
from tp_attention.comm import CollectiveError, TPGroup, all_gather, all_reduce, barrier, broadcast, stores
from tp_attention.comm.checks import RECORD, Call, difference, record
from tp_attention.launch import RankError

pytestmark = [
    pytest.mark.skipif(launch.launched(), reason="ranks die here, and a launcher's must not"),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="NCCL's ranks end as test_heartbeat_* tests it on gloo"),
]

SIZE = {"all_reduce": 7, "chunks": 100_000, "all_gather": 300_000, "broadcast": 50_000}


def ones(n):
    return torch.ones(n)


CALLS = {
    "all_reduce": lambda group, src: all_reduce(ones(SIZE["all_reduce"]), group),
    "chunks": lambda group, src: all_reduce(ones(SIZE["chunks"]), group),
    "all_gather": lambda group, src: all_gather(ones(SIZE["all_gather"]), group),
    "broadcast": lambda group, src: broadcast(ones(SIZE["broadcast"]), group, src),
    "barrier": lambda group, src: barrier(group),
}


def named(call, rank, size, number, reason):
    """The error of a call as a pattern."""
    operation = "all_reduce" if call == "chunks" else call
    what = "barrier" if call == "barrier" else rf"{operation} of torch\.float32 \[{SIZE[call]}\]"
    return rf"{what} failed on rank {rank} of {size} of group tp \[.*\]: call {number}, {reason}"


# Killed


def die(how):
    if how == "exit":
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def outlive(world, call, victim, how):
    """The survivors keep what they have until all of them have the error: none is woken by another that goes."""
    barrier(world.tp)
    if world.rank == victim:
        die(how)
    start = time.monotonic()
    try:
        for _ in range(2):  # whoever does not wait for the victim in the first one does in the second
            CALLS[call](world.tp, victim)
    except CollectiveError as error:
        assert time.monotonic() - start < 5
        store = stores.default()
        store.set(str(world.rank), "")
        store.wait([str(rank) for rank in range(world.size) if rank != victim], timedelta(seconds=5))
        with pytest.raises(CollectiveError, match="the group failed earlier: " + re.escape(str(error))):
            barrier(world.tp)
        raise


@pytest.mark.parametrize(
    "n, call, victim, how",
    [
        (2, "all_reduce", 1, "kill"),
        (2, "barrier", 0, "exit"),
        (3, "chunks", 2, "kill"),
        (3, "broadcast", 1, "exit"),
        (4, "all_reduce", 3, "exit"),
        (4, "all_gather", 1, "kill"),
        (4, "broadcast", 1, "kill"),  # a tree: some wait for ranks that live
        (4, "barrier", 2, "kill"),
    ],
)
def test_killed_rank(failures, n, call, victim, how):
    start = time.monotonic()
    ends = failures(n, outlive, call, victim, how)
    assert time.monotonic() - start < 10
    assert ends.keys() == set(range(n))
    assert ends.pop(victim).exit_code == (0 if how == "exit" else -signal.SIGKILL)
    for rank, end in ends.items():
        assert end.cause_type == "CollectiveError" and end.echo
        assert re.match(named(call, rank, n, "[23]", "after .* s of at most 60 s: "), end.cause_message)


def lose_a_rank_of_a_mesh(world):
    barrier(world.dp)
    if world.rank == 3:
        die("kill")
    lost, kept = {0: (None, world.tp), 1: (world.dp, world.tp), 2: (world.tp, world.dp)}[world.rank]
    if lost:
        with pytest.raises(CollectiveError, match=rf"rank 0 of 2 of group {lost.name[:2]} \[{world.rank}, 3\]"):
            barrier(lost)
    if world.rank < 2:
        assert all_reduce(ones(1), kept).item() == 2  # the row of the living goes on
    raise KeyError("as it should be")


def test_killed_rank_of_a_mesh(failures):
    ends = failures(4, lose_a_rank_of_a_mesh, tp=2)
    assert [ends[rank].cause_type for rank in range(4)] == ["KeyError"] * 3 + ["SIGKILL"]


# Late


def come_late(world, calls):
    for call in calls:
        with launch.init(timeout=0.7) as impatient:
            if world.rank == 1:
                time.sleep(1.4)
            start = time.monotonic()
            with pytest.raises(CollectiveError, match=named(call, world.rank, world.size, 1, "after .* at most 0.7 s")):
                CALLS[call](impatient.tp, 1)
            assert time.monotonic() - start < 5
            assert impatient.tp.process_group is None
        barrier(world.tp)  # which nothing has happened to


@pytest.mark.parametrize(
    "n, calls", [(2, ["all_reduce"]), (3, ["all_gather", "barrier"]), (4, ["chunks", "broadcast"])]
)
def test_late_rank(world, n, calls):
    world(n)(come_late, calls)


def limits(world):
    with launch.init(timeout=7) as other:
        return world.tp.timeout, other.dp.timeout, TPGroup.from_process_group(other.tp.process_group).timeout


def test_time_limit_is_the_process_groups(world):
    assert world(2)(limits) == [(60, 120, 7)] * 2  # dp has one rank, which waits for nobody


# TP_ATTENTION_CHECK


def disagree(group, odd):
    """Calls of rank `odd` and of the others, and what the error must say of each."""

    def pick(theirs, mine):
        return mine if group.rank == odd else theirs

    rank, size = group.rank, group.size
    even = [2] * size
    yield lambda: all_reduce(ones(pick(3, 5)), group), r"all_reduce of torch\.float32 \[3\]", r"float32 \[5\]"
    yield lambda: all_reduce(ones(pick(0, 4)), group), r"\[0\]", r"\[4\]"
    yield lambda: all_reduce(ones(3).to(pick(torch.float16, torch.bfloat16)), group), r"torch\.float16", r"bfloat16"
    yield lambda: pick(all_reduce, all_gather)(ones(3), group), "all_reduce of", "all_gather of"
    yield lambda: broadcast(ones(3), group, pick(0, 1)), "src=0", "src=1"
    yield lambda: all_gather(ones(6).view(pick((2, 3), (3, 2))), group, dim=0), r"\[\*, 3\]", r"\[\*, 2\]"
    yield lambda: all_gather(ones(4).view(2, 2), group, dim=pick(0, 1)), r"\[\*, 2\]", r"\[2, \*\]"
    yield lambda: all_gather(ones(2), group, sizes=pick(None, even)), "sizes=None", r"sizes=\[2, "
    yield lambda: all_gather(ones(pick(2, 3)), group, sizes=even), r"\[\*\] sizes", r"\[3\] sizes"
    yield lambda: barrier(group) if rank != odd else broadcast(ones(1), group), "barrier;?", "broadcast of"


def check_disagreements(group, odd):
    others = re.escape(str([rank for rank in range(group.size) if rank != odd]))
    number = group._call.number
    for call, theirs, mine in disagree(group, odd):
        number += 1
        with pytest.raises(CollectiveError) as caught:
            call()
        text = str(caught.value)
        assert f"failed on rank {group.rank} of {group.size} of group {group.name}: call {number}, " in text
        assert re.search(rf"ranks {others} want call {number}: [^;]*{theirs}", text), text
        assert re.search(rf"ranks \[{odd}\] want call {number}: [^;]*{mine}", text), text
    assert all_reduce(ones(2), group).tolist() == [group.size] * 2  # all ranks raised: the group goes on


def disagree_and_go_on(world):
    group = world.tp
    assert group.checked
    check_disagreements(group, odd=group.size - 1)
    check_disagreements(group, odd=0)
    n = group.rank + 1
    assert len(all_gather(ones(n), group)) == group.size * (group.size + 1) // 2  # legal: n may differ
    assert len(all_gather(ones(n), group, sizes=range(1, group.size + 1))) == group.size * (group.size + 1) // 2
    with pytest.raises(ValueError, match="sizes="):  # wrong alike
        all_gather(ones(2), group, sizes=[3] * group.size)
    barrier(group)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_disagreement_raises_on_all_ranks(world, monkeypatch, n):
    monkeypatch.setenv("TP_ATTENTION_CHECK", "1")
    world(n)(disagree_and_go_on)


def sum_alone(world):
    return all_reduce(ones(2).to(world.device), world.tp).tolist()


def test_a_world_of_one_agrees(world, monkeypatch):
    monkeypatch.setenv("TP_ATTENTION_CHECK", "1")
    assert world(1)(sum_alone) == [[1, 1]]


def disagree_in_one_row(world):
    if world.dp.rank == 1:
        check_disagreements(world.tp, odd=1)
    else:
        for _ in range(3):
            assert all_reduce(ones(1), world.tp).item() == 2
    assert all_reduce(ones(1), world.dp).item() == 2
    with pytest.raises(
        CollectiveError, match=r"group dp \[.*ranks \[0\] want .*barrier; ranks \[1\] want .*all_reduce"
    ):
        barrier(world.dp) if world.dp.rank == 0 else all_reduce(ones(1), world.dp)


def test_disagreement_on_a_mesh(world, monkeypatch):
    monkeypatch.setenv("TP_ATTENTION_CHECK", "1")
    world(4, tp=2)(disagree_in_one_row)


def come_late_to_the_comparison(world):
    with launch.init(timeout=0.7) as impatient:
        if world.rank == 0:
            time.sleep(1.4)
            return
        with pytest.raises(CollectiveError, match=named("all_reduce", world.rank, 3, 1, "after .* at most 0.7 s")):
            all_reduce(ones(7), impatient.tp)


def test_late_rank_is_an_error_of_the_comparison_too(world, monkeypatch):
    monkeypatch.setenv("TP_ATTENTION_CHECK", "1")
    world(3)(come_late_to_the_comparison)


def start_again(world):
    world.close()
    if world.rank == 1:
        os.environ["TP_ATTENTION_CHECK"] = "1"
    launch.init()


def test_ranks_that_do_not_all_compare_do_not_start(world):
    with pytest.raises(RankError, match="rank 1 wants cpu and tp=2 with TP_ATTENTION_CHECK, but rank 0 wants cpu and"):
        world(2)(start_again)


def test_records_differ_where_calls_do():
    sizes = list(range(300))  # past what fits into a record
    long = Call(1, "all_gather", torch.float32, (3, 4), 0, {"sizes": sizes})
    other = long._replace(arguments={"sizes": [*sizes[:-1], 7]})
    assert len(record(long)) == len(record(Call())) == RECORD
    assert difference([record(long), record(long._replace(shape=(9, 4)))]) is None
    assert difference([record(long), record(other)]).startswith(
        "ranks [0] want call 1: all_gather of torch.float32 [*, 4"
    )
    assert "ranks [0, 2] want call 0: none; ranks [1]" in difference([record(Call()), record(long), record(Call())])


def count_transfers(world):
    seen = Counter()

    def counted(name, hook):
        def count(self, *args):
            seen[name] += 1
            return hook(self, *args)

        return count

    for name in ("_meet", "_gather", "_exchange", "_sum", "_broadcast", "_barrier"):
        setattr(TPGroup, name, counted(name, getattr(TPGroup, name)))
    for _ in range(3):
        all_reduce(ones(4), world.tp)
        all_gather(ones(300_000), world.tp, sizes=[300_000] * world.size)
        broadcast(ones(4), world.tp)
        barrier(world.tp)
    watching = [thread.name for thread in threading.enumerate() if "heartbeat" in thread.name]
    return dict(seen), watching, world.tp._store


def test_nothing_more_is_sent_unless_asked_for(world, monkeypatch):
    plain = {"_gather": 6, "_broadcast": 3, "_barrier": 3}
    assert world(2)(count_transfers) == [(plain, [], None)] * 2
    monkeypatch.setenv("TP_ATTENTION_CHECK", "0")
    assert world(2)(count_transfers) == [(plain, [], None)] * 2
    monkeypatch.setenv("TP_ATTENTION_CHECK", "1")
    assert world(2)(count_transfers) == [(plain | {"_gather": 18, "_meet": 12}, [], None)] * 2
