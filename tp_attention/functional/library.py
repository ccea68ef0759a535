"""The public functions as operators of torch.library, so that torch.compile and FakeTensor see through them.

`@traceable(fake)` makes torch.ops.tp_attention.<name> of a function. Called while being traced, the function calls its
operator, whose implementation is the function itself; an eager call pays one test for it (0.3 µs). An error ends the
trace: under fullgraph=True it is torch's, with the text of ours; otherwise the call runs eagerly and raises ours.

Operators have no backward. A tensor that requires grad is refused like an error: without fullgraph=True the call runs
eagerly, where the torch path has gradients.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tp_attention.functional.backends import refuse_grad

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


@functools.cache
def _again() -> Callable[..., Any]:
    """replay.again, or a plain call where Triton is missing."""
    try:
        from tp_attention.kernels.replay import again
    except ImportError:
        return lambda function, args, keywords: function(*args, **keywords)
    return again


def traceable(
    fake: Callable[..., list[Tensor]], *, check: Callable[..., Any] | None = None, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Make an operator of a function whose first argument is a Tensor and which returns one Tensor or a tuple of them.

    fake, check: called with the function's arguments by name. fake returns empty contiguous outputs, check raises what
    the function itself would. mutates: the arguments that are written to; the function has a single output then.
    A keyword `out`, which the function writes and returns, is no argument of the operator: being traced, a result, of
    its dtype where the function has a keyword for that, is copied to it.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        signature = inspect.signature(function).parameters
        defaults = {name: p.default for name, p in signature.items()}
        positional = [name for name, p in signature.items() if p.kind is not p.KEYWORD_ONLY]
        required = {name for name, p in signature.items() if p.default is p.empty}
        parameters = {name: p for name, p in signature.items() if name != "out"}
        names = list(parameters)
        windows = [name for name, p in parameters.items() if p.annotation == "Window | None"]
        types = {name: _TYPES[p.annotation] for name, p in parameters.items()}
        for name in mutates:
            types[name] = types[name].replace("Tensor", f"Tensor({name}!)")
        schema = ", ".join(f"{type_} {name}" for name, type_ in types.items())
        single = bool(mutates)  # torch takes no list from an operator that writes to its arguments

        def implementation(*values: Any) -> Any:
            keywords = dict(zip(names, values, strict=True))
            given = [keywords.pop(name) for name in positional]
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
            first: Any = args[0] if args else keywords.get(names[0])
            if not torch.compiler.is_compiling() and type(first) is not FakeTensor:
                if isinstance(first, Tensor) and first.is_cuda:
                    return _again()(function, args, keywords)
                return function(*args, **keywords)
            given = [*positional[: len(args)], *keywords]
            fits = len(args) <= len(positional) and len(given) == len(set(given))
            if not (fits and required <= set(given) <= set(defaults)):
                return function(*args, **keywords)  # Python says what is wrong
            values: dict[str, Any] = {**defaults, **dict(zip(positional, args, strict=False)), **keywords}
            if check is not None:
                check(**values)
            cos, sin = values.get("rope") or (None, None)
            refuse_grad(cos=cos, sin=sin, **{name: x for name, x in values.items() if isinstance(x, Tensor)})
            for name in windows:
                if (window := values[name]) is not None:
                    values[name] = [-1 if side is None else side for side in window]
            out = values.pop("out", None)
            if out is not None and "dtype" in values:
                values["dtype"] = out.dtype
            results = operator(*values.values())
            if out is not None:
                return out.copy_(results[0])
            return results if single else results[0] if len(results) == 1 else tuple(results)  # type: ignore[return-value]

        return wrapper

    return decorate
