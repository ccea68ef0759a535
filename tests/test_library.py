"""Every public function under torch.compile(fullgraph=True), on fake tensors, and as torch.library wants operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tp_attention import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def cu_seqlens() -> torch.Tensor:
    return torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)


def angles() -> tuple[torch.Tensor, torch.Tensor]:
    return random(1, 5, 8), random(1, 5, 8)


def lengths() -> torch.Tensor:
    return torch.tensor([7, 9], dtype=torch.int32, device=DEVICE)


# name -> positional arguments, keywords; each made afresh
CALLS: dict[str, tuple[Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "attention": (
        lambda: (random(2, 5, 4, 16), *(random(2, 7, 2, 16) for _ in "kv")),
        {"causal": True, "window": (3, None)},
    ),
    "attention, lse": (lambda: (random(2, 5, 4, 16), *(random(2, 7, 2, 16) for _ in "kv")), {"return_lse": True}),
    "attention_varlen": (
        lambda: (random(5, 4, 16), random(5, 2, 16), random(5, 2, 16), cu_seqlens(), cu_seqlens()),
        {"return_lse": True},
    ),
    "attention_decode": (
        lambda: (random(2, 1, 4, 16), random(2, 12, 2, 16), random(2, 12, 2, 16), lengths()),
        {"return_lse": True},
    ),
    "norm_qkv": (lambda: (random(2, 5, 32), random(64, 32)), {"norm": "rmsnorm", "return_normed": True}),
    "norm_qkv, rope": (
        lambda: (random(2, 5, 32), random(64, 32)),
        {"heads": 2, "kv_heads": 1, "qk_norm": "rmsnorm", "rope": angles},
    ),
    "linear": (lambda: (random(2, 5, 32), random(64, 32), random(64)), {}),
    "norm": (lambda: (random(2, 5, 32), random(32)), {"kind": "layernorm"}),
    "softmax_context": (lambda: (random(2, 5, 4, 16), *(random(2, 7, 2, 16) for _ in "kv")), {"causal": True}),
    "score_4d_matmul": (lambda: (random(2, 5, 4, 16), random(2, 7, 2, 16)), {"causal": True}),
    "softmax": (lambda: (random(2, 4, 5, 7),), {"window": (2, 2)}),
    "context_4d_matmul": (lambda: (random(2, 4, 5, 7), random(2, 7, 2, 16)), {}),
}


def call_of(name: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    arguments, keywords = CALLS[name]
    made = {key: value() if callable(value) else value for key, value in keywords.items()}
    return getattr(functional, name.split(",")[0]), arguments(), made


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> None:
    torch._dynamo.reset()  # torch counts the graphs of one piece of code, and stops at eight


@pytest.mark.parametrize("name", CALLS)
def test_compiled_results_are_the_eager_ones(name: str) -> None:
    function, arguments, keywords = call_of(name)

    @torch.compile(fullgraph=True)
    def compiled(*tensors: Any) -> Any:
        return function(tensors[0] * 1, *tensors[1:], **keywords)

    torch.testing.assert_close(compiled(*arguments), function(*arguments, **keywords))


@pytest.mark.parametrize("name", CALLS)
def test_fake_results_have_the_shapes_and_dtypes_of_real_ones(name: str) -> None:
    function, arguments, keywords = call_of(name)
    real = function(*arguments, **keywords)
    with FakeTensorMode() as mode:
        there = [mode.from_tensor(x) for x in arguments]
        faked = {
            key: tuple(map(mode.from_tensor, value)) if key == "rope" else value for key, value in keywords.items()
        }
        fake = function(*there, **faked)
    for a, b in zip(_all(fake), _all(real), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def test_compiled_append_writes_into_the_cache() -> None:
    q, k, v = random(2, 1, 4, 16), random(2, 1, 2, 16), random(2, 1, 2, 16)
    caches = [random(2, 12, 2, 16) for _ in "kv"]
    expected = [x.clone() for x in caches]
    rotated = functional.append_kv(q, k, v, *expected, lengths())
    compiled = torch.compile(lambda *tensors: functional.append_kv(*tensors), fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, *caches, lengths()), rotated)
    torch.testing.assert_close(caches, expected)


def test_one_graph_serves_every_length() -> None:
    compiled = torch.compile(lambda q, k: functional.attention(q, k, k, causal=True), fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (3, 8, 21):
            q, k = random(1, tokens, 2, 16), random(1, tokens + 4, 2, 16)
            torch.testing.assert_close(compiled(q, k), functional.attention(q, k, k, causal=True))


def _all(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
