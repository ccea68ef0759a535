"""Checkpoints: how each family packs its weights, and reading a rank's part of them."""
