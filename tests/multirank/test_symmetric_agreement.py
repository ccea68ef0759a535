"""Whether a group sums through symmetric memory, and what ends such a group: every rank alike (symmetric_ranks)."""

import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from tp_attention.comm import CollectiveError, Norm, all_reduce, linear_all_reduce, stores

pytest.importorskip("triton", reason="triton is built for Linux alone")

from tests.multirank.symmetric_ranks import (
    assert_empty,
    make_inboxes,
    shared,
)
from tp_attention.comm.symmetric import agreement, memory
from tp_attention.comm.symmetric import sums as sums_module
from tp_attention.comm.symmetric.inbox import Inboxes
from tp_attention.comm.symmetric.sums import ONE_SHOT_BYTES, SymmetricSums

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in Triton's interpreter without a GPU")


@pytest.mark.parametrize("way", [None, "", "auto", "nccl", "one_shot", "two_shot", "ring"])
def test_what_the_environment_asks_for(monkeypatch, way):
    if way is None:
        monkeypatch.delenv(agreement.SWITCH, raising=False)
    else:
        monkeypatch.setenv(agreement.SWITCH, way)
    if way == "ring":
        with pytest.raises(ValueError, match=r"TP_ATTENTION_ALL_REDUCE=ring is none of auto, nccl, one_shot, two_shot"):
            agreement.wanted()
    else:
        assert agreement.wanted() == (way or "auto")


def test_obstacles():
    assert agreement._obstacle(["a", "a"], ["0, H of 4 SMs", "1, H of 4 SMs"]) == ""
    assert "differ: H of 4 SMs and H of 8" in agreement._obstacle(["a", "a"], ["0, H of 4 SMs", "1, H of 8 SMs"])
    assert "2 hosts" in agreement._obstacle(["a", "b", "a"], ["0", "1", "2"])
    assert "share a GPU" in agreement._obstacle(["a"] * 3, ["0", "1", "0"])
    assert agreement._obstacle(["a"] * 8, [*"01234567"]) == ""
    assert "9 ranks, more than 8" in agreement._obstacle(["a"] * 9, [*"012345678"])
    assert agreement._host() == agreement._host() != ""
    assert f"up to {ONE_SHOT_BYTES[4] >> 10} KiB" in agreement._table("auto", 4) and "up to" not in agreement._table(
        "auto", 2
    )
    assert agreement._table("two_shot", 4) == "two_shot because of TP_ATTENTION_ALL_REDUCE"


class Wrong(Inboxes):
    """wrong: what is off by one on this rank, "sent", "got" or "gathered"."""

    wrong = ""

    def two_shot(self, x, out, **keywords):
        super().two_shot(x + 1 if self.wrong == "sent" else x, out, **keywords)
        if self.wrong == "got":
            out[-1] += 1

    def gather(self, out, chunk, stride):
        super().gather(out, chunk, stride)
        if self.wrong == "gathered":
            out[-1, -1] += 1


def agree(world, ways, fault=None, on=-1):
    """What the group agrees on; its text if it is an error. fault: what happens on rank `on`."""
    group, rank, here = world.tp, world.rank, world.rank == on
    store = stores.private(group.process_group)
    allocations = []

    def reserved(device, way):
        allocations.append(way)
        if fault == "allocation" and here:
            raise RuntimeError("no room\nfor it")

    def mapped(mine, process_group, rank, size, way):
        memory = shared(1 << 14, process_group)
        if fault == "sharing" and here:
            raise RuntimeError("no peer\naccess")
        inboxes = Wrong(rank, memory, patience=-1)
        inboxes.wrong = fault if here else ""
        return SymmetricSums(inboxes, [], way)

    def integers(numel, generator):
        return torch.randint(-32, 33, (numel,), generator=generator).float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_gpu", lambda device: "same" if fault == "gpu" else f"GPU {rank}")
        patch.setattr(agreement, "_host", lambda: f"host {int(fault == 'host' and here)}")
        patch.setattr(agreement, "_reserved", reserved)
        patch.setattr(agreement, "_shared", mapped)
        patch.setattr(
            agreement, "_looks", lambda seconds: 400 if fault in ("got", "gathered", "left") else int(seconds * 3000)
        )
        patch.setattr(agreement, "TRIALS", (64, 1402, 1402, 6))
        patch.setattr(torch, "randn", integers)
        patch.setenv(agreement.SWITCH, ways[rank])
        if fault == "left" and here:
            return None
        start = time.monotonic()
        try:
            sums = agreement.agree(group.process_group, store, group.device, "tp", 1.0 if fault == "left" else 30.0)
        except (ValueError, RuntimeError, TimeoutError) as error:
            return type(error).__name__, str(error), len(allocations), time.monotonic() - start
    if sums is None:
        return None, "", len(allocations), time.monotonic() - start
    assert sums.inboxes.patience == 3000 * (30 + agreement.MARGIN) and sums.way == (ways[rank] or "auto")
    group.symmetric = sums
    total = all_reduce(torch.full((500,), rank + 1.0), group)
    group.symmetric = None
    assert torch.equal(total, torch.full((500,), world.size * (world.size + 1) / 2))
    assert_empty(sums.inboxes)
    return "sums", "", len(allocations), time.monotonic() - start


