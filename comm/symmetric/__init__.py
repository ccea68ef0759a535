"""Sums over GPUs of one host through memory that all of them can write.

kernels.py how, cluster.py what a GPU's programs add up together, inbox.py the kernels' launches, sums.py which way for
which size, overlap.py a projection over its sum, memory.py where, agreement.py whether.
"""

AUTO, NCCL, ONE_SHOT, TWO_SHOT = WAYS = ("auto", "nccl", "one_shot", "two_shot")  # of summing; auto: by size
