"""Tensor-parallel attention: heads sharded over ranks, one all-reduce after the output projection."""
