"""Benchmarks: correctness asserted first, then our numbers and the peers' in the same run."""
