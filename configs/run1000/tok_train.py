"""Tokenizer of four billion characters."""

dataset = "fineweb-edu"
max_chars = 4_000_000_000
vocab_size = 65_536
