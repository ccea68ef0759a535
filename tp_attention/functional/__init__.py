"""Attention, norms and projections as functions on tensors: what ops.py and people who want one function call.

Each checks its arguments, picks a backend and says in the log why the faster one does not run. Nothing here knows of
ranks: head dimensions are those of the tensors given.

`backend`, the same everywhere: "auto" takes the fastest path that can do the job (Triton kernels on a GPU, torch
elsewhere), "torch" the torch path in eager/, and "triton" raises RuntimeError where no kernel can. Arguments that do
not fit raise ValueError before any work is done. Inference only: on the Triton path a tensor that requires grad under
enabled grad raises RuntimeError.
"""

from tp_attention.functional.backends import BACKENDS, choose_backend
from tp_attention.functional.decode import append_kv, attention_decode
from tp_attention.functional.prefill import attention, attention_varlen
from tp_attention.functional.projections import linear, norm, norm_qkv
from tp_attention.functional.softmax_context import context_4d_matmul, score_4d_matmul, softmax, softmax_context

__all__ = [
    "BACKENDS",
    "append_kv",
    "attention",
    "attention_decode",
    "attention_varlen",
    "choose_backend",
    "context_4d_matmul",
    "linear",
    "norm",
    "norm_qkv",
    "score_4d_matmul",
    "softmax",
    "softmax_context",
]
