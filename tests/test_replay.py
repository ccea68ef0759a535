"""Launches made again: with a launcher of our own on the CPU, with the real ones on a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is built for Linux alone")

from triton.backends.nvidia import driver

from tp_attention import functional
from tp_attention.kernels import configs, plans, replay

GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Any:
    replay.forget()
    if not GPU:
        monkeypatch.setattr(replay, "_current_device", lambda: -1)  # the CPU's number
        monkeypatch.setattr(plans, "_stream", lambda device: 7)
    yield
    replay.forget()


def floats(argument: Any, count: int) -> Any:
    """Memory of a tensor, of an address or of what stands for a descriptor."""
    if isinstance(argument, tuple):
        argument = argument[1]
    address = argument if isinstance(argument, int) else argument.data_ptr()
    return (ctypes.c_float * count).from_address(address)


class Launcher:
    """As Triton's: out = factor · x + y, by an inner call. style: how that is reached and takes its arguments."""

    def __init__(self, style: str) -> None:
        def launcher(*args: Any) -> None:
            before, kernel = (args[:13], args[13:]) if style != "nested" else (args[:15], args[15])
            out, x = kernel[:-3] if style == "plain" else kernel[:-3:3]  # a map, a size and a stride each
            count, factor, y = kernel[-3:]
            assert before[3] == 7, "the stream of now"
            for i in range(count):
                floats(out, count)[i] = factor * floats(x, count)[i] + (0 if y is None else floats(y, count)[i])

        def wrapped(*args: Any) -> None:
            """Makes maps of descriptors."""
            args, kernel = (args[:13], args[13:]) if style == "wrapped" else (args[:-1], args[-1])
            expanded: list[Any] = []
            for value in kernel:
                expanded += driver.make_tensordesc_arg(value, "meta") if hasattr(value, "block_shape") else [value]
            launcher(*args, expanded) if style == "nested" else launcher(*args, *expanded)

        self.launch = launcher if style == "plain" else wrapped
        self.style = style

    def __call__(self, *args: Any) -> None:
        base = (*args[:5], False, False, None, None, *args[5:9])
        if self.style == "nested":
            self.launch(*base, "annotations", "signature", args[9:])
        else:
            self.launch(*base, *args[9:])


STYLES = ("plain", "wrapped", "nested")
calls: list[int] = []


def run(style: str, *values: Any) -> None:
    compiled = SimpleNamespace(run=LAUNCHERS[style], metadata=SimpleNamespace(tensordesc_meta=["meta"] * 2))
    watch = replay.watched()

    def call() -> None:
        compiled.run(1, 1, 1, 7, "function", "packed", None, None, None, *values)

    call() if watch is None else watch.launched(compiled, values, call)


LAUNCHERS = {style: Launcher(style) for style in STYLES}


