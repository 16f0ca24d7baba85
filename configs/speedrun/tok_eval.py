"""Compression against gpt2 and cl100k_base."""

dataset = "fineweb-edu"
