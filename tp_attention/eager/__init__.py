"""The torch path of every function in functional/, under the same names: no Triton, any device, differentiable.

It is what runs on a CPU, and on a GPU wherever no kernel applies. Arguments are not checked here.
"""

from tp_attention.eager.prefill import attention, attention_varlen
from tp_attention.eager.projections import linear, norm, norm_qkv

__all__ = ["attention", "attention_varlen", "linear", "norm", "norm_qkv"]