def described(x: Tensor, style: str) -> Any:
    if style == "plain":
        return x
    return SimpleNamespace(base=x, shape=[x.numel()], strides=[1], padding="zero", block_shape=[4])


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []

    def make(value: Any, metadata: Any) -> list[Any]:
        assert metadata == "meta"
        made.append(value.base.data_ptr())
        return [("map", value.base.data_ptr()), *value.shape, *value.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", make)
    return made


def scaled(x: Tensor, *, y: Tensor | None = None, factor: float = 2.0, style: str = "plain") -> tuple[Tensor, Tensor]:
    """(factor · x + y, as a view [1, …] of it; factor · that)."""
    calls.append(1)
    first, second = torch.empty(x.shape), x.new_empty(x.shape)
    run(style, described(first, style), described(x, style), x.numel(), factor, y)
    run(style, described(second, style), described(first, style), x.numel(), factor, None)
    return first.view(1, *x.shape), second


def check(times: int, expected_calls: int, function: Any = scaled, **keywords: Any) -> None:
    calls.clear()
    for _ in range(times):
        x = torch.randn(6)
        first, second = replay.again(function, (x,), keywords)
        y = keywords.get("y")
        truth = keywords.get("factor", 2.0) * x + (0 if y is None else y)
        torch.testing.assert_close(first, truth[None])
        torch.testing.assert_close(second, keywords.get("factor", 2.0) * truth)
        assert first.shape == (1, 6) and first.data_ptr() != second.data_ptr()
    assert len(calls) == expected_calls


@pytest.mark.skipif(GPU, reason="a launcher that is none, in the GPU's place")
class TestMechanism:
    @pytest.mark.parametrize("style", STYLES)
    def test_the_third_call_is_launches_alone(self, style: str, maps: list[int]) -> None:
        check(6, 2, style=style)
        check(6, 2, style=style, y=torch.randn(6))
        check(6, 2, style=style, factor=3.0)

    def test_maps_are_made_once_an_address(self, maps: list[int]) -> None:
        x = torch.randn(6)
        for _ in range(3):
            kept = replay.again(scaled, (x,), {"style": "wrapped"})
        maps.clear()
        del kept
        for _ in range(20):
            replay.again(scaled, (x,), {"style": "wrapped"})
        assert len(maps) <= 4 * len(set(maps))  # four places take descriptors, each one an address

    def test_what_matters_is_told_apart(self) -> None:
        calls.clear()
        memory = torch.randn(40)
        variants = [memory[:6], memory[1:7], memory[:5], memory[:12].view(6, 2)[:, 0], memory[:6].requires_grad_()]
        for x in variants:
            with torch.no_grad():
                replay.again(scaled, (x,), {})
        replay.again(scaled, (memory.detach()[:6],), {"factor": 1})
        replay.again(scaled, (memory.detach()[:6],), {"factor": 1.0})
        replay.again(scaled, (memory.detach()[:6],), {"factor": True})
        assert len(calls) == len(variants) + 3  # each for the first time

    def test_views_of_arguments(self) -> None:
        def second_half(x: Tensor) -> Tensor:
            calls.append(1)
            out = torch.empty(4)
            run("plain", out[1:], x[3:], 3, 2.0, None)
            run("plain", out[:1], x[:1], 1, 5.0, None)
            return out[:4]

        calls.clear()
        for _ in range(5):
            x = torch.randn(6)
            torch.testing.assert_close(replay.again(second_half, (x,), {}), torch.cat((5 * x[:1], 2 * x[3:])))
        assert len(calls) == 2

    def test_results_that_share_memory(self) -> None:
        def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            out = torch.empty(6)
            run("plain", out, x, 6, 2.0, None)
            return out.view(2, 3), out[4:], x

        for _ in range(5):
            x = torch.randn(6)
            whole, end, same = replay.again(split, (x,), {})
            torch.testing.assert_close(whole, 2 * x.view(2, 3))
            torch.testing.assert_close(end, 2 * x[4:])
            assert same is x and end.data_ptr() == whole.data_ptr() + 16

    def test_anything_else_is_done_every_time(self) -> None:
        constant = torch.ones(6)
        for extra in (
            lambda x, out: out.add_(0),
            lambda x, out: x.clone(),
            lambda x, out: float(x[0]),
            lambda x, out: run("plain", out, constant, 6, 1.0, None),
            lambda x, out: run("plain", torch.empty_strided((2, 3), (1, 2)), x, 6, 1.0, None),
        ):

            def function(x: Tensor, extra: Any = extra) -> Tensor:
                calls.append(1)
                out = torch.empty(6)
                extra(x, out)
                run("plain", out, x, 6, 2.0, None)
                return out

            calls.clear()
            for _ in range(4):
                x = torch.randn(6)
                torch.testing.assert_close(replay.again(function, (x,), {}), 2 * x)
            assert len(calls) == 4

    def test_one_tensor_twice_is_not_kept(self) -> None:
        x = torch.randn(6)
        calls.clear()
        for _ in range(4):
            first, _ = replay.again(scaled, (x,), {"y": x})
            torch.testing.assert_close(first[0], 3 * x)
        assert len(calls) == 4

    def test_pauses_and_new_configurations(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check(3, 2)
        with replay.paused():
            check(2, 2)
        check(2, 0)
        monkeypatch.setattr(configs, "_autotuned", {})
        configs.remember("gemm", (90, "half"), object())
        check(3, 2)

    def test_tensors_of_another_gpu_are_not_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replay, "_current_device", lambda: 1)
        check(4, 4)
        assert not replay._plans

    def test_a_failure_leaves_nothing_behind(self) -> None:
        def fails(x: Tensor) -> Tensor:
            raise ValueError("no")

        for _ in range(4):
            with pytest.raises(ValueError, match="no"):
                replay.again(fails, (torch.randn(2),), {})
        check(4, 2)
        assert replay.watched() is None

    def test_no_more_is_kept_than_there_is_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replay, "MOST_PLANS", 3)
        for factor in range(9):
            check(3, 2, factor=float(factor))
        assert len(replay._plans) == 3


@pytest.mark.skipif(not GPU, reason="real launches need a GPU")
class TestOnGPU:
    @staticmethod
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float16)

    @pytest.mark.parametrize("tokens", (3, 200))
    def test_every_function(self, tokens: int) -> None:
        draw = self.draw

        def qkv() -> tuple[Tensor, ...]:
            return draw(2, tokens, 3 * 4 * 64).unflatten(2, (3, 4, 64)).unbind(2)

        weight, across, bias, gamma = draw(768, 256) / 16, draw(256, 768) / 16, draw(768), draw(256)
        cases = {
            "attention": lambda: (functional.attention, qkv(), {"causal": True}),
            "with lse": lambda: (functional.attention, qkv(), {"return_lse": True}),
            "masked": lambda: (functional.attention, qkv(), {"mask": torch.rand(2, tokens, device="cuda") > 0.2}),
            "softmax_context": lambda: (functional.softmax_context, qkv(), {}),
            "linear": lambda: (functional.linear, (draw(2, tokens, 256), weight, bias), {}),
            "transposed": lambda: (functional.linear, (draw(2, tokens, 256), across), {"transposed": True}),
            "norm": lambda: (functional.norm, (draw(2, tokens, 256), gamma), {}),
            "norm_qkv": lambda: (
                functional.norm_qkv, (draw(2, tokens, 256), weight, bias),
                {"norm": "layernorm", "norm_weight": gamma, "norm_bias": gamma, "return_normed": True},
            ),
        }  # fmt: skip
        kept = 0
        for name, make in cases.items():
            for turn in range(5):
                function, args, keywords = make()
                with torch.no_grad():
                    found = function(*args, **keywords)
                    with replay.paused():
                        expected = function(*args, **keywords)
                found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (name, turn)
            kept += isinstance(list(replay._plans.values())[-1], plans.Plan)
        assert kept >= len(cases) - 2  # those that need a copy or a count at zero are done every time

    def test_within_a_graph(self) -> None:
        x, weight = self.draw(4, 256), self.draw(512, 256)
        with torch.no_grad():
            for _ in range(3):
                functional.linear(x, weight)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = functional.linear(x, weight)
            x.normal_()
            graph.replay()
            with replay.paused():
                assert torch.equal(y, functional.linear(x, weight))
