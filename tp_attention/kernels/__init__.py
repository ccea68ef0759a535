"""Single-GPU Triton kernels and their launchers, one family per file.

Arguments are checked in functional/, not here.
"""
