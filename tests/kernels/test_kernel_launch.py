"""What launch() takes for the same kernel: never two calls that Triton would compile differently."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is built for Linux alone")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from tp_attention.kernels import launch as launching


class Metadata(NamedTuple):
    target: GPUTarget
    num_warps: int
    num_ctas: int
    shared: int


class Kernel:
    """Stands for a jit function: `size` may be anything, `count` is specialised on."""

    __name__ = "kernel"
    arg_names = ["x", "size", "count", "BLOCK", "FLAG"]  # noqa: RUF012  # as on a JITFunction

    def __init__(self) -> None:
        self.params = [SimpleNamespace(do_not_specialize=name == "size") for name in self.arg_names]
        self.compiled = 0
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*args: Any, **keywords: Any) -> Any:
            self.compiled += 1
            return SimpleNamespace(
                run=lambda *values: self.launched.append(values), function=None, packed_metadata=None,
                launch_metadata=lambda *_: None,
            )  # fmt: skip

        return compile_and_launch

    def warmup(self, *args: Any, grid: tuple[int, ...], **keywords: Any) -> Any:
        self.metadata = Metadata(
            target=GPUTarget("cuda", 90, 32), num_warps=keywords["num_warps"], num_ctas=1, shared=64
        )
        return SimpleNamespace(**vars(self[grid](*args, **keywords)), metadata=self.metadata)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    launching._specialised.cache_clear()
    return Kernel()


def call(
    kernel: Kernel,
    x: torch.Tensor,
    size: int = 5,
    count: int = 5,
    flag: Any = False,
    *,
    grid: tuple[int, ...] = (3, 2),
    cluster: int = 1,
    **options: Any,
) -> int:
    constexprs = {"BLOCK": 16, "FLAG": flag}
    launching._launch(kernel, grid, (x, size, count), constexprs, options or {"num_warps": 4}, cluster, 0)
    return kernel.compiled


def test_what_triton_tells_apart_is_compiled_apart(kernel: Kernel) -> None:
    x = torch.zeros(64)
    expected = 0
    for changed in (
        {"x": x},
        {"count": 1},  # equal to True, and Triton makes a constant of it
        {"count": 32},
        {"count": 2**31 + 1},
        {"count": 2**31 + 16},
        {"size": 2**31},
        {"x": x[1:]},  # no longer at 16 bytes
        {"x": x.half()},
        {"x": None},
        {"flag": True},
        {"num_warps": 8},
        {"grid": (4, 2), "cluster": 4},
        {"grid": (8, 2), "cluster": 8},
    ):
        expected += 1
        for _ in range(2):
            assert call(kernel, **({"x": x} | changed)) == expected, changed
    for same in ({"size": 1}, {"size": 16}, {"count": 7}, {"count": -3}, {"x": torch.zeros(3)}):
        assert call(kernel, **({"x": x} | same)) == expected, same


def test_the_second_launch_has_grid_stream_and_every_argument(kernel: Kernel) -> None:
    x = torch.zeros(4)
    call(kernel, x)
    call(kernel, x, size=9)
    (values,) = kernel.launched
    assert values[:4] == (3, 2, 1, 7)
    assert values[-5] is x and values[-4:] == (9, 5, 16, False)


def test_clusters_are_launched_from_the_first_time_on(kernel: Kernel) -> None:
    """Triton's launcher makes them of num_ctas, by which it multiplies the grid."""
    for _ in range(2):
        call(kernel, torch.zeros(4), grid=(8, 5), cluster=4)
    assert kernel.compiled == 1 and len(kernel.launched) == 2
    backend = make_backend(kernel.metadata.target)
    for values in kernel.launched:
        assert values[:3] == (2, 5, 1)
        assert values[5] == backend.pack_metadata(kernel.metadata._replace(num_ctas=4))
        assert values[5] != backend.pack_metadata(kernel.metadata)


def test_constants_out_of_order_are_refused(kernel: Kernel) -> None:
    with pytest.raises(TypeError, match="takes"):
        launching._launch(kernel, (1,), (torch.zeros(1), 1, 1), {"FLAG": True, "BLOCK": 16}, {}, 1, 0)


def test_an_empty_grid_launches_nothing(kernel: Kernel) -> None:
    launching.launch(kernel, (4, 0), torch.device("cpu"), (), {})
    assert kernel.compiled == 0


def test_a_grid_is_whole_clusters(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match="a grid of 6 programs is no whole number of clusters of 4"):
        launching.launch(kernel, (6, 2), torch.device("cpu"), (), {}, cluster=4)
    assert kernel.compiled == 0