def test_agreement(world):
    run = world(3)
    for way in ("auto", "two_shot"):
        assert [outcome[:3] for outcome in run(agree, [way] * 3)] == [("sums", "", 1)] * 3


@pytest.mark.parametrize(
    ("fault", "on", "allocations", "reason"),
    [
        ("allocation", 1, 1, "rank 1: RuntimeError: no room for it"),
        ("sharing", 1, 1, "rank 1: RuntimeError: no peer access"),
        ("got", 2, 1, ""),
        ("sent", 0, 1, "rank 0: RuntimeError: two_shot of 64 values is wrong"),
        ("gathered", 2, 1, ""),
        ("gpu", -1, 0, "two ranks share a GPU"),
        ("host", 2, 0, "its ranks are on 2 hosts"),
    ],
)
def test_one_rank_cannot_and_so_none_does(world, fault, on, allocations, reason):
    run = world(3)
    assert [outcome[:3] for outcome in run(agree, ["auto"] * 3, fault, on)] == [(None, "", allocations)] * 3
    for name, text, *_ in run(agree, ["one_shot"] * 3, fault, on):
        assert name == "RuntimeError" and "TP_ATTENTION_ALL_REDUCE=one_shot cannot be in group tp: " in text
        assert "unset it to use NCCL" in text
        assert reason in text


def test_agreement_on_nccl_and_on_nothing(world):
    run = world(2)
    assert [outcome[:3] for outcome in run(agree, ["nccl"] * 2)] == [(None, "", 0)] * 2
    for name, text, allocations, seconds in run(agree, ["one_shot", "auto"]):
        assert (name, allocations) == ("ValueError", 0) and seconds < 5
        assert "the ranks of group tp have TP_ATTENTION_ALL_REDUCE=one_shot, auto; all must have the same" in text
    assert [outcome[0] for outcome in run(agree, ["", "auto"])] == ["sums"] * 2
    (name, text, allocations, _), _ = run(agree, ["auto"] * 2, "left", 1)
    assert (name, allocations) == ("TimeoutError", 0) and "ranks [1] of 2 did not come" in text


def end_with_its_agreement(world):
    """A group whose agreement fails is over, on the rank that raises and on those that meet it later."""
    group = world.tp

    def never(*_):
        raise TimeoutError("ranks [1] of 2 did not come")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "agree", never)
        with pytest.raises(CollectiveError, match=rf"rank {world.rank} of 2 of group tp .*did not come"):
            group._agree(dist.PrefixStore("symmetric", stores.private(group.process_group)))
    with pytest.raises(RuntimeError, match="destroyed"):
        all_reduce(torch.ones(1), group)


def fail_on_one_rank(world):
    """An error of any kind inside a collective ends the group: the ranks no longer agree which call is which."""
    group = world.tp
    group.symmetric = SymmetricSums(make_inboxes(1 << 14, group.process_group, patience=-200), [])
    x, weight = torch.ones(2, 8), torch.ones(16, 8)
    if world.rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sums_module, "partial_sums", fail)
            with pytest.raises(CollectiveError, match=r"linear_all_reduce of .* rank 0 of 2 .* no registers"):
                linear_all_reduce(x, weight, group)
        with pytest.raises(CollectiveError, match="failed earlier"):
            all_reduce(x, group)
    else:
        linear_all_reduce(x, weight, group)
        assert group.symmetric.inboxes.failed()  # on a GPU a trap


def fail(*args, **keywords):
    raise LookupError("no registers")  # a compiler's errors are of its own kinds


def test_an_error_on_one_rank_ends_the_group(world):
    world(2)(fail_on_one_rank)


def disagree_about_the_norm(world):
    """With a norm the many tokens go another way: without the comparison the ranks would mix their calls up."""
    group = world.tp
    group.symmetric = SymmetricSums(make_inboxes(1 << 14, group.process_group), [])
    norm = Norm("rmsnorm") if world.rank else None
    with pytest.raises(CollectiveError, match=r"ranks disagree: .*norm=None.*norm=rmsnorm"):
        linear_all_reduce(torch.ones(2, 8), torch.ones(16, 8), group, norm=norm)


def test_ranks_compare_norms(world, monkeypatch):
    monkeypatch.setenv("TP_ATTENTION_CHECK", "1")
    world(2)(disagree_about_the_norm)


def test_a_failed_agreement_ends_the_group(world):
    world(2)(end_with_its_agreement)


def test_memory_is_mapped_in_rank_order(monkeypatch):
    """torch's symmetric memory as far as it can be had without GPUs: what is asked of it, and what is made of that."""
    everyones = [torch.full((64,), rank, dtype=torch.uint8) for rank in range(3)]
    handle = SimpleNamespace(
        world_size=3, get_buffer=lambda rank, sizes, dtype: everyones[rank][: sizes[0]].view(dtype)
    )
    monkeypatch.setattr(symmetric_memory, "empty", torch.empty)
    monkeypatch.setattr(symmetric_memory, "rendezvous", lambda mine, group: (group == "name") and handle)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    mine = memory.reserve(64, torch.device("cpu"))
    assert mine.dtype == torch.uint8 and (mine == 255).all() and mine.shape == (64,)
    mapped, keep = memory.share(mine, SimpleNamespace(group_name="name"))
    assert [each[0].item() for each in mapped] == [0, 1, 2] and all(each.shape == (64,) for each in mapped)
    assert keep[0] is mine and keep[1] is handle
