"""The Hopper prefill kernel: emulated on a CPU, compiled and run on a Hopper GPU; and who takes what."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is built for Linux alone")

from tests.kernels import gluon_emulation
from tests.kernels.gluon_emulation import HARDWARE, Barrier, emulated
from tests.tolerances import TOLERANCE, error_of
from tp_attention import reference
from tp_attention.kernels import configs, flash_prefill
from tp_attention.kernels import flash_prefill_hopper as hopper
from tp_attention.kernels import flash_prefill_hopper_kernel as device_code

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if HOPPER else "cpu"
PROGRAMS = 3  # on the CPU: few enough that each goes through several tiles


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Hopper GPU every launch is emulated."""
    if not HOPPER:

        def emulate(kernel: Any, grid: tuple[int], device: Any, args: Any, constexprs: Any, **_: Any) -> None:
            emulated(kernel)(grid[0], args, constexprs)

        monkeypatch.setattr(hopper, "launch", emulate)
        monkeypatch.setattr(configs, "multiprocessors", lambda device: PROGRAMS)


def check(
    batch: int, heads: int, kv_heads: int, tokens: int, keys: int, head_dim: int, causal: bool,
    *, dtype: torch.dtype = torch.bfloat16, lengths: tuple[int, ...] = (), config: hopper.Config | None = None,
) -> None:  # fmt: skip
    """Out and lse are the reference's, for every sequence by itself."""
    q, k, v = (
        torch.randn(batch, n, h, head_dim, device=DEVICE).to(dtype)
        for n, h in ((tokens, heads), (keys, kv_heads), (keys, kv_heads))
    )
    for i, length in enumerate(lengths):  # whatever lies behind a sequence is not used
        k[i, length:], v[i, length:] = torch.nan, torch.nan
    out, lse = hopper.flash_attention_hopper(
        q, k, v, scale=head_dim**-0.5, causal=causal, group_size=heads // kv_heads, return_lse=True, config=config,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE) if lengths else None,
    )  # fmt: skip
    assert lse is not None
    for i in range(batch):
        length = lengths[i] if lengths else keys
        one = slice(i, i + 1)
        expected, expected_lse = reference.attention(q[one], k[one, :length], v[one, :length], causal=causal)
        assert error_of(out[one], expected) <= TOLERANCE[dtype]
        assert error_of(lse[one], expected_lse) <= TOLERANCE[torch.float32]


CONFIGS = [(key[1], config) for key, config in hopper.CONFIGS.items()]


@pytest.mark.parametrize("config", dict.fromkeys(hopper.CONFIGS.values()))
@pytest.mark.parametrize("mask", ("full", "diagonal", "edges"))
def test_every_configuration(config: hopper.Config, mask: str) -> None:
    """edges: the first consumer passes over blocks that the second needs, while it has a tile before to finish."""
    head_dim = next(key[1] for key, value in hopper.CONFIGS.items() if value == config)
    check(1, 4, 2, 300, 352 if mask == "edges" else 300, head_dim, mask != "full", config=config)


SHAPES = {
    "one block": (1, 2, 2, 64, 100, 64, False),
    "fewer queries than keys": (1, 1, 1, 150, 500, 64, True),
    "fewer queries than keys, D 256": (1, 2, 1, 130, 300, 256, True),
    "more queries than keys": (1, 2, 1, 300, 100, 128, True),
    "far fewer keys": (1, 1, 1, 700, 70, 64, True),
    "odd lengths": (1, 3, 1, 333, 333, 128, True),
    "a group in one tile": (2, 8, 2, 20, 300, 128, True),
    "a group in one tile, full": (1, 4, 1, 37, 200, 64, False),
    "9 heads over 3": (1, 9, 3, 140, 140, 64, True),
}

if HOPPER:  # too much for the emulation
    SHAPES |= {
        "many tiles a program": (2, 16, 4, 4096, 4096, 64, True),
        "many odd tiles": (2, 5, 5, 1537, 1537, 128, True),
        "many full tiles": (2, 16, 16, 2048, 2048, 128, False),
        "many causal tiles": (2, 16, 4, 2048, 2048, 128, True),
        "many causal tiles, D 256": (2, 8, 8, 2048, 2048, 256, True),
        "a part of a long cache": (1, 3, 3, 450, 5000, 64, True),
        "odd keys, D 256": (2, 6, 2, 130, 700, 256, True),
    }


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    check(*SHAPES[name])


