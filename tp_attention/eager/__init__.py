"""The torch path of every function in functional/, under the same names: no Triton, any device, differentiable.

It is what runs on a CPU, and on a GPU wherever no kernel applies. Arguments are not checked here.
"""

from tp_attention.eager.decode import append_kv, attention_decode
from tp_attention.eager.prefill import attention, attention_varlen
from tp_attention.eager.projections import linear, norm, norm_qkv
from tp_attention.eager.softmax_context import context_4d_matmul, score_4d_matmul, softmax, softmax_context

__all__ = [
    "append_kv",
    "attention",
    "attention_decode",
    "attention_varlen",
    "context_4d_matmul",
    "linear",
    "norm",
    "norm_qkv",
    "score_4d_matmul",
    "softmax",
    "softmax_context",
]
