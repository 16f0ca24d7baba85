"""Tokenizer of two billion characters."""

dataset = "fineweb-edu"
max_chars = 2_000_000_000
vocab_size = 65_536