@pytest.mark.parametrize("seed", range(20 if HOPPER else 6))
def test_any_shape(seed: int) -> None:
    """Every table entry, at odd lengths that nobody thought of."""
    draw = random.Random(seed)
    (_, head_dim, _), config = draw.choice([*hopper.CONFIGS.items()])
    groups, kv_heads = draw.choice((1, 2, 3, 4)), draw.choice((1, 2, 3))
    most = 3000 if HOPPER else 500
    tokens, keys = draw.randint(1, most), draw.randint(1, most)
    lengths = tuple(draw.randint(1, keys) for _ in range(2)) if draw.random() < 0.3 else ()
    check(
        2, groups * kv_heads, kv_heads, tokens, keys, head_dim, draw.random() < 0.8, lengths=lengths,
        config=config if lengths or draw.random() < 0.5 else None,
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("causal", (False, True))
def test_lengths(head_dim: int, causal: bool) -> None:
    check(3, 4, 2, 140, 260, head_dim, causal, lengths=(260, 133, 5))


def test_chosen_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "architecture", lambda device: 90)
    calls = []
    run = hopper.flash_attention_hopper
    monkeypatch.setattr(
        hopper, "flash_attention_hopper", lambda *args, **keywords: calls.append(1) or run(*args, **keywords)
    )
    q, k, v = (torch.randn(1, n, 2, 64, device=DEVICE).half() for n in (70, 300, 300))
    out, _ = flash_prefill.flash_attention(q, k, v, reach=(None, 0))
    assert calls
    assert error_of(out, reference.attention(q, k, v, causal=True)[0]) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("change", "why"),
    (
        ({"dtype": torch.float32}, "torch.float32"),
        ({"head_dim": 80}, "head_dim 80, not one of 64, 128, 256"),
        ({"features": ("a mask", "softcap")}, "a mask, softcap"),
        ({"reach": (5, 0)}, "a window"),
        ({"scale": -1.0}, "a scale that is not positive"),
        ({"tokens": 20}, "fewer than 64 queries or 256 keys"),
        ({"tokens": 21}, "fewer than 64 queries or 256 keys"),  # the same line: it is in the log already
        ({"keys": 255}, "fewer than 64 queries or 256 keys"),
        ({}, None),
    ),
)
def test_who_takes_what(change: dict[str, Any], why: str | None) -> None:
    call = {
        "dtype": torch.half,
        "head_dim": 64,
        "features": (),
        "reach": (None, 0),
        "scale": 0.1,
        "tokens": 70,
        "keys": 300,
        **change,
    }
    q, k = (
        torch.empty(1, call[n], 2, call["head_dim"], dtype=call["dtype"], device="meta") for n in ("tokens", "keys")
    )
    asked = {name: call[name] for name in ("scale", "reach", "features")}
    assert flash_prefill.hopper_obstacle(q, k, **asked) == why


THREE = hopper.Config(3, 128, 3, turns=False, ahead=True)  # consumers


class TestEmulation:
    """The protocol broken on purpose: the emulation must notice, or it proves nothing."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if HOPPER:
            pytest.skip("nothing is emulated on a Hopper GPU")
        monkeypatch.setattr(gluon_emulation, "PATIENCE", 2.0)

    def test_waits_that_do_not_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Barrier, "wait", lambda self, parity: None)
        with pytest.raises(RuntimeError, match=r"nothing was loaded to|was overwritten|more arrivals"):
            check(1, 2, 2, 300, 300, 64, False)

    def test_bytes_that_never_come(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Barrier, "complete", lambda self, nbytes: None)
        with pytest.raises(RuntimeError, match=r"deadlock|another partition failed"):
            check(1, 2, 2, 300, 300, 64, False)

    def test_a_buffer_freed_too_early(self, monkeypatch: pytest.MonkeyPatch) -> None:
        init, wait = Barrier.init, HARDWARE["warpgroup_mma_wait"]

        def slow(*args: Any, **keywords: Any) -> Any:
            if threading.current_thread().name == "partition 1":
                time.sleep(0.5)  # its operands are still needed, while its neighbour goes on
            return wait(*args, **keywords)

        monkeypatch.setattr(Barrier, "init", lambda self, count: init(self, 1))  # free once one consumer is done
        monkeypatch.setitem(HARDWARE, "warpgroup_mma_wait", slow)
        with pytest.raises(RuntimeError, match=r"was overwritten|nothing was loaded to|deadlock|another partition"):
            check(1, 1, 1, 576, 1000, 64, True, config=THREE)

    def test_blocks_passed_over_unwaited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def skip(ring: Any, step: int, count: int, *_: Any) -> int:
            for i in range(count):
                for free in (ring[3], ring[5]):
                    free.index((step + i) % len(free.barriers)).arrive(1)
            return step + count

        load = HARDWARE["tma"].async_copy_global_to_shared
        late: list[threading.Timer] = []

        def late_first(*args: Any) -> None:
            if late:
                load(*args)
            else:  # the block that the first consumer passes over
                late.append(threading.Timer(1.0, load, args))
                late[0].start()

        monkeypatch.setattr(device_code._skip, "fn", skip)
        monkeypatch.setattr(HARDWARE["tma"], "async_copy_global_to_shared", late_first)
        with pytest.raises(RuntimeError, match=r"nothing was loaded to|more arrivals"):
            check(1, 1, 1, 576, 1000, 64, True, config=THREE)
        late[0].join()  # no thread of torch may outlive the interpreter
