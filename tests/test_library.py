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


WRONG: dict[str, tuple[Callable[..., Any], tuple[int, ...], type[Exception], str]] = {
    "misspelt": (lambda x: functional.norm(x, None, epss=1.0), (2, 8), TypeError, "unexpected keyword.*epss"),
    "too many": (lambda x: functional.linear(x, x, None, True), (8, 8), TypeError, "positional argument"),
    "twice": (lambda x: functional.linear(x, x, weight=x), (8, 8), TypeError, "multiple values.*weight"),
    "missing": (lambda x: functional.linear(x), (8, 8), TypeError, "missing.*weight"),
    "linear": (lambda x: functional.linear(x, x[:, 1:]), (4, 8), ValueError, r"\[4, 8\] and weight \[4, 7\]"),
    "out of linear": (lambda x: functional.linear(x, x, out=x[:3]), (8, 8), ValueError, r"out is \[3, 8\].*\[8, 8\]"),
    "dtype of out": (lambda x: functional.linear(x, x, out=x.half()), (8, 8), ValueError, "out is torch.float16"),
    "norm": (lambda x: functional.norm(x, x[:, 0]), (2, 8), ValueError, r"\[2\]; expected \[8\]"),
    "norm_qkv": (lambda x: functional.norm_qkv(x, x, norm_weight=x[0]), (8, 8), ValueError, "need a norm"),
    "softmax_context": (
        lambda x: functional.softmax_context(x, x[:, :, :2], x),
        (1, 2, 3, 8),
        ValueError,
        "do not fit",
    ),
    "score_4d_matmul": (
        lambda x: functional.score_4d_matmul(x, x[:, :, :2]),
        (1, 2, 3, 8),
        ValueError,
        "3 query heads.*2 kv heads",
    ),
    "softmax": (lambda x: functional.softmax(x, sinks=x[0, 0, 0]), (1, 2, 3, 8), ValueError, r"\[8\]; expected.*\[2\]"),
    "out of softmax": (lambda x: functional.softmax(x, out=x[:, :1]), (1, 2, 3, 8), ValueError, r"\[1, 1, 3, 8\]"),
    "context_4d_matmul": (lambda x: functional.context_4d_matmul(x, x), (1, 2, 3, 8), ValueError, "do not fit"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_as_in_an_eager_call(name: str) -> None:
    function, shape, error, message = WRONG[name]
    x = random(*shape)
    with FakeTensorMode() as mode, pytest.raises(error, match=message):
        function(mode.from_tensor(x))
    for call in (function, torch.compile(function)):  # which leads back to an eager call
        with pytest.raises(error, match=message):
            call(x)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError):  # torch's own, around ours
        torch.compile(function, fullgraph=True)(x)


@pytest.mark.parametrize("name", CALLS)
def test_no_graph_of_tensors_that_require_grad(name: str) -> None:
    function, (first, *others), keywords = call_of(name)
    first.requires_grad_()
    with pytest.raises(RuntimeError, match=r"requires grad|Observed exception"):  # torch names ours or not
        torch.compile(lambda x: function(x, *others, **keywords), fullgraph=True)(first)
    with torch.no_grad():
        torch.compile(lambda x: function(x, *others, **keywords), fullgraph=True)(first)


def test_compiled_and_eager_gradients_of_the_torch_path() -> None:
    x, weight = random(2, 5, 32), random(64, 32).requires_grad_()
    gradients = []
    for call in (
        functional.linear,
        torch.compile(lambda *tensors, **keywords: functional.linear(*tensors, **keywords)),
    ):
        (gradient,) = torch.autograd.grad(call(x, weight, backend="torch").square().sum(), weight)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


def test_compiled_results_go_to_out_unrounded() -> None:
    scores, x, weight = random(2, 4, 5, 7).half(), random(3, 32), random(64, 32)
    probabilities, product = torch.zeros(2, 4, 5, 7, device=DEVICE), torch.zeros(3, 64, device=DEVICE)
    compiled = torch.compile(lambda *x: functional.softmax(x[0], out=x[1]), fullgraph=True)
    assert compiled(scores, probabilities) is probabilities
    torch.testing.assert_close(probabilities, functional.softmax(scores, dtype=torch.float32))
    torch.compile(lambda *x: functional.linear(*x[:2], out=x[2]), fullgraph=True)(x, weight, product)
    torch.testing.assert_close(product, functional.linear(x, weight))


def test_one_graph_serves_every_length() -> None:
    compiled = torch.compile(lambda q, k: functional.attention(q, k, k, causal=True), fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (3, 8, 21):
            q, k = random(1, tokens, 2, 16), random(1, tokens + 4, 2, 16)
            torch.testing.assert_close(compiled(q, k), functional.attention(q, k, k, causal=True))


def _all(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
