"""The public functions as operators of torch.library, so that torch.compile and FakeTensor see through them.

`@traceable(fake)` makes torch.ops.tp_attention.<name> of a function. Called while being traced, the function calls its
operator, whose implementation is the function itself; an eager call pays one test for it (0.3 µs).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# An operator's argument types, by annotation. None in a window is -1, which means the same.
_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "bool": "bool",
    "int": "SymInt",
    "int | None": "SymInt?",
    "float": "float",
    "float | None": "float?",
    "str": "str",
    "str | None": "str?",
    "torch.dtype | None": "ScalarType?",
    "torch.dtype": "ScalarType",
    "Window | None": "SymInt[]?",
    "tuple[Tensor, Tensor] | None": "Tensor[]?",
}


def traceable(
    fake: Callable[..., list[Tensor]], *, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Make an operator of a function whose first argument is a Tensor and which returns one Tensor or a tuple of them.

    fake: called with the function's arguments by name, and returns empty contiguous outputs. mutates: the arguments
    that are written to; the function has a single output then. A keyword `out`, which the function writes and returns,
    is no argument of the operator: being traced, the result is copied to it.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name != "out"}
        names, defaults = list(parameters), {name: p.default for name, p in parameters.items()}
        windows = [name for name, p in parameters.items() if p.annotation == "Window | None"]
        types = {name: _TYPES[p.annotation] for name, p in parameters.items()}
        for name in mutates:
            types[name] = types[name].replace("Tensor", f"Tensor({name}!)")
        schema = ", ".join(f"{type_} {name}" for name, type_ in types.items())
        single = bool(mutates)  # torch takes no list from an operator that writes to its arguments

        def implementation(*values: Any) -> Any:
            keywords = dict(zip(names, values, strict=True))
            given = [keywords.pop(name) for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
            results: Any = function(*given, **keywords)  # type: ignore[arg-type]
            outputs = [
                x.clone() if any(x is value for value in values) else x.contiguous()  # an operator's are its own
                for x in (results if isinstance(results, tuple) else (results,))
            ]
            return outputs[0] if single else outputs

        def shapes(*values: Any) -> Any:
            results = fake(**dict(zip(names, values, strict=True)))
            return results[0] if single else results

        operator = torch.library.custom_op(
            f"tp_attention::{function.__name__}",
            implementation,
            mutates_args=mutates,
            schema=f"({schema}) -> Tensor{'' if single else '[]'}",
        )
        operator.register_fake(shapes)

        @functools.wraps(function)
        def wrapper(*args: Parameters.args, **keywords: Parameters.kwargs) -> Result:
            first = args[0] if args else keywords.get(names[0])
            if not torch.compiler.is_compiling() and type(first) is not FakeTensor:
                return function(*args, **keywords)
            values: dict[str, Any] = {**defaults, **dict(zip(names, args, strict=False)), **keywords}
            for name in windows:
                if (window := values[name]) is not None:
                    values[name] = [-1 if side is None else side for side in window]
            out = values.pop("out", None)
            results = operator(*values.values())
            if out is not None:
                return out.copy_(results[0])
            return results if single else results[0] if len(results) == 1 else tuple(results)  # type: ignore[return-value]

        return wrapper

    return decorate
