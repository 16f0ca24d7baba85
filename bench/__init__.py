"""Measurements: `pytest bench/` times every kernel against eager and compiled PyTorch and peers."""
