"""Which of the two paths a call takes: the Triton kernels or plain torch."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

log = logging.getLogger("tp_attention")

BACKENDS = ("auto", "triton", "torch")


@functools.cache
def choose_backend(requested: str, device: torch.device, obstacle: str | None = None) -> str:
    """ "triton" or "torch", saying once per reason in the log why it is not Triton.

    obstacle: why no kernel can do what is asked, or None. On a CPU only "triton" itself takes the kernels, in Triton's
    interpreter (TRITON_INTERPRET=1). Raises ValueError on an unknown name, RuntimeError where "triton" cannot run.
    """
    if requested == "torch":
        return "torch"
    if requested not in BACKENDS:
        raise ValueError(f"unknown backend {requested!r}; use one of {', '.join(BACKENDS)}")
    why = obstacle or _missing(requested, device)
    if why is None:
        return "triton"
    if requested == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {why}; use backend='auto' or 'torch'")
    log.info("torch path: %s", why)  # once: the answer is cached
    return "torch"


def _missing(requested: str, device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" or (requested == "triton" and _interpreted()):
        return None
    return f"the tensors are on {device.type}, not a GPU"


def _interpreted() -> bool:
    from tp_attention.kernels.configs import interpreted  # here: kernels import triton, which may be missing

    return interpreted()


def refuse_grad(**tensors: Tensor | None) -> None:
    """The kernels have no backward: raise RuntimeError for a tensor that requires grad while grad is enabled."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{name} requires grad and the Triton kernels are for inference; call under torch.no_grad() or "
                    "torch.inference_mode(), or pass backend='torch'"
                )
